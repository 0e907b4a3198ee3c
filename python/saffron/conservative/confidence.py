"""Confidence terms: how far an estimate from counts may lie from the truth.

Of n = N_h(s,a) visits, with delta' = delta / comparators:

    beta*(n) = log(3 S A H / delta') + log(8 e (n + 1))            from the cited work (Menard et al. 2021, BPI-UCBVI)
    beta(n)  = log(3 S A H / delta') + S log(8 e (n + 1))          from the cited work (the same)
    width    = 3 sqrt(Var_Phat(U_{h+1}) beta*(n) / n) + 14 H G_h beta(n) / n + Phat (U_{h+1} - L_{h+1}) / H
                                                                   from the cited work (3, 14 H^2, 1/H, from memory)
    comparators = H + 1: one union over "baseline up to h0, then optimal"        reconstructed
    G_h: what the values of the next step are bounded by                          "horizon": from the cited work (H
        there)
                                                                                  "remaining": reconstructed, tighter

Rewards that are not known are estimated; with x = log(3 S A H n (n + 1) / delta_r), by the empirical Bernstein bound of
Audibert, Munos and Szepesvari (2009),

    width_r  = sqrt(2 Var(observed) x / n) + 3 x / n               from the cited work; the union over n reconstructed

and delta is halved between kernel and rewards (reconstructed). The paper's own constants could not be seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from saffron.conservative.arguments import flag, refused, within
from saffron.conservative.counts import Counts

UNVISITED = 1e300  # the width of what was never tried; finite, so that times 0 it is 0


@dataclass(frozen=True, slots=True)
class Confidence:
    """How wide intervals are.

    Attributes:
        delta: probability with which any interval of any episode may fail, in (0, 1).
        scale: factor of the whole width. 1 is what the proof needs. Smaller values give the proof up: calibrate them
            (docs/conservative.md).
        value_range: what bounds the values of the next step in 14 H G_h beta / n: "remaining", the largest return from
            there on, which is 0 after the last step (certainty: reconstructed; every use of the range in the proof is
            of the next step's values); or "horizon", the largest return from anywhere (from the cited work).
        uniform: beta instead of beta* under the root. Needed where the policy that is tested may depend on the data in
            any way (two signals, learned baselines): the event behind beta holds for all functions at once.
            Certainty: reconstructed.
    """

    delta: float = 0.05
    scale: float = 1.0
    value_range: str = "remaining"
    uniform: bool = False

    def __post_init__(self) -> None:
        delta = within("delta", self.delta, "a number between 0 and 1", 0, 1, open_low=True, open_high=True)
        scale = within("scale", self.scale, "a number above 0 and at most 1", 0, 1, open_low=True)
        if not (isinstance(self.value_range, str) and self.value_range in ("remaining", "horizon")):
            raise refused("value_range", self.value_range, '"remaining" or "horizon"')
        for name, found in (("delta", delta), ("scale", scale), ("uniform", flag("uniform", self.uniform))):
            object.__setattr__(self, name, found)  # of NumPy's numbers those that JSON can hold


class Widths(NamedTuple):
    """Of counts: what the widths of all steps are computed from, scale included. cells = states * actions.

    Attributes:
        inverse: float64 [runs, steps, 1, cells], 1 / n, 0 if never visited.
        root: float64 [runs, steps, cells], 9 beta* / n: times the variance it is the square of the first term.
        linear: float64 [runs, steps, cells], 14 H beta / n, UNVISITED if n = 0. Times G_h it is the second term.
        slope: scale / H. Times Phat (U - L) it is the third term.
        reward: float64 [runs, steps, cells] or None: estimated mean rewards. reward_width: of the same shape.
    """

    inverse: np.ndarray
    root: np.ndarray
    linear: np.ndarray
    slope: float
    reward: np.ndarray | None
    reward_width: np.ndarray | None


def widths(counts: Counts, confidence: Confidence, comparators: int, estimate_rewards: bool) -> Widths:
    """The terms of all widths that depend on the counts alone. comparators: fixed functions the union is over."""
    runs, steps, states, actions = counts.visits.shape
    n = counts.visits.reshape(runs, steps, states * actions)
    inverse = 1.0 / np.maximum(n, 1e-300)
    unvisited = n <= 0
    some_unvisited = bool(unvisited.any())
    if some_unvisited:
        inverse[unvisited] = 0.0
    delta = confidence.delta / 2 if estimate_rewards else confidence.delta
    base = np.log(3 * states * actions * steps * comparators / delta)
    growth = np.log1p(n)
    growth += np.log(8 * np.e)
    beta = base + states * growth
    root = beta if confidence.uniform else base + growth
    root = root * inverse
    root *= 9 * confidence.scale**2
    linear = beta * inverse
    linear *= 14 * steps * confidence.scale
    if some_unvisited:
        linear[unvisited] = UNVISITED
    reward = reward_width = None
    if estimate_rewards:
        reward, reward_width = _rewards(counts, n, inverse, unvisited, delta, confidence.scale)
    return Widths(inverse[:, :, None], root, linear, confidence.scale / steps, reward, reward_width)


def _rewards(
    counts: Counts, n: np.ndarray, inverse: np.ndarray, unvisited: np.ndarray, delta: float, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    _, steps, states, actions = counts.visits.shape
    mean = counts.rewards.reshape(n.shape) * inverse
    variance = np.maximum(counts.squares.reshape(n.shape) * inverse - mean * mean, 0.0)
    # log(n (n + 1)) with n of at least 1, so that decayed counts below 1 do not narrow the interval.
    seen = np.maximum(n, 1.0)
    x = np.log(3 * states * actions * steps * seen * (seen + 1) / delta) * inverse
    width = scale * (np.sqrt(2 * variance * x) + 3 * x)
    width[unvisited] = UNVISITED
    return mean, width
