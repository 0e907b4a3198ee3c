"""Optimistic and pessimistic evaluation of policies from counts, by one backward pass over the steps.

With U_{H+1} = L_{H+1} = 0, for h = H..1 (the paper's PolicyEva; its body is reconstructed):

    QU_h = min(cap_h, r_h + Phat_h U_{h+1} + width_h)           cap_h = min(H - h + 1, G)
    QL_h = max(0,     r_h + Phat_h L_{h+1} - width_h)
    U_h(s) = sum_a pi_h(a|s) QU_h(s,a)                          L_h(s) = sum_a pi_h(a|s) QL_h(s,a)

The optimistic policy takes argmax_a QU_h(s,a) (ties: the lowest action), and L follows it, so that L <= V^pibar <=
V* <= U (from the cited work, BPI-UCBVI; L of the same policy instead of the best L is reconstructed). What was
never tried has QU = cap and QL = 0. The widths are those of `confidence.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from saffron.conservative.confidence import Confidence, Widths
from saffron.conservative.counts import Counts


class Signal(NamedTuple):
    """What is summed over an episode, per run and goal. A goal is one weighting of two signals; most have one.

    Attributes:
        reward: float64 [runs or 1, goals, steps, cells], in [0, 1].
        width: of that shape, how far an estimated reward may be off; None: the reward is known.
        bound: float64 [goals]: G, the largest return from anywhere.
        cap: float64 [goals, steps + 1], the largest return from each step on; None: min(H - h + 1, G).
    """

    reward: np.ndarray
    width: np.ndarray | None
    bound: np.ndarray
    cap: np.ndarray | None = None

    def caps(self) -> np.ndarray:
        """The largest return from each step on: float64 [goals, steps + 1]; 0 after the last step."""
        return caps(self.bound, self.reward.shape[2]) if self.cap is None else self.cap

    def capped(self) -> Signal:
        """With the largest return that the rewards allow, if they are known: r_h + cap_{h+1} bounds QU_h, so that what
        was never tried is not taken for better than it can be. As valid (reconstructed)."""
        if self.width is not None:
            return self
        best = self.reward.max(axis=(0, 3))[:, ::-1].cumsum(1)[:, ::-1]
        return self._replace(cap=np.minimum(self.caps(), np.pad(best, ((0, 0), (0, 1)))))

    def repeated(self, goals: int) -> Signal:
        """One goal as so many equal ones."""
        cap = None if self.cap is None else np.repeat(self.cap, goals, 0)
        return Signal(self.reward, self.width, np.repeat(self.bound, goals), cap)


class Bounds(NamedTuple):
    """Of policies: upper and lower [runs, goals, candidates], and the optimistic actions [runs, goals, steps,
    states]."""

    upper: np.ndarray
    lower: np.ndarray
    actions: np.ndarray


def signal(widths: Widths, reward: np.ndarray | None, bound: float) -> Signal:
    """One goal. reward: float64 [runs or 1, steps, states, actions]; None: the estimate from the counts."""
    if reward is not None:
        flat = reward.reshape(*reward.shape[:2], -1)
        return Signal(flat[:, None], None, np.array([bound]))
    assert widths.reward is not None and widths.reward_width is not None
    return Signal(widths.reward[:, None], widths.reward_width[:, None], np.array([bound]))


def weighted(objective: Signal, safety: Signal, weights: np.ndarray) -> Signal:
    """(objective + weight * safety) / (1 + weight) for every weight: in [0, 1] again, with the same best policies."""
    w = weights[:, None, None]
    total = 1 + w
    width = None
    if objective.width is not None or safety.width is not None:
        width = (0 if objective.width is None else objective.width) + w * (0 if safety.width is None else safety.width)
        width = width / total
    return Signal(
        (objective.reward + w * safety.reward) / total,
        width,
        (objective.bound + weights * safety.bound) / (1 + weights),
        (objective.caps() + weights[:, None] * safety.caps()) / (1 + weights[:, None]),
    )


def caps(bound: np.ndarray, steps: int) -> np.ndarray:
    """min(H - h + 1, G) for h = 1..H + 1: float64 [goals, steps + 1]; 0 after the last step."""
    return np.minimum(np.arange(steps, -1, -1.0), bound[:, None])


def sweep(
    counts: Counts,
    widths: Widths,
    confidence: Confidence,
    what: Signal,
    start: np.ndarray,
    baseline: np.ndarray | None = None,
    actions: np.ndarray | None = None,
    policy: np.ndarray | None = None,
) -> Bounds:
    """Evaluates a policy and, with a baseline, every "baseline up to step h0, then the policy", in one pass.

    The candidates h0 >= h play the baseline at step h; all that play it at most up to h share their tail, so that
    step h backs up H - h + 2 functions, and the pass H (H + 1) / 2 + H.

    Args:
        start: float64 [runs, states].
        baseline: float64 [runs, steps, states, actions]; candidates are then h0 = 0..steps, otherwise there is one.
        actions: int [runs, goals, steps, states]: the policy. policy: float64 [runs, goals, steps, states, actions]
            likewise, as probabilities. Neither: the optimistic policy of the signal.
    """
    runs, steps, states, num_actions = counts.visits.shape
    cells, goals = states * num_actions, len(what.bound)
    cap = what.caps()
    ranges = cap[:, 1:] if confidence.value_range == "remaining" else np.repeat(what.bound[:, None], steps, 1)
    kernel = counts.transitions.reshape(runs, steps, cells, states).swapaxes(-1, -2)
    chosen = np.empty((runs, goals, steps, states), dtype=np.intp) if actions is None else actions
    rows = np.arange(runs * goals * states) * num_actions
    after = np.zeros((2, runs, goals, 1, states))  # U and L of the next step
    for h in reversed(range(steps)):
        q = _backup(after, kernel[:, h], widths, h, ranges[:, h], last=h == steps - 1)
        reward = what.reward[:, :, h, None]
        if what.width is None:
            q += reward
        else:
            margin = what.width[:, :, h, None]
            q[0] += reward + margin
            q[1] += reward - margin
        limit = cap[:, h, None, None]
        if what.cap is not None and what.width is None:  # what was never tried pays its known reward
            limit = np.minimum(limit, reward + cap[:, h + 1, None, None])
        np.minimum(q[0], limit, out=q[0])
        np.maximum(q[1], 0.0, out=q[1])
        tail = q[:, :, :, 0].reshape(2, runs * goals * states, num_actions)
        count = q.shape[3]
        after = np.empty((2, runs, goals, count + 1 if baseline is not None else 1, states))
        if policy is not None:
            probabilities = policy[:, :, h].reshape(runs * goals * states, num_actions)
            after[:, :, :, 0] = (tail * probabilities).sum(-1).reshape(2, runs, goals, states)
        else:
            if actions is None:
                chosen[:, :, h] = tail[0].argmax(-1).reshape(runs, goals, states)
            places = rows + chosen[:, :, h].reshape(-1)
            after[:, :, :, 0] = tail.reshape(2, -1)[:, places].reshape(2, runs, goals, states)
        if baseline is not None:
            split = q.reshape(2, runs, goals, count, states, num_actions)
            np.einsum("brgcsa,rsa->brgcs", split, baseline[:, h], out=after[:, :, :, 1:])
    values = (after * start[:, None, None]).sum(-1)
    return Bounds(values[0], values[1], chosen)


def _backup(
    after: np.ndarray, kernel: np.ndarray, widths: Widths, h: int, value_range: np.ndarray, last: bool
) -> np.ndarray:
    """Phat U + width and Phat L - width: [2, runs, goals, functions, cells]. kernel: N of the step, [runs, states,
    cells]."""
    _, runs, goals, functions, states = after.shape
    cells = kernel.shape[-1]
    margin = widths.linear[:, h, None, None] * value_range[:, None, None]  # [runs, goals, 1, cells]
    q = np.empty((2, runs, goals, functions, cells))
    if last:  # nothing follows: no value to be wrong about
        q[0], q[1] = margin, -margin
        return q
    columns = np.empty((runs, 3, goals, functions, states))
    columns[:, 0], columns[:, 1] = after[0], after[1]
    centre = after[0].mean(-1, keepdims=True)  # the variance does not depend on it, its rounding does
    np.subtract(after[0], centre, out=columns[:, 2])
    np.square(columns[:, 2], out=columns[:, 2])
    means = np.matmul(columns.reshape(runs, 3 * goals * functions, states), kernel)
    means *= widths.inverse[:, h]
    upper, lower, square = means.reshape(runs, 3, goals, functions, cells).swapaxes(0, 1)
    square -= np.square(upper - centre)  # the variance
    np.maximum(square, 0.0, out=square)
    square *= widths.root[:, h, None, None]
    np.sqrt(square, out=square)
    square += margin
    gap = upper - lower
    gap *= widths.slope
    square += gap  # the width
    np.add(upper, square, out=q[0])
    np.subtract(lower, square, out=q[1])
    return q


def evaluate(
    counts: Counts,
    widths: Widths,
    confidence: Confidence,
    what: Signal,
    start: np.ndarray,
    policy: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """PolicyEva: the lower and the upper bound of policies [runs, steps, states, actions]; float64 [runs] each."""
    bounds = sweep(counts, widths, confidence, what, start, policy=policy[:, None])
    return bounds.lower[:, 0, 0], bounds.upper[:, 0, 0]
