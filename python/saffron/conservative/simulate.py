"""Learners on known MDPs: many runs at a time, and the exact value of every policy that is played.

Between two plans a policy stays the same, so that its episodes are sampled in blocks. A block ends where a plan is
due; the random numbers of episode k of run i belong to (seed, i, k), so that neither block sizes nor the other runs
matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from saffron.conservative.arguments import floats, instance, real, refused, whole
from saffron.conservative.counts import Counts
from saffron.conservative.learner import Learner, Plan
from saffron.conservative.mdp import TabularMDP
from saffron.errors import ConfigError

CHUNK = 8192  # episodes whose random numbers are drawn together
BLOCK = 16  # episodes of the smallest block
Observe = Callable[[np.ndarray, Plan], None]


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """What was played, run by run: `plans[i]` plans, each for some episodes.

    Attributes:
        episodes: int [plans], how many episodes each plan was for. values: float64 [plans], its exact expected return.
        lower: float64 [plans], the largest lower bound among its candidates.
        baseline: bool [plans], whether nothing but the baseline was played.
    """

    episodes: np.ndarray
    values: np.ndarray
    lower: np.ndarray
    baseline: np.ndarray

    def curve(self, points: np.ndarray) -> np.ndarray:
        """Sums of expected returns of the first k episodes, for k in `points`: float64, of their shape."""
        points = floats("points", points)
        ends = np.concatenate([[0], np.cumsum(self.episodes)])
        sums = np.concatenate([[0.0], np.cumsum(self.episodes * self.values)])
        return np.interp(points, ends, sums)

    def at(self, points: np.ndarray) -> np.ndarray:
        """The expected return of episode k, counted from 1, for k in `points`."""
        points, ends = floats("points", points), np.cumsum(self.episodes)
        if not ((points >= 1).all() and (points <= ends[-1]).all()):
            raise refused("points", points, f"episodes from 1 to {ends[-1]}")
        return self.values[np.searchsorted(ends, points)]

    def below(self, floor: float, until: int | None = None) -> int:
        """Episodes, of the first `until`, whose policy's exact value lies below the floor (by more than rounding)."""
        episodes, floor = self.episodes, real("floor", floor, "a finite number")
        if until is not None:
            whole("until", until, 0)
            ends = np.minimum(np.cumsum(episodes), until)
            episodes = np.diff(np.concatenate([[0], ends]))
        return int(episodes[self.values < floor - 1e-9].sum())


def simulate(
    learner: Learner,
    mdp: TabularMDP,
    episodes: int,
    *,
    replan: str | int = "doubling",
    seed: int = 0,
    first_run: int = 0,
    counts: Counts | None = None,
    observe: Observe | None = None,
) -> tuple[list[History], Counts]:
    """Runs a learner, every run on its own MDP.

    Args:
        replan: "doubling": as soon as visits of a step, state and action have doubled since the last plan (an episode's
            last step counts first); a number: after as many episodes.
        first_run: the number of the first run, for its random numbers.
        counts: of an offline log, to start from; not changed.
        observe: called with the numbers of the runs, and their new plan.

    Returns:
        A history per run, and the counts at the end.

    Raises:
        ConfigError: replan is neither, shapes do not fit, or there is less than one episode.
    """
    instance("learner", learner, Learner)
    instance("mdp", mdp, TabularMDP)
    if mdp.kernel.shape[:4] != learner.problem.shape:
        raise ConfigError(f"mdp: got shape {mdp.kernel.shape[:4]}, expected {learner.problem.shape} of the problem")
    whole("episodes", episodes, 1)
    seed, first_run = whole("seed", seed, 0), whole("first_run", first_run, 0)
    instance("counts", counts, Counts, or_none=True)
    if counts is not None:
        counts.check(learner.problem.shape)
    if observe is not None and not callable(observe):
        raise refused("observe", observe, "a function or None")
    return _Simulation(learner, mdp, episodes, checked_replan(replan), seed, first_run, counts, observe).run()


def checked_replan(replan: str | int) -> int | None:
    """None for "doubling", otherwise the number of episodes."""
    if isinstance(replan, str) and replan == "doubling":
        return None
    return whole("replan", replan, 1, what='"doubling" or a number of episodes,')


class _Simulation:
    def __init__(
        self,
        learner: Learner,
        mdp: TabularMDP,
        episodes: int,
        every: int | None,
        seed: int,
        first_run: int,
        counts: Counts | None,
        observe: Observe | None,
    ) -> None:
        self.learner, self.mdp, self.episodes, self.every = learner, mdp, episodes, every
        self.seed, self.first_run, self.observe = seed, first_run, observe
        runs, steps, states, actions = learner.problem.shape
        self.counts = Counts.zeros(runs, steps, states, actions) if counts is None else counts.copy()
        self.rewards = learner.problem.reward is None
        self.kernel = cumulative(mdp.kernel)
        self.start = cumulative(mdp.start)
        self.policies = np.empty((runs, 2, steps, states, actions - 1))
        self.weight, self.threshold = np.empty(runs), np.empty(learner.problem.shape)
        self.done = np.zeros(runs, dtype=np.int64)
        self.since = np.zeros(runs, dtype=np.int64)
        self.random: list[np.ndarray] = [np.empty(0)] * runs
        self.plans: list[list[list[float]]] = [[] for _ in range(runs)]

    def run(self) -> tuple[list[History], Counts]:
        runs = len(self.done)
        due, block = np.ones(runs, dtype=bool), BLOCK
        while (self.done < self.episodes).any():
            active = np.flatnonzero(self.done < self.episodes)
            planned = active[due[active]]
            if planned.size:
                self._plan(planned)
            taken = self._play(active, block, due)
            block = int(np.clip(2 * taken.mean(), BLOCK, CHUNK))
        return [History(*_columns(rows)) for rows in self.plans], self.counts

    def _plan(self, runs: np.ndarray) -> None:
        everything = runs.size == len(self.done)
        learner = self.learner if everything else self.learner.of(runs)
        plan = learner.plan(self.counts if everything else self.counts.of(runs))
        mdp = self.mdp if everything else TabularMDP(self.mdp.kernel[runs], self.mdp.reward[runs], self.mdp.start[runs])
        values = mdp.value(plan.first)
        if plan.weight.any():
            values = (1 - plan.weight) * values + plan.weight * mdp.value(plan.second)
        self.policies[runs, 0], self.policies[runs, 1] = cumulative(plan.first), cumulative(plan.second)
        self.weight[runs] = plan.weight
        self.threshold[runs] = np.maximum(2 * self.counts.visits[runs], 1)
        self.since[runs] = 0
        steps = self.learner.problem.shape[1]
        for i, run in enumerate(runs):
            baseline = plan.h0[i] == steps and plan.weight[i] == 0
            self.plans[run].append([0, values[i], plan.lower[i].max(), float(baseline)])
        if self.observe is not None:
            self.observe(runs, plan)

    def _play(self, runs: np.ndarray, block: int, due: np.ndarray) -> np.ndarray:
        """Samples up to `block` episodes of each run, keeps those before the next plan, counts them."""
        uniform, available = self._uniform(runs, block)
        states, actions, rewards = self._sample(runs, uniform)
        within = np.arange(uniform.shape[1]) < available[:, None]
        if self.every is None:
            end, due[runs] = self._doubled(runs, states, actions, within)
            taken = np.minimum(end, available)
        else:
            taken = available
            due[runs] = self.since[runs] + taken == self.every
        kept = np.arange(uniform.shape[1]) < taken[:, None]
        steps = actions.shape[-1]
        owner = np.broadcast_to(runs[:, None, None], actions.shape)[kept].reshape(-1, steps)
        self.counts.add(owner, states[kept], actions[kept], None if rewards is None else rewards[kept])
        self.done[runs] += taken
        self.since[runs] += taken
        for run, count in zip(runs, taken, strict=True):
            self.plans[run][-1][0] += int(count)
        return taken

    def _uniform(self, runs: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Random numbers [runs, block, 2 steps + 2] of the next episodes, and how many of them each run may use."""
        width = 2 * self.learner.problem.shape[1] + 2
        uniform = np.full((runs.size, block, width), 0.5)
        available = np.empty(runs.size, dtype=np.int64)
        for i, run in enumerate(runs):
            chunk, place = divmod(int(self.done[run]), CHUNK)
            if place == 0 or not self.random[run].size:
                self.random[run] = np.random.default_rng([self.seed, self.first_run + run, chunk]).random(
                    (CHUNK, width)
                )
            available[i] = min(block, CHUNK - place, self.episodes - int(self.done[run]))
            if self.every is not None:
                available[i] = min(available[i], self.every - self.since[run])
            uniform[i, : available[i]] = self.random[run][place : place + available[i]]
        return uniform, available

    def _sample(self, runs: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """states [runs, block, steps + 1], actions and rewards [runs, block, steps]."""
        steps = self.learner.problem.shape[1]
        row = runs[:, None]
        branch = (uniform[..., 0] < self.weight[row]).astype(np.intp)
        states = np.empty((*uniform.shape[:2], steps + 1), dtype=np.intp)
        actions = np.empty((*uniform.shape[:2], steps), dtype=np.intp)
        rewards = np.empty(actions.shape) if self.rewards else None
        state = states[..., 0] = _draw(self.start[row], uniform[..., 1])
        for h in range(steps):
            action = actions[..., h] = _draw(self.policies[row, branch, h, state], uniform[..., 2 * h + 2])
            after = _draw(self.kernel[row, h, state, action], uniform[..., 2 * h + 3])
            if rewards is not None:
                paid = self.mdp.arrival_reward
                rewards[..., h] = (
                    self.mdp.reward[row, h, state, action] if paid is None else paid[row, h, state, action, after]
                )
            state = states[..., h + 1] = after
        return states, actions, rewards

    def _doubled(
        self, runs: np.ndarray, states: np.ndarray, actions: np.ndarray, within: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """How many episodes it takes until visits have doubled, and whether they do within the block; [runs]."""
        shape = self.counts.visits.shape
        steps = np.arange(shape[1])
        cells = np.ravel_multi_index((runs[:, None, None], steps, states[..., :-1], actions), shape)
        needed = (self.threshold - self.counts.visits).reshape(-1)
        inside = np.broadcast_to(within[..., None], cells.shape)
        seen = np.bincount(cells[inside], minlength=needed.size)
        may = inside & (seen >= needed)[cells]
        crossed = np.zeros(cells.shape, dtype=bool)
        chosen = cells[may]
        if chosen.size:
            order = np.argsort(chosen, kind="stable")
            sorted_cells = chosen[order]
            begins = np.concatenate([[True], sorted_cells[1:] != sorted_cells[:-1]])
            group = np.maximum.accumulate(np.where(begins, np.arange(chosen.size), 0))
            rank = np.empty(chosen.size, dtype=np.int64)
            rank[order] = np.arange(chosen.size) - group + 1
            crossed[may] = rank >= needed[chosen]
        episode = crossed.any(-1)
        happens = np.asarray(episode.any(-1))
        return np.where(happens, episode.argmax(-1) + 1, within.shape[1]), happens


def cumulative(probabilities: np.ndarray) -> np.ndarray:
    """Where `_draw` cuts [0, 1): cumulative sums but the last, those that miss 1 by rounding being 1."""
    cumulative = np.cumsum(probabilities[..., :-1], -1)
    cumulative[cumulative > 1 - 1e-12] = 1.0
    return cumulative


def _draw(cumulative: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    return (uniform[..., None] >= cumulative).sum(-1)


def _columns(rows: list[list[float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    table = np.array(rows)
    return table[:, 0].astype(np.int64), table[:, 1], table[:, 2], table[:, 3].astype(bool)
