"""OptPess-LP: a linear program under the estimated kernel, with an optimistic objective and a pessimistic constraint.

Liu, Zhou, Kalathil, Kumar and Tian, "Learning policies with zero or bounded constraint violation for constrained MDPs",
NeurIPS 2021 (arXiv 2106.02684). The constants are those of the implementation that DOPE's authors published for their
comparison, which was read for facts.
"""

from __future__ import annotations

import numpy as np

from saffron.conservative.counts import Counts
from saffron.conservative.linear_program import ProgramLearner, Solution, policy_of, solve


class OptPessLP(ProgramLearner):
    """Per plan, with kappa = V^b - gamma, n at least 1 and Phat uniform if never visited:

        beta_h(s,a) = sqrt(L / n)
        max V_Phat(r + alpha beta)  such that  V_Phat(r - (1 + S H) beta) >= gamma
        alpha = 1 + S H + 4 H (1 + S H) / kappa

    The baseline is played while V_Phat^b(r - (1 + S H) beta) <= (gamma + V^b) / 2, and if there is no solution.
    Certainty: from the cited work, by way of an implementation; L = log(32 S^2 A H K / delta), there without A
    (reconstructed). `Confidence.scale` multiplies beta.
    """

    name = "optpess-lp"

    def solve(self, run: int, counts: Counts) -> Solution | None:
        _, steps, states, actions = self.problem.shape
        baseline, start, floor = self.problem.baseline[run], self.problem.start[run], float(self.problem.floor[run])
        value = float(self.baseline_value[run])
        n = counts.visits[run]
        seen = np.maximum(n, 1.0)
        kernel = np.where(n[..., None] > 0, counts.transitions[run] / seen[..., None], 1.0 / states)
        log = np.log(32 * states**2 * actions * steps * self.episodes / self.confidence.delta)
        beta = self.confidence.scale * np.sqrt(log / seen)
        factor = 1 + states * steps
        alpha = factor + 4 * steps * factor / (value - floor)
        reward = self.known_reward(run)
        pessimistic, optimistic = reward - factor * beta, reward + alpha * beta
        if _value(kernel, pessimistic, baseline, start) <= (floor + value) / 2:
            return None
        found = solve(optimistic.ravel(), pessimistic.ravel(), floor, _flow(kernel, start), None)
        if found is None:
            return None
        occupancy = found.reshape(steps, states, actions)
        return Solution(
            policy_of(occupancy, baseline),
            float((occupancy * pessimistic).sum()),
            float((occupancy * optimistic).sum()),
        )


def _value(kernel: np.ndarray, reward: np.ndarray, policy: np.ndarray, start: np.ndarray) -> float:
    after = np.zeros(start.shape)
    for h in reversed(range(len(kernel))):
        after = (policy[h] * (reward[h] + kernel[h] @ after)).sum(-1)
    return float(start @ after)


def _flow(kernel: np.ndarray, start: np.ndarray) -> tuple:
    """sum_a q_h(s,a) = sum_{s0,a0} q_{h-1}(s0,a0) Phat_{h-1}(s|s0,a0), start at first."""
    from scipy.sparse import csr_array

    steps, states, actions, _ = kernel.shape
    cells = states * actions
    matrix = np.zeros((steps, states, steps, cells))
    leaving = np.repeat(np.eye(states), actions, axis=1)
    for h in range(steps):
        matrix[h, :, h] = leaving
        if h:
            matrix[h, :, h - 1] = -kernel[h - 1].reshape(cells, states).T
    right = np.zeros(steps * states)
    right[:states] = start
    return csr_array(matrix.reshape(steps * states, steps * cells)), right
