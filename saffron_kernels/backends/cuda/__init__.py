"""Ops in hand-written CUDA (`csrc/cuda`), for compute capability 8.0 and up: bf16, fp16, fp32 storage, fp32 arithmetic.

K and V may be stored in fp8 (e4m3).

The compiled module `saffron_kernels._cuda` is built where nvcc is found. On CPU tensors the same kernels run, executed
thread for thread by the CPU, where the environment variable `SAFFRON_CUDA_HOST` names a module built for that, as tests
do.

There is a file per op. `native.py` loads the module and hands tensors to it, in the groups of `arguments.py`. Bad
content of tensors: see `saffron_kernels.backends.faults`.
"""

from __future__ import annotations

import torch

from saffron_kernels.backends.cuda import native
from saffron_kernels.backends.cuda.advance_tree import advance_tree
from saffron_kernels.backends.cuda.append_kv import append_kv
from saffron_kernels.backends.cuda.block_plan import block_plan
from saffron_kernels.backends.cuda.gather_kv import gather_kv
from saffron_kernels.backends.cuda.merge_attention import merge_attention
from saffron_kernels.backends.cuda.multifurcate import multifurcate
from saffron_kernels.backends.cuda.multifurcation_head import multifurcation_head
from saffron_kernels.backends.cuda.nucleus import nucleus
from saffron_kernels.backends.cuda.select_beam import select_beam
from saffron_kernels.backends.cuda.tree_attention import DTYPES as _ATTENTION_DTYPES
from saffron_kernels.backends.cuda.tree_attention import tree_attention
from saffron_kernels.backends.faults import raise_faults
from saffron_kernels.checks import FP8

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
    "why_not_op",
]


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run there; None if they can."""
    if dtype not in native.CODE and dtype != torch.int32:  # int32: ops on indices only
        return f"it computes in fp32, which does not hold {dtype}"
    if device.type not in ("cpu", "cuda"):
        return "it needs a CUDA device"
    return native.why_not_loaded(device)


def why_not_op(op: str, dtype: torch.dtype) -> str | None:
    """Why one op does not serve a dtype that others do."""
    if op == "tree_attention" and dtype not in _ATTENTION_DTYPES:
        return "its tree_attention runs on tensor cores, which multiply bf16 and fp16 exactly, but not fp32"
    if dtype == FP8 and op not in ("append_kv", "tree_attention", "gather_kv"):
        return f"{dtype} is what K and V are stored in, and nothing else"
    return None
