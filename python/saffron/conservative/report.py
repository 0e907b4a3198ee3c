"""Tables and figures of the experiments in `experiment.py`, as one page."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saffron.conservative.experiment import ETA, PRACTICAL, Record
from saffron.errors import MissingDependencyError, outside
from saffron.storage.folders import PICTURE, check_replaceable, write_atomically, write_replaceable

# Okabe and Ito's colours, which people who see few colours can tell apart.
COLOURS = {
    "stepmix": "#d55e00", "epsmix": "#0072b2", "ucbvi": "#009e73", "all-or-nothing": "#cc79a7", "baseline": "#7f7f7f",
    "dope": "#e69f00", "optpess-lp": "#56b4e9",
}  # fmt: skip
SCALE_OF_PROGRAMS = 0.03  # that of DOPE and OptPess-LP in the figure
Rows = list[list[str]]


def pyplot() -> Any:
    """Matplotlib, drawing to files.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "plots") from error
    matplotlib.use("agg")
    matplotlib.rcParams["svg.hashsalt"] = "saffron"  # the same figure is the same file
    import matplotlib.pyplot as plt

    return plt


def check(folder: Path) -> None:
    """Raises `ConfigError` where `write` would not write over what lies there."""
    if (folder / PAGE).exists():  # of ours, and so are the figures that it shows
        check_replaceable("output", folder / PAGE, MARK)
        return
    for file in (folder / name for name in FIGURES):
        if file.exists():
            check_replaceable("output", file, PICTURE)


def write(records: Sequence[Record], folder: Path) -> Path:
    """Writes results-conservative.md and figures/conservative-*.svg; sections without records are left out."""
    figures = folder / "figures"
    with outside(f"{figures}: cannot be made"):
        figures.mkdir(parents=True, exist_ok=True)
    parts = [_HEAD]
    for name, section in (
        ("paper", _paper), ("proof", _proof), ("scale", _scale), ("floor", _floor), ("offline", _offline)
    ):  # fmt: skip
        chosen = [record for record in records if record["experiment"] == name]
        if chosen:
            parts.append(section(chosen, figures))
    page = folder / PAGE
    write_replaceable(page, "\n".join(parts).encode(), MARK)
    return page


def mean_interval(values: Sequence[float] | np.ndarray, of: Callable[[np.ndarray], np.ndarray] | None = None) -> str:
    """A mean over trials with the interval that holds 95 % of 2,000 bootstrap means; `of` maps drawn trials to
    numbers."""
    array = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(0, len(array), (2000, len(array)))
    means = array[drawn].mean(1) if of is None else of(drawn)
    middle = array.mean() if of is None else float(of(np.arange(len(array))[None])[0])
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{_number(middle)} ({_number(low)} to {_number(high)})"


def at_most(failures: int, trials: int) -> float:
    """Upper end of the exact one-sided 95 % interval of a share (Clopper and Pearson)."""
    from scipy.stats import beta

    return 1.0 if failures == trials else float(beta.ppf(0.95, failures + 1, trials - failures))


PAGE, MARK = "results-conservative.md", b"# Conservative exploration: results"
FIGURES = ("figures/conservative-paper.svg", "figures/conservative-scale.svg")
_HEAD = f"""# Conservative exploration: results

Written by `saffron stepmix` from its records; no figure here was typed. The page in the documentation is made by
`saffron stepmix --output DIR --docs docs --workers 2`. What the words mean, and what is guaranteed, is in
[conservative.md](conservative.md).

Random MDPs of 5 states, 5 actions and 3 steps, rewards uniform in [0, 1] and known, kernels uniform on the simplex. The
baseline is the policy in proportion to exp({ETA:g} Q\\*), the floor a share of its value (0.9 unless said otherwise).
Plans are made whenever a count has doubled. An episode is below the floor if the *exact* expected return of its
policy is. The learners know the rewards and not the kernels. "scale" is the factor of the whole interval; 1 is what
the proof needs. "range" says what bounds the next step's values in an interval: "horizon", H, as in the cited work,
or "remaining", the steps that are left, which is as valid (reconstructed) and tighter. Intervals hold 95 % of 2,000
bootstrap means over trials. The paper's own constants, baseline, floor and number of episodes are unknown; these are
not its figures.
"""


def _paper(records: list[Record], figures: Path) -> str:
    groups = _grouped(records, "learner", "value_range", "scale")
    free = {key[1]: group for key, group in groups.items() if key[0] == "ucbvi"}
    rows = []
    for (name, value_range, scale), group in groups.items():
        against = free["remaining" if value_range == "-" else value_range]
        rows.append([name, value_range, f"{scale:g}", *_violations(group), mean_interval(_column(group, "regret")),
                     _ratio(group, against), _number(np.mean(_column(group, "last")))])  # fmt: skip
    _draw_paper(groups, figures / "conservative-paper.svg")
    head = ["learner", "range", "scale", "episodes below", "trials with any", "first tenth", "worst margin", "regret",
            "ratio to ucbvi", "last return"]  # fmt: skip
    some = records[0]
    numbers = {
        name: _number(np.mean([r[name] for r in groups[next(iter(groups))]])) for name in ("best", "baseline", "floor")
    }
    return f"""
## The paper's experiment

{some["trials"]} trials of {some["episodes"]:,} episodes. Means over the MDPs: optimum {numbers["best"]}, baseline
{numbers["baseline"]}, floor {numbers["floor"]}. At the practical scale, {PRACTICAL:g}:

{_verdicts(groups)}

![Return and regret by episode](figures/conservative-paper.svg)

{_table(head, rows)}

"first tenth": the share of the first tenth of the episodes that lie below the floor. "ratio to ucbvi": regret as a
multiple of the unconstrained learner's on the same MDPs, of the same range and scale {PRACTICAL:g} (DOPE and
OptPess-LP: range "remaining"). These two run on the first {min(10, some["trials"])} MDPs alone; they are told the
baseline's value and the number of episodes, and `scale` multiplies their radii.
"""


def _verdicts(groups: dict[tuple, list[Record]]) -> str:
    """The claims, as they came out."""
    lines = []
    for value_range in ("remaining", "horizon"):
        for name in ("stepmix", "epsmix"):
            group, free = (groups.get((n, value_range, PRACTICAL)) for n in (name, "ucbvi"))
            if not group or not free:
                continue
            below, total = sum(_column(group, "below")), sum(r["episodes"] for r in group)
            ratio = sum(_column(group, "regret")) / sum(_column(free, "regret"))
            kept = "never below" if below == 0 else f"below in {below:.0f} of {total:,} episodes"
            lines.append(
                f'{name}, range "{value_range}": {kept} the floor; regret {ratio:.2f} times that of ucbvi, '
                f"{'within' if ratio <= 1.2 else 'not within'} the 1.2 that was aimed at."
            )
        free_group = groups.get(("ucbvi", value_range, PRACTICAL))
        if free_group:
            broken = sum(r["below"] > 0 for r in free_group)
            lines.append(f'ucbvi, range "{value_range}": below the floor in {broken} of {len(free_group)} trials.')
    return "\n".join(f"- {line}" for line in lines)


def _proof(records: list[Record], figures: Path) -> str:
    rows = []
    for (name,), group in _grouped(records, "learner").items():
        starts = [r["starts"] for r in group if r["starts"] is not None]
        begun = (
            f"{int(np.median(starts)):,} ({len(starts)} of {len(group)})" if starts else f"never (0 of {len(group)})"
        )
        rows.append([name, *_violations(group), begun, mean_interval(_column(group, "regret")),
                     _number(np.mean(_column(group, "last"))), _number(np.mean(_column(group, "best")))])  # fmt: skip
    head = ["learner", "episodes below", "trials with any", "first tenth", "worst margin",
            "leaves the baseline after (median)", "regret", "last return", "optimum"]  # fmt: skip
    some = records[0]
    return f"""
## With the proof: scale 1

{some["trials"]} trials of {some["episodes"]:,} episodes, range "remaining". Nothing is given up here: the floor holds
in every episode with probability 0.95.

{_table(head, rows)}
"""


def _scale(records: list[Record], figures: Path) -> str:
    groups = _grouped(records, "value_range", "scale", "learner")
    free = {key[:2]: group for key, group in groups.items() if key[2] == "ucbvi"}
    rows = []
    for (value_range, scale, name), group in groups.items():
        checked = sum(r["checked"] for r in group)
        missed = f"{100 * sum(r['missed'] for r in group) / checked:.3g} %" if checked else ""
        rows.append([value_range, f"{scale:g}", name, *_violations(group), mean_interval(_column(group, "regret")),
                     _ratio(group, free[value_range, scale]), missed])  # fmt: skip
    _draw_scale(groups, figures / "conservative-scale.svg")
    head = ["range", "scale", "learner", "episodes below", "trials with any", "first tenth", "worst margin", "regret",
            "ratio to ucbvi", "bounds missed"]  # fmt: skip
    return f"""
## How wide intervals have to be

The same with other scales. "bounds missed": of all plans and candidates of the unconstrained learner, the share whose
lower bound exceeds the true value.

![Regret and violations by scale](figures/conservative-scale.svg)

{_table(head, rows)}
"""


def _floor(records: list[Record], figures: Path) -> str:
    rows = []
    broken = []
    for (scale, share, name), group in _grouped(records, "scale", "share", "learner").items():
        failed = sum(r["below"] > 0 for r in group)
        if failed:
            broken.append((scale, share, name))
        gain = np.mean([(r["last"] - r["baseline"]) / (r["best"] - r["baseline"]) for r in group])
        chance = f"{100 * at_most(failed, len(group)):.1f} %"
        rows.append([f"{scale:g}", f"{share:g}", name, *_violations(group), chance, _number(gain)])
    head = ["scale", "floor / baseline", "learner", "episodes below", "trials with any", "first tenth", "worst margin",
            "chance of a trial, at most", "gain"]  # fmt: skip
    some = records[0]
    first = max(scale for scale, _, _ in broken) if broken else None
    said = (
        f"It breaks first at scale {first:g}, at floors of "
        + ", ".join(f"{share:g} ({name})" for scale, share, name in broken if scale == first)
        + " times the baseline's value."
        if broken
        else "Nowhere in this table is an episode below the floor."
    )
    text = (
        f'{some["trials"]} trials of {some["episodes"]:,} episodes, range "remaining". {said} "chance of a trial, at '
        'most": upper end of the exact 95 % interval of the share of trials with a violation. "gain": what the last '
        "policy gained over the baseline, 1 being the optimum."
    )
    return f"""
## The floor tightened until it breaks

{textwrap.fill(text, 118)}

{_table(head, rows)}
"""


def _offline(records: list[Record], figures: Path) -> str:
    rows = []
    for (logged, method), group in _grouped(records, "episodes", "learner").items():
        passing = [r for r in group if r["passes"]]
        rows.append([f"{logged:,}", method, f"{sum(r['below'] for r in group)} of {len(group)}",
                     _number(min(r["worst"] for r in group)), f"{len(passing)} of {len(group)}",
                     f"{sum(r['below'] for r in passing)}"])  # fmt: skip
    head = [
        "logged episodes",
        "baseline",
        "truly below",
        "worst margin",
        "bound reaches the floor",
        "of these truly below",
    ]
    return f"""
## A baseline learned from a log

Episodes of the Boltzmann policy are logged, a baseline is learned from them at scale {PRACTICAL:g}: "clone", behaviour
cloning; "pessimistic", pessimistic value iteration. The floor is 0.9 of what the logged policy returns. A learned
baseline is used once its lower bound reaches the floor; until then there is none, however good it may be.

{_table(head, rows)}
"""


def _violations(group: list[Record]) -> list[str]:
    """Episodes below, trials with any, share of the first tenth, worst margin."""
    episodes = group[0]["episodes"]
    tenth = max(1, episodes // 10) * len(group)
    below = int(sum(_column(group, "below")))
    return [
        f"{below:,} of {episodes * len(group):,}",
        f"{sum(r['below'] > 0 for r in group)} of {len(group)}",
        f"{100 * sum(_column(group, 'below_first_tenth')) / tenth:.3g} %",
        _number(min(_column(group, "worst"))),
    ]


def _ratio(group: list[Record], against: list[Record]) -> str:
    mine, theirs = (np.array(_column(records, "regret")) for records in (group, against[: len(group)]))  # same MDPs
    return mean_interval(mine, lambda drawn: mine[drawn].sum(1) / theirs[drawn].sum(1))


def _draw_paper(groups: dict[tuple, list[Record]], file: Path) -> None:
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    some = next(iter(groups.values()))
    for (name, value_range, scale), group in groups.items():
        if value_range == "horizon" or (value_range == "-" and scale != SCALE_OF_PROGRAMS):
            continue
        label = name if value_range != "-" else f"{name}, scale {scale:g}"
        for axis, column in ((left, "values"), (right, "regrets")):
            curves = np.array([record[column] for record in group])
            if axis is left:  # learners need not have run on the same MDPs
                curves -= np.array([[record["best"]] for record in group])
            mean = curves.mean(0)
            spread = 1.96 * curves.std(0) / np.sqrt(len(curves))
            axis.plot(group[0]["points"], mean, color=COLOURS[name], label=label)
            if axis is right:
                axis.fill_between(
                    group[0]["points"], mean - spread, mean + spread, color=COLOURS[name], alpha=0.15, lw=0
                )
    left.axhline(np.mean([r["floor"] - r["best"] for r in some]), color="0.3", lw=1, ls="--", label="floor (mean)")
    left.set(
        xscale="log", xlabel="episode", ylabel="expected return, less the optimum", title="Return of what is played"
    )
    right.set(xscale="log", xlabel="episode", ylabel="regret so far", title="Regret (mean, 95 %)")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    left.legend(fontsize=7)
    _save(figure, file)


def _draw_scale(groups: dict[tuple, list[Record]], file: Path) -> None:
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for name in ("stepmix", "epsmix", "ucbvi", "all-or-nothing"):
        for value_range, style in (("remaining", "-"), ("horizon", "--")):
            points = [(key[1], group) for key, group in groups.items() if key[0] == value_range and key[2] == name]
            scales = [scale for scale, _ in points]
            label = name if value_range == "remaining" else f"{name}, range horizon"
            left.plot(
                scales, [np.mean(_column(g, "regret")) for _, g in points], style, color=COLOURS[name], marker="o",
                ms=3, label=label,
            )  # fmt: skip
            share = [100 * sum(_column(g, "below")) / sum(r["episodes"] for r in g) for _, g in points]
            right.plot(scales, share, style, color=COLOURS[name], marker="o", ms=3)
    left.set(xscale="log", yscale="log", xlabel="scale of the intervals", ylabel="regret", title="Regret")
    right.set(xscale="log", xlabel="scale of the intervals", ylabel="% of episodes below the floor", title="Violations")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    left.legend(fontsize=7)
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", bbox_inches="tight", metadata={"Date": None, "Title": PICTURE.decode()})
    pyplot().close(figure)
    write_atomically(file, picture.getvalue())


def _grouped(records: list[Record], *names: str) -> dict[tuple, list[Record]]:
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record[name] for name in names), []).append(record)
    return groups


def _column(group: list[Record], name: str) -> list[float]:
    return [float(record[name]) for record in group]


def _number(value: Any) -> str:
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1 or value == 0 else f"{value:.3f}"


def _table(head: list[str], rows: Rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
