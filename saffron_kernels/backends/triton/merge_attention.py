"""Two attention results over disjoint tokens, joined."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saffron_kernels.backends.triton.launch import launch, next_power_of_2
from saffron_kernels.backends.triton.numerics import exp, narrow


@triton.jit(do_not_specialize=["heads"])
def _merge_kernel(
    a_ptr, lse_a_ptr, b_ptr, lse_b_ptr, out_ptr, lse_ptr, heads,
    a_stride_n, a_stride_h, a_stride_d, lse_a_stride_n, lse_a_stride_h,
    b_stride_n, b_stride_h, b_stride_d, lse_b_stride_n, lse_b_stride_h,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    query, head = row // heads, row % heads
    lse_a = tl.load(lse_a_ptr + query * lse_a_stride_n + head * lse_a_stride_h)
    lse_b = tl.load(lse_b_ptr + query * lse_b_stride_n + head * lse_b_stride_h)
    largest = tl.maximum(lse_a, lse_b)
    base = tl.where(largest == float("-inf"), 0.0, largest)  # no -inf - -inf
    mass_a, mass_b = exp(lse_a - base), exp(lse_b - base)
    mass = mass_a + mass_b  # 0, or from 1 to 2
    nothing = mass == 0
    mass = tl.where(nothing, 1.0, mass)
    lse = tl.where(nothing, float("-inf"), base + tl.log(mass))

    dim = tl.arange(0, BLOCK_D)
    a = tl.load(a_ptr + query * a_stride_n + head * a_stride_h + dim * a_stride_d, dim < D, 0.0).to(tl.float32)
    b = tl.load(b_ptr + query * b_stride_n + head * b_stride_h + dim * b_stride_d, dim < D, 0.0).to(tl.float32)
    out = a * (mass_a / mass) + b * (mass_b / mass)
    tl.store(out_ptr + row * D + dim, narrow(out, out_ptr.dtype.element_ty), dim < D)
    tl.store(lse_ptr + row, lse)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    queries, heads, head_dim = out_a.shape
    out = torch.empty_like(out_a, memory_format=torch.contiguous_format)
    lse = torch.empty_like(lse_a, memory_format=torch.contiguous_format)
    launch(
        _merge_kernel, (queries * heads,), out_a, lse_a, out_b, lse_b, out, lse, heads,
        *out_a.stride(), *lse_a.stride(), *out_b.stride(), *lse_b.stride(),
        D=head_dim, BLOCK_D=next_power_of_2(head_dim), num_warps=2,
    )  # fmt: skip
    return out, lse
