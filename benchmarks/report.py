"""Draws curves and a table from the CSV of results, and measures this checkout against another commit.

    python benchmarks/report.py                              table and curves of what was measured
    python benchmarks/report.py --base main -- -k nucleus    and how many times as fast as main, measured now

Writes `<op>.svg` and `table.md` next to the CSV; of several runs of one case the latest counts. With `--base` the other
commit is checked out and built in a temporary folder, the benchmarks of this checkout are run on both in turn, and
`against-base.md` is written as well. What follows `--` goes to pytest; without it all ops are measured.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import compare
import curves
from harness import FOLDER, RESULTS

from saffron.errors import MissingDependencyError

Row = dict[str, str]
Key = tuple[str, ...]
OPS = sorted(FOLDER / f"bench_{name}.py" for name in ("multifurcate", "nucleus", "small_ops", "tree_attention"))
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
    return f"{value / 1e3:.2f} ms" if value >= 1e3 else f"{value:.0f} us" if value >= 100 else f"{value:.1f} us"


def markdown(lines: list[list[str]]) -> str:
    """A table; the first line is its header."""
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def table(now: dict[Key, Row]) -> str:
    """A line per case of ours, with what each competitor takes."""
    lines = [["op", "shape", "dtype", "median (p20-p80)", "GB/s", "GFLOP/s", "x floor", "% of peak", "against"]]
    for key, row in now.items():
        if row["competitor"]:
            continue
        against = [
            f"{float(other['ratio']):.1f}x {other['competitor']}"
            for rival, other in now.items()
            if rival[:-1] == key[:-1] and other["competitor"]
        ]
        spread = f"{microseconds(row['p20_us'])}-{microseconds(row['p80_us'])}"
        lines.append([
            row["op"],
            describe(row["shape"]),
            row["dtype"],
            f"{microseconds(row['median_us'])} ({spread})",
            row["gb_per_s"] if row["times_floor"] else "",
            row["gflop_per_s"] if row["times_floor"] else "",
            row["times_floor"],
            f"{100 / float(row['times_floor']):.0f}" if row["times_floor"] else "",
            ", ".join(against),
        ])  # fmt: skip
    some = next(iter(now.values()))
    title = f"{some['device']}, {some['threads']} threads, {some['versions']}, commit {some['commit']}"
    note = "Peak: this machine's copy rate or matrix-product rate, measured in the same run, whichever binds."
    return f"{title}. {note}\n\n{markdown(lines)}"


def brief(now: dict[Key, Row]) -> str:
    """A short line per case: time, % of peak, and the fastest competitor."""
    lines = []
    for key, row in now.items():
        if row["competitor"]:
            continue
        rivals = [r for k, r in now.items() if k[:-1] == key[:-1] and r["competitor"]]
        best = min(rivals, key=lambda r: float(r["median_us"]), default=None)
        against = f"{float(best['ratio']):.2f}x {best['competitor']}" if best else ""
        peak = f"{100 / float(row['times_floor']):3.0f}%" if row["times_floor"] else ""
        shape = json.loads(row["shape"])
        how = ("graph " if shape.pop("graph", False) else "") + (f"{shape.pop('l2')} " if "l2" in shape else "")
        sizes = " ".join(str(value).replace(" ", "") for value in shape.values())
        name = f"{row['op']} {how}{sizes} {row['dtype']}"
        lines.append(f"{name[:72]:72} {microseconds(row['median_us']):>10} {peak:>4}  {against}")
    return "\n".join(lines)


def against_base(revision: str, arguments: list[str], rounds: int) -> str:
    """Measures this checkout and another commit in turn: a line per case."""
    with compare.checked_out(revision) as base:
        ours, theirs = compare.interleaved(base, arguments, rounds)
    lines = [["op", "shape", "dtype", "backend", f"{revision}", "now", "times as fast (least-greatest of the rounds)"]]
    for (op, shape, dtype, backend), (before, now, ratio, least, most) in compare.ratios(ours, theirs).items():
        times = microseconds(str(before)), microseconds(str(now))
        lines.append([op, describe(shape), dtype, backend, *times, f"{ratio:.2f}x ({least:.2f}-{most:.2f})"])
    only = len(ours.keys() ^ theirs.keys())
    note = f"\n{only} cases stand on one side only.\n" if only else ""
    return f"Against {revision}, {rounds} runs of each in turn\n\n{markdown(lines)}{note}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV (default: %(default)s)")
    parser.add_argument("--commit", help="only rows of this commit")
    parser.add_argument("--base", metavar="REV", help="measure against this commit")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each commit (default: %(default)s)")
    parser.add_argument("--brief", action="store_true", help="print a short line per case, write nothing")
    parser.add_argument("--no-curves", action="store_true", help="only the tables")
    parser.add_argument("pytest", nargs="*", help="after --: what to run, e.g. -- -k peaked")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds: got {args.rounds}, expected at least 1")
    if args.base:
        files = any((Path(argument.split("::")[0])).exists() for argument in args.pytest)
        chosen = [str(Path(a).resolve()) if Path(a.split("::")[0]).exists() else a for a in args.pytest]
        try:
            text = against_base(args.base, chosen if files else [*map(str, OPS), *chosen], args.rounds)
        except compare.CannotCompare as error:
            parser.exit(2, f"{error}\n")
        args.results.parent.mkdir(parents=True, exist_ok=True)
        (args.results.parent / "against-base.md").write_text(text)
        print(text)
        if not args.results.exists():
            return
    if not args.results.exists():
        parser.exit(0 if args.base else 2, f"{args.results}: no results there; run pytest benchmarks first\n")
    with args.results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    now = latest(rows, args.commit)
    if not now:
        parser.exit(2, f"{args.results}: no rows of commit {args.commit}\n")
    if args.brief:
        print(brief(now))
        return
    text = table(now)
    (args.results.parent / "table.md").write_text(text)
    print(text)
    if args.no_curves:
        return
    try:
        for svg in curves.draw(list(now.values()), args.results.parent):
            print(svg)
    except MissingDependencyError as error:
        print(f"no curves: {error}")


if __name__ == "__main__":
    main()
