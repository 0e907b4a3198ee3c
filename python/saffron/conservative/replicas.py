"""Replicas: controllers that began with equal counts become one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from saffron.conservative import storage
from saffron.conservative.arguments import listed, refused
from saffron.errors import ConfigError

if TYPE_CHECKING:
    from saffron.conservative.controller import StepMixController


def merge(replicas: Sequence[StepMixController]) -> StepMixController:
    """One controller from replicas that began with equal counts: their own counts add, the common ones count once.

    Give every replica a copy of it (`save`, `load`) to begin the next round: what it counted is then common. Of
    replicas with different numbers of alarms only those with the most count, since the others' counts are of the
    time before.

    Raises:
        ConfigError: there are none, or they differ in problem, settings or in what they began with.
    """
    replicas = listed("replicas", replicas, "a sequence of controllers")
    for replica in replicas:
        if not hasattr(replica, "own_counts"):
            raise refused("replicas", replica, "controllers")
    if not replicas:
        raise ConfigError("replicas: got none, expected at least one controller")
    first = replicas[0]
    for other in replicas[1:]:
        if not alike(first, other):
            raise ConfigError(
                "replicas: got controllers of other problems, settings or offline logs, expected equal ones"
            )
    check_apart(replicas)
    alarms = max(replica.alarms for replica in replicas)
    counted = [replica for replica in replicas if replica.alarms == alarms]
    weight = float(np.prod([replica._base_weight for replica in counted]))
    total = first._base.scaled(weight)
    for replica in counted:
        total = total + replica.own_counts()
    merged = type(first)(
        first.problem, confidence=first.confidence, method=first.method, replan=first.replan, drift=first.drift
    )
    merged._total, merged._base = total, total.copy()
    merged.episodes, merged.alarms = sum(replica.episodes for replica in replicas), alarms
    merged.plan()
    return merged


def check_apart(replicas: Sequence[Any]) -> None:
    """Raises `ConfigError` if one of them is there twice, or if counts of one file are in several of them."""
    if len(set(map(id, replicas))) < len(replicas):
        raise ConfigError("replicas: got one of them twice, whose counts would be added twice; expected each once")
    if storage.common([replica._lineage for replica in replicas]):
        raise ConfigError(
            "replicas: got some that go on from one file which had counted something, which would be added twice; "
            "expected copies of a file that nothing was counted in, as of a log or of `merge([one])` (those that "
            "save to one file need no merge)"
        )


def alike(one: StepMixController, other: StepMixController) -> bool:
    """Whether two controllers have equal problems and settings, and began with equal counts."""

    def settings(controller: StepMixController) -> tuple:
        problem = controller.problem
        scalars = (problem.bound, problem.objective_bound, problem.weights)
        return controller.confidence, controller.method, controller.replan, controller.drift, scalars

    def arrays(controller: StepMixController) -> list[np.ndarray]:
        problem = controller.problem
        known = (problem.baseline, problem.floor, problem.start, problem.reward, problem.objective)
        return [np.asarray(0.0 if array is None else array) for array in known] + list(controller._base.arrays())

    return settings(one) == settings(other) and all(
        a.shape == b.shape and np.array_equal(a, b) for a, b in zip(arrays(one), arrays(other), strict=True)
    )
