"""Runs the stages of benchmarks/gpu.py as a GPU would see them, small, on a device that the CPU plays.

    python tests/support/rehearsal.py FOLDER [PART or STAGE...]

Prints a line for each stage: its name, then "ok" or what failed; results are written into the folder as on a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import runpy
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / place) for place in ("benchmarks", "tests/support", "tests/ops", "python", "")]

import gpu  # noqa: E402
import pretend_gpu  # noqa: E402
import pytest  # noqa: E402

SMALL_TREE = "1,2,4/3,2,4"


class OnlyFirst:
    """Of each test one case, where a stage asks for more than one; what the host costs is measured without a GPU."""

    def __init__(self) -> None:
        self.passed = 0
        self.wrong: list[str] = []

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        explicit = {argument.rpartition("/")[2] for argument in config.args if "[" in argument}
        found: dict[str, pytest.Item] = {}
        for item in items:
            name = item.nodeid.rpartition("/")[2]
            if "host_cost" not in name:
                found.setdefault(name if name in explicit else name.partition("[")[0], item)
        items[:] = found.values()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.passed += report.when == "call" and report.passed
        if report.failed or report.skipped:  # a stage has no case that is skipped on a GPU
            self.wrong.append(f"{report.nodeid}: {report.outcome}")


def smaller(patch: Callable[[object, str, object], None]) -> None:
    """Sizes that take a moment; what is timed three times."""
    import bench_multifurcate
    import bench_nucleus
    import bench_search
    import bench_small_ops
    import bench_step
    import bench_tree_attention
    import flagship
    import harness
    import timing
    import torch
    import workloads

    measure, plan, attend, step = (
        harness.measure, workloads.search_plan, bench_tree_attention.run, bench_step.measure_step
    )  # fmt: skip

    def small_plan(beams: int, prompt: int, levels: int, searches: int = 1, **rest: Any) -> workloads.Plan:
        return plan(min(beams, 8), min(prompt, 20), min(levels, 3), min(searches, 2), **rest)

    def small_run(race: object, plan: Any, shape: Any, dtype: Any, heads: Any, head_dim: int, **rest: Any) -> None:
        attend(race, plan, shape, dtype, (4, 2), 16, **{**rest, "layers": min(2, rest.get("layers", 1))})

    filler = torch.empty(8, device=timing.DEVICE)
    patch(timing, "_cache_filler", lambda: filler)
    patch(harness, "copy_rate", lambda: 1e9)
    patch(harness, "matmul_rate", lambda dtype: 1e12)
    patch(harness, "measure", lambda case, seconds, alone: measure(case, 0.0, alone))
    patch(harness, "CALLS_A_GRAPH", 2)
    for name, value in {"HEADS": 4, "KV_HEADS": 2, "HEAD_DIM": 16}.items():
        patch(bench_small_ops, name, value)
    for module in (bench_nucleus, bench_multifurcate):
        patch(module, "VOCAB", 999)
    patch(bench_multifurcate, "HIDDEN", 16)
    patch(bench_tree_attention, "search_plan", small_plan)
    patch(bench_tree_attention, "chain_plan", lambda tokens: workloads.chain_plan(7))
    patch(bench_tree_attention, "parse_tree", lambda text: workloads.parse_tree(SMALL_TREE))
    patch(bench_tree_attention, "run", small_run)
    tiny = {"intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    for name, value in {
        "VOCAB": 97, "WIDTH": 3, "NEW_TOKENS": 3, "POLICY": {**tiny, "hidden_size": 64},
        "MRM": {**tiny, "hidden_size": 32}, "measure_step": lambda *given: step(*given[:-1], 20),
    }.items():  # fmt: skip
        patch(bench_step, name, value)
    for name in ("PROMPT", "WIDTH", "NEW_TOKENS"):
        patch(bench_search, name, 2)
    small = {
        flagship.attention: dict(beams=4, prompt=6, head_dim=8, heads=(4, 2)),
        flagship.choice: dict(rows=3, vocab=99, hidden=8),
        flagship.nuclei: dict(rows=3, vocab=99),
        flagship.append: dict(tokens=3, head_dim=8),
    }
    kinds = {case.func for case in flagship.CASES.values()}  # type: ignore[attr-defined]
    patch(flagship, "CASES", {kind.__name__: functools.partial(kind, **small[kind]) for kind in kinds})


def execute(command: tuple[str, ...]) -> str:
    """What `python3 COMMAND` does, here: "ok", or what was wrong."""
    if command[:2] == ("-m", "pytest"):
        seen = OnlyFirst()
        absent = "test_triton_gpu" if importlib.util.find_spec("triton") is None else "nothing"
        status = pytest.main([argument for argument in command[2:] if absent not in argument], plugins=[seen])
        return "ok" if status == 0 and seen.passed and not seen.wrong else f"exit {int(status)}: {seen.wrong}"
    before, path = sys.argv, list(sys.path)
    start = 2 if command[0] == "-m" else 1
    sys.argv = list(command[start - 1 :])
    try:
        if command[0] == "-m":
            runpy.run_module(command[1], run_name="__main__")
        elif command[0].endswith("flagship.py"):
            sys.modules["flagship"].main()
        else:
            runpy.run_path(str(ROOT / command[0]), run_name="__main__")
    except SystemExit as error:
        return "ok" if not error.code else f"exit {error.code}"
    finally:
        sys.argv, sys.path[:] = before, path
    return "ok"


def main(folder: Path, names: list[str]) -> int:
    os.chdir(ROOT)
    os.environ["SAFFRON_RESULTS"] = str(folder / "results.csv")
    os.environ.pop("TRITON_INTERPRET", None)
    from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: F401 (while torch is as it is)

    patch, failed = pytest.MonkeyPatch(), False
    with pretend_gpu.pretended(patch):
        smaller(patch.setattr)
        for stage in (*gpu.chosen(names or list(gpu.PARTS)), *gpu.REPORTS):
            if stage.name == "build":
                continue
            said, start = io.StringIO(), time.perf_counter()
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                try:
                    status = execute(stage.command)
                except Exception:  # noqa: BLE001 (the next stage is tried as well)
                    status = traceback.format_exc()
            print(f"{stage.name} ({time.perf_counter() - start:.1f} s): {status}", flush=True)
            if status != "ok":
                failed = True
                print(said.getvalue()[-6000:])
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
