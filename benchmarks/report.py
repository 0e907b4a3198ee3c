"""Draws curves and a table from the CSV of results: `python benchmarks/report.py [--commit REV] [--base REV]`.

Writes `<op>.svg` and `table.md` next to the CSV. Of several runs of one case the latest counts. `--base` adds a column:
how many times as fast as at that commit, which must have been measured into the same file.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path

from harness import RESULTS

Row = dict[str, str]
Key = tuple[str, ...]
CASE = ("op", "shape", "dtype", "device", "threads", "backend", "competitor")


def latest(rows: list[Row], commit: str | None = None) -> dict[Key, Row]:
    """The last row of every case, of one commit if given (a trailing + marks uncommitted changes)."""
    return {
        tuple(row[name] for name in CASE): row
        for row in rows
        if commit is None or row["commit"].removesuffix("+").startswith(commit.removesuffix("+"))
    }


def describe(shape: str) -> str:
    return ", ".join(f"{name} {value}" for name, value in json.loads(shape).items())


def microseconds(text: str) -> str:
    value = float(text)
    return f"{value / 1e3:.2f} ms" if value >= 1e3 else f"{value:.0f} us"


def table(now: dict[Key, Row], base: dict[Key, Row]) -> str:
    """Markdown: a line a case of ours, with what each competitor takes."""
    header = ["op", "shape", "dtype", "median (p20-p80)", "GB/s", "GFLOP/s", "x floor", "against"]
    lines = [[*header, "against base"] if base else header]
    for key, row in now.items():
        if row["competitor"]:
            continue
        against = [
            f"{float(other['ratio']):.1f}x {other['competitor']}"
            for rival, other in now.items()
            if rival[:-1] == key[:-1] and other["competitor"]
        ]
        spread = f"{microseconds(row['p20_us'])}-{microseconds(row['p80_us'])}"
        line = [
            row["op"],
            describe(row["shape"]),
            row["dtype"],
            f"{microseconds(row['median_us'])} ({spread})",
            row["gb_per_s"],
            row["gflop_per_s"],
            row["times_floor"],
            ", ".join(against),
        ]
        if base:
            before = base.get(key)
            line.append(f"{float(before['median_us']) / float(row['median_us']):.2f}x" if before else "")
        lines.append(line)
    lines.insert(1, ["---"] * len(lines[0]))
    some = next(iter(now.values()))
    title = f"{some['device']}, {some['threads']} threads, {some['versions']}, commit {some['commit']}"
    return f"{title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def draw(now: dict[Key, Row], folder: Path) -> list[Path]:
    """One figure an op: for tree_attention time over the prompt, for the others a bar a contender."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    by_op: dict[str, list[Row]] = defaultdict(list)
    for row in now.values():
        by_op[row["op"]].append(row)
    files = []
    for op, rows in by_op.items():
        curves = _curves(rows) if op == "tree_attention" else {}
        panels = curves or {"": {}}
        figure, axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 4), squeeze=False, sharey=True)
        for axis, (title, lines) in zip(axes[0], sorted(panels.items()), strict=True):
            for name, points in sorted(lines.items()):
                axis.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
            if lines:
                axis.set(xscale="log", yscale="log", title=title, xlabel="prompt tokens", ylabel="us")
                axis.legend(fontsize=7)
            else:
                _bars(axis, rows)
        axes[0][0].set_title(op if not curves else axes[0][0].get_title())
        figure.tight_layout()
        files.append(folder / f"{op}.svg")
        figure.savefig(files[-1])
        plt.close(figure)
    return files


def _curves(rows: list[Row]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    panels: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        shape = json.loads(row["shape"])
        if shape.get("plan") != "search" or shape["head_dim"] != 128:
            continue
        panel = panels[f"{shape['beams']} beams, {row['dtype']}"]
        panel[row["competitor"] or "saffron"].append((shape["prompt"], float(row["median_us"])))
        if not row["competitor"]:
            panel["floor"].append((shape["prompt"], float(row["floor_us"])))
    return panels


def _bars(axis, rows: list[Row]) -> None:  # type: ignore[no-untyped-def]
    names = [f"{row['competitor'] or 'saffron'}\n{describe(row['shape'])[:40]}, {row['dtype']}" for row in rows]
    axis.barh(names, [float(row["median_us"]) for row in rows])
    axis.set(xscale="log", xlabel="us")
    axis.tick_params(axis="y", labelsize=6)
    axis.invert_yaxis()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV (default: %(default)s)")
    parser.add_argument("--commit", help="only rows of this commit")
    parser.add_argument("--base", metavar="REV", help="compare with the rows of this commit")
    args = parser.parse_args()
    if not args.results.exists():
        parser.exit(2, f"{args.results}: no results there; run pytest benchmarks first\n")
    with args.results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    now = latest(rows, args.commit)
    if not now:
        parser.exit(2, f"{args.results}: no rows of commit {args.commit}\n")
    base = latest(rows, args.base) if args.base else {}
    text = table(now, base)
    (args.results.parent / "table.md").write_text(text)
    print(text)
    try:
        for file in draw(now, args.results.parent):
            print(file)
    except ImportError:
        print("no curves: matplotlib is not installed")


if __name__ == "__main__":
    main()
