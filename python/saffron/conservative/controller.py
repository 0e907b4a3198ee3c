"""StepMix for a running system: episodes are begun and reported from any thread, plans are made on the way."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saffron.conservative import arguments, storage
from saffron.conservative.arguments import flag, index, instance, listed, one_of, refused, reward, whole, within
from saffron.conservative.confidence import Confidence
from saffron.conservative.constant import ConstantBaseline
from saffron.conservative.counts import Counts
from saffron.conservative.drift import Cusum, Drift
from saffron.conservative.episode import Episode, Snapshot, policy_rows
from saffron.conservative.epsmix import EpsMix
from saffron.conservative.learner import Learner, Plan, Problem
from saffron.conservative.replicas import alike
from saffron.conservative.simulate import checked_replan
from saffron.conservative.stepmix import StepMix
from saffron.errors import CheckpointError, ConfigError, shown

METHODS: dict[str, type[Learner]] = {learner.name: learner for learner in (StepMix, EpsMix, ConstantBaseline)}
DECAYED = 0.9  # of the counts a plan was made from: a new plan is due when they have decayed to this share
Transition = Sequence[Any]  # (state, action, next state), and the reward in [0, 1] if it is not known
_COUNTS = ("transitions", "visits", "rewards", "squares")


class Synced(NamedTuple):
    """What a file held at the last load or save: counts, what they weigh in today's, and reported episodes."""

    counts: Counts
    weight: float
    episodes: int


class StepMixController:
    """Chooses actions so that the expected return of every episode stays above a floor, while it learns.

    Guaranteed at scale 1, with probability 1 - delta, for all episodes together: the expected return of the policy
    that is played is at least the floor, if the baseline's is, if episodes come from one MDP that does not change,
    and if every begun episode is reported or left out for reasons that have nothing to do with how it went. Not
    guaranteed: any single episode's return; anything while the traffic changes (see `Drift`); anything at a smaller
        scale.

    Example:
        Two actions, of which the first is trusted; a floor under the success rate.

        >>> import random
        >>> from saffron.conservative import Problem, StepMixController
        >>> chance, world = [0.90, 0.97], random.Random(0)  # unknown to the controller
        >>> control = StepMixController(Problem(baseline=[[[1.0, 0.0]]], floor=0.85))
        >>> for _ in range(20_000):
        ...     action = control.begin().act(state=0)
        ...     success = world.random() < chance[action]
        ...     control.update([(0, action, 0, success)])
        >>> int(control.plan().h0[0])  # the first action is played at no step any more
        0

    Args:
        problem: of one run: baseline, floor, what is known of rewards. If its reward is None, `update` is told rewards.
        confidence: of the bounds.
        method: "stepmix", "epsmix" or "baseline".
        replan: "doubling" (as soon as any count has doubled) or a number of episodes.
        offline: counts of a log. What they say of the baseline has to reach the floor.
        trusted: the baseline is known to reach the floor on other grounds, whatever `offline` says.
        drift: measures against traffic that changes.
        seed: of the random numbers that choose policies and actions.

    Raises:
        ConfigError: an argument is not allowed; or the baseline's lower bound on `offline` is below the floor.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        confidence: Confidence | None = None,
        method: str = "stepmix",
        replan: str | int = "doubling",
        offline: Counts | None = None,
        trusted: bool = False,
        drift: Drift | None = None,
        seed: int = 0,
    ) -> None:
        instance("problem", problem, Problem)
        for name, given, kind in (
            ("confidence", confidence, Confidence), ("offline", offline, Counts), ("drift", drift, Drift)
        ):  # fmt: skip
            instance(name, given, kind, or_none=True)
        trusted, seed = flag("trusted", trusted), whole("seed", seed, 0)
        if problem.shape[0] != 1:
            raise ConfigError(f"problem: got {problem.shape[0]} runs, expected 1")
        one_of("method", method, METHODS)
        _, self.horizon, self.states, self.actions = problem.shape
        self.problem, self.drift, self.method = problem, drift or Drift(), method
        self.confidence = confidence or Confidence()
        self._every = checked_replan(replan)
        self.replan = "doubling" if self._every is None else self._every
        self._learner = METHODS[method](problem, self.confidence)
        nothing = Counts.zeros(*problem.shape)
        if offline is not None:
            offline.check(problem.shape)
        if offline is not None and not trusted and (bound := baseline_bound(problem, offline, confidence)) < self.floor:
            raise ConfigError(
                f"floor: got {self.floor}, but `offline` only shows that the baseline returns {bound:.6g}; "
                "expected at most that, or more data"
            )
        self._bound = self.horizon if problem.bound is None else problem.bound
        self._cusum: Cusum | None = None
        if self.drift.alarm_shift is not None:
            self._cusum = Cusum(1 - self.floor / self._bound, self.drift.alarm_shift, self.drift.alarm_run_length)
        self._rng = np.random.default_rng(seed)
        self._lock, self._planning = threading.Lock(), threading.Lock()
        self._base = nothing if offline is None else offline.copy()
        self._total, self._base_weight = self._base.copy(), 1.0
        self._lineage = storage.Lineage()
        self._synced = self._before = Synced(self._total.copy(), 1.0, 0)
        self.episodes, self.alarms = 0, 0  # reported episodes; alarms since the beginning
        self._elapsed, self._since, self._plans, self._warned, self._due = 0, 0, 0, False, True
        self._trusted = ConstantBaseline(problem, self.confidence).plan(nothing)
        self._baseline_rows = policy_rows(problem.baseline)
        self._snapshot = Snapshot.of(0, self._trusted)
        self._needed = np.ones(nothing.visits.size).tolist()
        self.plan()

    @property
    def floor(self) -> float:
        return float(self.problem.floor[0])

    @property
    def current(self) -> Plan:
        """The plan that episodes begin with."""
        return self._snapshot.plan

    def begin(self, start_state: int | None = None, rng: np.random.Generator | None = None) -> Episode:
        """Begins an episode: takes the current plan and draws its policy. Waits for no update and no planning.

        start_state: checked if given. rng: random numbers of the caller's instead of the controller's own.

        Raises:
            ConfigError: an episode cannot start in this state.
        """
        if start_state is not None:
            what = "a state with a probability in `start`,"
            start_state = whole("start_state", start_state, 0, self.states - 1, what)
            if not self.problem.start[0, start_state] > 0:
                raise refused("start_state", start_state, what[:-1])
        if rng is not None:
            instance("rng", rng, np.random.Generator)
        share, *uniform = (rng or self._rng).random(self.horizon + 2).tolist()
        snapshot = self._snapshot
        if share < self.drift.baseline_share:
            return Episode(snapshot.number, self.horizon, 0.0, self._baseline_rows, uniform[1:])
        return snapshot.begin(uniform)

    def update(self, trajectory: Iterable[Transition]) -> None:
        """Counts one episode: `horizon` transitions (state, action, next state), with the reward if it is not known.

        An episode that ends early goes on in an absorbing state. If a new plan is due and no other thread is making it,
        it is made here.

        Raises:
            ConfigError: these are no transitions of one episode; nothing is counted then.
        """
        cells, afters, rewards = self._checked(listed("trajectory", trajectory, f"{self.horizon} transitions"))
        with self._lock:
            total = self._total
            transitions, visits = total.transitions.reshape(-1), total.visits.reshape(-1)
            for cell, after in zip(cells, afters, strict=True):
                transitions[cell * self.states + after] += 1
                visits[cell] = n = visits[cell] + 1
                if n >= self._needed[cell] and self._every is None:
                    self._due = True
            if self.problem.reward is None:
                sums, squares = total.rewards.reshape(-1), total.squares.reshape(-1)
                for cell, reward in zip(cells, rewards, strict=True):
                    sums[cell] += reward
                    squares[cell] += reward * reward
            self.episodes += 1
            self._elapsed += 1
            self._since += 1
            if self._since == self._every or self.drift.weight_after(self._elapsed) < DECAYED:
                self._due = True
            if self._cusum is not None and self._cusum.add(max(0.0, 1 - sum(rewards) / self._bound)):
                self._forget()
        if self._due:
            self._plan_if_due()

    def plan(self) -> Plan:
        """Makes a plan from the counts as they are and returns it; equal counts, equal plan."""
        with self._planning:
            self._make_plan()
            return self._snapshot.plan

    def counts(self) -> Counts:
        """A copy of what was counted, the offline log included."""
        with self._lock:
            return self._total.copy()

    def own_counts(self) -> Counts:
        """A copy of what was counted since this controller was made or merged."""
        with self._lock:
            return self._total + self._base.scaled(-self._base_weight)

    def save(self, path: str | Path) -> None:
        """Writes everything to one .npz file, atomically: after a crash there is the old file or the new one.

        Several processes may load one file and save to it. If others saved there meanwhile, what was counted here since
        the last load or save is added to what they counted, in the file and in this controller.

        Raises:
            CheckpointError: the file holds a later state that does not go on from this one's.
        """
        self._lineage.save(arguments.path(path), self)

    def _saved(self) -> tuple[dict[str, Any], dict[str, np.ndarray], bool]:
        settings, arrays = self.state(sync=True)
        return settings, arrays, bool(self.own_counts().visits.any())

    def _unsaved(self) -> None:
        with self._lock:
            self._synced = self._before._replace(weight=self._before.weight * self._synced.weight)

    def _joined(self, settings: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self.join(StepMixController.from_state(settings, arrays))

    def join(self, other: StepMixController) -> None:
        """Adds what was counted here since the last load or save to what `other`, loaded from the file, holds.

        Raises:
            CheckpointError: they did not begin with the same counts.
        """
        instance("other", other, StepMixController)
        if not alike(self, other):
            raise CheckpointError("state: got a controller of another problem, settings or log, expected an equal one")
        with self._lock:
            synced, theirs, weight = self._synced, other._total, 1.0
            if other.alarms > self.alarms:  # what was counted here is of the time before
                self._total, self._base_weight, self.alarms = theirs, other._base_weight, other.alarms
            elif other.alarms == self.alarms:
                weight = synced.weight or 1.0  # 0: an alarm here and one there
                own = self._total + synced.counts.scaled(-synced.weight)
                self._total, self._base_weight = theirs.scaled(weight) + own, other._base_weight * weight
            self.episodes += other.episodes - synced.episodes
            self._synced = Synced(theirs.copy(), weight if other.alarms >= self.alarms else 0.0, other.episodes)
        self.plan()

    @classmethod
    def load(cls, path: str | Path) -> StepMixController:
        """A controller as it was saved, its random numbers included.

        Raises:
            CheckpointError: the file is missing, damaged or of another version.
        """
        settings, arrays = storage.read(arguments.path(path))
        try:
            found = cls.from_state(settings, arrays)
            found._lineage = storage.Lineage.of(settings)
            return found
        except (KeyError, OverflowError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: not a controller's state ({error})") from error

    def state(self, *, sync: bool = False) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Everything it is, as of one moment: settings that JSON can hold, and arrays. sync: it is what a file now
        holds, from which `join` goes on."""
        with self._lock:
            settings = {
                "method": self.method, "replan": self.replan, "confidence": asdict(self.confidence),
                "drift": asdict(self.drift), "bounds": [self.problem.bound, self.problem.objective_bound],
                "weights": self.problem.weights, "episodes": self.episodes, "alarms": self.alarms,
                "elapsed": self._elapsed, "base_weight": self._base_weight, "random": self._rng.bit_generator.state,
                "level": None if self._cusum is None else self._cusum.level,
            }  # fmt: skip
            total = self._total.copy()
            if sync:
                self._before, self._synced = self._synced, Synced(total, 1.0, self.episodes)
        arrays = dict(zip(_COUNTS, total.arrays(), strict=True))
        arrays |= {f"base_{name}": array for name, array in zip(_COUNTS, self._base.arrays(), strict=True)}
        known = {name: getattr(self.problem, name) for name in ("baseline", "floor", "start", "reward", "objective")}
        return settings, arrays | {name: array for name, array in known.items() if array is not None}

    @classmethod
    def from_state(cls, settings: dict[str, Any], arrays: dict[str, np.ndarray]) -> StepMixController:
        """The controller of `state`. Raises `KeyError`, `TypeError` or `ValueError` if it is not one's."""
        bound, objective_bound = settings["bounds"]
        problem = Problem(
            arrays["baseline"], arrays["floor"], arrays.get("reward"), arrays.get("objective"),
            start=arrays["start"], bound=bound, objective_bound=objective_bound, weights=tuple(settings["weights"]),
        )  # fmt: skip
        found = cls(
            problem, confidence=Confidence(**settings["confidence"]), method=settings["method"],
            replan=settings["replan"], drift=Drift(**settings["drift"]),
        )  # fmt: skip
        found._total = Counts(*(arrays[name] for name in _COUNTS))
        found._base = Counts(*(arrays[f"base_{name}"] for name in _COUNTS))
        found._total.check(problem.shape)
        found._base.check(problem.shape)
        numbers = (whole(name, settings[name], 0, 1 << 62) for name in ("episodes", "alarms", "elapsed"))
        found.episodes, found.alarms, found._elapsed = numbers
        found._base_weight = within("base_weight", settings["base_weight"], "a number from 0 to 1", 0, 1)
        found._rng.bit_generator.state = settings["random"]
        if found._cusum is not None:
            found._cusum.level = within("level", settings["level"], "a finite number from 0", 0, math.inf)
        found._synced = Synced(found._total.copy(), 1.0, found.episodes)
        found.plan()
        return found

    def _checked(self, trajectory: list[Transition]) -> tuple[list[int], list[int], list[float]]:
        """Cells, next states and rewards of the floor's signal, or an error."""
        if len(trajectory) != self.horizon:
            raise ConfigError(f"trajectory: got {len(trajectory)} transitions, expected {self.horizon}, the horizon")
        known = self.problem.reward
        width = 4 if known is None else 3
        cells, afters, rewards = [], [], []
        previous = 0
        for step, transition in enumerate(trajectory):
            observed: list[float] | None = None
            try:
                state, action, after = map(index, transition[:3])
                observed = [reward(number) for number in transition[3:]]
            except (OverflowError, TypeError, ValueError):
                pass
            if observed is None or len(observed) != width - 3:
                raise ConfigError(
                    f"trajectory: got {shown(transition)} at step {step}, expected {width} numbers, the first three "
                    "whole"
                )
            if not (0 <= state < self.states and 0 <= after < self.states and 0 <= action < self.actions):
                raise ConfigError(
                    f"trajectory: got {shown(transition)} at step {step}, expected states below {self.states} and an "
                    f"action below {self.actions}"
                )
            if not (state == previous if step else self.problem.start[0, state] > 0):
                allowed = f"{previous}, where it had led" if step else "one with a probability in `start`"
                raise ConfigError(f"trajectory: got state {state} at step {step}, expected {allowed}")
            if observed and not 0 <= observed[0] <= 1:
                raise ConfigError(f"trajectory: got reward {transition[3]} at step {step}, expected 0 to 1")
            cells.append((step * self.states + state) * self.actions + action)
            afters.append(after)
            rewards.append(observed[0] if known is None else float(known[0, step, state, action]))
            previous = after
        if (total := sum(rewards)) > self._bound * (1 + 1e-9):
            raise ConfigError(f"trajectory: got a return of {total:.6g}, expected at most {self._bound}, `bound`")
        return cells, afters, rewards

    def _forget(self) -> None:
        """After an alarm, the lock being held: what was counted is of another traffic."""
        self.alarms += 1
        self._total, self._base_weight = Counts.zeros(*self.problem.shape), 0.0
        self._synced = self._synced._replace(weight=0.0)
        self._plans += 1
        self._snapshot = Snapshot.of(self._plans, self._trusted)
        self._due = True

    def _plan_if_due(self) -> None:
        while self._due and self._planning.acquire(blocking=False):
            try:
                self._make_plan()
            finally:
                self._planning.release()

    def _make_plan(self) -> None:
        with self._lock:
            self._due = False
            weight = self.drift.weight_after(self._elapsed)
            if weight < 1:
                self._total = self._total.scaled(weight)
                self._base_weight *= weight
                self._synced = self._synced._replace(weight=self._synced.weight * weight)
            self._elapsed = self._since = 0
            counts, alarms = self._total.copy(), self.alarms
            self._needed = np.maximum(2 * counts.visits.reshape(-1), 1).tolist()
        plan = self._learner.plan(counts)
        snapshot = Snapshot.of(self._plans + 1, plan)
        with self._lock:
            if self.alarms == alarms:  # otherwise the counts were dropped meanwhile
                self._plans += 1
                self._snapshot = snapshot
        if plan.upper[0, -1] < self.floor and not self._warned and self.method != "baseline":
            self._warned = True
            warnings.warn(
                f"the baseline returns at most {plan.upper[0, -1]:.6g}, below the floor {self.floor:.6g}: it is played "
                "always, and the floor does not hold",
                stacklevel=4,
            )


def baseline_bound(problem: Problem, counts: Counts, confidence: Confidence | None = None) -> float:
    """The lower bound of the baseline's value that counts of one run give. Less some kappa, it is a floor to choose."""
    bounds = ConstantBaseline(problem, confidence).plan(counts).lower
    if len(bounds) != 1:
        raise ConfigError(f"problem: got {len(bounds)} runs, expected 1")
    return float(bounds[0, 0])
