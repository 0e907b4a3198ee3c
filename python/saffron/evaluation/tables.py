"""Results as tables: SAFFRON-1's tables 1 to 3 for the data at hand, and what the defence leaves of the answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from saffron.evaluation.metrics import (
    BUDGETS,
    Curve,
    Group,
    Interval,
    bootstrap,
    budget,
    distinct,
    option,
    refusal_openings,
    repeated_opening,
    scaling_efficiency,
    wilson,
)

TITLES = {
    "greedy": "No defence, greedy",
    "sample": "No defence, sampling",
    "best-of-n": "Best-of-N",
    "best-of-n-mrm": "Best-of-N, MRM",
    "beam": "Beam search",
    "beam-mrm": "Beam search, MRM",
    "rebase": "Rebase",
    "rebase-mrm": "Rebase, MRM",
    "deal": "DeAL",
    "deal-mrm": "DeAL, MRM",
    "mcts": "MCTS",
    "mcts-mrm": "MCTS, MRM",
    "args": "ARGS",
    "args-mrm": "ARGS, MRM",
    "cards": "CARDS",
    "cards-mrm": "CARDS, MRM",
    "saffron": "Saffron",
}
SCALED = ("children", "lookahead")  # what SAFFRON-1's table 2 varies
LIMIT = 1.5  # compute limit of the scaling efficiency, in multiples of the most expensive row


@dataclass(frozen=True, slots=True)
class Table:
    """Cells of text under a title; `note` says what a reader has to know."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"**{self.title}**\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")


def title(method: str) -> str:
    """A method's name and, where it has any, its options but the budget: "Beam search (children 4)"."""
    name, _, options = method.partition(":")
    shown = [
        o.replace("_", " ").replace("=", " ") for o in options.split(",") if o and o.partition("=")[0] not in BUDGETS
    ]
    return TITLES.get(name, name) + (f" ({', '.join(shown)})" if shown else "")


def titles(methods: Sequence[str]) -> list[str]:
    """Names alone where they tell methods apart, options as well where they do not."""
    names = [method.partition(":")[0] for method in methods]
    return [TITLES.get(n, n) for n in names] if len(set(names)) == len(names) else [title(m) for m in methods]


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def interval(value: Interval) -> str:
    return f"{value.mean:.3f} [{value.low:.3f}, {value.high:.3f}]"


def signed(value: Interval) -> str:
    return f"{value.mean:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"


def compute(flops: float) -> str:
    """FLOPs in the unit a reader wants."""
    for unit, size in (("TFLOP", 1e12), ("GFLOP", 1e9)):
        if flops >= size:
            return f"{flops / size:.2f} {unit}"
    return f"{flops / 1e9:.3f} GFLOP"


def summary(group: Group) -> dict[str, Any]:
    """One group in plain data."""
    repeated, opening = repeated_opening(group.texts)
    judges = group.records[0]["harmful"]
    return {
        "data": group.data,
        "attack": group.attack,
        "method": group.method,
        "variant": group.variant,
        "prompts": len(group.records),
        "attack_success": {judge: group.success(judge).mean for judge in judges},
        "interval": {judge: [group.success(judge).low, group.success(judge).high] for judge in judges},
        "flops": group.flops,
        "seconds": group.cost("seconds"),
        "policy_tokens": group.cost("policy_tokens"),
        "reward_tokens": group.cost("reward_tokens"),
        "policy_calls": group.cost("policy_calls"),
        "reward_calls": group.cost("reward_calls"),
        "answered": group.answered,
        "refusal_openings": refusal_openings(group.texts),
        "repeated_opening": [repeated, opening],
        "distinct": [distinct(group.texts, n) for n in (1, 2, 3)],
        "log_probability": group.likelihood,
        "length": group.length,
    }


def overview(groups: Sequence[Group], judge: str) -> Table:
    """Every group: attack success, compute, calls."""
    others = [name for name in groups[0].records[0]["harmful"] if name != judge]
    rows = [
        (
            f"`{one.method}`" + (f", {one.variant}" if one.variant else ""),
            str(len(one.records)),
            interval(one.success(judge)),
            *(share(one.success(name).mean) for name in others),
            compute(one.flops),
            f"{one.cost('policy_calls'):.0f}",
            f"{one.cost('reward_calls'):.0f}",
        )
        for one in groups
    ]
    header = ("method", "prompts", f"attack success [95 %], {judge}", *others, "compute per prompt")
    return Table("Every run", (*header, "policy calls", "reward calls"), tuple(rows))


def matched(curves: Sequence[Curve], reference: Group, judge: str) -> Table:
    """Table 1: all methods at the compute of one group, and how far each is from it, prompt by prompt."""
    base, rows = reference.harmful(judge), []
    for curve in curves:
        found = curve.at(reference.flops, judge)
        if found is None:
            cost = compute(curve.groups[0].flops)
            rows.append((math.inf, (title(curve.name), f"costs at least {cost}", "", "")))
            continue
        against = "" if curve.name == reference.family else signed(bootstrap(found - base))
        used = min(reference.flops, curve.groups[-1].flops)
        rows.append((found.mean(), (title(curve.name), compute(used), interval(bootstrap(found)), against)))
    rows.sort(key=lambda row: -row[0])
    name = f"{title(reference.method)}, {_budget(reference.method)}"
    return Table(
        f"Table 1. Attack success at the compute of {name}: {compute(reference.flops)}",
        ("method", "compute per prompt", "attack success [95 %]", "against " + name),
        tuple(row for _, row in rows),
        "Between two budgets of a method by the logarithm of their compute; a method that was not run at so much "
        "stands at its most expensive run. Intervals and paired differences: bootstrap over prompts.",
    )


def _budget(method: str) -> str:
    value = budget(method)
    return "default budget" if value is None else f"budget {value:g}"


def scaling_sets(groups: Sequence[Group]) -> list[tuple[str, list[Group]]]:
    """Groups that differ in nothing but children or lookahead: (what differs, groups by its value)."""
    found: dict[tuple[str, str], list[Group]] = {}
    for one in groups:
        name, _, options = one.method.partition(":")
        for varied in SCALED:
            if option(one.method, varied) is not None:
                rest = [o for o in options.split(",") if o.partition("=")[0] != varied]
                found.setdefault((varied, f"{name}:{','.join(rest)}"), []).append(one)
    sets = [(varied, members) for (varied, _), members in found.items() if len(members) > 1]
    return [(varied, sorted(members, key=lambda g: float(option(g.method, varied) or 0))) for varied, members in sets]


def efficiency(groups: Sequence[Group], judge: str, limit: float | None = None) -> Table | None:
    """Table 2: scaling efficiency by children and lookahead; None where nothing varies them."""
    rows = []
    for varied, members in scaling_sets(groups):
        bound = limit or LIMIT * max(g.flops for g in members)
        for one in members:
            success = one.success(judge)
            rows.append((
                title(one.method.partition(":")[0]),
                f"{varied} {option(one.method, varied)}",
                _others(one.method, varied),
                compute(one.flops),
                interval(success),
                compute(bound),
                f"{scaling_efficiency(one.flops, success.mean, bound):.3f}",
            ))  # fmt: skip
    if not rows:
        return None
    return Table(
        "Table 2. Scaling efficiency, log(limit / compute) / attack success",
        ("method", "exploration", "other options", "compute per prompt", "attack success [95 %]", "limit", "ScalEff"),
        tuple(rows),
    )


def _others(method: str, varied: str) -> str:
    options = method.partition(":")[2].split(",")
    return ", ".join(o.replace("_", " ").replace("=", " ") for o in options if o.partition("=")[0] != varied)


def by_width(groups: Sequence[Group], judge: str) -> Table | None:
    """Table 3: attack success of Saffron by search width, next to the undefended policy."""
    families = list(dict.fromkeys(g.family for g in groups if g.method.partition(":")[0] == "saffron"))
    widths = sorted({g.budget for g in groups if g.family in families and g.budget is not None})
    if not widths:
        return None
    undefended = next((g for g in groups if g.method.partition(":")[0] == "greedy"), None)
    rows = []
    for name in families:
        found = {g.budget: interval(g.success(judge)) for g in groups if g.family == name}
        start = interval(undefended.success(judge)) if undefended else ""
        rows.append((title(name), start, *(found.get(width, "") for width in widths)))
    return Table(
        "Table 3. Attack success by search width",
        ("", "no defence", *(f"N = {width:g}" for width in widths)),
        tuple(rows),
    )


def utility(groups: Iterable[Group]) -> Table:
    """What is left of the answers: a defence that always refuses is safe and useless."""
    rows = []
    for one in groups:
        repeated, opening = repeated_opening(one.texts)
        rows.append((
            f"`{one.method}`",
            f"{one.data}, {one.attack}",
            "" if one.answered is None else interval(wilson([float(r["answered"]) for r in one.records])),
            share(refusal_openings(one.texts)),
            f"{share(repeated)} “{opening}”",
            *(share(distinct(one.texts, n)) for n in (1, 2, 3)),
            f"{one.likelihood:.2f}",
            f"{one.length:.1f}",
        ))  # fmt: skip
    return Table(
        "Answers",
        ("method", "prompts", "answered [95 %]", "open with a refusal", "most frequent opening", "distinct-1",
         "distinct-2", "distinct-3", "log-probability per token", "tokens"),
        tuple(rows),
    )  # fmt: skip
