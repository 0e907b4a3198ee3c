"""docs/results.md from the runs of `reproduce.runs`: tables, figures, and what they say of SAFFRON-1's claims."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from reproduce.claims import (
    Saving,
    Trend,
    at_every_budget,
    compare,
    saving,
    trends,
    verdict,
    with_suffix,
)
from reproduce.runs import (
    ATTACK,
    BASELINES,
    CHANGES,
    JUDGE,
    NUCLEUS,
    WIDE,
    Results,
    Scale,
    exploration,
    overlap,
    representatives,
)
from saffron.evaluation import plots
from saffron.evaluation.metrics import Curve, Group, curves, group, option
from saffron.evaluation.store import Record
from saffron.evaluation.tables import (
    TITLES,
    Table,
    by_width,
    compute,
    efficiency,
    interval,
    matched,
    share,
    utility,
)

SUFFIX = 80  # tokens of Llama Guard's template behind a response, which each call of it reads


@dataclass(frozen=True)
class Material:
    """Results by what they are of. `sweeps` are the curves of one nucleus, by method."""

    scale: Scale
    results: Results

    @cached_property
    def _all(self) -> list[Group]:
        return group(self.results.main)

    def groups(self, attack: str = ATTACK, data: str = "world", variant: str = "") -> dict[str, Group]:
        place = (attack, data, variant)
        return {one.method: one for one in self._all if (one.attack, one.data, one.variant) == place}

    def sweeps(self, nucleus: str = NUCLEUS, records: Sequence[Record] | None = None) -> dict[str, Curve]:
        same = group(records, attack=ATTACK, data="world", variant="") if records else self.groups().values()
        found = curves(same)
        by_name = {curve.name: curve for curve in found}
        options = {name: nucleus for name in ("best-of-n", "saffron")}
        options |= {name: given.replace(NUCLEUS, nucleus) for name, given in self.results.chosen.items()}
        wanted = {name: f"{name}:{given}" for name, given in options.items()}
        wanted |= {f"{name}-mrm": f"{name}-mrm:{options[name]}" for name in ("best-of-n", "mcts")}
        return {name: by_name[family] for name, family in wanted.items() if family in by_name}


def write_pages(scale: Scale, results: Results, out: Path, mrm: dict[str, str], context: dict[str, Any]) -> Path:
    """Writes results.md and figures/ into a folder; returns the page.

    Args:
        mrm: what `study` found.
        context: command and duration, for the head of the page.
    """
    material = Material(scale, results)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    _draw(material, out / "figures")
    found = _main(material) | _more(material) | _cost(material)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    text = environment.get_template("results.md").render(**found, mrm=mrm, machine=machine(), **context)
    page = out / "results.md"
    page.write_text(text.rstrip() + "\n", encoding="utf-8")
    return page


def machine() -> str:
    """What times were taken on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return f"{processor}, torch {torch.__version__.partition('+')[0]}, Python {platform.python_version()}"


def _main(material: Material) -> dict[str, Any]:
    """The comparison of methods, at both nuclei, and the verdicts on it."""
    sweeps, wide = material.sweeps(), material.sweeps(WIDE)
    samples, saffron = sweeps["best-of-n"], sweeps["saffron"]
    reference = next(g for g in samples.groups if g.budget == 32)
    plain = [c for name, c in sweeps.items() if not name.endswith("-mrm")]
    guard = _guard_flops()
    costly = material.sweeps(records=with_suffix(material.results.main, SUFFIX - guard["suffix"], guard["token"]))
    return {
        "prompts": material.scale.prompts,
        "tuning_prompts": material.scale.tuning,
        "overlap": overlap(material.scale),
        "chosen": {TITLES[name]: _words(given) for name, given in material.results.chosen.items()},
        "tuning": _tuning(material.results.tuning),
        "matched": matched(plain, reference, JUDGE).markdown(),
        "budgets": _budgets(sweeps),
        "saffron_below": verdict(compare(saffron, samples, JUDGE)),
        "saffron_below_each": {TITLES[n]: verdict(compare(saffron, sweeps[n], JUDGE)) for n in BASELINES},
        "samples_below": {TITLES[name]: verdict(compare(samples, sweeps[name], JUDGE)) for name in BASELINES},
        "saving_words": _saving(saving(saffron, reference, JUDGE)),
        "baselines_differ": any(not c.below for n in BASELINES for c in compare(samples, sweeps[n], JUDGE)),
        "wide_budgets": _budgets(wide),
        "wide_saffron_below": verdict(compare(wide["saffron"], wide["best-of-n"], JUDGE)),
        "wide_samples_below": {T: verdict(compare(wide["best-of-n"], wide[n], JUDGE)) for n, T in _baselines()},
        "wide_saving_words": _saving(
            saving(wide["saffron"], next(g for g in wide["best-of-n"].groups if g.budget == 32), JUDGE)
        ),
        "guard": guard,
        "suffix": SUFFIX,
        "costly_budgets": _budgets(costly),
        "costly_below": {TITLES[n]: verdict(compare(costly["best-of-n"], costly[n], JUDGE)) for n in BASELINES},
        "costly_saffron": verdict(compare(costly["saffron"], costly["best-of-n"], JUDGE)),
        "calls": _calls(sweeps),
        "mrm_budgets": at_every_budget(
            samples, [sweeps[n] for n in ("best-of-n-mrm", "mcts", "mcts-mrm", "saffron")], JUDGE,
            "With the MRM in the PRM's place, at the compute of Best-of-N with the PRM",
        ).markdown(),
    }  # fmt: skip


def _saving(found: Saving) -> str:
    """How a claim of a third fares."""
    if found.ratio is None or found.flops is None:
        return f"never reaches its {found.success:.3f}"
    holds = "holds" if found.ratio.mean <= 1 / 3 else "does not hold"
    low, high = (f"{value:.2f}" for value in (found.ratio.low, found.ratio.high))
    return (
        f"{holds}: {found.success:.3f} takes {compute(found.flops)} instead of {compute(found.reference)}, "
        f"{found.ratio.mean:.2f} of it [{low}, {high}]"
    )


def _trend(trend: Trend) -> str:
    """How the claim of falling efficiency fares."""
    steps = ", ".join(f"{value}: {e:.2f}" for value, e in zip(trend.values, trend.efficiency, strict=True))
    limits = (
        "at every limit from 1.1 to 100 times the most expensive run" if trend.robust else "at other limits not always"
    )
    return f"{'holds' if trend.falls else 'does not hold'} ({steps}; lower at the end {limits})"


def _baselines() -> list[tuple[str, str]]:
    return [(name, TITLES[name]) for name in BASELINES]


def _budgets(sweeps: dict[str, Curve]) -> str:
    others = [sweeps[name] for name in ("saffron", *BASELINES) if name in sweeps]
    heading = "Attack success at the compute of each Best-of-N (and the paired difference to it [95 %])"
    return at_every_budget(sweeps["best-of-n"], others, JUDGE, heading).markdown()


def _words(options: str) -> str:
    return ", ".join(o.replace("_", " ").replace("=", " ") for o in options.split(",") if not o.startswith("top_p"))


def _guard_flops() -> dict[str, int]:
    """What a call of the bundled guard reads behind a response, and what a token of it costs."""
    from saffron.models.bundled import load_bundled

    guard = load_bundled(device="cpu").guard
    empty, one = guard.sequence("x", []), guard.sequence("x", [0])
    suffix = next(i for i in range(len(empty)) if empty[len(empty) - 1 - i :] != one[len(one) - 1 - i :])
    return {"suffix": suffix, "token": guard.flops.per_token}


def _calls(sweeps: dict[str, Curve]) -> str:
    """How often the reward model was asked, and how far the nucleus let a method branch."""
    rows = []
    for name in ("best-of-n", *BASELINES, "saffron"):
        for one in sweeps[name].groups:
            children = option(one.method, "children")
            rows.append((
                f"`{one.method}`", f"{one.cost('policy_calls'):.0f}", f"{one.cost('reward_calls'):.0f}",
                f"{int(children) * 32 * int(one.budget or 1)}" if name == "beam" and children else "",
                interval(one.success(JUDGE)), compute(one.flops),
            ))  # fmt: skip
    return Table(
        "Calls per prompt",
        ("method", "policy calls", "reward calls", "if all beams had all children", "attack success [95 %]",
         "compute per prompt"),
        tuple(rows),
    ).markdown()  # fmt: skip


def _tuning(records: list[Record]) -> str:
    """Every candidate, at the two budgets it was tried at."""
    rows = [
        (f"`{one.method}`", interval(one.success(JUDGE)), compute(one.flops))
        for one in sorted(group(records), key=lambda g: (g.method.partition(":")[0], g.family, g.flops))
    ]
    return Table("Candidates", ("method", "attack success [95 %]", "compute per prompt"), tuple(rows)).markdown()


def _more(material: Material) -> dict[str, Any]:
    """Exploration, width, ablations, attacks, answers."""
    groups = material.groups()
    explored = [groups[m] for m in exploration(material.scale, material.results.chosen)]
    ranking = [groups[f"saffron:width=16,{NUCLEUS},{change}"] for change in CHANGES]
    nuclei = [g for m, g in groups.items() if _varies_nucleus(m)]
    unmasked = list(material.groups(variant="no unseen mask").values())
    table, found = efficiency(explored, JUDGE), trends(explored, JUDGE)
    width = by_width(
        [groups["greedy"], *material.sweeps()["saffron"].groups, *material.sweeps(WIDE)["saffron"].groups], JUDGE
    )
    allowed = material.groups("none", "world-allowed")
    shown = ["greedy", f"sample:{NUCLEUS}", *representatives(material.scale, material.results.chosen)]
    assert table is not None and width is not None
    return {
        "efficiency": table.markdown(),
        "trends": found,
        "trend_words": [_trend(trend) for trend in found],
        "width": width.markdown(),
        "ablations": _plain([groups[f"saffron:width=16,{NUCLEUS}"], *ranking]),
        "nuclei": _plain(
            sorted(nuclei, key=lambda g: (g.method.partition(":")[0], float(option(g.method, "top_p") or 0)))
        ),
        "unmasked": _plain([x for g in unmasked for x in (groups[g.method], g)]),
        "lengths": _attacks(
            material, sorted({r["attack"] for r in material.results.main if _is_prefill(r)}, key=_length)
        ),
        "wraps": _attacks(material, ["none", "role-play", "suffix", "role-play+prefill:10", "suffix+prefill:10"]),
        "allowed": utility(allowed[m] for m in shown).markdown(),
        "answers": utility(groups[m] for m in shown).markdown(),
    }


def _varies_nucleus(method: str) -> bool:
    return (
        method.startswith(("saffron:width=16,top_p", "best-of-n:n=16,top_p"))
        and method.count(",") == 1
        or method.startswith("beam:width=1,children=8,step_tokens=1,top_p")
    )


def _is_prefill(record: Record) -> bool:
    return str(record["attack"]).startswith("prefill:")


def _length(attack: str) -> int:
    return int(attack.removeprefix("prefill:"))


def _plain(groups: Iterable[Group]) -> str:
    rows = [
        (
            f"`{one.method}`" + (f", {one.variant}" if one.variant else ""),
            interval(one.success(JUDGE)),
            share(one.success("prm").mean),
            compute(one.flops),
            f"{one.likelihood:.2f}",
        )
        for one in groups
    ]
    header = ("method", "attack success [95 %]", "by the guard", "compute per prompt", "log-probability per token")
    return _untitled(header, rows)


def _attacks(material: Material, attacks: Sequence[str]) -> str:
    methods = ["greedy", f"best-of-n:n=16,{NUCLEUS}", f"saffron:width=16,{NUCLEUS}"]
    found = {attack: material.groups(attack) for attack in attacks}
    rows = [
        (f"`{attack}`", *(interval(found[attack][m].success(JUDGE)) for m in methods),
         *(share(found[attack][m].success("prm").mean) for m in methods))
        for attack in attacks
    ]  # fmt: skip
    names = ("no defence", "Best-of-16", "Saffron, N = 16")
    header = ("attack", *names, *(f"{name}, by the guard" for name in names))
    return _untitled(header, rows)


def _cost(material: Material) -> dict[str, Any]:
    """Wall time by width, and with and without the trie cache."""
    found = {(g.method, g.variant): g for g in group(material.results.timing)}
    undefended = found["greedy", ""]
    rows = []
    for one in [undefended, *(g for g in found.values() if g.method.startswith("saffron") and not g.variant)]:
        times = _milliseconds(one)
        name = "undefended" if one is undefended else f"N = {one.budget:g}"
        slower, dearer = times[0] / _milliseconds(undefended)[0], one.flops / undefended.flops
        rows.append((name, *(f"{t:.0f}" for t in times), f"{slower:.1f}", compute(one.flops), f"{dearer:.1f}"))
    header = ("", "ms per prompt, median", "p20", "p80", "x undefended", "compute", "x undefended")
    rows.sort(key=lambda row: 0 if row[0] == "undefended" else int(row[0].split()[-1]))
    return {"timing": _untitled(header, rows), "cache": _cache(found), "timed": material.scale.timed}


def _cache(found: dict[tuple[str, str], Group]) -> str:
    rows = []
    for (method, variant), one in found.items():
        if variant:
            trie = found[method, ""]
            same = sum(a["text"] == b["text"] for a, b in zip(trie.records, one.records, strict=True))
            quick, slow = _milliseconds(trie)[0], _milliseconds(one)[0]
            rows.append((
                f"`{method}`", compute(trie.flops), compute(one.flops), f"{one.flops / trie.flops:.1f}",
                f"{quick:.0f}", f"{slow:.0f}", f"{slow / quick:.1f}", f"{same} of {len(one.records)}",
            ))  # fmt: skip
    return _untitled(("method", "compute, trie", "without", "x", "ms, trie", "without", "x", "same answer"), rows)


def _untitled(header: Sequence[str], rows: Iterable[tuple[str, ...]]) -> str:
    return Table("", tuple(header), tuple(rows)).markdown().removeprefix("****\n\n")


def _milliseconds(one: Group) -> tuple[float, float, float]:
    seconds = [r["cost"]["seconds"] * 1e3 for r in one.records]
    median, low, high = np.quantile(seconds, (0.5, 0.2, 0.8))
    return float(median), float(low), float(high)


def _draw(material: Material, folder: Path) -> None:
    undefended = material.groups()["greedy"]
    for nucleus, stem in ((NUCLEUS, "scaling"), (WIDE, "scaling-wide")):
        sweeps = material.sweeps(nucleus)
        shown = [sweeps[name] for name in ("saffron", "best-of-n", *BASELINES)]
        text = f"Attack success over compute ({nucleus.replace('=', ' ').replace('_', '-')})"
        plots.scaling(shown, JUDGE, [folder / f"{stem}.svg"], text, undefended)
    sweeps = material.sweeps()
    conventional = [sweeps[name] for name in ("best-of-n", *BASELINES)]
    plots.scaling(conventional, JUDGE, [folder / "dilemma.svg"], "Search with a PRM", undefended)
    both = [c for name, c in sweeps.items() if name.removesuffix("-mrm") in ("best-of-n", "mcts", "saffron")]
    plots.scaling(both, JUDGE, [folder / "mrm.svg"], "PRM (solid) and MRM (dashed)", undefended)
    attacks = sorted({r["attack"] for r in material.results.main if _is_prefill(r)}, key=_length)
    methods = {
        "no defence": "greedy",
        "Best-of-16": f"best-of-n:n=16,{NUCLEUS}",
        "Saffron, N = 16": f"saffron:width=16,{NUCLEUS}",
    }
    points = {
        name: [(float(_length(a)), float(material.groups(a)[m].harmful(JUDGE).mean())) for a in attacks]
        for name, m in methods.items()
    }
    files, names = [folder / "prefill.svg"], {"x": "prefilled tokens", "y": "attack success rate"}
    plots.lines(points, files, heading="Prefilling", **names, ylim=(-0.02, 1.02))
