"""EpsMix: one coin an episode between baseline and optimistic policy.

Li, Huang, Shen and Yang, ICML 2023 (arXiv 2306.06265): "randomization-based" is from the abstract; the rule is from
memory and reconstructed.
"""

from __future__ import annotations

import numpy as np

from saffron.conservative.evaluation import Bounds
from saffron.conservative.optimism import OptimisticLearner


class EpsMix(OptimisticLearner):
    """Plays the optimistic policy for a whole episode with probability eps, otherwise the baseline:

        eps = 1 if L(0) >= gamma;  0 if L(H) < gamma;  else (L(H) - gamma) / (L(H) - L(0)).

    The floor holds for the mixture, that is before the coin falls.
    """

    name = "epsmix"

    def decide(self, bounds: Bounds, floor: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        optimistic, baseline = bounds.lower[..., 0], bounds.lower[..., -1]
        whole, none = optimistic >= floor, baseline < floor
        mixing = ~whole & ~none
        eps = np.where(mixing, (baseline - floor) / np.where(mixing, baseline - optimistic, 1.0), 0.0)
        steps = bounds.lower.shape[-1] - 1
        first = np.where(whole, 0, steps)
        return first, np.where(mixing, 0, first), eps, whole | ~none
