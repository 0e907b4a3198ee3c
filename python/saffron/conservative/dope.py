"""DOPE: doubly optimistic and pessimistic exploration, a linear program over kernels and policies.

Bura, HasanzadeZonuzy, Kalathil, Shakkottai and Chamberland, NeurIPS 2022 (arXiv 2112.00885). The published
implementation (archanabura/DOPE-DoublyOptimisticPessimisticExploration) was read for facts; no code is taken from it.
"""

from __future__ import annotations

import numpy as np

from saffron.conservative.counts import Counts
from saffron.conservative.linear_program import ProgramLearner, Solution, policy_of, solve


class DOPE(ProgramLearner):
    """Per plan, over policies and kernels of a confidence set, with kappa = V^b - gamma and B_h(s,a) = sum_s' beta:

        beta_h(s,a,s') = min(1, 2 sqrt(L p (1 - p) / n) + 14 L / (3 n)),  p = Phat_h(s'|s,a),  1 if n = 0
        max V(r + H^2 / kappa * B)  such that  V(r - H B) >= gamma,  |P - Phat| <= beta

    as the extended program in z_h(s,a,s'). No solution: the baseline. Certainty: beta, H B, H^2 / kappa and the
    fallback from the cited work's implementation, where costs are bounded from above; L = log(6 S^2 A H K / delta),
    there without A (the union over actions is reconstructed); its first K_0 = S^2 A H^3 / kappa^2 episodes of the
    baseline are left out, since the program is infeasible until the data allow it. `Confidence.scale` multiplies beta.
    """

    name = "dope"

    def solve(self, run: int, counts: Counts) -> Solution | None:
        _, steps, states, actions = self.problem.shape
        reward = self.known_reward(run)
        baseline = self.problem.baseline[run]
        kappa = float(self.baseline_value[run] - self.problem.floor[run])
        n = counts.visits[run]
        seen = np.maximum(n, 1.0)[..., None]
        estimate = np.where(n[..., None] > 0, counts.transitions[run] / seen, 1.0 / states)
        log = np.log(6 * states**2 * actions * steps * self.episodes / self.confidence.delta)
        radius = 2 * np.sqrt(log * estimate * (1 - estimate) / seen) + 14 * log / (3 * seen)
        radius = np.where(n[..., None] > 0, np.minimum(self.confidence.scale * radius, 1.0), 1.0)
        total = radius.sum(-1)
        pessimistic, optimistic = reward - steps * total, reward + steps**2 / kappa * total
        shape = (steps, states, actions, states)
        found = solve(
            np.repeat(optimistic.ravel(), states),
            np.repeat(pessimistic.ravel(), states),
            float(self.problem.floor[run]),
            _flow(shape, self.problem.start[run]),
            _within(estimate, radius),
        )
        if found is None:
            return None
        occupancy = found.reshape(shape).sum(-1)
        return Solution(
            policy_of(occupancy, baseline),
            float((occupancy * pessimistic).sum()),
            float((occupancy * optimistic).sum()),
        )


def _flow(shape: tuple[int, int, int, int], start: np.ndarray) -> tuple:
    """What leaves a state is what arrived: sum_{a,s'} z_h(s,a,s') = sum_{s0,a0} z_{h-1}(s0,a0,s), start at first."""
    from scipy.sparse import coo_array

    steps, states, actions, _ = shape
    places = np.arange(steps * states * actions * states).reshape(shape)
    h, s, _, after = np.indices(shape)
    out = (h * states + s).ravel()
    arriving = h < steps - 1
    rows = np.concatenate([out, ((h + 1) * states + after)[arriving]])
    columns = np.concatenate([places.ravel(), places[arriving]])
    values = np.concatenate([np.ones(out.size), -np.ones(int(arriving.sum()))])
    right = np.zeros(steps * states)
    right[:states] = start
    return coo_array((values, (rows, columns)), shape=(steps * states, places.size)).tocsr(), right


def _within(estimate: np.ndarray, radius: np.ndarray) -> tuple:
    """(Phat - beta) sum_y z_h(s,a,y) <= z_h(s,a,s') <= (Phat + beta) sum_y z_h(s,a,y); rows that always hold left
    out."""
    from scipy.sparse import coo_array, vstack

    states = estimate.shape[-1]
    size = estimate.size
    blocks = []
    for sign, limit, needed in (
        (1.0, estimate + radius, estimate + radius < 1),
        (-1.0, estimate - radius, estimate > radius),
    ):
        chosen = np.flatnonzero(needed)
        rows = np.arange(chosen.size)
        cell = chosen // states
        others = (cell[:, None] * states + np.arange(states)).ravel()
        values = np.concatenate([np.full(chosen.size, sign), np.repeat(-sign * limit.ravel()[chosen], states)])
        place = (np.concatenate([rows, np.repeat(rows, states)]), np.concatenate([chosen, others]))
        blocks.append(coo_array((values, place), shape=(chosen.size, size)))  # equal places are summed
    matrix = vstack(blocks).tocsr()
    return matrix, np.zeros(matrix.shape[0])
