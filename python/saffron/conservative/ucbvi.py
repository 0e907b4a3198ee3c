"""BPI-UCBVI without a constraint: always the optimistic policy.

Menard, Domingues, Jonsson, Kaufmann, Leurent and Valko, "Fast active learning for pure exploration in reinforcement
learning", ICML 2021 (arXiv 2007.13442). Constants from memory of that work.
"""

from __future__ import annotations

import numpy as np

from saffron.conservative.evaluation import Bounds
from saffron.conservative.optimism import OptimisticLearner


class UCBVI(OptimisticLearner):
    """pibar, whatever its bounds say. With an objective, the weight of the largest optimistic objective."""

    name = "ucbvi"

    def decide(self, bounds: Bounds, floor: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        h0 = np.zeros(bounds.lower.shape[:-1], dtype=np.intp)
        return h0, h0, np.zeros(h0.shape), np.ones(h0.shape, dtype=bool)
