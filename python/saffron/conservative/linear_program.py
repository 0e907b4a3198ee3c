"""Occupancy measures as linear programs, solved by HiGHS: what DOPE and OptPess-LP share."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import numpy as np

from saffron.conservative.arguments import floats, instance, refused, whole
from saffron.conservative.confidence import Confidence
from saffron.conservative.counts import Counts
from saffron.conservative.learner import Learner, Plan, Problem
from saffron.errors import ConfigError


class Solution(NamedTuple):
    """policy: float64 [steps, states, actions]. pessimistic, optimistic: its value under the program's two rewards."""

    policy: np.ndarray
    pessimistic: float
    optimistic: float


class ProgramLearner(Learner):
    """Solves a linear program for every plan; without a solution the baseline is played.

    Args:
        baseline_value: float64 [runs], V of the baseline, which these methods have to be told; above the floor.
        episodes: how many there will be, which their intervals depend on.
    """

    def __init__(
        self, problem: Problem, confidence: Confidence | None = None, *, baseline_value: np.ndarray, episodes: int
    ) -> None:
        super().__init__(problem, confidence)
        if problem.reward is None:
            raise ConfigError(f"reward: {self.name} needs a known reward, got None")
        value = floats("baseline_value", baseline_value, "numbers")
        if value.shape not in ((), (1,), problem.floor.shape):
            raise refused("baseline_value", baseline_value, f"a number, or one for each of {len(problem.floor)} runs")
        self.baseline_value = np.broadcast_to(value, problem.floor.shape)
        if not (np.isfinite(value).all() and (self.baseline_value > problem.floor).all()):
            raise ConfigError(
                f"baseline_value: got {self.baseline_value.tolist()}, expected values above the floor, "
                f"{problem.floor.tolist()}"
            )
        self.episodes = whole("episodes", episodes, 1)

    def of(self, runs: np.ndarray) -> Learner:
        return type(self)(
            self.problem.of(runs), self.confidence, baseline_value=self.baseline_value[runs], episodes=self.episodes
        )

    def plan(self, counts: Counts) -> Plan:
        instance("counts", counts, Counts)
        if counts.visits.shape != self.problem.shape:
            raise ConfigError(f"counts: got shape {counts.visits.shape}, expected {self.problem.shape}")
        runs, steps, _, _ = self.problem.shape
        policy = self.problem.baseline.copy()
        lower, upper = np.full((runs, 1), -np.inf), np.full((runs, 1), np.inf)
        solved = np.zeros(runs, dtype=bool)
        for run in range(runs):
            solution = self.solve(run, counts)
            if solution is not None:
                policy[run], lower[run], upper[run] = solution
                solved[run] = True
        h0 = np.where(solved, -1, steps)
        return Plan(policy, policy, np.zeros(runs), lower, upper, h0, h0, solved)

    @abstractmethod
    def solve(self, run: int, counts: Counts) -> Solution | None:
        """The program of one run; None: infeasible, or not yet to be solved."""

    def known_reward(self, run: int) -> np.ndarray:
        reward = self.problem.reward
        assert reward is not None
        return reward[run if len(reward) > 1 else 0]


def solve(
    objective: np.ndarray, floor_reward: np.ndarray, floor: float, equal: tuple, at_most: tuple | None
) -> np.ndarray | None:
    """max objective x, such that floor_reward x >= floor, equal = (A, b): A x = b, at_most = (A, b): A x <= b, x >= 0.

    Returns None if there is no solution, or if HiGHS finds none for numerical reasons: the caller then stays safe.
    """
    from scipy.optimize import linprog
    from scipy.sparse import csr_array, vstack

    rows, bound = csr_array(-floor_reward[None]), np.array([-floor])
    if at_most is not None:
        rows, bound = vstack([rows, at_most[0]]), np.concatenate([bound, at_most[1]])
    result = linprog(-objective, A_ub=rows, b_ub=bound, A_eq=equal[0], b_eq=equal[1], bounds=(0, None), method="highs")
    return result.x if result.status == 0 else None


def policy_of(occupancy: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """q_h(s,a) / sum_a q_h(s,a); where nothing arrives, the baseline's. Both [steps, states, actions]."""
    occupancy = np.maximum(occupancy, 0.0)
    total = occupancy.sum(-1, keepdims=True)
    arrives = total > 1e-12
    return np.where(arrives, occupancy / np.where(arrives, total, 1.0), baseline)
