"""What was seen: visits, transitions and rewards of each step, state and action. Counts of replicas add."""

from __future__ import annotations

import numpy as np

from saffron.conservative.arguments import floats, instance, integers, real, refused, whole
from saffron.errors import ConfigError, outside, shown

ROUNDING = 1e-6  # of a count that was decayed, scaled and added, by what it may miss its bounds


class Counts:
    """Counts of transitions, with a leading axis of independent runs.

    Attributes:
        transitions: float64 [runs, steps, states, actions, states], N_h(s,a,s'). Floating-point numbers hold
            integers up to 2^53 exactly, are what a matrix product reads, and can be decayed.
        visits: float64 [runs, steps, states, actions], N_h(s,a).
        rewards, squares: float64 of that shape: sums of the observed rewards and of their squares.
    """

    __slots__ = ("transitions", "visits", "rewards", "squares")

    def __init__(self, transitions: np.ndarray, visits: np.ndarray, rewards: np.ndarray, squares: np.ndarray) -> None:
        for name, given, axes in (
            ("transitions", transitions, 5), ("visits", visits, 4), ("rewards", rewards, 4), ("squares", squares, 4)
        ):  # fmt: skip
            if not (isinstance(given, np.ndarray) and given.ndim == axes and given.dtype.kind == "f"):
                raise refused(name, given, f"a float64 array of {axes} axes")
        self.transitions, self.visits, self.rewards, self.squares = transitions, visits, rewards, squares

    @classmethod
    def zeros(cls, runs: int, steps: int, states: int, actions: int) -> Counts:
        given = {"runs": runs, "steps": steps, "states": states, "actions": actions}
        shape = tuple(whole(name, size, 1) for name, size in given.items())
        with outside(f"runs, steps, states, actions: got {shown(shape)}, expected counts that fit into memory"):
            return cls(np.zeros((*shape, shape[2])), np.zeros(shape), np.zeros(shape), np.zeros(shape))

    @classmethod
    def from_trajectories(
        cls,
        states: np.ndarray,
        actions: np.ndarray,
        rewards: np.ndarray | None = None,
        *,
        num_states: int,
        num_actions: int,
    ) -> Counts:
        """Counts of logged episodes of one problem (runs = 1).

        Args:
            states: int [episodes, steps + 1]. actions: int [episodes, steps].
            rewards: float [episodes, steps], as observed; None: not used (the rewards are known).

        Raises:
            ConfigError: shapes do not fit, or a state, an action or a reward is out of range.
        """
        states, actions = integers("states", states), integers("actions", actions)
        num_states, num_actions = whole("num_states", num_states, 1), whole("num_actions", num_actions, 1)
        if states.ndim != 2 or actions.shape != (states.shape[0], states.shape[1] - 1):
            raise ConfigError(
                f"actions: got shape {actions.shape} with states of shape {states.shape}, expected [episodes, steps] "
                "and [episodes, steps + 1]"
            )
        for name, given, limit in (("states", states, num_states), ("actions", actions, num_actions)):
            if given.size and not (given.min() >= 0 and given.max() < limit):
                raise ConfigError(f"{name}: got {given.min()} to {given.max()}, expected 0 to {limit - 1}")
        if rewards is not None:
            rewards = floats("rewards", rewards)
            if rewards.shape != actions.shape or not ((rewards >= 0).all() and (rewards <= 1).all()):
                raise ConfigError(f"rewards: expected shape {actions.shape} like actions, and numbers from 0 to 1")
        counts = cls.zeros(1, actions.shape[1], num_states, num_actions)
        runs = np.zeros(actions.shape, dtype=np.intp)
        counts.add(runs, states, actions, rewards)
        return counts

    @property
    def runs(self) -> int:
        return self.visits.shape[0]

    def add(self, runs: np.ndarray, states: np.ndarray, actions: np.ndarray, rewards: np.ndarray | None = None) -> None:
        """Adds episodes in place. runs, actions, rewards: [episodes, steps]; states: [episodes, steps + 1]."""
        with outside(f"runs, states, actions: expected whole numbers of counts of shape {self.visits.shape}"):
            steps = np.broadcast_to(np.arange(actions.shape[1]), actions.shape)
            cells = np.ravel_multi_index((runs, steps, states[:, :-1], actions), self.visits.shape).ravel()
            after = states[:, 1:].ravel()
            if after.size and not (after.min() >= 0 and after.max() < self.transitions.shape[-1]):
                raise ValueError(f"next states from {after.min()} to {after.max()}")
            observed = None if rewards is None else np.asarray(rewards, dtype=np.float64).ravel()
            if observed is not None and observed.shape != cells.shape:
                raise ValueError(f"{observed.size} rewards of {cells.size} transitions")
        transitions = cells * self.transitions.shape[-1] + after
        _add_at(self.transitions, transitions, None)
        _add_at(self.visits, cells, None)
        if observed is not None:
            _add_at(self.rewards, cells, observed)
            _add_at(self.squares, cells, observed * observed)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises `ConfigError` unless these can be counts of problems of this shape, with rewards in [0, 1]."""
        found = [array.shape for array in self.arrays()]
        if found != [(*shape, shape[2]), shape, shape, shape]:
            raise ConfigError(f"counts: got shapes {found}, expected {(*shape, shape[2])} and three of {shape}")
        slack = ROUNDING * (1 + self.visits)
        if not (
            np.isfinite(self.visits).all()
            and all((array >= -slack.reshape(slack.shape + (1,) * (array.ndim - 4))).all() for array in self.arrays())
            and (np.abs(self.transitions.sum(-1) - self.visits) <= slack).all()
            and (self.rewards <= self.visits + slack).all()
            and (self.squares <= self.rewards + slack).all()
        ):
            raise ConfigError(
                "counts: expected visits of at least 0 that are the sums of their transitions, and sums of rewards "
                "from 0 to 1 and of their squares"
            )

    def copy(self) -> Counts:
        return Counts(*(array.copy() for array in self.arrays()))

    def of(self, runs: np.ndarray) -> Counts:
        """The counts of some runs, copied. runs: int or bool [runs]."""
        with outside(f"runs: got {shown(runs)}, expected an array of runs below {self.runs}"):
            return Counts(*(array[runs] for array in self.arrays()))

    def scaled(self, factor: float) -> Counts:
        """Counts as if every episode counted `factor` times."""
        factor = real("factor", factor, "a finite number")
        return Counts(*(array * factor for array in self.arrays()))

    def __add__(self, other: Counts) -> Counts:
        instance("counts", other, Counts)
        if self.transitions.shape != other.transitions.shape:
            raise ConfigError(
                f"counts: got shape {other.transitions.shape} to add to {self.transitions.shape}, expected equal shapes"
            )
        return Counts(*(a + b for a, b in zip(self.arrays(), other.arrays(), strict=True)))

    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.transitions, self.visits, self.rewards, self.squares


def _add_at(target: np.ndarray, places: np.ndarray, amounts: np.ndarray | None) -> None:
    """target.ravel()[places] += amounts (1 if None), repeated places counted each time. In the order of `places`."""
    if places.size * 8 < target.size:  # a table of the whole target would cost more than the sorted places
        unique, inverse = np.unique(places, return_inverse=True)
        target.reshape(-1)[unique] += np.bincount(inverse, amounts, len(unique))
    else:
        target.reshape(-1)[:] += np.bincount(places, amounts, target.size)
