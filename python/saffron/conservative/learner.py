"""The one interface of all algorithms: `Problem` says what a learner is told, `Learner.plan` maps counts to a
`Plan`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from saffron.conservative.arguments import floats, instance, listed, refused, whole, within
from saffron.conservative.confidence import Confidence, Widths, widths
from saffron.conservative.counts import Counts
from saffron.conservative.evaluation import Signal, signal
from saffron.conservative.mdp import check_probabilities, check_unit
from saffron.errors import ConfigError

# Safety weights of the optimistic policies if there are two signals (certainty: reconstructed; 7.2 iii of our design).
WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 40.0)


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """What is known before learning. A leading axis of runs may be left out of any array; it is added.

    Attributes:
        baseline: float64 [runs, steps, states, actions], the trusted policy pi^b.
        floor: float64 [runs], gamma: no policy that is played may have a smaller expected return.
        reward: float64 [runs, steps, states, actions] in [0, 1], the known reward that the floor is on (with two
            signals: the safety); None: it is estimated from what is observed.
        objective: of the same shape, a known second signal that is maximised while the floor is on `reward`; None: the
            reward itself is maximised.
        start: float64 [runs, states], the known law of the first state; or an int, the first state.
        bound: G, the largest return of `reward` from anywhere, in (0, steps]; None: steps, as in the paper.
        objective_bound: the same of `objective`.
        weights: of the safety in the optimistic policies if there is an objective.
    """

    baseline: np.ndarray
    floor: np.ndarray
    reward: np.ndarray | None = None
    objective: np.ndarray | None = None
    start: np.ndarray = 0  # type: ignore[assignment]
    bound: float | None = None
    objective_bound: float | None = None
    weights: tuple[float, ...] = WEIGHTS

    def __post_init__(self) -> None:
        baseline = _with_runs("baseline", self.baseline, 4)
        _set(self, "baseline", baseline)
        check_probabilities("baseline", baseline)
        runs, steps, states, _ = baseline.shape
        for name in ("reward", "objective"):
            if getattr(self, name) is not None:
                array = _with_runs(name, getattr(self, name), 4)
                if array.shape[1:] != baseline.shape[1:] or array.shape[0] not in (1, runs):
                    raise ConfigError(f"{name}: got shape {array.shape}, expected {baseline.shape} like baseline")
                check_unit(name, array)
                _set(self, name, array)
        allowed = f"a state from 0 to {states - 1} or a law of states"
        start = floats("start", self.start, allowed)
        if start.ndim == 0:
            first = whole("start", self.start, 0, states - 1, "a law of states or a state")
            start = (np.arange(states) == first).astype(np.float64)
        start = np.broadcast_to(np.atleast_2d(start), (runs, states)) if start.shape[-1] == states else start
        if start.shape != (runs, states):
            raise ConfigError(f"start: got shape {start.shape}, expected {(runs, states)}")
        check_probabilities("start", start)
        _set(self, "start", start.astype(np.float64))
        floor = floats("floor", self.floor, f"a finite number, or one for each of {runs} runs")
        if np.asarray(self.floor).dtype.kind == "b" or not (
            floor.shape in ((), (1,), (runs,)) and np.isfinite(floor).all()
        ):
            raise refused("floor", self.floor, f"a finite number, or one for each of {runs} runs")
        _set(self, "floor", np.broadcast_to(floor, (runs,)).copy())
        for name, signal_ in (("bound", self.reward), ("objective_bound", self.objective)):
            bound, least = getattr(self, name), 0.0 if signal_ is None else float(np.max(signal_))
            if bound is not None:
                allowed = (
                    f"a number above 0, at most {steps}, the steps, and at least {least}, the largest reward, or None"
                )
                _set(self, name, within(name, bound, allowed, max(least, 0.0), steps, open_low=not least))
        _set(self, "weights", safety_weights(self.weights))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """runs, steps, states, actions."""
        return self.baseline.shape

    def of(self, runs: np.ndarray) -> Problem:
        """The problem of some runs."""

        def part(array: np.ndarray | None) -> np.ndarray | None:
            return array if array is None or array.shape[0] == 1 else array[runs]

        return Problem(
            self.baseline[runs], self.floor[runs], part(self.reward), part(self.objective), self.start[runs],
            self.bound, self.objective_bound, self.weights,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The policy of the next episodes: a coin that falls once an episode between two Markov policies. Never changed.

    A coin at the start of an episode and one at the step where the two differ give every trajectory the same
    probability (elementary).

    Attributes:
        first, second: float64 [runs, steps, states, actions].
        weight: float64 [runs], the probability of `second` (rho of StepMix, eps of EpsMix), in [0, 1].
        lower, upper: float64 [runs, candidates], bounds of the value of each candidate, as the algorithm orders them.
        h0, h0_second: int [runs]: up to this step `first` and `second` play the baseline; steps: always. -1: not of
            that form.
        safe: bool [runs]: a bound says that the floor holds; otherwise the baseline is played, which is trusted.
    """

    first: np.ndarray
    second: np.ndarray
    weight: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    h0: np.ndarray
    h0_second: np.ndarray
    safe: np.ndarray

    def markov(self) -> np.ndarray:
        """One Markov policy [runs, steps, states, actions] of the same value, if `first` and `second` differ in one
        step."""
        weight = self.weight[:, None, None, None]
        return (1 - weight) * self.first + weight * self.second


class Learner(ABC):
    """Plans from counts. A pure function of them: equal counts, equal plan.

    Args:
        problem: what is known. confidence: how wide intervals are. The union of all learners is over H + 1 comparators
            where StepMix needs it, so that they differ in their rule alone.
    """

    name: ClassVar[str]
    two_signals: ClassVar[bool] = False  # whether an objective besides the floor's reward is supported

    def __init__(self, problem: Problem, confidence: Confidence | None = None) -> None:
        instance("problem", problem, Problem)
        instance("confidence", confidence, Confidence, or_none=True)
        if problem.objective is not None and not self.two_signals:
            raise ConfigError(f"objective: {self.name} maximises the reward that the floor is on; expected None")
        self.problem = problem
        self.confidence = confidence or Confidence()

    @abstractmethod
    def plan(self, counts: Counts) -> Plan:
        """The plan for the episodes after those that were counted. counts: of as many runs as the problem."""

    def of(self, runs: np.ndarray) -> Learner:
        """The learner of some runs."""
        return type(self)(self.problem.of(runs), self.confidence)

    def widths(self, counts: Counts, confidence: Confidence) -> Widths:
        """Raises `ConfigError` if the counts are not of the problem's shape."""
        instance("counts", counts, Counts)
        if counts.visits.shape != self.problem.shape:
            raise ConfigError(f"counts: got shape {counts.visits.shape}, expected {self.problem.shape}")
        comparators = 1 if confidence.uniform else self.problem.shape[1] + 1
        return widths(counts, confidence, comparators, self.problem.reward is None)

    def reward(self, found: Widths) -> Signal:
        bound = self.problem.bound
        return signal(found, self.problem.reward, self.problem.shape[1] if bound is None else bound)


def safety_weights(given: object) -> tuple[float, ...]:
    """Of the optimistic policies, checked."""
    allowed = "one finite number of at least 0 or more"
    weights = tuple(within("weights", w, allowed, 0, np.inf) for w in listed("weights", given, allowed))
    if not weights:
        raise refused("weights", given, allowed)
    return weights


def _with_runs(name: str, given: np.ndarray, dimensions: int) -> np.ndarray:
    array = floats(name, given)
    if np.may_share_memory(array, given):  # what the caller writes there later is no change of the problem
        array = array.copy()
    if array.ndim == dimensions - 1:
        array = array[None]
    if array.ndim != dimensions or not array.size:
        raise ConfigError(f"{name}: got shape {array.shape}, expected [steps, states, actions] or runs of that")
    return array


def _set(frozen: object, name: str, value: object) -> None:
    object.__setattr__(frozen, name, value)
