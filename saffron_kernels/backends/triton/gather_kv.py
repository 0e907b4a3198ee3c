"""K and V of whole sequences, copied out of the trie."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.triton import bits
from saffron_kernels.backends.triton.launch import launch, next_power_of_2


@triton.jit(do_not_specialize=["slots", "length", "kv_heads"])
def _gather_kernel(
    k_cache_ptr, v_cache_ptr, slots_ptr, k_ptr, v_ptr, fault_ptr, slots, length, kv_heads,
    kc_stride_s, kc_stride_h, kc_stride_d, vc_stride_s, vc_stride_h, vc_stride_d,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)  # (sequence, position)
    slot = tl.load(slots_ptr + place)
    if (slot < -1) | (slot >= slots):
        tl.atomic_or(fault_ptr, bits.SLOT)
    head = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    exists = head < kv_heads
    read = head < tl.where((slot >= 0) & (slot < slots), kv_heads, 0)  # what is not read is zero: padding
    slot = slot.to(tl.int64)
    k = tl.load(k_cache_ptr + slot * kc_stride_s + head * kc_stride_h + dim * kc_stride_d, read & (dim < D), 0.0)
    v = tl.load(v_cache_ptr + slot * vc_stride_s + head * vc_stride_h + dim * vc_stride_d, read & (dim < D_V), 0.0)
    row = (place // length * kv_heads + head) * length + place % length
    tl.store(k_ptr + row * D + dim, k, exists & (dim < D))
    tl.store(v_ptr + row * D_V + dim, v, exists & (dim < D_V))


def gather_kv(k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    (sequences, length), (num_slots, kv_heads, head_dim) = slots.shape, k_cache.shape
    faults.check_index("slots", slots, num_slots, lowest=-1)
    k = k_cache.new_empty(sequences, kv_heads, length, head_dim)
    v_dim = v_cache.shape[2]
    v = v_cache.new_empty(sequences, kv_heads, length, v_dim)
    block_d = next_power_of_2(max(head_dim, v_dim))
    block_h = min(next_power_of_2(kv_heads), max(1, 2048 // block_d))
    launch(
        _gather_kernel, (sequences * length, -(-kv_heads // block_h)),
        k_cache, v_cache, slots.contiguous(), k, v, faults.word(k.device), num_slots, length, kv_heads,
        *k_cache.stride(), *v_cache.stride(), D=head_dim, D_V=v_dim, BLOCK_H=block_h, BLOCK_D=block_d,
    )  # fmt: skip
    return k, v
