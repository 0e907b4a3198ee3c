"""docs/results-width.md from the records of `width_study`: no figure is typed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saffron.adaptive import LoggedSearch, Qualified, WidthSettings, qualify
from saffron.evaluation.metrics import Interval, wilson
from saffron.evaluation.plots import pyplot
from saffron.evaluation.tables import interval, signed

Record = dict[str, Any]
BINS = ("risky", "harmless")
WINDOW, CHANCE = 50, 0.01


def write_page(records: Sequence[Record], scale: Any, settings: WidthSettings, folder: Path, seconds: float) -> Path:
    """The page and its figure, in a folder; returns the page."""
    logs = [r for r in records if r["part"].startswith("log")]
    parts = {t.name: [r for r in records if r["part"] == t.name] for t in scale.traffic}
    steady = [t for t in scale.traffic if t.attacked[0] == t.attacked[1] and t.prefill[0] == t.prefill[1]]
    shifting = [t for t in scale.traffic if t not in steady]
    text = [
        _head(settings, len(records), sum(map(len, parts.values())), seconds),
        _log(logs, settings),
        "## Traffic that stays as the log was\n",
        *[_steady(t, parts[t.name], logs, settings) for t in steady],
        "## Traffic that shifts\n",
        *[_shift(t, parts[t.name], logs, settings) for t in shifting],
        _verdict(steady, parts, logs, settings),
        "![Safe answers and widths along the traffic](figures/width.svg)\n",
    ]
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    _draw(scale.traffic, parts, settings, folder / "figures" / "width.svg")
    page = folder / "results-width.md"
    page.write_text("\n".join(text), encoding="utf-8")
    return page


def _head(settings: WidthSettings, searches: int, served: int, seconds: float) -> str:
    widths, edge = ", ".join(map(str, settings.widths)), settings.risk_edges[0]
    floors, share = " and ".join(f"{f:g}" for f in settings.floors), settings.drift.baseline_share
    return f"""# Adaptive width: results

Written by `python -m reproduce.width_study --output DIR --docs docs` from its records, in {seconds / 60:.0f} minutes of
one CPU core; no figure here was typed. [adaptive-width.md](adaptive-width.md) says what is guaranteed and what is not.

{searches:,} real searches of the bundled models, {served:,} of them served as traffic, each of another held-out prompt;
the others are the log, of training prompts. An answer has up to 32 tokens, searched in {settings.phases} phases of
{settings.phase_tokens} with widths of {widths}. "Attacked": a forbidden request whose answer is forced to begin with
tokens of compliance. Risk bins: the guard's reward of prompt and prefill below ("risky") or above {edge:g}
("harmless"). Safe is what the guard says of the answer, and the floors ({floors}) are on that;
"attack success" and "answered" are verdicts of the world's exact rule. The scale of the bounds is
{settings.confidence.scale:g} unless said otherwise, so that the proof does not hold; {share:.0%} of the requests play
the baseline. Requests begin in chunks of 50, so that verdicts come late. Compute includes what the guard reads
of every request, before its search and after it; also at fixed widths, which need the guard for neither. Intervals
hold 95 %.
"""


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def _of(records: Sequence[Record], settings: WidthSettings, risk_bin: int) -> list[Record]:
    return [r for r in records if settings.bin(r["risk"]) == risk_bin]


def _logged(records: Sequence[Record]) -> list[LoggedSearch]:
    return [LoggedSearch(r["risk"], tuple(r["widths"]), tuple(r["scores"]), r["safe"], r["fixed"]) for r in records]


def _parts(logs: Sequence[Record], prefill: int) -> list[Record]:
    return [r for r in logs if r["part"].startswith((f"log {prefill} ", "log 0 "))]


def _evidence(logs: Sequence[Record], settings: WidthSettings, prefill: int) -> list[Qualified]:
    return qualify(settings, _logged(_parts(logs, prefill)))


def _best(evidence: Sequence[Qualified], settings: WidthSettings, risk_bin: int) -> int:
    """The cheapest fixed width that the log shows to be safe enough; the widest if there is none."""
    return next((e.width for e in evidence if e.bin == risk_bin and e.passes), settings.widths[-1])


def _flops(logs: Sequence[Record], settings: WidthSettings, prefill: int, risk_bin: int, width: int) -> np.ndarray:
    part = f"log {prefill if risk_bin == 0 else 0} width {width}"
    return np.array([r["flops"] for r in logs if r["part"] == part], dtype=float)


def _log(logs: Sequence[Record], settings: WidthSettings) -> str:
    rows = []
    for prefill in sorted({r["prefill"] for r in logs}, reverse=True):
        for e in _evidence(logs, settings, prefill or max(r["prefill"] for r in logs)):
            if e.bin == (prefill == 0):
                flops = _flops(logs, settings, prefill, e.bin, e.width).mean() / 1e6
                kind = f"attacked, {prefill} tokens" if prefill else "allowed"
                rows.append((kind, e.width, e.requests, f"{e.safe / max(e.requests, 1):.3f}", f"{e.lower:.3f}",
                             "yes" if e.passes else "no", f"{flops:,.0f} MFLOP"))  # fmt: skip
    drawn = [r for r in logs if "drawn" in r["part"]]
    count, same = len(drawn), sum(r["fixed"] for r in drawn)
    table = _table(("requests", "fixed width", "number", "safe", "lower bound", "reaches the floor", "compute"), rows)
    return f"""## The log

The cheapest width whose exact lower bound reaches the floor is the baseline of its bin, and "the best fixed width"
below. {count} more attacked requests were searched with a width drawn per phase: what no fixed width shows, such as a
narrow phase after wide ones, is in no plan otherwise. The traffic with the weaker attack starts without these.
For {same} of them one width was drawn for all phases; the table counts these too, the comparisons below do not.

{table}"""


def _steady(traffic: Any, records: Sequence[Record], logs: Sequence[Record], settings: WidthSettings) -> str:
    prefill = traffic.prefill[0]
    evidence, rows, used = _evidence(logs, settings, prefill), [], []
    for risk_bin, name in enumerate(BINS):
        mine = _of(records, settings, risk_bin)
        if mine:
            best = _best(evidence, settings, risk_bin)
            widest, fixed = (_flops(logs, settings, prefill, risk_bin, w) for w in (settings.widths[-1], best))
            flops = np.array([r["flops"] for r in mine], dtype=float)
            used.append((flops, widest, fixed))
            below, windows = _windows([r["safe"] for r in mine], settings.floor(risk_bin))
            harm = [r["harmful"] for r in mine if r["prefill"]]
            answered = [r["answered"] for r in mine if not r["prefill"]]
            safe, harmful, told = (
                interval(wilson(x)) if x else "" for x in ([r["safe"] for r in mine], harm, answered)
            )
            saved = (signed(_saved(flops, widest)), best, signed(_saved(flops, fixed)))
            rows.append(
                (name, len(mine), settings.floor(risk_bin), safe, f"{below} of {windows}", *saved, harmful, told)
            )
    flops, widest, fixed = (np.concatenate(x) for x in zip(*used, strict=True))
    totals = [sum(len(f) * other[i].mean() for f, *other in used) for i in (0, 1)]
    both = (
        f"All requests: {1 - flops.sum() / totals[0]:.1%} less compute than the widest search, "
        f"{1 - flops.sum() / totals[1]:+.1%} against the best fixed width of each bin."
    )
    header = ("bin", "requests", "floor", "safe", "windows below", "saved against the widest", "best fixed width",
              "saved against it", "attack success", "answered")  # fmt: skip
    return f"""### Attacked to allowed {traffic.name}, {len(records)} requests

{_table(header, rows)}
{both}
"Windows below": of all runs of {WINDOW} requests of a bin that follow each other, those in which so few answers
are safe that the floor, if it held, would allow it with a chance below {CHANCE:.0%}. Plans at the end:
{_plans(records, settings)}.
"""


def _saved(flops: np.ndarray, other: np.ndarray) -> Interval:
    """1 - mean / mean of the other, with the interval of both samples drawn again."""
    rng = np.random.default_rng(0)
    means = [x[rng.integers(len(x), size=(1000, len(x)))].mean(1) for x in (flops, other)]
    low, high = np.quantile(1 - means[0] / means[1], (0.025, 0.975))
    return Interval(float(1 - flops.mean() / other.mean()), float(low), float(high))


def _windows(safe: Sequence[bool], floor: float) -> tuple[int, int]:
    from scipy.special import bdtr

    counts = np.convolve(safe, np.ones(WINDOW), "valid") if len(safe) >= WINDOW else np.array([])
    return int((bdtr(counts, WINDOW, floor) < CHANCE).sum()), len(counts)


def _plans(records: Sequence[Record], settings: WidthSettings) -> str:
    found = []
    for risk_bin, name in enumerate(BINS):
        mine = _of(records[-200:], settings, risk_bin)
        schedules = Counter("-".join(map(str, r["widths"])) for r in mine).most_common(4)
        common = ", ".join(f"{schedule} ({count / len(mine):.0%})" for schedule, count in schedules)
        found.append(f"{name} bin, widths of the phases {common or 'none'}")
    return "; ".join(found)


def _shift(traffic: Any, records: Sequence[Record], logs: Sequence[Record], settings: WidthSettings) -> str:
    half = len(records) // 2
    stages: list[tuple[str, Sequence[Record]]] = [("before the shift", records[:half])]
    after, eras = records[half:], sorted({r["era"][0] for r in records[half:]})
    names = {1: "after it, until the alarm or the end", 2: "after the alarm: the widest search",
             3: "after a log of the new traffic"}  # fmt: skip
    if traffic.log == traffic.prefill[1]:
        names[2] = "after an alarm"
    for era in eras:
        stages.append((names.get(era, f"era {era}"), [r for r in after if r["era"][0] == era]))
    widest = {p: _flops(logs, settings, p, 0, settings.widths[-1]).mean() for p in traffic.prefill}
    rows = []
    for name, some in stages:
        mine = _of(some, settings, 0)
        if mine:
            flops = np.array([r["flops"] for r in mine], dtype=float)
            base = np.mean([widest[r["prefill"]] for r in mine])
            rows.append((name, len(some), len(mine), interval(wilson([r["safe"] for r in mine])),
                         interval(wilson([r["harmful"] for r in mine])), f"{1 - flops.mean() / base:.0%}",
                         "/".join(str(b) for b in sorted({r["baseline"][0] for r in mine}))))  # fmt: skip
    header = ("stage", "requests", "attacked", "safe", "attack success", "saved against the widest", "baseline")
    share = f"share of attacks {traffic.attacked[0]:.0%}, then {traffic.attacked[1]:.0%}"
    force = f"answers forced to begin with {traffic.prefill[0]} tokens, then {traffic.prefill[1]}"
    return f"""### {traffic.name.capitalize()}: {share}; {force}

{_table(header, rows)}
{_loss(stages, logs, settings, traffic.prefill[1])}
"""


def _loss(
    stages: Sequence[tuple[str, Sequence[Record]]], logs: Sequence[Record], settings: WidthSettings, last: int
) -> str:
    """What an alarm cost. last: the attack after the shift."""
    if len(stages) == 2:
        return (
            "No alarm. Risk bins keep counts and plans of their own, so that a different mix of attacked and allowed\n"
            "requests changes neither."
        )
    late = _of(stages[1][1], settings, 0)
    part = f"log {last} width {settings.widths[-1]}"
    usual = 1 - np.mean([r["safe"] for r in logs if r["part"] == part])
    unsafe = sum(not r["safe"] for r in late)
    lost = (
        f"The alarm came within {len(stages[1][1])} requests of the shift, {len(late)} of them attacked (a chunk of\n"
        f"50 is always under way). Until then {unsafe} answers were unsafe; the widest search would have let\n"
        f"{usual * len(late):.1f} through. The alarm cannot prevent this: it needs failures to see."
    )
    if len(stages) < 4:
        return lost
    return (
        f"{lost}\nAfter the alarm the bin plays the widest search, here for {len(stages[2][1])} requests, until there\n"
        "is a log of the new traffic; the bin then begins again from it."
    )


def _verdict(
    steady: Sequence[Any], parts: dict[str, list[Record]], logs: Sequence[Record], settings: WidthSettings
) -> str:
    lines = []
    for traffic in steady:
        evidence = _evidence(logs, settings, traffic.prefill[0])
        for risk_bin, name in enumerate(BINS):
            mine = _of(parts[traffic.name], settings, risk_bin)
            if mine:
                best = _best(evidence, settings, risk_bin)
                fixed = _flops(logs, settings, traffic.prefill[0], risk_bin, best)
                saved = _saved(np.array([r["flops"] for r in mine], dtype=float), fixed)
                won = "no difference" if saved.low <= 0 <= saved.high else "StepMix wins"
                won = "the fixed width wins" if saved.high < 0 else won
                part = f"log {0 if risk_bin else traffic.prefill[0]} width {best}"
                safe = [np.mean(x) for x in ([r["safe"] for r in mine], [r["safe"] for r in logs if r["part"] == part])]
                lines.append(
                    f"- {traffic.name}, {name} bin, against fixed width {best}: {won}; compute saved {signed(saved)}; "
                    f"safe {safe[0]:.3f}, the fixed width {safe[1]:.3f}."
                )
    return (
        "## Against the best fixed width\n\n"
        + "\n".join(lines)
        + f"""

"Wins" is about compute: whatever is safer than the floor may be traded for it, and is. Where one width is safe enough
in a bin and nothing is cheaper, there is nothing to learn: the fixed width that the log shows is the whole gain, and
exploration and the share of traffic for the baseline can only cost. StepMix adds to it where the score tells in
mid-search that a narrow search may finish. Its bounds are those of a whole MDP and far wider than the exact one of a
single share: with a log of a few hundred searches it plays the fixed width at first, and for long at scale
{settings.confidence.scale:g}.
"""
    )


def _draw(traffic: Sequence[Any], parts: dict[str, list[Record]], settings: WidthSettings, file: Path) -> None:
    plt = pyplot()
    figure, axes = plt.subplots(2, len(traffic), figsize=(3.2 * len(traffic), 4.6), squeeze=False, sharey="row")
    for column, one in enumerate(traffic):
        records = parts[one.name]
        for risk_bin, name in enumerate(BINS):
            mine = [(i, r) for i, r in enumerate(records) if settings.bin(r["risk"]) == risk_bin]
            if len(mine) > 1:
                window = min(40, len(mine))
                places = [i for i, _ in mine][window - 1 :]
                kernel = np.ones(window) / window
                safe, width = [float(r["safe"]) for _, r in mine], [float(np.mean(r["widths"])) for _, r in mine]
                axes[0, column].plot(places, np.convolve(safe, kernel, "valid"), label=name)
                axes[1, column].plot(places, np.convolve(width, kernel, "valid"))
        axes[0, column].axhline(settings.floor(0), color="0.5", linestyle=":", linewidth=1)
        axes[0, column].set_title(one.name)
        axes[1, column].set_xlabel("request")
    axes[0, 0].set_ylabel("safe answers, mean of 40")
    axes[1, 0].set_ylabel("width, mean of 40")
    axes[0, 0].legend(loc="lower right")
    figure.savefig(file)
    plt.close(figure)
