"""Joins two attention results over disjoint sets of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from saffron_kernels.backends.cuda import native
from saffron_kernels.backends.cuda.arguments import Attended


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(out_a, memory_format=torch.contiguous_format)
    lse = torch.empty_like(lse_a, memory_format=torch.contiguous_format)
    native.launch("merge_attention", out, Attended(out_a, lse_a), Attended(out_b, lse_b), Attended(out, lse))
    return out, lse
