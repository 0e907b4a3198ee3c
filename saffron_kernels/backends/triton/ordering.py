"""Many lists at once in order: value descending, then place in the list ascending.

Blocks of a list are sorted in registers; an element's place in the whole list is its place in its block plus, for each
other block, the number of elements before it there (binary search). Value and place are one integer, so no two
elements are equal and the result does not depend on how the work is divided.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.triton import bits
from saffron_kernels.backends.triton.launch import INTERPRETED, cdiv, launch, next_power_of_2
from saffron_kernels.backends.triton.numerics import exp, order_key

# Elements that are sorted together. Up to _PAIRS a sort compares all pairs, which the interpreter does faster.
_PAIRS = tl.constexpr(256 if INTERPRETED else 64)
_BLOCK = 256 if INTERPRETED else 512


class Lists(NamedTuple):
    """Where lists lie in flat storage: list `r` from `r * stride + start[r]` on, `stop[r] - start[r]` elements.

    Attributes:
        start, stop: `[rows]` int32; padded lists start at 0 (None) and have a stride, ragged lists have offsets and
            stride 0.
        stride: elements from one list to the next.
        capacity: the most elements a list can have.
        groups: `[rows]` int32, of each list, or None.
        num_groups: lists of a group that is none of `0 .. num_groups - 1` count as empty.
    """

    start: Tensor | None
    stop: Tensor
    stride: int
    capacity: int
    groups: Tensor | None = None
    num_groups: int = 0

    @classmethod
    def ragged(cls, offsets: Tensor, size: int, groups: Tensor | None = None, num_groups: int = 0) -> Lists:
        """Lists by their offsets `[rows + 1]`, together `size` elements."""
        offsets = offsets.contiguous()
        return cls(offsets[:-1], offsets[1:], 0, size, None if groups is None else groups.contiguous(), num_groups)


@triton.jit
def list_bounds(start_ptr, stop_ptr, row, stride, capacity, groups_ptr=None, num_groups=0):
    """First element (int64) and length of a list; offsets that do not fit are cut to what exists."""
    start = 0
    if start_ptr is not None:
        start = tl.minimum(tl.maximum(tl.load(start_ptr + row), 0), capacity)
    stop = tl.minimum(tl.load(stop_ptr + row), capacity)
    if groups_ptr is not None:
        group = tl.load(groups_ptr + row)
        stop = tl.where((group >= 0) & (group < num_groups), stop, 0)
    return row.to(tl.int64) * stride + start, tl.maximum(stop - start, 0)


@triton.jit
def sort_block(value, composites_ptr, size, fault_ptr, BLOCK: tl.constexpr):
    """Stores this program's block (its number is that of axis 1) of a list that begins at `composites_ptr`, sorted."""
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if tl.max(((value != value) & (i < size)).to(tl.int32)) > 0:
        tl.atomic_or(fault_ptr, bits.REWARD)
    composite = (order_key(value).to(tl.int64) << 32) | (2147483647 - i).to(tl.int64)
    composite = tl.where(i < size, composite, -9223372036854775808)  # last
    if BLOCK <= _PAIRS:
        rank = tl.sum((composite[None, :] > composite[:, None]).to(tl.int32), 1)
        place = tl.program_id(1) * BLOCK + rank
    else:
        composite = tl.sort(composite, descending=True)
        place = i
    tl.store(composites_ptr + place, composite, place < size)


@triton.jit(do_not_specialize=["stride", "capacity", "num_groups"])
def _sort_blocks_kernel(
    values_ptr, composites_ptr, start_ptr, stop_ptr, groups_ptr, fault_ptr, stride, capacity, num_groups,
    BLOCK: tl.constexpr,
):  # fmt: skip
    first, size = list_bounds(start_ptr, stop_ptr, tl.program_id(0), stride, capacity, groups_ptr, num_groups)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if tl.program_id(1) * BLOCK < size:
        value = tl.load(values_ptr + first + i, i < size, 0.0).to(tl.float32)
        sort_block(value, composites_ptr + first, size, fault_ptr, BLOCK)


@triton.jit(do_not_specialize=["stride", "capacity", "num_groups", "out_stride", "limit"])
def _emit_kernel(
    composites_ptr, start_ptr, stop_ptr, groups_ptr, tokens_ptr, values_ptr, stats_ptr,
    out_start_ptr, out_tokens_ptr, out_values_ptr,
    arrived_ptr,  # [1] int32 or None: set to 0 for a later kernel
    stride, capacity, num_groups, out_stride, limit,
    PROBABILITY: tl.constexpr, VALUES: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0), tl.program_id(1)
    if arrived_ptr is not None:
        tl.store(arrived_ptr, 0, (row == 0) & (block == 0))
    first, size = list_bounds(start_ptr, stop_ptr, row, stride, capacity, groups_ptr, num_groups)
    i = block * BLOCK + tl.arange(0, BLOCK)
    if block * BLOCK < size:
        composite = tl.load(composites_ptr + first + i, i < size, 0)
        rank = tl.arange(0, BLOCK)
        for other in range(0, tl.cdiv(size, BLOCK)):
            if other != block:
                # How many of the other block, which descends, are above this element.
                low = tl.zeros([BLOCK], tl.int32)
                high = low + tl.minimum(size - other * BLOCK, BLOCK)
                for _ in range(STEPS):
                    middle = (low + high) // 2
                    theirs = tl.load(composites_ptr + first + other * BLOCK + middle, low < high, 0)
                    above = theirs > composite
                    low, high = (
                        tl.where((low < high) & above, middle + 1, low),
                        tl.where((low < high) & (above == 0), middle, high),
                    )
                rank += low
        place = 2147483647 - (composite & 2147483647)
        written = (i < size) & (rank < limit)
        out = row.to(tl.int64) * out_stride + rank
        if out_start_ptr is not None:
            out += tl.load(out_start_ptr + row)
        tl.store(out_tokens_ptr + out, tl.load(tokens_ptr + first + place, written, 0), written)
        if VALUES:
            value = tl.load(values_ptr + first + place, written, 0.0)
            if PROBABILITY:
                largest, total = tl.load(stats_ptr + 2 * row), tl.load(stats_ptr + 2 * row + 1)
                value = tl.div_rn(exp(value - largest), total)
            tl.store(out_values_ptr + out, value, written)


def sort_blocks(values: Tensor, lists: Lists, room: Tensor | None = None) -> Tensor:
    """Value and place of every element as one int64, each block of each list descending. NaN is recorded as a fault.

    `room`, if given, is where they go.
    """
    composites = torch.empty(values.shape, dtype=torch.int64, device=values.device) if room is None else room
    rows, block = lists.stop.shape[0], block_size(lists.capacity)
    launch(
        _sort_blocks_kernel, (rows, cdiv(lists.capacity, block)),
        values, composites, lists.start, lists.stop, lists.groups, faults.word(values.device), lists.stride,
        lists.capacity, lists.num_groups, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return composites


def emit_in_order(
    composites: Tensor,
    lists: Lists,
    tokens: Tensor,
    values: Tensor,
    out_start: Tensor | None,
    out_tokens: Tensor,
    out_values: Tensor | None,
    *,
    out_stride: int = 0,
    limit: int | None = None,
    stats: Tensor | None = None,
    arrived: Tensor | None = None,
) -> None:
    """Writes the elements of every list in order, the first `limit` of each.

    Args:
        composites: what `sort_blocks` made of `values`.
        tokens, values: of the elements, in the storage of the lists.
        out_start, out_stride: list `r` goes to `r * out_stride + out_start[r]` on (None: 0).
        out_tokens, out_values: written; `out_values` None: tokens only.
        stats: if given, values are logits and go out as probabilities.
        arrived: `[1]` int32, set to 0 along the way if there is a list.
    """
    rows, block = lists.stop.shape[0], block_size(lists.capacity)
    launch(
        _emit_kernel, (rows, max(1, cdiv(lists.capacity, block))),
        composites, lists.start, lists.stop, lists.groups, tokens, values, stats, out_start, out_tokens, out_values,
        arrived, lists.stride, lists.capacity, lists.num_groups, out_stride, lists.capacity if limit is None else limit,
        PROBABILITY=stats is not None, VALUES=out_values is not None, BLOCK=block, STEPS=block.bit_length(),
        num_warps=4,
    )  # fmt: skip


def block_size(capacity: int) -> int:
    """Elements that are sorted together."""
    return min(_BLOCK, max(32, next_power_of_2(capacity)))
