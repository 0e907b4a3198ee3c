"""Writes the K and V rows of new tokens into their slots."""

from __future__ import annotations

from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.cuda import native
from saffron_kernels.backends.cuda.arguments import KVCaches, Rotary
from saffron_kernels.backends.reference import apart


def append_kv(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    faults.check_index("slots", slots, k_cache.shape[0], lowest=-1)
    k, v = apart(k, k_cache, v_cache), apart(v, k_cache, v_cache)
    cos, sin = (x if x is None or x.dtype in native.COMPUTED else x.float() for x in (cos, sin))
    k_scale, v_scale = (None if x is None else x.contiguous() for x in (k_scale, v_scale))
    native.launch("append_kv", k, k, v, slots, KVCaches(k_cache, v_cache, k_scale, v_scale), Rotary(cos, sin))
