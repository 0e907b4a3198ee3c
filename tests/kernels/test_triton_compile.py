"""Every Triton kernel in every configuration, compiled for GPUs that are not here: all but nothing spills, all fits."""

from __future__ import annotations

import importlib
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from saffron_kernels.backends.triton.launch import INTERPRETED

if INTERPRETED:
    pytest.skip("TRITON_INTERPRET is set: kernels that are interpreted cannot be compiled", allow_module_level=True)

import triton_report as aot
from torch.utils._python_dispatch import TorchDispatchMode

from saffron_kernels.backends import faults

CASES = dict(aot.cases())
# Every kernel once. Its other configurations are `further` on chips other than Hopper: CI compiles them once.
ONE_OF_EACH = {
    *("tree_attention bf16 d128 n32", "append_kv bf16", "gather_kv bf16", "merge_attention bf16", "nucleus bf16"),
    *("multifurcation_head bf16", "multifurcate bf16, everything", "select_beam", "advance_tree"),
    "block_plan",
}


def _on_every_chip() -> Iterator[Any]:
    for case, arch in itertools.product(CASES, sorted(aot.CHIPS)):
        once = arch == 90 or case in ONE_OF_EACH
        yield pytest.param(case, arch, id=f"{case}-{arch}", marks=() if once else pytest.mark.further)


@pytest.mark.parametrize("case, arch", list(_on_every_chip()))
def test_fits_the_chip(case: str, arch: int) -> None:
    usages = aot.compile_case(arch, case, CASES[case])
    assert usages
    assert [usage._replace(ptx="") for usage in usages if not usage.fits] == []


def test_no_kernel_is_left_out() -> None:
    compiled = {usage.kernel for case in ONE_OF_EACH for usage in aot.compile_case(90, case, CASES[case])}
    sources = "".join(file.read_text() for file in Path(aot.ops.__file__).parent.glob("*.py"))
    assert compiled == set(re.findall(r"^def (_\w+_kernel)\(", sources, re.MULTILINE))


class _ComputesNothing(TorchDispatchMode):
    """Lets memory be allocated and looked at in other shapes; anything else would be one more launch."""

    ALLOWED = {"empty", "empty_like", "new_empty", "view", "slice", "alias", "detach"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name in self.ALLOWED, f"{name} runs on the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options, expected", [("", 9), (", everything", 9)])
def test_launches_of_a_step(options: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "eager", lambda tensor: False)  # as on a GPU
    faults.word(torch.device("cpu"))  # which a process makes once
    run = CASES[f"multifurcate bf16{options}"]
    arguments: list[tuple] = []
    monkeypatch.setattr(aot.ops, "multifurcate", lambda *given: arguments.append(given))
    run()
    monkeypatch.undo()
    monkeypatch.setattr(faults, "eager", lambda tensor: False)

    def step() -> None:
        with _ComputesNothing():
            aot.ops.multifurcate(*arguments[0])

    assert len(aot.compile_case(90, "a step", step)) == expected


@pytest.mark.parametrize("arch", sorted(aot.CHIPS))
def test_attention_streams_whole_rows(arch: int) -> None:
    """K and V go to shared memory 16 bytes at a time while earlier ones are used; Hopper's matrix units are fed."""
    case = "tree_attention bf16 d128 n32"
    ptx = next(u.ptx for u in aot.compile_case(arch, case, CASES[case]) if u.kernel == "_attention_kernel")
    assert len(re.findall(r"cp\.async\.cg\.shared\.global.*, 0x10", ptx)) >= 16
    assert "wgmma.mma_async" in ptx or arch != 90


@pytest.mark.parametrize("arch", sorted(aot.CHIPS))
def test_logits_are_read_in_wide_loads(arch: int) -> None:
    case = "nucleus bf16"
    compiled = {u.kernel: u.ptx for u in aot.compile_case(arch, case, CASES[case])}
    for ptx in (compiled["_measure_kernel"], compiled["_list_kernel"]):
        assert re.search(r"ld\.global\.v4\.b32", ptx) and not re.search(r"ld\.global\.b16", ptx)


def test_what_does_not_fit() -> None:
    usage = aot.Usage(80, "case", "kernel", "options", registers=255, local_bytes=0, shared_bytes=163 * 1024)
    assert usage.fits
    assert usage._replace(local_bytes=16).fits and not usage._replace(local_bytes=24).fits
    mend = usage._replace(kernel="_mend_kernel")
    assert mend._replace(local_bytes=200).fits and not mend._replace(local_bytes=204).fits
    assert not usage._replace(shared_bytes=163 * 1024 + 1).fits


def test_spills_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile that the threads cannot hold in their registers is reported."""
    module = importlib.import_module("saffron_kernels.backends.triton.tree_attention")
    monkeypatch.setattr(module, "config", lambda *_: module.Config(64, 32, num_warps=2, num_stages=1))
    case = "tree_attention fp16 d128 n32"
    assert any(not usage.fits for usage in aot.compile_case(90, case, CASES[case]))


def test_report_has_a_row_for_every_kernel_and_a_cell_for_every_chip() -> None:
    usages = [aot.Usage(arch, "case", "k", "BLOCK=8", 30, 0, 2048) for arch in aot.CHIPS]
    usages.append(aot.Usage(90, "other dtype", "k", "BLOCK=8", 40, 0, 1024))
    report = aot.markdown(usages)
    assert "| `k` | BLOCK=8 | 30 / 0 / 2.0 | 40 / 0 / 2.0 | 30 / 0 / 2.0 |" in report
    assert "| case | 1: `k` |" in report
