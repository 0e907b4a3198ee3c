"""Chooses settings of the search on the validation prompts, by a rule that asks the reward, never the judge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from saffron.storage.results import Record

CALIBRATED = 0.5  # the median of what the MRM says of safe text is the cap without a sweep
BASELINE = "sample"
OPTIONS = {"cap": "reward_cap", "tolerance": "reward_tolerance", "weight": "policy_weight"}
RULE = (
    "Of the settings whose log-probability per token is not below sampling's on the same prompts, the one whose "
    "answers have the highest mean reward by VADER; among equal ones, and if no setting is that fluent, the one of the "
    "highest log-probability."
)


@dataclass(frozen=True, slots=True)
class Grid:
    """What is swept: `saffron` of one width with one of the settings.

    Attributes:
        width: of the search.
        prompts: attacked validation prompts.
        quantiles: caps, as quantiles of what the MRM says of held-out prefixes that are safe.
        tolerances, weights: of `reward_tolerance` and `policy_weight`.
    """

    width: int
    prompts: int
    quantiles: tuple[float, ...]
    tolerances: tuple[float, ...]
    weights: tuple[float, ...]

    def values(self, levels: dict[float, float]) -> dict[str, list[float]]:
        """The values of every setting, by the name of its place in the scales' methods; quantiles may coincide.

        Args:
            levels: the MRM's reward at each quantile.
        """
        caps = list(dict.fromkeys(levels[quantile] for quantile in self.quantiles))
        return {"cap": caps, "tolerance": list(self.tolerances), "weight": list(self.weights)}

    def method(self, name: str, value: float) -> str:
        return f"saffron:width={self.width},{OPTIONS[name]}={value:g}"

    def methods(self, levels: dict[float, float]) -> list[str]:
        """All that is run, sampling first."""
        return [BASELINE, *(self.method(name, v) for name, values in self.values(levels).items() for v in values)]


class Row(NamedTuple):
    """What a method's answers come to: their number, mean reward, share of negative ones, log-probability per token."""

    method: str
    n: int
    reward: float
    negative: float
    log_probability: float


def rows(records: Iterable[Record]) -> dict[str, Row]:
    """By method."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record["method"], []).append(record)
    return {
        method: Row(
            method,
            len(answers),
            float(np.mean([r["reward"] for r in answers])),
            float(np.mean([r["reward"] < -0.05 for r in answers])),
            float(np.mean([r["log_probability"] for r in answers])),
        )
        for method, answers in found.items()
    }


def choose(candidates: Sequence[Row], floor: float) -> Row:
    """The rule of `RULE`.

    Args:
        floor: sampling's log-probability per token.
    """
    fluent = [row for row in candidates if row.log_probability >= floor]
    if not fluent:
        return max(candidates, key=lambda row: row.log_probability)
    return max(fluent, key=lambda row: (row.reward, row.log_probability))


def chosen(grid: Grid, levels: dict[float, float], records: Iterable[Record]) -> dict[str, str]:
    """The chosen value of every setting that was swept, as methods spell it, and the "calibrated" cap.

    What was not run on all prompts is no candidate; before the sweep is done, the cap is the calibrated one and the
    other settings are the first of the grid.
    """
    found = {method: row for method, row in rows(records).items() if row.n == grid.prompts}
    values = {"calibrated": f"{levels[CALIBRATED]:g}"}
    for name, some in grid.values(levels).items():
        there = {found[method]: f"{v:g}" for v in some if (method := grid.method(name, v)) in found}
        if BASELINE in found and there:
            values[name] = there[choose(list(there), found[BASELINE].log_probability)]
        elif some:
            values[name] = values["calibrated"] if name == "cap" else f"{some[0]:g}"
    return values
