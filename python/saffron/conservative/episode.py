"""A plan as episodes read it, and an episode."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from saffron.conservative.arguments import whole
from saffron.conservative.learner import Plan
from saffron.conservative.simulate import cumulative
from saffron.errors import ConfigError

Rows = list[list[list[float]]]  # [step][state] -> cumulative probabilities of all actions but the last


class Episode:
    """One episode under the plan that was current when it began.

    Attributes:
        plan_id: number of that plan. h0: the baseline is played up to this step. rho: probability of the plan's second
            policy. branch: "baseline", "mixed" or "optimistic", what was drawn.
    """

    __slots__ = ("plan_id", "h0", "rho", "branch", "_rows", "_uniform", "_step")

    def __init__(self, plan_id: int, h0: int, rho: float, rows: Rows, uniform: list[float]) -> None:
        self.plan_id, self.h0, self.rho = plan_id, h0, rho
        self.branch = "baseline" if h0 == len(rows) else "mixed" if h0 else "optimistic"
        self._rows, self._uniform, self._step = rows, uniform, 0

    def act(self, state: int) -> int:
        """The action of the next step, in `state`."""
        step = self._step
        if step == len(self._rows):
            raise ConfigError(f"act: called {step + 1} times, expected at most {step}, the horizon")
        if type(state) is not int or not 0 <= state < len(self._rows[step]):
            state = whole("state", state, 0, len(self._rows[step]) - 1)
        self._step = step + 1
        return bisect_right(self._rows[step][state], self._uniform[step])


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A plan of one run, never changed. rows, h0: of its first and its second policy."""

    number: int
    plan: Plan
    rows: tuple[Rows, Rows]
    h0: tuple[int, int]
    weight: float

    @classmethod
    def of(cls, number: int, plan: Plan) -> Snapshot:
        first = policy_rows(plan.first)
        second = policy_rows(plan.second) if plan.weight[0] > 0 else first
        h0 = (int(plan.h0[0]), int(plan.h0_second[0]))
        return cls(number, plan, (first, second), h0, float(plan.weight[0]))

    def begin(self, uniform: list[float]) -> Episode:
        """uniform: horizon + 1 random numbers in [0, 1)."""
        drawn = int(uniform[0] < self.weight)
        return Episode(self.number, self.h0[drawn], self.weight, self.rows[drawn], uniform[1:])


def policy_rows(policy: np.ndarray) -> Rows:
    """Of a policy [1, steps, states, actions]."""
    return cumulative(policy[0]).tolist()
