"""Measures two commits against each other: both built, and run in turn by the benchmarks of this checkout."""

from __future__ import annotations

import csv
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CASE = ("op", "shape", "dtype", "backend")

Case = tuple[str, ...]
Medians = dict[Case, list[float]]  # us, one per round


class CannotCompare(RuntimeError):
    """The other commit does not exist, or cannot be built or run."""


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
    """A temporary checkout of a commit, with its native module built."""
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


def measure(checkout: Path, arguments: Sequence[str]) -> dict[Case, float]:
    """Medians of our ops in us, by case, from one run of the benchmarks on the packages of a checkout."""
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results.csv"
        packages = os.pathsep.join(str(checkout / part) for part in ("", "python"))
        command = [sys.executable, "-m", "pytest", "-q", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "--alone"]
        command += ["-p", "no:cacheprovider", *arguments]
        _run(command, Path(scratch), f"pytest on {checkout}", PYTHONPATH=packages, SAFFRON_RESULTS=str(results))
        with results.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if not row["competitor"]]
    expected = revision_of(checkout)
    if any(row["commit"].removesuffix("+") != expected for row in rows):
        raise CannotCompare(f"what was measured are not the packages in {checkout}")
    return {tuple(row[name] for name in CASE): float(row["median_us"]) for row in rows}


def interleaved(base: Path, arguments: Sequence[str], rounds: int) -> tuple[Medians, Medians]:
    """Medians of this checkout and of `base`, `rounds` runs each, in turn: drift of the machine falls on both."""
    ours: Medians = defaultdict(list)
    theirs: Medians = defaultdict(list)
    for number in range(rounds):
        order = [(ours, ROOT), (theirs, base)]
        for found, checkout in order if number % 2 else order[::-1]:
            print(f"round {number + 1} of {rounds}: {checkout}", flush=True)
            for case, median in measure(checkout, arguments).items():
                found[case].append(median)
    return ours, theirs


def ratios(ours: Medians, theirs: Medians) -> dict[Case, tuple[float, float, float, float, float]]:
    """By case: time of the base and ours (median of the rounds), and the ratio of the two with its least and greatest.

    Cases that only one side has are left out.
    """
    found = {}
    for case in ours.keys() & theirs.keys():
        of_rounds = [b / a for a, b in zip(ours[case], theirs[case], strict=True)]
        middle = statistics.median(ours[case]), statistics.median(theirs[case])
        found[case] = (middle[1], middle[0], statistics.median(of_rounds), min(of_rounds), max(of_rounds))
    return dict(sorted(found.items()))
