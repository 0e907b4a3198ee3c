"""StepMix: the baseline up to a step, the optimistic policy after it, and a coin at that step.

Li, Huang, Shen and Yang, ICML 2023 (arXiv 2306.06265). The mixture policy that interpolates between baseline and
optimistic policy is from the paper's abstract; candidates and rule are from memory of it, the constants from the cited
work (`confidence.py`).
"""

from __future__ import annotations

import numpy as np

from saffron.conservative.evaluation import Bounds
from saffron.conservative.optimism import OptimisticLearner, take


class StepMix(OptimisticLearner):
    """With candidates pi^{h0}, h0 = 0..H (baseline at steps 1..h0, then optimistic), and their lower bounds L(h0):

    - none reaches the floor gamma: the baseline is played (it is trusted, and its data raise L(H));
    - L(0) >= gamma: the optimistic policy is played;
    - else, with h* the smallest h0 such that L(h0) >= gamma: pi^{h*}, except that step h* is the optimistic policy's
      with probability

          rho = (L(h*) - gamma) / (L(h*) - L(h* - 1)),  in [0, 1).

    pi^{h*} and pi^{h*-1} differ in step h* alone, so that value and lower bound are linear in rho (elementary), and the
    lower bound of what is played is gamma exactly. L need not be monotone in h0; only L(h* - 1) < gamma <= L(h*) is
    used.
    """

    name = "stepmix"

    def decide(self, bounds: Bounds, floor: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        lower = bounds.lower
        passing = lower >= floor[:, :, None]
        safe = np.asarray(passing.any(-1))
        smallest = passing.argmax(-1)  # 0 if none passes
        before = np.maximum(smallest - 1, 0)
        at, below = take(lower, smallest), take(lower, before)
        mixing = safe & (smallest > 0)
        weight = np.where(mixing, (at - floor) / np.where(mixing, at - below, 1.0), 0.0)
        steps = lower.shape[-1] - 1
        first = np.where(safe, smallest, steps)
        return first, np.where(mixing, before, first), weight, safe
