"""Searches that were run before, and which fixed width they show to be safe enough."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import betaincinv

from saffron.adaptive.settings import WidthSettings
from saffron.conservative import Counts
from saffron.conservative.arguments import flag, instance, listed, refused, whole
from saffron.errors import ConfigError


class LoggedSearch(NamedTuple):
    """One request of a log.

    Attributes:
        risk: as `AdaptiveWidth.begin` is told it.
        widths: of its phases, as long as it searched; each one of the settings' widths.
        scores: the best MRM score after each of them.
        safe: the guard's verdict of the answer.
        fixed: the width was chosen before the search, one for all phases, so that the request is evidence for it.
            Where a plan chose the widths, or they were drawn per phase, requests that happen to have one width
            throughout are no sample of the traffic: which ones they are depends on their scores and lengths.
    """

    risk: float
    widths: tuple[int, ...]
    scores: tuple[float, ...]
    safe: bool
    fixed: bool = True


@dataclass(frozen=True, slots=True)
class Qualified:
    """What a log says about a fixed width in a risk bin.

    Attributes:
        lower: exact lower bound of the share of safe answers. passes: it reaches the bin's floor.
    """

    bin: int
    width: int
    requests: int
    safe: int
    lower: float
    passes: bool


def _searches(log: Iterable[LoggedSearch]) -> list[LoggedSearch]:
    found = listed("log", log, "a sequence of LoggedSearch")
    for one in found:
        instance("log", one, LoggedSearch)
        if not all(isinstance(part, (tuple, list)) for part in one[1:3]):
            raise refused("log", one, "widths and scores that are tuples")
        for width in one.widths:
            whole("log.widths", width, 1)
        flag("log.safe", one.safe)
        flag("log.fixed", one.fixed)
    return found


def at_least(successes: int, trials: int, chance: float) -> float:
    """The lower end of the exact one-sided interval of a share (Clopper and Pearson 1934), wrong with `chance`."""
    return 0.0 if successes == 0 else float(betaincinv(successes, trials - successes + 1, chance))


def qualify(settings: WidthSettings, log: Iterable[LoggedSearch]) -> list[Qualified]:
    """The evidence for every width in every bin, from the requests whose width was fixed before their search.

    All bounds hold together with probability 1 - delta.
    """
    instance("settings", settings, WidthSettings)
    count: dict[tuple[int, int], list[int]] = {}
    for one in _searches(log):
        if one.fixed and len(set(one.widths)) == 1:
            count.setdefault((settings.bin(one.risk), one.widths[0]), []).append(bool(one.safe))
    chance = settings.confidence.delta / (settings.bins * len(settings.widths))
    found = []
    for risk_bin in range(settings.bins):
        for width in settings.widths:
            verdicts = count.get((risk_bin, width), [])
            lower = at_least(sum(verdicts), len(verdicts), chance)
            passes = bool(verdicts) and lower >= settings.floor(risk_bin)
            found.append(Qualified(risk_bin, width, len(verdicts), sum(verdicts), lower, passes))
    return found


def log_counts(settings: WidthSettings, log: Iterable[LoggedSearch], risk_bin: int) -> Counts:
    """Counts of the requests of one bin, whatever widths they were searched with.

    Raises:
        ConfigError: a width that the settings do not have, or not one score per width.
    """
    states, actions = [], []
    for one in _searches(log):
        if not (0 < len(one.widths) == len(one.scores) <= settings.phases and set(one.widths) <= set(settings.widths)):
            raise ConfigError(
                f"log: got widths {one.widths} and scores {one.scores}, expected one of {settings.widths} and a score "
                f"for each of at most {settings.phases} phases"
            )
        if settings.bin(one.risk) == risk_bin:
            path, chosen = settings.trajectory([settings.widths.index(w) for w in one.widths], one.scores, one.safe)
            states.append(path)
            actions.append(chosen)
    shape = (len(states), settings.phases + 1)
    return Counts.from_trajectories(
        np.array(states, dtype=np.intp).reshape(shape[0], shape[1] + 1),
        np.array(actions, dtype=np.intp).reshape(shape),
        num_states=settings.states,
        num_actions=len(settings.widths),
    )
