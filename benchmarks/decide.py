"""For which ops the backend `cuda` may become the default: those where it is nowhere slower than `triton`.

    python benchmarks/decide.py [--results CSV]

Compares the medians of the latest run of every case that both were measured in, as CUDA graphs where there are such
(what a decoder replays), with the chip's cache cold and warm. Writes `decisions.md` next to the CSV, with what the
attention of a decode step is meant to take, and which path of the CUDA backend's attention is faster from how many rows
on. Decides nothing by itself: docs/kernels.md says where a decision goes.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from harness import RESULTS
from report import Row, describe, latest, markdown

NOISE = 0.03  # by so much a case may be slower: two runs of one kernel differ by as much
SHORT, SHORT_US = 4096, 7.0  # up to so many cached tokens a layer is to take at most this
LONG, LONG_PEAK = 16384, 85.0  # from so many on, its unique bytes are to move at this % of the copy rate

Case = tuple[str, str, str, str]  # op, dtype, device, shape


def by_backend(rows: Iterable[Row]) -> dict[Case, dict[str, Row]]:
    """Rows of ours by case and backend, whichever was the default."""
    found: dict[Case, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        name = row["competitor"].removesuffix(" backend") if row["competitor"] else row["backend"]
        if row["competitor"] in ("", f"{name} backend"):
            found[row["op"], row["dtype"], row["device"], row["shape"]][name] = row
    return found


def is_graph(shape: str) -> bool:
    return bool(json.loads(shape).get("graph"))


def decisions(found: Mapping[Case, Mapping[str, Row]]) -> list[list[str]]:
    """A line an op, dtype and device: cases, how many times as fast as Triton, and what follows."""
    ratios: dict[tuple[str, str, str], dict[str, float]] = defaultdict(dict)
    for (op, dtype, device, shape), rows in found.items():
        if {"cuda", "triton"} <= rows.keys():
            ratio = float(rows["triton"]["median_us"]) / float(rows["cuda"]["median_us"])
            ratios[op, dtype, device][shape] = ratio
    lines = []
    for (op, dtype, device), cases in sorted(ratios.items()):
        counted = {shape: r for shape, r in cases.items() if is_graph(shape)} or cases
        least = min(counted, key=lambda shape: counted[shape])
        slower = sum(r < 1 - NOISE for r in counted.values())
        verdict = "cuda" if not slower else "triton" if slower == len(counted) else f"slower in {slower}"
        mean = statistics.geometric_mean(counted.values())
        worst = f"{counted[least]:.2f}x ({describe(least)})"
        lines.append([op, dtype, device, str(len(counted)), f"{mean:.2f}x", worst, verdict])
    return lines


def targets(found: Mapping[Case, Mapping[str, Row]]) -> list[list[str]]:
    """What attention took where the project says what it should take, as a graph."""
    lines = []
    for (op, dtype, _, shape), rows in sorted(found.items()):
        size = json.loads(shape)
        if op != "tree_attention" or not size.get("graph") or size.get("plan") not in ("search", "32 layers"):
            continue
        for name, row in sorted(rows.items()):
            took, peak = float(row["median_us"]), 100 / float(row["times_floor"])
            if size["tokens"] <= SHORT:
                met, target = took <= SHORT_US, f"{SHORT_US:g} us"
            elif size["tokens"] >= LONG:
                met, target = peak >= LONG_PEAK, f"{LONG_PEAK:g} % of peak"
            else:
                continue
            lines.append(
                [describe(shape), dtype, name, f"{took:.1f} us", f"{peak:.0f} %", target, "yes" if met else "no"]
            )
    return lines


def paths(rows: Iterable[Row]) -> list[list[str]]:
    """By dtype, head size and rows of a KV head: how many times as fast `wgmma` is as `mma`, as graphs."""
    took: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["competitor"] in ("cuda mma", "cuda wgmma") and is_graph(row["shape"]):
            took[row["dtype"], row["shape"]][row["competitor"].removeprefix("cuda ")] = float(row["median_us"])
    ratios: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    for (dtype, shape), by_path in took.items():
        size = json.loads(shape)
        if len(by_path) == 2 and "beams" in size and "searches" not in size["plan"]:
            group = size["heads"][0] // size["heads"][1]
            ratios[dtype, size["head_dim"], size["beams"] * group].append(by_path["mma"] / by_path["wgmma"])
    return [
        [
            dtype,
            str(head_dim),
            str(count),
            str(len(all_)),
            f"{min(all_):.2f}x",
            f"{statistics.geometric_mean(all_):.2f}x",
        ]
        for (dtype, head_dim, count), all_ in sorted(ratios.items())
    ]


def report(rows: Iterable[Row]) -> str:
    rows = list(rows)
    found = by_backend(rows)
    decided, reached, by_path = decisions(found), targets(found), paths(rows)
    text = "No case was measured on both backends.\n"
    if decided:
        header = ["op", "dtype", "device", "cases", "Triton's time over cuda's", "least", "default"]
        text = markdown([header, *decided])
        text += f"\nA case counts as slower below {1 - NOISE:.2f}x.\n"
    if reached:
        header = ["attention", "dtype", "backend", "median", "% of peak", "target", "met"]
        text += "\n" + markdown([header, *reached])
    if by_path:
        header = ["attention", "head size", "rows of a KV head", "cases", "wgmma over mma, least", "mean"]
        text += "\n" + markdown([header, *by_path])
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the CSV (default: %(default)s)")
    results = parser.parse_args().results
    if not results.exists():
        parser.exit(2, f"{results}: no results there; run pytest benchmarks first\n")
    with results.open(newline="") as file:
        text = report(latest(list(csv.DictReader(file))).values())
    results.with_name("decisions.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
