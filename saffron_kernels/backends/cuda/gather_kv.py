"""Copies the K and V of whole sequences out of the caches."""

from __future__ import annotations

from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.cuda import native
from saffron_kernels.backends.cuda.arguments import KVCaches


def gather_kv(k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    (sequences, length), (num_slots, kv_heads, head_dim) = slots.shape, k_cache.shape
    faults.check_index("slots", slots, num_slots, lowest=-1)
    k = k_cache.new_empty(sequences, kv_heads, length, head_dim)
    v = v_cache.new_empty(sequences, kv_heads, length, v_cache.shape[2])
    native.launch("gather_kv", k, KVCaches(k_cache, v_cache), slots, k, v)
    return k, v
