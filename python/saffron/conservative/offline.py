"""A baseline learned from trajectories of a policy that was run before: nothing is played until a bound allows it.

Li, Huang, Shen and Yang (arXiv 2306.06265) extend StepMix to a baseline that is learned from an offline data set;
that it exists is from the abstract, everything here is reconstructed. Both learned baselines depend on the data
that also bound them, so that their bounds use beta under the root (`Confidence.uniform`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from saffron.conservative.arguments import instance, one_of, real
from saffron.conservative.confidence import Confidence, widths
from saffron.conservative.counts import Counts
from saffron.conservative.evaluation import evaluate, signal
from saffron.conservative.learner import Problem
from saffron.conservative.mdp import one_hot
from saffron.errors import ConfigError, SaffronError

METHODS = ("clone", "pessimistic")


class NoSafePolicyError(SaffronError, ValueError):
    """No bound from the data reaches the floor: keep running the policy that the data are from, and collect more."""


@dataclass(frozen=True, slots=True, eq=False)
class LearnedBaseline:
    """A policy from data and what it is known to return.

    Attributes:
        policy: float64 [runs, steps, states, actions]. lower, upper: float64 [runs], bounds of its value.
    """

    method: str
    policy: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


def clone(counts: Counts) -> np.ndarray:
    """Behaviour cloning, N_h(s,a) / N_h(s); uniform where nobody was. [runs, steps, states, actions]."""
    visited = counts.visits.sum(-1, keepdims=True)
    uniform = 1.0 / counts.visits.shape[-1]
    return np.where(visited > 0, counts.visits / np.where(visited > 0, visited, 1.0), uniform)


def pessimistic_value_iteration(
    counts: Counts, reward: np.ndarray | None, confidence: Confidence, bound: float | None = None
) -> np.ndarray:
    """VI-LCB: greedy in QL_h = max(0, r + Phat L_{h+1} - width), the term (U - L) / H of the width left out.

    The variance is that of L. Ties go to the action that was tried more often, then to the lowest: where nothing is
    known all QL are 0. Certainty: reconstructed (in the manner of Rashidinejad et al. 2021).
    """
    runs, steps, states, actions = counts.visits.shape
    largest = steps if bound is None else bound
    found = widths(counts, confidence, 1, reward is None)
    what = signal(found, reward, largest)
    caps = np.minimum(np.arange(steps, -1, -1.0), largest)
    after = np.zeros((runs, states))
    chosen = np.empty((runs, steps, states), dtype=np.intp)
    for h in reversed(range(steps)):
        range_after = caps[h + 1] if confidence.value_range == "remaining" else largest
        columns = np.stack([after, after * after], 1)[..., None]
        kernel = counts.transitions[:, h].reshape(runs, 1, states * actions, states)
        mean, square = ((kernel @ columns)[..., 0] * found.inverse[:, h]).swapaxes(0, 1)
        width = np.sqrt(np.maximum(square - mean * mean, 0.0) * found.root[:, h]) + found.linear[:, h] * range_after
        q = what.reward[:, 0, h] + mean - width
        if what.width is not None:
            q -= what.width[:, 0, h]
        q = np.maximum(q, 0.0).reshape(runs, states, actions)
        visits = counts.visits[:, h]
        best = q == q.max(-1, keepdims=True)
        chosen[:, h] = np.where(best, visits, -1.0).argmax(-1)
        after = np.take_along_axis(q, chosen[:, h][..., None], -1)[..., 0]
    return one_hot(chosen, actions)


def learn_baseline(
    counts: Counts,
    method: str,
    *,
    reward: np.ndarray | None = None,
    start: np.ndarray | int = 0,
    bound: float | None = None,
    confidence: Confidence | None = None,
) -> LearnedBaseline:
    """A baseline from offline counts, with bounds of its value.

    Args:
        counts: of the logged episodes. method: "clone" or "pessimistic". The rest: as of `Problem`.

    Raises:
        ConfigError: another method, or shapes that do not fit.
    """
    instance("counts", counts, Counts)
    one_of("method", method, METHODS)
    instance("confidence", confidence, Confidence, or_none=True)
    confidence = replace(confidence or Confidence(), uniform=True)
    # First with any policy, which checks the rest.
    checked = Problem(clone(counts), np.zeros(counts.runs), reward, start=start, bound=bound)  # type: ignore[arg-type]
    known, bound = checked.reward, checked.bound
    policy = clone(counts) if method == "clone" else pessimistic_value_iteration(counts, known, confidence, bound)
    problem = Problem(policy, np.zeros(1), known, start=start, bound=bound)  # type: ignore[arg-type]
    found = widths(counts, confidence, 1, known is None)
    what = signal(found, problem.reward, problem.shape[1] if bound is None else bound)
    lower, upper = evaluate(counts, found, confidence, what, problem.start, policy)
    return LearnedBaseline(method, policy, lower, upper)


def offline_problem(
    counts: Counts,
    floor: float,
    *,
    reward: np.ndarray | None = None,
    start: np.ndarray | int = 0,
    bound: float | None = None,
    confidence: Confidence | None = None,
) -> tuple[Problem, LearnedBaseline]:
    """A problem whose baseline comes from the data: the pessimistic one if its bound reaches the floor, else the clone.

    Learn on from `counts`, with `uniform=True` in the learner's confidence: the floor then holds from the first
    episode.

    Raises:
        NoSafePolicyError: neither bound reaches the floor. Says how far they are.
    """
    instance("counts", counts, Counts)
    floor = real("floor", floor, "a finite number")
    if counts.runs != 1:
        raise ConfigError(f"counts: got {counts.runs} runs, expected 1")
    tried = []
    for method in reversed(METHODS):
        learned = learn_baseline(counts, method, reward=reward, start=start, bound=bound, confidence=confidence)
        if learned.lower[0] >= floor:
            problem = Problem(learned.policy, np.array([floor]), reward, start=start, bound=bound)  # type: ignore[arg-type]
            return problem, learned
        tried.append(f"{method}: at least {learned.lower[0]:.4f}")
    raise NoSafePolicyError(
        f"no policy learned from these data is known to return {floor:.4f} ({'; '.join(tried)}): keep running the "
        "policy that they are from until there are more"
    )
