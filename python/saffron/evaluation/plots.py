"""Figures of results: attack success over compute, with bands by bootstrap over prompts."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from saffron.errors import MissingDependencyError, outside
from saffron.evaluation.metrics import Curve, Group, bootstrap
from saffron.evaluation.tables import titles
from saffron.storage.folders import PICTURE, write_atomically

# Okabe and Ito's colours, which people who see few colours can tell apart.
COLOURS = {
    "saffron": "#d55e00", "best-of-n": "#0072b2", "beam": "#009e73", "rebase": "#56b4e9", "mcts": "#cc79a7",
    "deal": "#e69f00", "best-of-n-mrm": "#0072b2", "beam-mrm": "#009e73", "rebase-mrm": "#56b4e9",
    "mcts-mrm": "#cc79a7", "deal-mrm": "#e69f00",
}  # fmt: skip
MARKERS = "osD^vP*X<>"
# One style for the figures of results, of training and of the benchmarks.
STYLE: Any = {
    "svg.hashsalt": "saffron",  # the same figure is the same file
    "figure.constrained_layout.use": True,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
}
CYCLE = ["#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#000000"]


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
    import matplotlib.pyplot as plt
    from cycler import cycler

    style: dict[Any, Any] = STYLE | {"axes.prop_cycle": cycler(color=CYCLE)}
    matplotlib.rcParams.update(style)
    return plt


def scaling(
    curves: Sequence[Curve], judge: str, files: Iterable[Path], heading: str, undefended: Group | None = None
) -> None:
    """Attack success over compute per prompt, a line per family. (SAFFRON-1, figures 2 and 4a.)"""
    plt = pyplot()
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    seen: dict[str, int] = {}
    labels = titles([curve.name for curve in curves])
    for i, (curve, label) in enumerate(zip(curves, labels, strict=True)):
        name = curve.name.partition(":")[0]
        nth = seen[name] = seen.get(name, 0) + 1
        # Families of one method differ in their options alone: the first has the method's colour, the others any.
        colour = COLOURS.get(name) if nth == 1 else f"C{i % 10}"
        style = {"color": colour, "linestyle": "--" if name.endswith("-mrm") else "-"}
        intervals = [bootstrap(g.harmful(judge)) for g in curve.groups]
        flops = [g.flops / 1e9 for g in curve.groups]
        (line,) = axis.plot(
            flops,
            [v.mean for v in intervals],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
            label=label,
            **style,
        )
        low, high = [v.low for v in intervals], [v.high for v in intervals]
        axis.fill_between(flops, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    if undefended is not None:
        axis.axhline(undefended.harmful(judge).mean(), color="0.4", linewidth=1, linestyle=":", label="No defence")
    axis.set(xscale="log", xlabel="GFLOP per prompt", ylabel="attack success rate", title=heading, ylim=(-0.02, 1.02))
    axis.grid(alpha=0.3)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    _save(plt, figure, files)


def lines(
    points: dict[str, list[tuple[float, float]]], files: Iterable[Path], *, x: str, y: str, heading: str, **axes: Any
) -> None:
    """Lines through points, by name."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 4.2))
    for i, (name, pairs) in enumerate(points.items()):
        axis.plot(*zip(*sorted(pairs), strict=True), marker=MARKERS[i % len(MARKERS)], markersize=4, label=name)
    axis.set(xlabel=x, ylabel=y, title=heading, **axes)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    _save(plt, figure, files)


def _save(plt: Any, figure: Any, files: Iterable[Path]) -> None:
    for file in files:
        metadata = {"Title": PICTURE.decode(), **({"Date": None} if file.suffix == ".svg" else {})}
        picture = io.BytesIO()
        with outside(f"{file}: cannot be drawn"):
            figure.savefig(picture, format=file.suffix[1:], dpi=150, bbox_inches="tight", metadata=metadata)
        write_atomically(file, picture.getvalue())
    plt.close(figure)
