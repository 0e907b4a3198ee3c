"""How well predicted rewards agree with the PRM's."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

DEPTHS = (1, 2, 4, 8, 16, 32, 64, 128)  # where the rows of the table by depth begin


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement over some tokens; errors are predicted minus true.

    Attributes:
        tokens: how many; with none the rest is NaN.
        within_1: share whose error is at most 1.
        correlation: Pearson's.
        mean_error, root_mean_square_error: of the predictions.
        true_mean, predicted_mean: of the rewards.
    """

    tokens: int
    within_1: float
    correlation: float
    mean_error: float
    root_mean_square_error: float
    true_mean: float
    predicted_mean: float

    @classmethod
    def of(cls, predicted: np.ndarray, true: np.ndarray) -> Agreement:
        """predicted, true: `[tokens]`."""
        if not len(true):
            return cls(0, *[float("nan")] * 6)
        predicted, true = predicted.astype(np.float64), true.astype(np.float64)
        error = predicted - true
        varies = predicted.std() > 0 and true.std() > 0
        return cls(
            len(true),
            float((np.abs(error) <= 1).mean()),
            float(np.corrcoef(predicted, true)[0, 1]) if varies else float("nan"),
            float(error.mean()),
            float(np.sqrt((error**2).mean())),
            float(true.mean()),
            float(predicted.mean()),
        )

    def to_json(self) -> dict[str, Any]:
        """NaN as None: JSON has none."""
        return {name: None if value != value else value for name, value in asdict(self).items()}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Agreement:
        known: dict[str, Any] = {name: float("nan") if value is None else value for name, value in record.items()}
        return cls(**known)


def by_depth(predicted: np.ndarray, true: np.ndarray, depth: np.ndarray) -> dict[tuple[int, int], Agreement]:
    """Agreement by how many tokens deep in its turn a token stands: (first, last) -> agreement; empty rows left out.

    Args:
        predicted, true: `[tokens]`.
        depth: `[tokens]`, from 1.
    """
    found = {}
    for first, beyond in zip(DEPTHS, (*DEPTHS[1:], 1 << 62), strict=True):
        here = (depth >= first) & (depth < beyond)
        if here.any():
            found[first, min(beyond - 1, int(depth.max()))] = Agreement.of(predicted[here], true[here])
    return found
