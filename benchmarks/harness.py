"""How benchmarks measure: contenders in turn, against each other and against what this machine can do at most.

The floor of an op is the larger of (floating-point operations / matrix-product rate of this machine at that dtype) and
(unique bytes / its copy rate), both rates measured in the same run. Results are appended to one CSV.
"""

from __future__ import annotations

import csv
import functools
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from saffron_kernels import backends

FOLDER = Path(__file__).resolve().parent
RESULTS = Path(os.environ.get("SAFFRON_RESULTS", FOLDER / "results" / "results.csv"))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COLUMNS = (
    "time", "commit", "op", "backend", "competitor", "shape", "dtype", "device", "threads", "versions",
    "median_us", "p20_us", "p80_us", "best_us", "gb_per_s", "gflop_per_s",
    "copy_gb_per_s", "matmul_gflop_per_s", "floor_us", "times_floor", "ratio",
)  # fmt: skip
BACKEND = backends.PREFERENCE[DEVICE.type][0]  # that the ops choose by themselves
MAX_ROUNDS = 200


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each round, sorted."""

    seconds: list[float]

    def quantile(self, q: float) -> float:
        return self.seconds[min(len(self.seconds) - 1, int(q * len(self.seconds)))]

    @property
    def median(self) -> float:
        return self.quantile(0.5)


@dataclass(slots=True)
class Case:
    """One op at one shape.

    Attributes:
        work: floating-point operations that the result needs; 0 where there is no floor to speak of.
        bytes: distinct bytes that have to be read or written; 0 likewise.
        ours: the op. contenders: other ways to the same result, by name.
        part: by name, the share of its work that a contender does in one call; its times are divided by it.
    """

    op: str
    shape: Mapping[str, object]
    dtype: torch.dtype
    work: float
    bytes: float
    ours: Callable[[], object]
    contenders: Mapping[str, Callable[[], object]]
    part: Mapping[str, float] = field(default_factory=dict)
    backend: str = BACKEND


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def time_in_turn(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, Times]:
    """Times calls in turn, so that a disturbance of the machine falls on all of them; 3 rounds at least."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    synchronize()
    end = time.perf_counter() + seconds
    while len(next(iter(taken.values()))) < 3 or (
        time.perf_counter() < end and len(next(iter(taken.values()))) < MAX_ROUNDS
    ):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            synchronize()
            taken[name].append(time.perf_counter() - start)
    return {name: Times(sorted(times)) for name, times in taken.items()}


@functools.cache
def copy_rate() -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.ones(1 << 26, device=DEVICE)
    target = torch.empty_like(source)
    best = time_in_turn({"copy": lambda: target.copy_(source)}, 1.0)["copy"].seconds[0]
    return 2 * source.nbytes / best


@functools.cache
def matmul_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product."""
    size = 2048 if DEVICE.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    best = time_in_turn({"matmul": lambda: a @ b}, 1.0)["matmul"].seconds[0]
    return 2 * size**3 / best


@functools.cache
def commit() -> str:
    try:
        run = functools.partial(subprocess.run, cwd=FOLDER, capture_output=True, text=True, check=True)
        revision = run(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        return revision + ("+" if run(["git", "status", "--porcelain", "-uno"]).stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@functools.cache
def device_name() -> str:
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def rows(case: Case, times: Mapping[str, Times]) -> list[dict[str, object]]:
    """What goes into the CSV: one row for us (competitor empty) and one for every contender."""
    ours = times[""]
    floor = max(case.work / matmul_rate(case.dtype), case.bytes / copy_rate())
    result = []
    for name, measured in times.items():
        scale = 1e6 / case.part.get(name, 1.0)
        median = measured.median * scale
        result.append({
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "op": case.op,
            "backend": case.backend,
            "competitor": name,
            "shape": json.dumps(case.shape),
            "dtype": str(case.dtype).removeprefix("torch."),
            "device": device_name(),
            "threads": torch.get_num_threads(),
            "versions": f"torch {torch.__version__}, python {platform.python_version()}",
            "median_us": f"{median:.1f}",
            "p20_us": f"{measured.quantile(0.2) * scale:.1f}",
            "p80_us": f"{measured.quantile(0.8) * scale:.1f}",
            "best_us": f"{measured.seconds[0] * scale:.1f}",
            "gb_per_s": f"{case.bytes / median / 1e3:.2f}",
            "gflop_per_s": f"{case.work / median / 1e3:.1f}",
            "copy_gb_per_s": f"{copy_rate() / 1e9:.2f}",
            "matmul_gflop_per_s": f"{matmul_rate(case.dtype) / 1e9:.1f}",
            "floor_us": f"{floor * 1e6:.1f}",
            "times_floor": f"{median / floor / 1e6:.2f}" if floor else "",
            "ratio": f"{median / ours.median / 1e6:.2f}",
        })  # fmt: skip
    return result


def append(new: list[dict[str, object]]) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    fresh = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if fresh:
            writer.writeheader()
        writer.writerows(new)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within some roundings of the storage dtype: what is timed has to be right first."""
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)
