"""What SAFFRON-1 claims, checked on results: each with the figures it stands or falls by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from saffron.evaluation.metrics import RESAMPLES, Curve, Group, Interval, bootstrap, option, scaling_efficiency
from saffron.evaluation.store import Record
from saffron.evaluation.tables import LIMIT, Table, compute, scaling_sets, share, signed, titles


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two methods at the same compute: attack success of each, and of the first less the second, prompt by prompt."""

    flops: float
    first: float
    second: float
    difference: Interval

    @property
    def below(self) -> bool:
        return self.difference.mean < 0

    @property
    def certain(self) -> bool:
        """The 95 % interval of the difference leaves zero out."""
        return self.difference.high < 0 or self.difference.low > 0


def compare(first: Curve, second: Curve, judge: str) -> list[Comparison]:
    """Two methods at every budget of the second one that the first can be had for.

    Where a method was not run at so much compute, its most expensive run stands for it: no worse than it would be.
    """
    found = []
    for one in second.groups:
        values, base = first.at(one.flops, judge), one.harmful(judge)
        if values is not None:
            found.append(Comparison(one.flops, values.mean(), base.mean(), bootstrap(values - base)))
    return found


def verdict(comparisons: Sequence[Comparison]) -> str:
    """In a few words how often the first is below the second."""
    if not comparisons:
        return "can not be compared"
    below, certain = sum(c.below for c in comparisons), sum(c.below and c.certain for c in comparisons)
    above = sum(c.certain and not c.below for c in comparisons)
    if below == len(comparisons) and not above:
        return f"holds at {below} of {below} budgets ({certain} beyond the 95 % interval)"
    if not below:
        return f"does not hold at any of {len(comparisons)} budgets ({above} beyond the 95 % interval)"
    return (
        f"holds at {below} of {len(comparisons)} budgets ({certain} beyond the 95 % interval; "
        f"the opposite at {above} beyond it)"
    )


def at_every_budget(reference: Curve, others: Sequence[Curve], judge: str, heading: str) -> Table:
    """All methods at each budget of one of them, with paired differences."""
    rows = []
    for one in reference.groups:
        base = one.harmful(judge)
        cells = []
        for curve in others:
            values = curve.at(one.flops, judge)
            at_most_expensive = curve.groups[-1].flops < one.flops * (1 - 1e-9)
            mark = "†" if at_most_expensive else ""
            cells.append("" if values is None else f"{share(values.mean())}{mark} ({signed(bootstrap(values - base))})")
        rows.append((f"{one.budget:g}", compute(one.flops), share(base.mean()), *cells))
    header = ("N", "compute per prompt", *titles([curve.name for curve in (reference, *others)]))
    return Table(heading, header, tuple(rows), "† at less compute: the method's most expensive run.")


@dataclass(frozen=True, slots=True)
class Saving:
    """Compute at which a curve reaches a group's attack success, as a share of that group's; None: it never does."""

    success: float
    flops: float | None
    reference: float
    ratio: Interval | None


def saving(curve: Curve, reference: Group, judge: str, seed: int = 0) -> Saving:
    """How much less compute a curve needs for a group's attack success; the interval is a bootstrap over prompts."""
    success = float(reference.harmful(judge).mean())
    flops = curve.flops_for(success, judge)
    if flops is None:
        return Saving(success, None, reference.flops, None)
    rng = np.random.default_rng(seed)
    outcomes, base = np.stack([g.harmful(judge) for g in curve.groups]), reference.harmful(judge)
    costs = np.array([g.flops for g in curve.groups])
    ratios = []
    for _ in range(RESAMPLES):
        drawn = rng.integers(len(base), size=len(base))
        needed = _crossing(costs, outcomes[:, drawn].mean(1), base[drawn].mean())
        ratios.append(np.inf if needed is None else needed / reference.flops)
    low, high = np.quantile(ratios, (0.025, 0.975), method="nearest")
    return Saving(success, flops, reference.flops, Interval(flops / reference.flops, float(low), float(high)))


def _crossing(costs: np.ndarray, rates: np.ndarray, success: float) -> float | None:
    """As `Curve.flops_for`."""
    under = np.flatnonzero(rates <= success)
    if not len(under):
        return None
    i = int(under[0])
    if i == 0:
        return float(costs[0])
    share = (rates[i - 1] - success) / (rates[i - 1] - rates[i])
    return float(costs[i - 1] * (costs[i] / costs[i - 1]) ** share)


@dataclass(frozen=True, slots=True)
class Trend:
    """Scaling efficiency as one method explores more.

    Attributes:
        method, varied: what was run, and the option that grew.
        values: of that option.
        efficiency: at `LIMIT` times the most expensive run.
        falls: whether it is lower at the last value than at the first.
        robust: whether that is so for every limit from 1.1 to 100 times the most expensive run.
    """

    method: str
    varied: str
    values: list[str]
    efficiency: list[float]
    falls: bool
    robust: bool


def trends(groups: Sequence[Group], judge: str) -> list[Trend]:
    """What more children or lookahead does to the scaling efficiency, wherever groups differ in nothing else."""
    found = []
    for varied, members in scaling_sets(groups):
        most_expensive = max(g.flops for g in members)
        rates = [(g.flops, g.harmful(judge).mean()) for g in members]

        def efficiency(times: float, rates: list = rates, most_expensive: float = most_expensive) -> list[float]:
            return [scaling_efficiency(flops, rate, times * most_expensive) for flops, rate in rates]

        limits = [efficiency(float(times)) for times in np.geomspace(1.1, 100, 40)]
        values = [option(g.method, varied) or "" for g in members]
        at = efficiency(LIMIT)
        name = members[0].method.replace(f"{varied}={values[0]}", f"{varied}=…")
        found.append(Trend(name, varied, values, at, at[-1] < at[0], all(e[-1] < e[0] for e in limits)))
    return found


def with_suffix(records: Sequence[Record], tokens: int, flops_a_token: int) -> list[Record]:
    """The same results, had every call of the guard read so many more tokens of its moderation template.

    The MRM reads no template behind the response, so what uses it costs what it did.
    """
    return [
        record
        if record["method"].startswith(("saffron", "greedy", "sample")) or "-mrm" in record["method"]
        else record
        | {
            "cost": record["cost"]
            | {"reward_flops": record["cost"]["reward_flops"] + record["cost"]["reward_calls"] * tokens * flops_a_token}
        }
        for record in records
    ]
