"""Every op in Triton: on CUDA GPUs of compute capability 8.0 and up; on the CPU interpreted (`TRITON_INTERPRET=1`).

One file per op, with its kernels; `ordering.py` sorts, `numerics.py` and `launch.py` are shared, `bits.py` names what
is recorded about bad content of tensors (`saffron_kernels.backends.faults`). `tests/support/triton_report.py` compiles
every kernel without a GPU and reports what it uses.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from saffron_kernels.backends.faults import raise_faults
from saffron_kernels.backends.triton.advance_tree import advance_tree as _advance_tree
from saffron_kernels.backends.triton.append_kv import append_kv as _append_kv
from saffron_kernels.backends.triton.block_plan import block_plan as _block_plan
from saffron_kernels.backends.triton.gather_kv import gather_kv as _gather_kv
from saffron_kernels.backends.triton.launch import INTERPRETED, device_properties
from saffron_kernels.backends.triton.merge_attention import merge_attention as _merge_attention
from saffron_kernels.backends.triton.multifurcate import multifurcate as _multifurcate
from saffron_kernels.backends.triton.multifurcation_head import multifurcation_head as _multifurcation_head
from saffron_kernels.backends.triton.nucleus import nucleus as _nucleus
from saffron_kernels.backends.triton.select_beam import select_beam as _select_beam
from saffron_kernels.backends.triton.tree_attention import tree_attention as _tree_attention
from saffron_kernels.checks import FP8

if INTERPRETED:
    from saffron_kernels.backends.triton import interpreter

    interpreter.install()

__all__ = [
    "advance_tree",
    "append_kv",
    "block_plan",
    "gather_kv",
    "merge_attention",
    "multifurcate",
    "multifurcation_head",
    "nucleus",
    "raise_faults",
    "select_beam",
    "tree_attention",
    "why_not",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32)  # int32: ops on indices only
_LEAST_ARCH = 80


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run there; None if they can."""
    if dtype == FP8:
        return f"it does not convert {dtype}"
    if dtype not in _DTYPES:
        return f"it computes in fp32, which does not hold {dtype}"
    if device.type == "cpu":
        return None if INTERPRETED else "on CPU tensors it runs only interpreted (TRITON_INTERPRET=1)"
    if device.type != "cuda":
        return "it needs a CUDA device"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    arch = device_properties(device).arch
    return None if arch >= _LEAST_ARCH else f"it needs compute capability 8.0, this device has {arch / 10}"


def _on_device_of_first(op: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be that of the tensors."""

    @wraps(op)
    def run(first: torch.Tensor, *args: Any) -> Any:
        with torch.cuda.device_of(first):
            return op(first, *args)

    return run


advance_tree = _on_device_of_first(_advance_tree)
append_kv = _on_device_of_first(_append_kv)
block_plan = _on_device_of_first(_block_plan)
gather_kv = _on_device_of_first(_gather_kv)
merge_attention = _on_device_of_first(_merge_attention)
multifurcate = _on_device_of_first(_multifurcate)
multifurcation_head = _on_device_of_first(_multifurcation_head)
nucleus = _on_device_of_first(_nucleus)
select_beam = _on_device_of_first(_select_beam)
tree_attention = _on_device_of_first(_tree_attention)
