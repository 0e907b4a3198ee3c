"""Fixture and report of the benchmarks: `pytest benchmarks`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import harness
import pytest

# Commands of their own, without cases; they import what not everybody has (vLLM, a client of HTTP).
_files = Path(__file__).parent.glob("bench_*.py")
collect_ignore = [file.name for file in _files if "\ndef test_" not in file.read_text(encoding="utf-8")]

_finished = pytest.StashKey[list[dict[str, object]]]()
_began = pytest.StashKey[float]()
_COLUMNS = ("op", "shape", "dtype", "competitor", "median_us", "p20_us", "p80_us", "gb_per_s", "gflop_per_s")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--alone", action="store_true", help="time our ops only, without what they are compared with")
    parser.addoption(
        "--budget", type=float, default=480.0,
        help="seconds for all cases: none begins later (480). The first case of each file comes first, then the second",
    )  # fmt: skip
    parser.addoption("--quick", action="store_true", help="three rounds a case, nothing written: does all of it run?")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files begin with what tells most, and no file takes the time of the others."""
    seen, place = Counter[Path](), dict[pytest.Item, int]()
    for item in items:
        place[item] = seen[item.path]
        seen[item.path] += 1
    items.sort(key=place.__getitem__)


def pytest_runtest_setup(item: pytest.Item) -> None:
    began = item.config.stash.setdefault(_began, time.monotonic())
    if time.monotonic() - began >= (budget := item.config.getoption("--budget")):
        pytest.skip(f"the budget of {budget:.0f} s is spent (--budget)")


@pytest.fixture
def race(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Times a case against its contenders, and appends the result to the CSV."""
    done = request.config.stash.setdefault(_finished, [])
    alone, quick = (request.config.getoption(name) for name in ("--alone", "--quick"))

    def run(case: harness.Case, seconds: float = 2.0) -> None:
        new = harness.measure(case, 0.0 if quick else seconds, alone)
        if not quick:
            harness.append(new)
        done.extend(new)

    return run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    done = config.stash.get(_finished, [])
    if not done:
        return
    rates = {(row["dtype"], row["copy_gb_per_s"], row["matmul_gflop_per_s"]) for row in done}
    terminalreporter.section("benchmarks")
    for dtype, copy, matmul in sorted(map(lambda r: tuple(map(str, r)), rates)):
        terminalreporter.line(f"this machine, {dtype}: copy {copy} GB/s, matrix product {matmul} GFLOP/s")
    for row in done:
        peaks = (
            100 * float(str(row["gb_per_s"])) / float(str(row["copy_gb_per_s"])),
            100 * float(str(row["gflop_per_s"])) / float(str(row["matmul_gflop_per_s"])),
        )
        text = "  ".join(f"{key.removesuffix('_us')} {row[key]}" for key in _COLUMNS if row[key])
        floor = f"{row['times_floor']} x floor" if row["times_floor"] else ""
        against = f"ratio {row['ratio']}" if row["competitor"] else floor
        terminalreporter.line(f"{text}  ({peaks[0]:.0f}% copy, {peaks[1]:.0f}% matmul)  {against}")
    for reason in dict.fromkeys(harness.left_out):
        terminalreporter.line(f"left out: {reason}")
    where = "of three rounds, not written" if config.getoption("--quick") else f"appended to {harness.RESULTS}"
    terminalreporter.line(f"times in us; {where}")
