"""The all-or-nothing rule: the optimistic policy if its own bound reaches the floor, otherwise the baseline.

No paper's algorithm: it shows what the mixtures are for. Data of the baseline alone may never raise the bound of
another policy, and then this rule never starts.
"""

from __future__ import annotations

import numpy as np

from saffron.conservative.evaluation import Bounds
from saffron.conservative.optimism import OptimisticLearner


class AllOrNothing(OptimisticLearner):
    """pibar if L(0) >= gamma, else pi^b."""

    name = "all-or-nothing"

    def decide(self, bounds: Bounds, floor: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        whole = bounds.lower[..., 0] >= floor
        h0 = np.where(whole, 0, bounds.lower.shape[-1] - 1)
        return h0, h0, np.zeros(h0.shape), whole | (bounds.lower[..., -1] >= floor)
