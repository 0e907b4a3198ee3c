"""The plan after one search step: two look-ups a token, and one new token a new query."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.triton import bits
from saffron_kernels.backends.triton.launch import cdiv, launch

_BLOCK = 256


@triton.jit
def _children_before(parents_ptr, new, query, steps):
    """How many of the ascending `parents[new]` are below each `query`: a binary search of fixed length."""
    low = tl.zeros_like(query)
    high = low + new
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(parents_ptr + middle, low < high, 0) < query
        # Where the search has ended (low == high) neither bound moves.
        low = tl.where((low < high) & below, middle + 1, low)
        high = tl.where((low < high) & (below == 0), middle, high)
    return low


@triton.jit(do_not_specialize=["tokens", "new", "queries", "size", "steps"])
def _advance_kernel(
    slot_ptr, begin_ptr, end_ptr, parents_ptr, new_slots_ptr, count_ptr, out_slot_ptr, out_begin_ptr, out_end_ptr,
    fault_ptr, tokens, new, queries, size, steps, BLOCK: tl.constexpr,
):  # fmt: skip
    if count_ptr is not None:
        count = tl.load(count_ptr)
        if (count < 0) | (count > tokens - new):
            tl.atomic_or(fault_ptr, bits.PLAN)
        tokens = tl.minimum(tl.maximum(count, 0), tokens)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    old = token < tokens
    begin, end = tl.load(begin_ptr + token, old, 0), tl.load(end_ptr + token, old, 0)
    bad = (begin < 0) | (begin > queries) | (end < 0) | (end > queries)
    begin = _children_before(parents_ptr, new, begin, steps)
    end = _children_before(parents_ptr, new, end, steps)
    slot = tl.load(slot_ptr + token, old, -1)

    query = token - tokens
    born = (query >= 0) & (query < new)
    parent = tl.load(parents_ptr + query, born, 0)
    before = tl.load(parents_ptr + query - 1, born & (query > 0), parent)
    bad = bad | (born & ((before > parent) | (parent < 0)))
    if tl.max(bad.to(tl.int32)) > 0:
        tl.atomic_or(fault_ptr, bits.PLAN)
    # What is neither old nor new is room that is left: dead.
    slot = tl.where(born, tl.load(new_slots_ptr + query, born, 0), slot)
    begin = tl.where(old, begin, tl.where(born, query, 0))
    end = tl.where(old, end, tl.where(born, query + (parent < queries).to(tl.int32), 0))
    tl.store(out_slot_ptr + token, slot, token < size)
    tl.store(out_begin_ptr + token, begin, token < size)
    tl.store(out_end_ptr + token, end, token < size)


def advance_tree(
    slot: Tensor,
    begin: Tensor,
    end: Tensor,
    parents: Tensor,
    new_slots: Tensor,
    queries: int,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, new = slot.shape[0], parents.shape[0]
    size = tokens + new if count is None else tokens
    held = faults.check_count(count, size - new)
    faults.check_ascending("parents", parents)
    faults.check_index("parents", parents, 1 << 31)
    faults.check_index("begin", begin[:held], queries + 1)
    faults.check_index("end", end[:held], queries + 1)
    out = [torch.empty(size, dtype=torch.int32, device=slot.device) for _ in range(3)]
    launch(
        _advance_kernel, (cdiv(max(1, size), _BLOCK),),
        slot.contiguous(), begin.contiguous(), end.contiguous(), parents.contiguous(), new_slots.contiguous(), count,
        *out, faults.word(slot.device), tokens, new, queries, size, new.bit_length(), BLOCK=_BLOCK,
    )  # fmt: skip
    return out[0], out[1], out[2]
