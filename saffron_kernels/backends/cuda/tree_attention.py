"""Attention over a flattened trie: layouts the kernel reads, workspace."""

from __future__ import annotations

import torch
from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.cuda import native
from saffron_kernels.backends.cuda.arguments import Attended, KVCaches, Scoring, Scratch, TriePlan
from saffron_kernels.backends.cuda.counters import counters
from saffron_kernels.checks import FP8, expect

DTYPES = (torch.bfloat16, torch.float16, FP8)  # fp32 has no exact product on tensor cores

_ALIGNMENT = 16  # bytes of a copy


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    begin: Tensor,
    end: Tensor,
    scale: float,
    count: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The op. Caches whose rows do not begin at multiples of 16 bytes are copied first; those of `KVTrie` do."""
    (queries, heads, head_dim), (slots, kv_heads, v_dim), tokens = q.shape, v_cache.shape, slot.shape[0]
    launchers = native.module(q)
    for name, size in (("q", head_dim), ("v_cache", v_dim)):
        expect(size <= launchers.MAX_HEAD_DIM, name, f"a head size of {size}", f"at most {launchers.MAX_HEAD_DIM}")
    slot, begin, end = slot.contiguous(), begin.contiguous(), end.contiguous()
    held = faults.check_count(count, tokens)
    if faults.eager(slot):
        faults.check_index("slot", slot[:held][begin[:held] < end[:held]], slots)
    unit = _ALIGNMENT // k_cache.element_size()  # fp8 caches have the longer one
    q, k_cache, v_cache = (_aligned(x, unit) for x in (q, k_cache, v_cache))
    k_scale, v_scale = (None if x is None else x.contiguous() for x in (k_scale, v_scale))
    sinks = None if sinks is None else sinks.float().contiguous()
    sizes = q.shape[2], v_cache.shape[2]
    out = torch.empty(queries, heads, sizes[1], dtype=q.dtype, device=q.device)
    lse = torch.empty(queries, heads, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        stored = native.CODE[k_cache.dtype]
        needed = launchers.tree_attention_workspace(queries, heads, kv_heads, max(sizes), tokens, stored)
    workspace = torch.empty(needed, dtype=torch.float32, device=q.device)
    native.launch(
        "tree_attention", q, q, KVCaches(k_cache, v_cache, k_scale, v_scale), TriePlan(slot, begin, end, count),
        Scoring(scale, softcap or 0.0, sinks), Attended(out, lse), Scratch(workspace, counters(q)),
    )  # fmt: skip
    return (out if out.shape[2] == v_dim else out[..., :v_dim].contiguous()), lse


def _aligned(rows: Tensor, unit: int) -> Tensor:
    """`[n, heads, head_dim]` as the kernel reads it: every head's row whole units of elements, at aligned 16 bytes."""
    places = (rows.data_ptr(), *(s * rows.element_size() for s in rows.stride()[:2]))
    if rows.shape[2] % unit == 0 and rows.stride(2) == 1 and not any(place % _ALIGNMENT for place in places):
        return rows
    size = -(-rows.shape[2] // unit) * unit
    copy = torch.zeros(*rows.shape[:2], size, dtype=rows.dtype, device=rows.device)
    copy[..., : rows.shape[2]] = rows
    return copy
