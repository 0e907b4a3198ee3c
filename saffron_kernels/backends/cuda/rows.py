"""The ops that move rows and indices: `append_kv`, `gather_kv`, `merge_attention`, `advance_tree`, `block_plan`."""

from __future__ import annotations

import torch
from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.cuda import native
from saffron_kernels.backends.cuda.native import CODE, view
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
    num_slots = k_cache.shape[0]
    faults.check_index("slots", slots, num_slots, lowest=-1)
    k, v = apart(k, k_cache, v_cache), apart(v, k_cache, v_cache)
    cos, sin = (x if x is None or x.dtype in native.COMPUTED else x.float() for x in (cos, sin))
    k_scale, v_scale = (None if x is None else x.contiguous() for x in (k_scale, v_scale))
    rotated, turn = (0, k.dtype) if cos is None else (cos.shape[1], cos.dtype)
    with torch.cuda.device_of(k):
        native.module(k).append_kv(
            *map(view, (k, v, slots, k_cache, v_cache, cos, sin, k_scale, v_scale)),
            *k.shape, v.shape[2], rotated, num_slots, CODE[k.dtype], CODE[k_cache.dtype], CODE[turn],
            view(faults.word(k.device)), native.stream(k),
        )  # fmt: skip


def gather_kv(k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    (sequences, length), (num_slots, kv_heads, head_dim) = slots.shape, k_cache.shape
    faults.check_index("slots", slots, num_slots, lowest=-1)
    k = k_cache.new_empty(sequences, kv_heads, length, head_dim)
    v = v_cache.new_empty(sequences, kv_heads, length, v_cache.shape[2])
    sizes = sequences, length, kv_heads, head_dim, v.shape[3], num_slots
    with torch.cuda.device_of(k):
        native.module(k).gather_kv(
            *map(view, (k_cache, v_cache, slots, k, v)),
            *sizes, CODE[k.dtype], view(faults.word(k.device)), native.stream(k),
        )  # fmt: skip
    return k, v


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(out_a, memory_format=torch.contiguous_format)
    lse = torch.empty_like(lse_a, memory_format=torch.contiguous_format)
    tensors = map(view, (out_a, lse_a, out_b, lse_b, out, lse))
    with torch.cuda.device_of(out):
        native.module(out).merge_attention(*tensors, *out.shape, CODE[out.dtype], native.stream(out))
    return out, lse


def advance_tree(
    slot: Tensor,
    begin: Tensor,
    end: Tensor,
    parents: Tensor,
    new_slots: Tensor,
    queries: int,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, fresh = slot.shape[0], parents.shape[0]
    size = tokens + fresh if count is None else tokens
    held = faults.check_count(count, size - fresh)
    faults.check_ascending("parents", parents)
    faults.check_index("parents", parents, 1 << 31)
    faults.check_index("begin", begin[:held], queries + 1)
    faults.check_index("end", end[:held], queries + 1)
    given = [x.contiguous() for x in (slot, begin, end, parents, new_slots)]
    plan = slot.new_empty(size), slot.new_empty(size), slot.new_empty(size)
    sizes = tokens, fresh, queries
    with torch.cuda.device_of(slot):
        native.module(slot).advance_tree(
            *map(view, (*given, count, *plan)), *sizes, view(faults.word(slot.device)), native.stream(slot)
        )
    return plan


def block_plan(
    block_table: Tensor, seq_lens: Tensor, query_start: Tensor, block_size: int, queries: int, size: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    faults.check_requests(block_table, seq_lens, query_start, block_size, queries)
    launchers, (requests, columns) = native.module(block_table), block_table.shape
    laid = seq_lens.new_empty(launchers.block_plan_workspace(requests), dtype=torch.int64)
    count = seq_lens.new_empty(1)
    given = [view(x) for x in (block_table, seq_lens, query_start, laid, count)]
    sizes = requests, columns, block_size, queries
    last = view(faults.word(block_table.device)), native.stream(block_table)
    with torch.cuda.device_of(block_table):
        launchers.sort_pages(*given, *sizes, (1 << 31) - 1 if size is None else size, *last)
        faults.settle(count)
        tokens = int(count) if size is None else size  # where no room is given: the one synchronisation
        plan = [seq_lens.new_empty(n) for n in (queries, tokens, tokens, tokens)]
        launchers.block_plan(*given, *map(view, plan), *sizes, tokens, *last)
    return plan[0], plan[1], plan[2], plan[3], count
