"""K and V rows of new tokens, written into their slots; K rotated by its position where cos and sin are given."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.reference import apart
from saffron_kernels.backends.triton import bits
from saffron_kernels.backends.triton.launch import cdiv, launch, next_power_of_2
from saffron_kernels.backends.triton.numerics import narrow

MAX_BLOCK = 2048  # elements of a row that one program copies


@triton.jit(do_not_specialize=["slots", "k_size", "v_size"])
def _append_kernel(
    k_ptr, v_ptr, slots_ptr, k_cache_ptr, v_cache_ptr, fault_ptr,
    cos_ptr, sin_ptr,  # [tokens, ROTATED], or None
    slots, k_size, v_size,
    k_stride_t, k_stride_h, k_stride_d, v_stride_t, v_stride_h, v_stride_d,
    kc_stride_s, kc_stride_h, kc_stride_d, vc_stride_s, vc_stride_h, vc_stride_d,
    cos_stride_t, cos_stride_d, sin_stride_t, sin_stride_d,
    D: tl.constexpr, D_V: tl.constexpr, ROTATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if (slot < -1) | (slot >= slots):
        tl.atomic_or(fault_ptr, bits.SLOT)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    head, dim = element // D, element % D
    exists = (slot >= 0) & (slot < slots)
    mask = element < tl.where(exists, k_size, 0)
    mask_v = element < tl.where(exists, v_size, 0)
    head_v, dim_v = element // D_V, element % D_V
    slot = slot.to(tl.int64)
    k_head = k_ptr + token * k_stride_t + head * k_stride_h
    k = tl.load(k_head + dim * k_stride_d, mask)
    if ROTATED > 0:
        rotated = mask & (dim < ROTATED)
        is_left = dim < ROTATED // 2
        partner = tl.where(is_left, dim + ROTATED // 2, dim - ROTATED // 2)
        other = tl.load(k_head + partner * k_stride_d, rotated, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + token * cos_stride_t + dim * cos_stride_d, rotated, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + token * sin_stride_t + dim * sin_stride_d, rotated, other=0.0).to(tl.float32)
        both = k.to(tl.float32) * cos + tl.where(is_left, -other, other) * sin
        k = tl.where(rotated, narrow(both, k.dtype), k)
    v = tl.load(v_ptr + token * v_stride_t + head_v * v_stride_h + dim_v * v_stride_d, mask_v)
    tl.store(k_cache_ptr + slot * kc_stride_s + head * kc_stride_h + dim * kc_stride_d, k, mask)
    tl.store(v_cache_ptr + slot * vc_stride_s + head_v * vc_stride_h + dim_v * vc_stride_d, v, mask_v)


def append_kv(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    _k_scale: None = None,
    _v_scale: None = None,
) -> None:
    tokens, kv_heads, head_dim = k.shape
    v_dim = v.shape[2]
    k, v = apart(k, k_cache, v_cache), apart(v, k_cache, v_cache)
    faults.check_index("slots", slots, k_cache.shape[0], lowest=-1)
    k_size, v_size = kv_heads * head_dim, kv_heads * v_dim
    row_size = max(k_size, v_size)
    block = min(MAX_BLOCK, next_power_of_2(row_size))
    launch(
        _append_kernel, (tokens, cdiv(row_size, block)),
        k, v, slots.contiguous(), k_cache, v_cache, faults.word(k.device), cos, sin, k_cache.shape[0], k_size, v_size,
        *k.stride(), *v.stride(), *k_cache.stride(), *v_cache.stride(),
        *((0, 0, 0, 0) if cos is None or sin is None else (*cos.stride(), *sin.stride())),
        D=head_dim, D_V=v_dim, ROTATED=0 if cos is None else cos.shape[1], BLOCK=block,
    )  # fmt: skip
