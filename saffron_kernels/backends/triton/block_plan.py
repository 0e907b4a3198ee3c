"""The plan of a paged KV cache: rows of the block table sorted, then one look-up a token.

Rows are sorted like words. In a round every row of a group (rows that are equal as far as was looked) is compared with
one row of its group, the pivot; next it counts who comes before it by what all found. Rows that differ from their pivot
at one block, and there have the same one, stay a group. A round at least halves a group with a probability of one half,
and reads no block a second time but those of the pivots; what is left after the last round is compared row with row.
Rows are counted, never exchanged, so nothing but the table decides about the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.triton import bits
from saffron_kernels.backends.triton.launch import INTERPRETED, cdiv, launch

_BLOCKS = 64 if INTERPRETED else 2048  # blocks of two rows compared at once
_ROWS = 1024  # rows counted at once
_TOKENS, _NEXT = 256, 32  # tokens that a program writes; rows in which it looks for the end of an interval at once
# A key sorts the rows of a group after a round: in its upper half where a row leaves the pivot, _EQUAL if nowhere
# (below: it comes before the pivot, the earlier the sooner they part; above: after it, the other way round); in its
# lower half 1 + the block it has there, 0 if it ends there.
_EQUAL = tl.constexpr(1 << 29)  # more blocks than a request can have


def rounds(requests: int) -> int:
    """How often all rows are compared with pivots, before what is left is compared row with row."""
    return 0 if requests <= 4 else 2 if requests <= 64 else 3 if requests <= 512 else 4


@triton.jit
def _request(lens_ptr, start_ptr, request, exists, lens_stride, start_stride, block_size, columns):
    """Queries, tokens and full blocks of requests; whether they take part; whether what is said of them is bad."""
    first = tl.load(start_ptr + request * start_stride, exists, 0).to(tl.int64)
    queries = tl.load(start_ptr + (request + 1) * start_stride, exists, 0).to(tl.int64) - first
    length = tl.load(lens_ptr + request * lens_stride, exists, 0).to(tl.int64)
    bad = (queries < 0) | ((queries > 0) & ((length < queries) | (length > columns.to(tl.int64) * block_size)))
    live = exists & (queries > 0) & (bad == 0)
    full = tl.where(live, (length - queries) // block_size, 0)
    return queries.to(tl.int32), length.to(tl.int32), full.to(tl.int32), live, exists & bad


@triton.jit
def _parting(key):
    """The block at which rows of these keys leave their pivot; _EQUAL if nowhere."""
    where = (key >> 32).to(tl.int32)
    return tl.where(where > _EQUAL, 2 * _EQUAL - where, where)


@triton.jit
def _shared(a_ptr, b_ptr, first, most, stride, BLOCKS: tl.constexpr):
    """How many blocks two rows share at the front, of which `first` are known, at most `most`."""
    at = first + tl.zeros([], tl.int32)
    found = tl.maximum(at, most)
    while at < most:
        column = at + tl.arange(0, BLOCKS)
        inside = column < most
        offset = column.to(tl.int64) * stride
        differ = inside & (tl.load(a_ptr + offset, inside, 0) != tl.load(b_ptr + offset, inside, 0))
        least = tl.min(tl.where(differ, column, most))
        found = tl.minimum(found, least)
        at = tl.where(least < most, most, at + BLOCKS)
    return found


@triton.jit
def _compared(
    table_ptr, lens_ptr, start_ptr, row, other, first, table_stride, column_stride, lens_stride, start_stride,
    block_size, columns, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The key of `row` with `other` as the pivot; they share the first `first` blocks."""
    full = _request(lens_ptr, start_ptr, row, row >= 0, lens_stride, start_stride, block_size, columns)[2]
    others = _request(lens_ptr, start_ptr, other, other >= 0, lens_stride, start_stride, block_size, columns)[2]
    row_ptr, other_ptr = table_ptr + row.to(tl.int64) * table_stride, table_ptr + other.to(tl.int64) * table_stride
    common = _shared(row_ptr, other_ptr, first, tl.minimum(full, others), column_stride, BLOCKS)
    at = common.to(tl.int64) * column_stride
    mine = tl.load(row_ptr + at, common < full, -1).to(tl.int64) + 1
    theirs = tl.load(other_ptr + at, common < others, -1).to(tl.int64) + 1
    where = tl.where(mine < theirs, common, tl.where(mine > theirs, 2 * _EQUAL - common, _EQUAL))
    return (where.to(tl.int64) << 32) | mine


@triton.jit
def _among(
    start_in_ptr, key_in_ptr, lens_ptr, start_ptr, row, own_start, own_key, requests, salt, lens_stride, start_stride,
    block_size, columns, FIRST: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of the rows of one group: how many come before `row`, how many are equal so far, how many of those are earlier
    rows, the most blocks that it shares with one that comes before, and the pivot of those that are equal."""
    before, equal, earlier, common = 0, 0, 0, 0
    pivot = tl.full([], (1 << 62), tl.int64)
    for first in range(0, requests, ROWS):
        other = first + tl.arange(0, ROWS)
        exists = other < requests
        if FIRST:
            same = _request(lens_ptr, start_ptr, other, exists, lens_stride, start_stride, block_size, columns)[3]
            key = tl.zeros([ROWS], tl.int64)
        else:
            same = exists & (tl.load(start_in_ptr + other, exists, -1) == own_start)
            key = tl.load(key_in_ptr + other, same, 0)
        less, equals = same & (key < own_key), same & (key == own_key)
        before += tl.sum(less.to(tl.int32))
        equal += tl.sum(equals.to(tl.int32))
        earlier += tl.sum((equals & (other < row)).to(tl.int32))
        parted = tl.minimum(_parting(key), _parting(own_key))
        common = tl.maximum(common, tl.max(tl.where(less, parted, 0)))
        drawn = ((other + salt).to(tl.int64) * 0x9E3779B1) & 0x3FFFFFFF
        pivot = tl.minimum(pivot, tl.min(tl.where(equals, (drawn << 31) | other, 1 << 62)))
    return before, equal, earlier, common, (pivot & 0x7FFFFFFF).to(tl.int32)


@triton.jit(do_not_specialize=["requests", "salt", "columns", "block_size"])
def _refine_kernel(
    table_ptr, lens_ptr, start_ptr,
    start_in_ptr, common_in_ptr, key_in_ptr,  # [requests] of the round before
    start_out_ptr, common_out_ptr, key_out_ptr,
    requests, salt, columns, block_size, table_stride, column_stride, lens_stride, start_stride,
    FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Program `r`: the group of row `r` after the round before (the place of its first row in the order, and how many
    blocks that shares with the row before it), and the key of row `r` in this round."""
    row = tl.program_id(0)
    if FIRST:
        request = _request(lens_ptr, start_ptr, row, row >= 0, lens_stride, start_stride, block_size, columns)
        start = tl.where(request[3], 0, -1)
        common = 0
        key = tl.full([], 0, tl.int64)
    else:
        start, common = tl.load(start_in_ptr + row), tl.load(common_in_ptr + row)
        key = tl.load(key_in_ptr + row)
    if start >= 0:
        before, equal, earlier, parted, pivot = _among(
            start_in_ptr, key_in_ptr, lens_ptr, start_ptr, row, start, key, requests, salt, lens_stride, start_stride,
            block_size, columns, FIRST, ROWS,
        )  # fmt: skip
        start += before
        common = tl.maximum(common, parted)
        where = _parting(key)
        # A key of 0 in the lower half: the rows end where they leave the pivot, so they are equal as well.
        done = (FIRST == 0) & ((where == _EQUAL) | ((key & 0xFFFFFFFF) == 0))
        if done:
            start += earlier
            full = _request(lens_ptr, start_ptr, row, row >= 0, lens_stride, start_stride, block_size, columns)[2]
            common = tl.where(earlier > 0, full, common)
        elif equal > 1:
            key = _compared(
                table_ptr, lens_ptr, start_ptr, row, pivot, 0 if FIRST else where + 1, table_stride, column_stride,
                lens_stride, start_stride, block_size, columns, BLOCKS,
            )  # fmt: skip
    tl.store(start_out_ptr + row, start)
    tl.store(common_out_ptr + row, common)
    tl.store(key_out_ptr + row, key)


@triton.jit(do_not_specialize=["requests", "columns", "block_size"])
def _finish_kernel(
    table_ptr, lens_ptr, start_ptr, start_in_ptr, common_in_ptr, key_in_ptr,
    request_ptr, common_ptr,  # [requests] in their order
    requests, columns, block_size, table_stride, column_stride, lens_stride, start_stride,
    FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Program `r`: the place of row `r`, compared with every row of its group that the rounds did not tell apart."""
    row = tl.program_id(0)
    full, live = _request(lens_ptr, start_ptr, row, row >= 0, lens_stride, start_stride, block_size, columns)[2:4]
    start, common = 0, 0
    key = tl.full([], 0, tl.int64)
    if FIRST == 0:
        start, common = tl.load(start_in_ptr + row), tl.load(common_in_ptr + row)
        key = tl.load(key_in_ptr + row)
    if live:
        before, equal, earlier, parted, _ = _among(
            start_in_ptr, key_in_ptr, lens_ptr, start_ptr, row, start, key, requests, 0, lens_stride, start_stride,
            block_size, columns, FIRST, ROWS,
        )  # fmt: skip
        place = start + before
        common = tl.maximum(common, parted)
        where = _parting(key)
        if (FIRST == 0) & ((where == _EQUAL) | ((key & 0xFFFFFFFF) == 0)):
            place += earlier
            common = tl.where(earlier > 0, full, common)
        elif equal > 1:
            for i in range(0, requests):
                other = i + tl.zeros([], tl.int32)
                if FIRST:
                    same = _request(
                        lens_ptr, start_ptr, other, other >= 0, lens_stride, start_stride, block_size, columns
                    )[3]  # fmt: skip
                else:
                    same = (tl.load(start_in_ptr + other) == start) & (tl.load(key_in_ptr + other) == key)
                if same & (other != row):
                    theirs = _compared(
                        table_ptr, lens_ptr, start_ptr, row, other, 0 if FIRST else where + 1, table_stride,
                        column_stride, lens_stride, start_stride, block_size, columns, BLOCKS,
                    )  # fmt: skip
                    at = (theirs >> 32).to(tl.int32)
                    if (at > _EQUAL) | ((at == _EQUAL) & (other < row)):
                        place += 1
                        common = tl.maximum(common, tl.minimum(_parting(theirs), full))
        tl.store(request_ptr + place, row)
        tl.store(common_ptr + place, common)


@triton.jit(do_not_specialize=["requests", "queries", "size", "columns", "block_size"])
def _lay_kernel(
    lens_ptr, start_ptr, request_ptr,
    common_ptr,  # [requests + 1]: what no row shares stands behind the last
    first_ptr, offset_ptr,  # [requests + 1]
    count_ptr, fault_ptr, requests, queries, size, columns, block_size, lens_stride, start_stride, ROWS: tl.constexpr,
):  # fmt: skip
    """One program: where the queries and the tokens of each request begin, in their order."""
    last = tl.load(start_ptr + requests * start_stride)
    wrong = ((tl.load(start_ptr) != 0) | (last > queries)).to(tl.int32)
    rows = 0
    for begin in range(0, requests, ROWS):
        request = begin + tl.arange(0, ROWS)
        exists = request < requests
        _, _, _, live, bad = _request(
            lens_ptr, start_ptr, request, exists, lens_stride, start_stride, block_size, columns
        )  # fmt: skip
        rows += tl.sum(live.to(tl.int32))
        wrong = tl.maximum(wrong, tl.max(bad.to(tl.int32)))
    tl.store(common_ptr + rows, -1)
    rows = tl.where(wrong > 0, 0, rows)
    placed = 0
    written = tl.full([], 0, tl.int64)
    for begin in range(0, requests + 1, ROWS):
        place = begin + tl.arange(0, ROWS)
        live = place < rows
        request = tl.load(request_ptr + place, live, 0)
        own, length, _, _, _ = _request(
            lens_ptr, start_ptr, request, live, lens_stride, start_stride, block_size, columns
        )  # fmt: skip
        tokens = tl.where(live, length - tl.load(common_ptr + place, live, 0) * block_size, 0).to(tl.int64)
        own = tl.where(live, own, 0)
        tl.store(first_ptr + place, placed + tl.cumsum(own, 0) - own, place <= requests)
        # What exceeds 32 bits is no plan.
        tl.store(offset_ptr + place, (written + tl.cumsum(tokens, 0) - tokens).to(tl.int32), place <= requests)
        placed += tl.sum(own)
        written += tl.sum(tokens)
    if (wrong > 0) | (written > size):
        tl.atomic_or(fault_ptr, bits.PAGES)
        written = tl.full([], 0, tl.int64)
    tl.store(count_ptr, written.to(tl.int32))


@triton.jit
def _place_of(bounds_ptr, rows, value, steps):
    """The last `i` of `0 .. rows` with `bounds[i] <= value`, where the first is: a binary search of fixed length."""
    low = tl.zeros_like(value)
    high = low + rows
    for _ in range(steps):
        middle = (low + high + 1) // 2
        low = tl.where(tl.load(bounds_ptr + middle) <= value, middle, low)
        high = tl.where(low == middle, high, middle - 1)
    return low


@triton.jit(do_not_specialize=["requests", "queries", "size", "steps", "block_size", "last_block"])
def _write_plan_kernel(
    table_ptr, lens_ptr, start_ptr, request_ptr, common_ptr, first_ptr, offset_ptr, count_ptr,
    order_ptr, slot_ptr, begin_ptr, end_ptr, fault_ptr, requests, queries, size, steps, block_size, last_block,
    table_stride, column_stride, lens_stride, start_stride,
    ROWS: tl.constexpr, NEXT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(count_ptr)
    # Where there is no plan, queries stay where they are; so do those of no request.
    placed = tl.where(count > 0, tl.load(first_ptr + requests), 0)
    row = _place_of(first_ptr, requests, tl.minimum(entry, placed - 1), steps)
    owned = entry < placed
    request = tl.load(request_ptr + row, owned, 0)
    query = tl.load(start_ptr + request * start_stride, owned, 0) + entry - tl.load(first_ptr + row, owned, 0)
    tl.store(order_ptr + entry, tl.where(owned, query, entry), entry < queries)

    live = entry < count
    row = _place_of(offset_ptr, requests, tl.minimum(entry, count - 1), steps)
    request, common = tl.load(request_ptr + row, live, 0), tl.load(common_ptr + row, live, 0)
    own, past = tl.load(first_ptr + row, live, 0), tl.load(first_ptr + row + 1, live, 0)
    context = tl.load(lens_ptr + request * lens_stride, live, 0) - (past - own)
    position = common * block_size + entry - tl.load(offset_ptr + row, live, 0)
    column = position // block_size
    at = request.to(tl.int64) * table_stride + column.to(tl.int64) * column_stride
    block = tl.load(table_ptr + at, live, 0)
    bad = live & ((block < 0) | (block > last_block))
    if tl.max(bad.to(tl.int32)) > 0:
        tl.atomic_or(fault_ptr, bits.PAGES)

    # A full block is seen as far as rows share it: to the first row behind that shares no more than the blocks before.
    open_ = live & (column < context // block_size)
    end = past
    if tl.max(open_.to(tl.int32)) > 0:
        latest = tl.max(tl.where(open_, column, -1))
        from_ = tl.min(tl.where(open_, row, requests)) + 1
        near = requests  # no row before this one closes an interval of this program
        while from_ <= requests:
            place = from_ + tl.arange(0, ROWS)
            closes = (place <= requests) & (tl.load(common_ptr + place, place <= requests, 0) <= latest)
            near = tl.min(tl.where(closes, place, requests))
            from_ = tl.where(tl.max(closes.to(tl.int32)) > 0, requests + 1, from_ + ROWS)
        closing = tl.zeros_like(row) + requests
        left = open_
        while near <= requests:
            place = near + tl.arange(0, NEXT)
            shared = tl.load(common_ptr + place, place <= requests, -1)
            closes = (place[None, :] > row[:, None]) & (shared[None, :] <= column[:, None])
            found = tl.min(tl.where(closes, place[None, :], requests + 1), 1)
            closing = tl.where(left, tl.minimum(found, requests), closing)
            left = left & (found > requests)
            near = tl.where(tl.max(left.to(tl.int32)) > 0, near + NEXT, requests + 1)
        end = tl.where(open_, tl.load(first_ptr + closing), past)
    live = live & (bad == 0)
    begin = own + tl.maximum(position - context, 0)
    tl.store(slot_ptr + entry, tl.where(live, block * block_size + position % block_size, -1), entry < size)
    tl.store(begin_ptr + entry, tl.where(live, begin, 0), entry < size)
    tl.store(end_ptr + entry, tl.where(live, end, 0), entry < size)


def block_plan(
    block_table: Tensor, seq_lens: Tensor, query_start: Tensor, block_size: int, queries: int, size: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    faults.check_requests(block_table, seq_lens, query_start, block_size, queries)
    (requests, columns), device = block_table.shape, block_table.device
    content = block_table, seq_lens, query_start
    strides = *block_table.stride(), seq_lens.stride(0), query_start.stride(0)
    request, common, first, offset = torch.empty(4, requests + 1, dtype=torch.int32, device=device).unbind()
    tiles = {"ROWS": _ROWS, "BLOCKS": _BLOCKS}
    # Groups, shared blocks and keys of this round and of the one before.
    states = torch.empty(2, 2, requests, dtype=torch.int32, device=device)
    keys = torch.empty(2, requests, dtype=torch.int64, device=device)
    old, new = (*states[0], keys[0]), (*states[1], keys[1])
    compared = rounds(requests)
    for i in range(compared):
        launch(
            _refine_kernel, (requests,), *content, *old, *new, requests, i, columns, block_size, *strides,
            FIRST=i == 0, **tiles,
        )  # fmt: skip
        old, new = new, old
    launch(
        _finish_kernel, (requests,), *content, *old, request, common, requests, columns, block_size, *strides,
        FIRST=compared == 0, **tiles,
    )  # fmt: skip
    count, fault = torch.empty(1, dtype=torch.int32, device=device), faults.word(device)
    room = (1 << 31) - 1 if size is None else size
    launch(
        _lay_kernel, (1,), seq_lens, query_start, request, common, first, offset, count, fault,
        requests, queries, room, columns, block_size, *strides[2:], ROWS=_ROWS, num_warps=8,
    )  # fmt: skip
    faults.raise_if_eager(count)
    tokens = int(count) if size is None else size  # where there is no room given: the one synchronisation
    order, slot, begin, end = (torch.empty(n, dtype=torch.int32, device=device) for n in (queries, *[tokens] * 3))
    launch(
        _write_plan_kernel, (cdiv(max(queries, tokens), _TOKENS),), *content, request, common, first, offset, count,
        order, slot, begin, end, fault, requests, queries, tokens, requests.bit_length(), block_size,
        (1 << 31) // block_size - 1, *strides, ROWS=_ROWS, NEXT=_NEXT, BLOCK=_TOKENS, num_warps=8,
    )  # fmt: skip
    return order, slot, begin, end, count
