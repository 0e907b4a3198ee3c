"""Measures two commits against each other, both built and run in turn; or compares two files of results."""

from __future__ import annotations

import csv
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CASE = ("op", "shape", "dtype", "backend")

Case = tuple[str, ...]
Medians = dict[Case, list[float]]  # us, one per round
NOISE = 0.05  # by so much the median of a case may be worse: two runs of one build differ by as much


class CannotCompare(RuntimeError):
    """The other commit does not exist, or cannot be built or run."""


class Ratio(NamedTuple):
    """One case: median times in us, and how many times as fast it is now, with the least and greatest of that."""

    before: float
    now: float
    times: float
    least: float
    greatest: float

    @property
    def is_slower(self) -> bool:
        """Whether it is slower beyond noise: at the median by more than `NOISE`, and at best slower as well."""
        return self.times < 1 - NOISE and self.greatest < 1


def _run(command: Sequence[str | Path], folder: Path, what: str, **environment: str) -> str:
    result = subprocess.run(
        list(map(str, command)), cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )
    if result.returncode:
        raise CannotCompare(f"{what} failed:\n{(result.stdout + result.stderr)[-3000:]}")
    return result.stdout.strip()


def revision_of(folder: Path, name: str = "HEAD") -> str:
    command = ["git", "rev-parse", "--verify", "--short", name + "^{commit}"]
    return _run(command, folder, f"git rev-parse {name}")


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """A checkout of a commit with its native module built: the folder that is named, or a temporary one."""
    if Path(revision).is_dir():
        yield Path(revision).resolve()
        return
    found = revision_of(ROOT, revision)
    folder = Path(tempfile.mkdtemp(prefix=f"saffron-{found}-"))
    try:
        _run(["git", "worktree", "add", "--detach", "--force", folder, found], ROOT, "git worktree add")
        print(f"building {found} in {folder}", flush=True)
        _run([sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], folder, f"building {found}")
        yield folder
    finally:
        subprocess.run(["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def measure(checkout: Path, arguments: Sequence[str], own: bool = False) -> dict[Case, float]:
    """Medians of our ops in us, by case, from one run of the benchmarks on the packages of a checkout.

    Args:
        own: run the checkout's own benchmarks instead of these.
    """
    root = checkout if own else ROOT
    arguments = [argument.replace(str(ROOT), str(root)) for argument in arguments]
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.csv"
        packages = os.pathsep.join(str(checkout / part) for part in ("", "python"))
        command = [sys.executable, "-m", "pytest", "-q", "-c", root / "pyproject.toml", "--rootdir", root, "--alone"]
        command += ["-p", "no:cacheprovider", *arguments]
        _run(command, Path(scratch), f"pytest on {checkout}", PYTHONPATH=packages, SAFFRON_RESULTS=str(results))
        with results.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if not row["competitor"]]
    expected = revision_of(checkout)
    if any(row["commit"].removesuffix("+") != expected for row in rows):
        raise CannotCompare(f"what was measured are not the packages in {checkout}")
    return {tuple(row[name] for name in CASE): float(row["median_us"]) for row in rows}


def interleaved(base: Path, arguments: Sequence[str], rounds: int, own: bool = False) -> tuple[Medians, Medians]:
    """Medians of this checkout and of `base`, `rounds` runs each, in turn: drift of the machine falls on both."""
    ours: Medians = defaultdict(list)
    theirs: Medians = defaultdict(list)
    for number in range(rounds):
        order = [(ours, ROOT), (theirs, base)]
        for found, checkout in order if number % 2 else order[::-1]:
            print(f"round {number + 1} of {rounds}: {checkout}", flush=True)
            for case, median in measure(checkout, arguments, own).items():
                found[case].append(median)
    return ours, theirs


def ratios(ours: Medians, theirs: Medians) -> dict[Case, Ratio]:
    """By case, over the rounds. Cases that only one side has are left out."""
    found = {}
    for case in ours.keys() & theirs.keys():
        of_rounds = [b / a for a, b in zip(ours[case], theirs[case], strict=True)]
        middle = statistics.median(ours[case]), statistics.median(theirs[case])
        found[case] = Ratio(middle[1], middle[0], statistics.median(of_rounds), min(of_rounds), max(of_rounds))
    return dict(sorted(found.items()))


def ratios_of_rows(
    ours: Mapping[Case, Mapping[str, str]], theirs: Mapping[Case, Mapping[str, str]]
) -> dict[Case, Ratio]:
    """By case, of two files of results: least and greatest from the 20th and 80th percentiles of the calls."""
    found = {}
    for case in sorted(ours.keys() & theirs.keys()):
        (before, fast_before, slow_before), (now, fast, slow) = (
            [float(rows[case][name]) for name in ("median_us", "p20_us", "p80_us")] for rows in (theirs, ours)
        )
        found[case] = Ratio(before, now, before / now, fast_before / slow, slow_before / fast)
    return found
