"""Compares this working tree with another commit: the same benchmarks, run on both, ours against theirs.

python benchmarks/compare.py --base REV [benchmarks/bench_nucleus.py ...]
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Key = tuple[str, str, str, str, str]  # op, backend, competitor, shape, dtype


def run_benchmarks(source: Path, files: Sequence[str], results: Path) -> dict[Key, float]:
    """Median microseconds by case, of the packages in `source` under this tree's benchmarks."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(source), str(source / "python")]),
        "SAFFRON_RESULTS": str(results),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    if subprocess.run(command, cwd=ROOT, env=environment).returncode:
        sys.exit(f"the benchmarks failed on {source}")
    with results.open(newline="") as file:
        return {
            (row["op"], row["backend"], row["competitor"], row["shape"], row["dtype"]): float(row["median_us"])
            for row in csv.DictReader(file)
        }


def check_out(revision: str, folder: Path) -> None:
    """Puts `revision` into `folder` and builds its native module there."""
    git = ["git", "-C", str(ROOT)]
    if subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(folder), revision]).returncode:
        sys.exit(f"--base: {revision!r} cannot be checked out")
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    if subprocess.run(build, cwd=folder).returncode:
        sys.exit(f"--base: {revision} does not build")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, metavar="REV", help="commit to compare with")
    parser.add_argument("files", nargs="*", default=["benchmarks"], help="benchmarks to run (default: all)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        try:
            check_out(options.base, base)
            theirs = run_benchmarks(base, options.files, Path(temporary) / "base.csv")
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(base)], capture_output=True)
        ours = run_benchmarks(ROOT, options.files, Path(temporary) / "ours.csv")
    print(f"{'base us':>12} {'now us':>12} {'speedup':>8}")
    for key in ours.keys() & theirs.keys():
        op, backend, competitor, shape, dtype = key
        if not competitor:  # what others do is no change of ours
            speedup = theirs[key] / ours[key]
            print(f"{theirs[key]:12.1f} {ours[key]:12.1f} {speedup:8.2f}  {op} {backend} {dtype} {shape}")


if __name__ == "__main__":
    main()
