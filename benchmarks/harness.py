"""How benchmarks measure: contenders in turn, against each other and against what this machine can do at most.

The floor of an op is the larger of (floating-point operations / matrix-product rate of this machine at that dtype) and
(unique bytes / its copy rate), both rates measured in the same run. Results are appended to one CSV.

On a GPU times are taken with events, the cache of the chip emptied before every call. A call of many launches then
takes as long as the host needs to launch them; where a case says that it can be captured, it is measured a second time
as a CUDA graph (`"graph": true` in its shape), which is what a decoder would replay. Both once more without emptying
the cache (`"l2": "warm"`), the graph then holding some calls in a row, so that what its launch costs hardly counts.

Nothing is timed that is not right: every op is first compared with the reference backend (on a CPU, where that takes
long, with a competitor), as is every other backend; competitors are checked by the benchmarks. What could not take part
is said in `left-out.txt` next to the CSV.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import torch
from timing import DEVICE, Times, copy_rate, matmul_rate, synchronize, time_in_turn
from torch import Tensor
from torch.utils._pytree import tree_leaves

import saffron_kernels
from saffron_kernels import backends, ops

FOLDER = Path(__file__).resolve().parent
RESULTS = Path(os.environ.get("SAFFRON_RESULTS", FOLDER / "results" / "results.csv"))
LEFT_OUT = RESULTS.with_name("left-out.txt")
COLUMNS = (
    "time", "commit", "op", "backend", "competitor", "shape", "dtype", "device", "threads", "versions",
    "median_us", "p20_us", "p80_us", "best_us", "gb_per_s", "gflop_per_s",
    "copy_gb_per_s", "matmul_gflop_per_s", "floor_us", "times_floor", "ratio",
)  # fmt: skip
Result = TypeVar("Result")
CALLS_A_GRAPH = 16  # of a warm one
REFERENCE_WORK = 1e10  # floating-point operations of the reference backend on a CPU, at most

left_out: list[str] = []  # contenders that could not take part, and why


@dataclass(slots=True)
class Case:
    """One op at one shape.

    Attributes:
        work: floating-point operations that the result needs; 0 where there is no floor to speak of.
        bytes: distinct bytes that have to be read or written; 0 likewise.
        ours: the op. contenders: other ways to the same result, by name.
        part: by name, ours being "", how often a call does the work; its times are divided by it. Below 1: a share.
        backend: the one that `ours` runs on; by default what the op chooses by itself.
        capture: names of the calls that wait for nothing, ours being "" and standing for our other backends as well: on
            a GPU they are also timed as CUDA graphs.
        stored: storage dtypes besides `dtype`, which is that of the products, e.g. of fp8 caches.
        check: raises unless the result of a backend is right; by default it is compared with the reference backend's.
    """

    op: str
    shape: Mapping[str, object]
    dtype: torch.dtype
    work: float
    bytes: float
    ours: Callable[[], object]
    contenders: Mapping[str, Callable[[], object]]
    part: Mapping[str, float] = field(default_factory=dict)
    backend: str = ""
    capture: Sequence[str] = ()
    stored: Sequence[torch.dtype] = ()
    check: Callable[[object], None] | None = None

    def __post_init__(self) -> None:
        self.backend = self.backend or chosen_backend(self.op, *self.dtypes)

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return (self.dtype, *self.stored)


def chosen_backend(op: str, *dtypes: torch.dtype) -> str:
    """The backend that an op chooses by itself on this device; for what is no op, the device's first."""
    if op not in ops.NAMES:
        return backends.PREFERENCE[DEVICE.type][0]
    chosen = backends.implementation(op, DEVICE, *dtypes)
    able = (name for name in backends.MODULES if backends.why_not(name, op, DEVICE, *dtypes) is None)
    return next(name for name in able if getattr(importlib.import_module(backends.MODULES[name]), op) is chosen)


def captured(call: Callable[[], object], calls: int = 1) -> Callable[[], object] | None:
    """The replay of a CUDA graph of some calls in a row; None where they cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(calls):
                call()
    except RuntimeError as error:
        synchronize()
        leave_out("a CUDA graph", error)
        return None
    return graph.replay


def leave_out(name: str, error: BaseException) -> None:
    """Notes that something could not take part, and why."""
    if isinstance(error, ModuleNotFoundError):
        reason = f"not installed ({error.name})"
    else:
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:160]}"
    left_out.append(f"{name}: {reason}")


def usable(
    makers: Mapping[str, Callable[[], Callable[[], object]]], check: Callable[[object], None]
) -> dict[str, Callable[[], object]]:
    """Other people's kernels, each made and its result checked. One that fails is left out, with its reason."""
    found = {}
    for name, make in makers.items():
        try:
            call = make()
            check(call())
            synchronize()
        except Exception as error:  # noqa: BLE001 (whatever is wrong with them must not stop ours)
            leave_out(name, error)
        else:
            found[name] = call
    return found


def on_backend(name: str, call: Callable[[], Result]) -> Callable[[], Result]:
    """The call with every op in it on one backend."""

    def run() -> Result:
        with backends.backend(name):
            return call()

    return run


def against_reference(case: Case) -> Callable[[object], None]:
    """Compares a result with the reference backend's, which is computed once."""
    expected = tree_leaves(on_backend("reference", case.ours)())

    return lambda result: assert_same(result, expected, case.dtype)


def other_backends(case: Case, check: Callable[[object], None]) -> dict[str, Callable[[], object]]:
    """On a GPU: the same call on the other backends that serve it there, the reference aside."""
    if DEVICE.type != "cuda" or case.op not in ops.NAMES:
        return {}
    found = {}
    for name in sorted(set(backends.MODULES) - {case.backend, "reference", "cpu"}):
        reason = backends.why_not(name, case.op, DEVICE, *case.dtypes)
        if reason is None:
            found[name] = functools.partial(on_backend, name, case.ours)
        else:
            left_out.append(f"{name} backend, {case.op} {dtype_names(case.dtypes)}: {reason}")
    return usable({f"{name} backend": make for name, make in found.items()}, check)


def measure(case: Case, seconds: float = 2.0, alone: bool = False) -> list[dict[str, object]]:
    """Rows for the CSV: one for us (competitor empty), and one for every contender unless `alone`.

    Raises:
        AssertionError: what we compute is not what the reference backend does.
    """
    on_gpu = DEVICE.type == "cuda"
    check = case.check
    if check is None and case.op in ops.NAMES and (on_gpu or case.work <= REFERENCE_WORK):
        check = against_reference(case)
    if check is not None:
        check(case.ours())
    others = {} if alone or check is None else other_backends(case, check)
    calls = {"": case.ours} if alone else {"": case.ours, **case.contenders, **others}
    result = rows(case, time_in_turn(calls, seconds))
    if not on_gpu or case.op not in ops.NAMES:
        return result
    names = {*case.capture, *(others if "" in case.capture else ())}
    graphs = {name: replay for name in calls if name in names and (replay := captured(calls[name]))}
    if "" not in graphs:
        return result + rows(variant(case, l2="warm"), time_in_turn(calls, seconds, warm=True))
    result += rows(variant(case, graph=True), time_in_turn(graphs, seconds))
    in_a_row = {name: replay for name in graphs if (replay := captured(calls[name], CALLS_A_GRAPH))}
    part = {name: CALLS_A_GRAPH * case.part.get(name, 1.0) for name in in_a_row}
    return result + rows(variant(case, graph=True, l2="warm", part=part), time_in_turn(in_a_row, seconds, warm=True))


def variant(case: Case, part: Mapping[str, float] | None = None, **how: object) -> Case:
    """The case as it is measured another way."""
    return replace(case, shape={**case.shape, **how}, part=case.part if part is None else part)


@functools.cache
def commit() -> str:
    """Of the package that is measured; + marks uncommitted changes. `SAFFRON_COMMIT` names it where git cannot."""
    try:
        folder = Path(saffron_kernels.__file__).parent
        run = functools.partial(subprocess.run, cwd=folder, capture_output=True, text=True, check=True)
        revision = run(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
        return revision + ("+" if run(["git", "status", "--porcelain", "-uno"]).stdout.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("SAFFRON_COMMIT", "unknown")


@functools.cache
def device_name() -> str:
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@functools.cache
def versions() -> str:
    text = f"torch {torch.__version__}, python {platform.python_version()}"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        text += f", triton {importlib.metadata.version('triton')}"
    return text


def dtype_names(dtypes: Iterable[torch.dtype]) -> str:
    """As in `bfloat16+float8_e4m3fn`."""
    return "+".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def rows(case: Case, times: Mapping[str, Times]) -> list[dict[str, object]]:
    """One row for every name in `times`."""
    ours = times[""].median / case.part.get("", 1.0)
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
            "dtype": dtype_names(case.dtypes),
            "device": device_name(),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "median_us": f"{median:.2f}",
            "p20_us": f"{measured.quantile(0.2) * scale:.2f}",
            "p80_us": f"{measured.quantile(0.8) * scale:.2f}",
            "best_us": f"{measured.seconds[0] * scale:.2f}",
            "gb_per_s": f"{case.bytes / median / 1e3:.2f}",
            "gflop_per_s": f"{case.work / median / 1e3:.1f}",
            "copy_gb_per_s": f"{copy_rate() / 1e9:.2f}",
            "matmul_gflop_per_s": f"{matmul_rate(case.dtype) / 1e9:.1f}",
            "floor_us": f"{floor * 1e6:.1f}",
            "times_floor": f"{median / floor / 1e6:.2f}" if floor else "",
            "ratio": f"{median / ours / 1e6:.2f}",
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
    if left_out:
        before = LEFT_OUT.read_text().splitlines() if LEFT_OUT.exists() else []
        LEFT_OUT.write_text("".join(f"{line}\n" for line in dict.fromkeys([*before, *left_out])))


def assert_same(actual: object, expected: object, dtype: torch.dtype) -> None:
    """Results of an op: the same indices, and floating-point numbers as `assert_close` has it."""
    for one, other in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        if other.is_floating_point():
            assert_close(one, other, dtype)
        else:
            assert torch.equal(one, other), "other indices"


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Within some roundings of the storage dtype: what is timed has to be right first."""
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)
