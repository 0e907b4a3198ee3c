"""Draws measured times: curves where a size runs along an axis, bars otherwise. One SVG per op."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saffron.evaluation.plots import pyplot

Row = dict[str, str]
Points = dict[str, list[tuple[float, float]]]  # (size, milliseconds) per contender

# The size along the x axis, and the size that the curves of one panel share. Every other op is drawn as bars.
AXES = {"tree_attention": ("prompt", "beams"), "generate": ("beams", "prompt"), "saffron_width": ("width", "prompt")}
OURS, FLOOR = "saffron-kernels", "floor of this machine"


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes a figure per op; returns the files.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    plt = pyplot()
    by_op: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_op[row["op"]].append(row)
    files = []
    for op, mine in by_op.items():
        panels = _panels(op, mine)
        figure = _curves(plt, op, panels) if panels else _bars(plt, op, mine)
        files.append(folder / f"{op}.svg")
        figure.savefig(files[-1], metadata={"Date": None})
        plt.close(figure)
    return files


def _panels(op: str, rows: Sequence[Row]) -> dict[str, Points]:
    """The points of each panel by contender, small sizes first; only panels in which ours has two points or more."""
    if op not in AXES:
        return {}
    x, shared = AXES[op]
    panels: dict[tuple[int, str], Points] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        shape = json.loads(row["shape"])
        if op == "tree_attention" and (shape.get("plan") != "search" or shape["head_dim"] != 128):
            continue
        kinds = [name for name, there in (("graph", shape.get("graph")), ("warm", shape.get("l2"))) if there]
        panel, how = panels[shape[shared], row["dtype"]], f" ({', '.join(kinds)})" if kinds else ""
        panel[(row["competitor"] or OURS) + how].append((shape[x], float(row["median_us"]) / 1e3))
        if float(row["floor_us"] or 0) > 0 and not row["competitor"] and not how:
            panel[FLOOR].append((shape[x], float(row["floor_us"]) / 1e3))
    return {
        f"{value} {shared}, {dtype}" if shared == "beams" else f"{shared} {value}, {dtype}": points
        for (value, dtype), points in sorted(panels.items())
        if len(points[OURS]) > 1
    }


def _curves(plt: Any, op: str, panels: dict[str, Points]) -> Any:
    """A panel per entry, and one legend for all of them, in which every name has its line."""
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.6 * columns, 2.9 * lines + 0.5), squeeze=False)
    found = {name for points in panels.values() for name, curve in points.items() if len(curve) > (name == FLOOR)}
    names = sorted(found, key=lambda name: (name != OURS, name == FLOOR, name))
    styles = {
        name: {"color": f"C{i}", "marker": "osD^vP*X"[i % 8], "linewidth": 2 if name == OURS else 1.2}
        | ({"color": "0.45", "marker": "", "linestyle": ":"} if name == FLOOR else {})
        for i, name in enumerate(names)
    }
    drawn: dict[str, Any] = {}
    for axis, (title, points) in zip(axes.flat, panels.items(), strict=False):
        for name in (name for name in names if len(points.get(name, ())) > (name == FLOOR)):
            (drawn[name],) = axis.plot(*zip(*sorted(points[name]), strict=True), markersize=4, **styles[name])
        sizes = sorted({size for curve in points.values() for size, _ in curve})
        axis.set(xscale="log", yscale="log", title=title, xlabel=AXES[op][0])
        axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
        axis.minorticks_off()
        _milliseconds(axis.yaxis)
    for axis in axes[:, 0]:
        axis.set_ylabel("ms")
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.legend([drawn[n] for n in names], names, loc="outside lower center", ncols=min(2 * columns, 5, len(names)))
    return figure


def _bars(plt: Any, op: str, rows: Sequence[Row]) -> Any:
    """A group of bars per case: ours first, then what it is compared with."""
    cases: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        shape = ", ".join(f"{name} {value}" for name, value in json.loads(row["shape"]).items())
        cases[f"{shape}, {row['dtype']}"].append(row)
    ordered = [(case, row) for case, mine in cases.items() for row in sorted(mine, key=lambda r: r["competitor"])]
    figure, axis = plt.subplots(figsize=(8.5, 0.8 + 0.2 * len(ordered) + 0.22 * len(cases)))
    place, heads = 0.0, []
    for case, mine in cases.items():
        heads.append((place, case))
        place += 1
        for row in sorted(mine, key=lambda r: r["competitor"]):
            value = float(row["median_us"]) / 1e3
            axis.barh(place, value, height=0.8, color="C1" if row["competitor"] else "C0")
            axis.annotate(f" {row['competitor'] or OURS}  {value:.3g}", (value, place), va="center", fontsize=7)
            place += 1
    axis.set(xscale="log", xlabel="ms", title=op)
    axis.set_yticks([at for at, _ in heads], [case for _, case in heads], fontsize=7)
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    _milliseconds(axis.xaxis)
    left, right = axis.get_xlim()
    axis.set_xlim(left, right * (right / left) ** 0.35)  # room for the names behind the bars
    return figure


def _milliseconds(axis: Any) -> None:
    """Ticks at 1, 2, 5, 10, ... written as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")
