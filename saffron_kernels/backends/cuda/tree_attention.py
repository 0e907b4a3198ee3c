"""Attention over a flattened trie: layouts the kernel reads, workspace, counters."""

from __future__ import annotations

import torch
from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.cuda import native
from saffron_kernels.backends.cuda.native import CODE, view
from saffron_kernels.checks import expect

DTYPES = (torch.bfloat16, torch.float16)  # fp32 has no exact product on tensor cores

_ALIGNMENT = 16  # bytes of a copy
# Zeros by device, stream and captured graph: launches that share counters must not overlap.
_counters: dict[tuple[torch.device, int, int], Tensor] = {}


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
) -> tuple[Tensor, Tensor]:
    """The op. Caches whose rows do not begin at multiples of 16 bytes are copied first; those of `KVTrie` do."""
    (queries, heads, head_dim), (slots, kv_heads, _), tokens = q.shape, k_cache.shape, slot.shape[0]
    launchers = native.module(q)
    expect(head_dim <= launchers.MAX_HEAD_DIM, "q", f"a head size of {head_dim}", f"at most {launchers.MAX_HEAD_DIM}")
    slot, begin, end = slot.contiguous(), begin.contiguous(), end.contiguous()
    if faults.eager(slot):
        faults.check_index("slot", slot[begin < end], slots)
    q, k_cache, v_cache = _aligned(q), _aligned(k_cache), _aligned(v_cache)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(queries, heads, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        needed = launchers.tree_attention_workspace(queries, heads, kv_heads, q.shape[2], tokens)
        workspace = torch.empty(needed, dtype=torch.float32, device=q.device)
        launchers.tree_attention(
            *map(view, (q, k_cache, v_cache, slot, begin, end, count)), scale, *map(view, (out, lse, workspace)),
            view(_zeros(q)), queries, heads, kv_heads, q.shape[2], tokens, slots, CODE[q.dtype],
            view(faults.word(q.device)), native.stream(q),
        )  # fmt: skip
    return (out if out.shape[2] == head_dim else out[..., :head_dim].contiguous()), lse


def _aligned(rows: Tensor) -> Tensor:
    """`[n, heads, head_dim]` as the kernel reads it: every head's row a whole number of aligned 16 bytes."""
    unit = _ALIGNMENT // rows.element_size()
    whole = rows.shape[2] % unit == 0
    if whole and rows.stride(2) == 1 and not any(s % unit for s in rows.stride()[:2]) and not rows.data_ptr() % 16:
        return rows
    size = -(-rows.shape[2] // unit) * unit
    copy = torch.zeros(*rows.shape[:2], size, dtype=rows.dtype, device=rows.device)
    copy[..., : rows.shape[2]] = rows
    return copy


def _zeros(tensor: Tensor) -> Tensor:
    """The counters for the stream of `tensor`. A graph that is being captured gets its own, zeroed at its beginning."""
    stream = native.stream(tensor)
    launchers = native.module(tensor)
    graph = launchers.capture_id(stream)
    key = tensor.device, stream, graph
    if key not in _counters:
        _counters[key] = torch.zeros(launchers.COUNTERS, dtype=torch.int32, device=tensor.device)
    return _counters[key]
