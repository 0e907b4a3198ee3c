"""The benchmarks run: every one at a size that takes a moment, and what is measured on a GPU, with the GPU made up."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import bench_multifurcate
import bench_nucleus
import bench_one_trunk
import bench_small_ops
import bench_step
import bench_tree_attention
import flagship
import harness
import pytest
import tiny
import torch
import workloads

from saffron.search import saffron
from saffron.search.captured_step import CapturedStep
from saffron.search.config import SearchConfig
from saffron_kernels import backends

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the benchmarks themselves are to run")

Race = Callable[..., None]
FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def measured() -> list[dict[str, object]]:
    return []


@pytest.fixture
def race(measured, monkeypatch: pytest.MonkeyPatch) -> Race:
    """Verifies a case and times three rounds of it."""
    monkeypatch.setattr(harness, "copy_rate", lambda: 1e9)
    monkeypatch.setattr(harness, "matmul_rate", lambda dtype: 1e12)
    return lambda case, seconds: measured.extend(harness.measure(case, seconds=0.0))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("plan", ["search", "tree"])
def test_tree_attention(race, measured, plan: str, layers: int) -> None:
    made = workloads.search_plan(4, 6, levels=3) if plan == "search" else workloads.parse_tree("1,2,4/3,2,4")
    bench_tree_attention.run(race, made, {"plan": plan}, BF16, (4, 2), 16, layers=layers)
    sdpa = ["SDPA with mask", "SDPA per beam"] if layers == 1 else []
    assert [row["competitor"] for row in measured] == ["", *sdpa]


def test_nucleus_and_multifurcate(race, measured, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (bench_nucleus, bench_multifurcate):
        monkeypatch.setattr(module, "VOCAB", 999)
    monkeypatch.setattr(bench_multifurcate, "HIDDEN", 16)
    bench_nucleus.test_nucleus(race, "peaked", 3, BF16)
    bench_nucleus.test_nucleus(race, "normal", 2, FP32)
    inputs = bench_multifurcate.inputs.__wrapped__()
    bench_multifurcate.test_multifurcate(race, inputs)
    bench_multifurcate.test_multifurcation_head(race, inputs)
    assert len(measured) == 8


def test_small_ops(race, measured, monkeypatch: pytest.MonkeyPatch) -> None:
    for how in ("as it is", "with rope"):
        bench_small_ops.test_append_kv(race, how, 5)
    bench_small_ops.test_append_kv(race, "with rope, fp8 caches", 3)
    bench_small_ops.test_gather_kv(race, 4, 40)
    bench_small_ops.test_merge_attention(race)
    bench_small_ops.test_select_beam(race, 2, 3)
    bench_small_ops.test_advance_tree(race, 9)
    assert {row["op"] for row in measured} == {
        "append_kv", "gather_kv", "merge_attention", "select_beam", "advance_tree",
    }  # fmt: skip


def test_decode_step(race, measured, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but every step is run as it is instead of captured."""
    monkeypatch.setattr(saffron, "why_not_captured", lambda *models: None)
    monkeypatch.setattr(saffron, "CapturedStep", partial(CapturedStep, capture=None))
    policy, mrm = (
        bench_step.random_llama(
            seed, FP32, 97, hidden_size=hidden, intermediate_size=32, num_hidden_layers=2, head_dim=8
        )
        for seed, hidden in enumerate((64, 32))
    )
    assert bench_step.weight_bytes(policy) == sum(p.nbytes for p in policy.parameters()) - 97 * 64 * 4
    config = SearchConfig(width=3, max_new_tokens=6, min_new_tokens=6)
    bench_step.measure_step(race, policy, mrm, config, prompt=11)
    assert [row["competitor"] for row in measured][:2] == ["", "step by step"]


@pytest.fixture
def made_up_gpu(race, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A device with Triton and CUDA, on which graphs can be captured; how often each backend was called."""
    calls = dict.fromkeys(("reference", "triton", "cuda"), 0)

    def on_backend(name: str, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            calls[name] += 1
            return call()

        return run

    def captured(call: Callable[[], object], calls: int = 1) -> Callable[[], object]:
        return lambda: [call() for _ in range(calls)]

    def why_not(name: str, op: str, device: torch.device, *dtypes: torch.dtype) -> str | None:
        return None if name in calls else "not on this device"

    monkeypatch.setattr(harness, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(harness, "device_name", lambda: "made up")
    monkeypatch.setattr(harness, "captured", captured)
    monkeypatch.setattr(harness, "on_backend", on_backend)
    monkeypatch.setattr(harness, "left_out", [])
    monkeypatch.setattr(backends, "why_not", why_not)
    return calls


def gather(capture: tuple[str, ...], result: Callable[[], torch.Tensor]) -> harness.Case:
    return harness.Case(
        op="gather_kv", shape={"n": 1}, dtype=FP32, work=0, bytes=8, ours=result, backend="triton",
        contenders={"PyTorch": result}, capture=capture,
    )  # fmt: skip


def test_measured_on_a_gpu(made_up_gpu) -> None:
    """Ours, the other backend and the competitor in the same run: as called, as graphs, and with a warm cache."""
    found = harness.measure(gather(("", "PyTorch"), lambda: torch.ones(2)), seconds=0.0)
    names = ["", "PyTorch", "cuda backend"]
    assert [(row["competitor"], row["shape"]) for row in found] == [
        (name, shape)
        for shape in ('{"n": 1}', '{"n": 1, "graph": true}', '{"n": 1, "graph": true, "l2": "warm"}')
        for name in names
    ]
    assert {row["backend"] for row in found} == {"triton"}
    assert made_up_gpu["reference"] == 1 and made_up_gpu["cuda"] >= 2 * harness.CALLS_A_GRAPH


def test_what_waits_for_the_host_is_not_captured(made_up_gpu) -> None:
    found = harness.measure(gather((), lambda: torch.ones(2)), seconds=0.0)
    assert [row["shape"] for row in found] == ['{"n": 1}'] * 3 + ['{"n": 1, "l2": "warm"}'] * 3


def test_nothing_wrong_is_timed(made_up_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    results = iter([torch.ones(2), torch.zeros(2)])
    with pytest.raises(AssertionError):
        harness.measure(gather((), lambda: next(results)), seconds=0.0)
    right, wrong = torch.ones(2), torch.zeros(2)
    honest = harness.on_backend
    monkeypatch.setattr(
        harness, "on_backend", lambda name, call: (lambda: wrong) if name == "cuda" else honest(name, call)
    )
    found = harness.measure(gather((), lambda: right), seconds=0.0)
    assert {row["competitor"] for row in found} == {"", "PyTorch"}
    assert harness.left_out[0].startswith("cuda backend: AssertionError")


def test_left_out_is_written_once(made_up_gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "results.csv")
    monkeypatch.setattr(harness, "LEFT_OUT", tmp_path / "left-out.txt")
    harness.leave_out("FlashInfer", ModuleNotFoundError("No module named 'flashinfer'", name="flashinfer"))
    rows = harness.measure(gather((), lambda: torch.ones(2)), seconds=0.0)
    for _ in range(2):
        harness.append(rows)
    assert harness.LEFT_OUT.read_text() == "FlashInfer: not installed (flashinfer)\n"
    assert len(harness.RESULTS.read_text().splitlines()) == 1 + 2 * len(rows)


def test_flagship_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of call that is profiled, small, between the profiler's marks."""
    marks: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: marks.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: marks.append("stop"))
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda name: nullcontext(marks.append(name)))
    kinds = {case.func for case in flagship.CASES.values()}  # type: ignore[attr-defined]
    assert kinds == {flagship.attention, flagship.choice, flagship.nuclei, flagship.append}
    for make in (
        partial(flagship.attention, 4, 6, head_dim=8, heads=(4, 2)),
        partial(flagship.attention, 4, 6, head_dim=8, heads=(4, 2), kv=flagship.FP8),
        partial(flagship.choice, 3, vocab=99, hidden=8),
        partial(flagship.nuclei, 3, vocab=99),
        partial(flagship.append, 3, head_dim=8),
    ):
        flagship.profiled("a case", make())
    assert marks == ["start", "a case", "stop"] * 5


def test_both_paths_of_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    given = bench_tree_attention.make(workloads.search_plan(4, 6, levels=3), BF16, (4, 2), 16, 1, BF16)
    assert bench_tree_attention.paths(given) == {}

    def on_backend(name: str, call: Callable[[], object]) -> Callable[[], object]:
        assert name == "cuda"

        def run() -> object:
            asked.append(os.environ.get(bench_tree_attention.PATH))
            return call()

        return run

    monkeypatch.setattr(bench_tree_attention, "ON_GPU", True)
    monkeypatch.setattr(bench_tree_attention, "on_backend", on_backend)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    expected = [out for out, _ in given.ours()]
    for make in bench_tree_attention.paths(given).values():
        assert torch.equal(make()()[0], expected[0])
    assert asked == ["mma", "wgmma"] and bench_tree_attention.PATH not in os.environ


def test_quick_writes_nothing(tmp_path: Path) -> None:
    results = tmp_path / "results.csv"
    command = [sys.executable, "-m", "pytest", "-q", "--quick", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(
        [*command, "benchmarks", "-k", "bench_tree_attention and tiny or episode"],  # all are collected
        cwd=harness.FOLDER.parent, env={**os.environ, "SAFFRON_RESULTS": str(results), "PYTEST_ADDOPTS": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "competitor SDPA with mask" in result.stdout and "of three rounds, not written" in result.stdout
    assert not results.exists()


def test_the_budget_is_kept() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "--budget", "0", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(
        [*command, "benchmarks", "-k", "bench_tree_attention and tiny or episode"], cwd=harness.FOLDER.parent,
        env={**os.environ, "PYTEST_ADDOPTS": ""}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0 and "the budget of 0 s is spent" in result.stdout, result.stdout
    assert "passed" not in result.stdout.splitlines()[-1]


def test_one_trunk_against_two_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, output = tiny.save_checkpoint(tmp_path / "base"), tmp_path / "out" / "one_trunk.csv"
    sizes = ["--prompts", "6", "--widths", "1", "3", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["bench", str(base), "--output", str(output), *sizes])
    assert bench_one_trunk.main() == 0
    rows = list(csv.DictReader(output.open()))
    assert [(row["trunk"], row["width"]) for row in rows] == [(t, w) for t in ("lora", "frozen") for w in ("1", "3")]
    for row in rows:
        assert 0 < float(row["one_megabytes"]) < float(row["two_megabytes"]) and float(row["one_ms"]) > 0
