"""Draws curves and a table from the CSV of results, and says whether anything is slower than it was.

    python benchmarks/report.py                              table and curves of what was measured
    python benchmarks/report.py --base main -- -k nucleus    and how many times as fast as main, measured now
    python benchmarks/report.py --base results-of-may.csv    and how many times as fast as that file says

Writes `<op>.svg` and `table.md` next to the CSV; of several runs of one case the latest counts. With `--base` the other
commit is checked out and built in a temporary folder (or a folder with a built checkout is named), the benchmarks of
this checkout are run on both in turn, and `against-base.md` is written as well; the exit status is 1 if a case is
slower beyond noise. What follows `--` goes to pytest; without it all ops and a search are measured.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Collection
from pathlib import Path

import compare
import curves
from harness import FOLDER, RESULTS

from saffron.errors import MissingDependencyError

Row = dict[str, str]
Key = tuple[str, ...]
OPS = sorted(
    FOLDER / f"bench_{name}.py" for name in ("multifurcate", "nucleus", "search", "small_ops", "tree_attention")
)
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


def against_base(revision: str, arguments: list[str], rounds: int, own: bool) -> tuple[str, bool]:
    """Measures this checkout and another commit in turn: a line per case, and whether any is slower beyond noise."""
    with compare.checked_out(revision) as base:
        ours, theirs = compare.interleaved(base, arguments, rounds, own)
    return comparison(
        revision, compare.ratios(ours, theirs), f"{rounds} runs of each in turn", ours.keys() ^ theirs.keys()
    )


def against_file(file: Path, now: dict[Key, Row]) -> tuple[str, bool]:
    """Compares results with those of another file of the same machine, as `against_base`."""
    with file.open(newline="") as stream:
        before = latest(list(csv.DictReader(stream)))
    ours, theirs = (
        {
            tuple(row[name] for name in (*compare.CASE, "device", "threads")): row
            for row in rows.values()
            if not row["competitor"]
        }
        for rows in (now, before)
    )
    found = {case[: len(compare.CASE)]: ratio for case, ratio in compare.ratios_of_rows(ours, theirs).items()}
    return comparison(file.name, found, "by the percentiles of the calls", ours.keys() ^ theirs.keys())


def comparison(base: str, found: dict[Key, compare.Ratio], how: str, on_one_side: Collection[Key]) -> tuple[str, bool]:
    """The table, and whether a case is slower."""
    lines = [["op", "shape", "dtype", "backend", base, "now", "times as fast (least-greatest)", ""]]
    for (op, shape, dtype, backend), ratio in found.items():
        times = [microseconds(str(ratio.before)), microseconds(str(ratio.now))]
        factor = f"{ratio.times:.2f}x ({ratio.least:.2f}-{ratio.greatest:.2f})"
        lines.append([op, describe(shape), dtype, backend, *times, factor, "slower" if ratio.is_slower else ""])
    slower = sum(ratio.is_slower for ratio in found.values())
    notes = f"{slower} of {len(found)} cases are slower beyond noise."
    if on_one_side:
        notes += f" {len(on_one_side)} cases stand on one side only."
    return f"Against {base}, {how}\n\n{markdown(lines)}\n{notes}\n", slower > 0


def write_comparison(results: Path, text: str) -> None:
    results.parent.mkdir(parents=True, exist_ok=True)
    (results.parent / "against-base.md").write_text(text)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV (default: %(default)s)")
    parser.add_argument("--commit", help="only rows of this commit")
    parser.add_argument("--base", metavar="BASE", help="compare with this commit, built checkout or CSV")
    parser.add_argument("--own", action="store_true", help="each commit runs its own benchmarks, not those of this one")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each commit (default: %(default)s)")
    parser.add_argument("--brief", action="store_true", help="print a short line per case, write nothing")
    parser.add_argument("--no-curves", action="store_true", help="only the tables")
    parser.add_argument("pytest", nargs="*", help="after --: what to run, e.g. -- -k peaked")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds: got {args.rounds}, expected at least 1")
    is_file = args.base is not None and Path(args.base).is_file()
    is_slower = False
    if args.base and not is_file:
        files = any((Path(argument.split("::")[0])).exists() for argument in args.pytest)
        chosen = [str(Path(a).resolve()) if Path(a.split("::")[0]).exists() else a for a in args.pytest]
        wanted = chosen if files else [*map(str, OPS), *chosen]
        try:
            text, is_slower = against_base(args.base, wanted, args.rounds, args.own)
        except compare.CannotCompare as error:
            parser.exit(2, f"{error}\n")
        write_comparison(args.results, text)
    if not args.results.exists():
        if args.base and not is_file:
            parser.exit(int(is_slower))
        parser.exit(2, f"{args.results}: no results there; run pytest benchmarks first\n")
    with args.results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    now = latest(rows, args.commit)
    if not now:
        parser.exit(2, f"{args.results}: no rows of commit {args.commit}\n")
    if is_file:
        text, is_slower = against_file(Path(args.base), now)
        write_comparison(args.results, text)
    if args.brief:
        print(brief(now))
        parser.exit(int(is_slower))
    text = table(now)
    (args.results.parent / "table.md").write_text(text)
    print(text)
    if not args.no_curves:
        try:
            for svg in curves.draw(list(now.values()), args.results.parent):
                print(svg)
        except MissingDependencyError as error:
            print(f"no curves: {error}")
    parser.exit(int(is_slower))


if __name__ == "__main__":
    main()
