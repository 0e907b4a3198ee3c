"""The best candidates of every group of rows.

The best `width` of each row are put in order first (`ordering.py`): no more of a row can be chosen. Then each of those
counts who is before it in its group; the first `width` of a group are chosen and written in order of their rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.triton import bits
from saffron_kernels.backends.triton.launch import INTERPRETED, cdiv, launch, next_power_of_2
from saffron_kernels.backends.triton.ordering import Lists, emit_in_order, list_bounds, sort_blocks

_PAIRS = 1 << 16 if INTERPRETED else 4096  # comparisons that a program holds at once
_BLOCK = 1024


@triton.jit(do_not_specialize=["rows", "width", "num_groups", "stride", "capacity"])
def _choose_kernel(
    rewards_ptr,  # [rows, width] the best of each row, in order
    start_ptr, stop_ptr, groups_ptr,
    widths_ptr,  # [num_groups] or None: `width` for all
    chosen_ptr,  # [rows, width] int8
    fault_ptr, rows, width, num_groups, stride, capacity, BLOCK: tl.constexpr, OTHERS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    group = tl.load(groups_ptr + row)
    if (group < 0) | (group > num_groups):
        tl.atomic_or(fault_ptr, bits.GROUP)
    size = list_bounds(start_ptr, stop_ptr, row, stride, capacity, groups_ptr, num_groups)[1]
    limit = width
    if widths_ptr is not None:
        limit = tl.load(widths_ptr + group, (group >= 0) & (group < num_groups), 1)
        if (limit < 1) | (limit > width):
            tl.atomic_or(fault_ptr, bits.WIDTH)
        limit = tl.minimum(limit, width)
    valid = place < tl.minimum(size, width)
    entry = row * width + place
    reward = tl.load(rewards_ptr + entry, valid, 0.0).to(tl.float32)
    if tl.max((reward != reward).to(tl.int32)) > 0:
        tl.atomic_or(fault_ptr, bits.REWARD)
    rank = tl.zeros([BLOCK], tl.int32)
    for first in range(0, tl.where(size > 0, rows * width, 0), OTHERS):
        other = first + tl.arange(0, OTHERS)
        exists = other < rows * width
        other_row = other // width
        rival = exists & (tl.load(groups_ptr + other_row, exists, 0) == group)
        length = tl.load(stop_ptr + other_row, rival, 0)
        if start_ptr is not None:
            length -= tl.load(start_ptr + other_row, rival, 0)
        rival = rival & (other % width < length)
        theirs = tl.load(rewards_ptr + other, rival, 0.0).to(tl.float32)
        # Equal rewards: the earlier row first, and within a row they are in order.
        equal_before = (theirs[None, :] == reward[:, None]) & (other[None, :] < entry[:, None])
        before = rival[None, :] & ((theirs[None, :] > reward[:, None]) | equal_before)
        rank += tl.sum(before.to(tl.int32), 1)
    tl.store(chosen_ptr + entry, (valid & (rank < limit)).to(tl.int8), place < width)


@triton.jit(do_not_specialize=["rows", "width", "size"])
def _place_kernel(
    rewards_ptr, tokens_ptr, chosen_ptr, out_parent_ptr, out_token_ptr, out_reward_ptr, rows, width, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program `r` writes the chosen of row `r` after those of the rows before; the last, the empty places."""
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    for first in range(0, row * width, BLOCK):
        before += tl.load(chosen_ptr + first + lane, first + lane < row * width, 0).to(tl.int32)
    place = tl.sum(before)
    if row < rows:
        for first in range(0, width, BLOCK):
            entry = row * width + first + lane
            chosen = tl.load(chosen_ptr + entry, first + lane < width, 0).to(tl.int32)
            out = place + tl.cumsum(chosen, 0) - 1
            write = (chosen > 0) & (out < size)
            tl.store(out_parent_ptr + out, tl.zeros([BLOCK], tl.int32) + row, write)
            tl.store(out_token_ptr + out, tl.load(tokens_ptr + entry, write, 0), write)
            tl.store(out_reward_ptr + out, tl.load(rewards_ptr + entry, write, 0.0), write)
            place += tl.sum(chosen)
    else:
        for first in range(place, size, BLOCK):
            out = first + lane
            tl.store(out_parent_ptr + out, tl.zeros([BLOCK], tl.int32) + rows, out < size)
            tl.store(out_token_ptr + out, tl.full([BLOCK], -1, tl.int32), out < size)
            tl.store(out_reward_ptr + out, tl.full([BLOCK], float("-inf"), tl.float32), out < size)


def best_of_rows(rewards: Tensor, tokens: Tensor, lists: Lists, best_rewards: Tensor, best_tokens: Tensor) -> None:
    """Writes the best `width` candidates of each list, in order, to `best_rewards` and `best_tokens` `[rows, width]`.

    `rows` may exceed the number of lists: those rows stay unwritten.
    """
    width = best_tokens.shape[1]
    composites = sort_blocks(rewards, lists)
    emit_in_order(composites, lists, tokens, rewards, None, best_tokens, best_rewards, out_stride=width, limit=width)


def choose(
    best_rewards: Tensor, best_tokens: Tensor, lists: Lists, groups: Tensor, num_groups: int, widths: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The best of every group among the best of its rows (as many as `lists` says), as `select_beam` returns them.

    Rows of group `num_groups` belong to none.
    """
    (rows, width), device = best_rewards.shape, best_rewards.device
    size = num_groups * width
    chosen = torch.empty(rows, width, dtype=torch.int8, device=device)
    block = min(64, next_power_of_2(width))
    widths = None if widths is None else widths.contiguous()
    launch(
        _choose_kernel, (rows, cdiv(width, block)),
        best_rewards, lists.start, lists.stop, groups, widths, chosen, faults.word(device), rows, width,
        num_groups, lists.stride, lists.capacity, BLOCK=block, OTHERS=_PAIRS // block, num_warps=4,
    )  # fmt: skip
    parent = torch.empty(size, dtype=torch.int32, device=device)
    token = torch.empty(size, dtype=torch.int32, device=device)
    reward = torch.empty(size, dtype=best_rewards.dtype, device=device)
    if size:
        launch(
            _place_kernel, (rows + 1,), best_rewards, best_tokens, chosen, parent, token, reward, rows, width, size,
            BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return parent, token, reward


def select_beam(
    rewards: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    groups: Tensor,
    num_groups: int,
    width: int,
    widths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, size = groups.shape[0], rewards.shape[0]
    faults.check_rewards(rewards, offsets, groups, num_groups)
    faults.check_index("widths", widths, width + 1, lowest=1)
    lists = Lists.ragged(offsets, size, groups, num_groups)
    best_rewards = torch.empty(rows, width, dtype=rewards.dtype, device=rewards.device)
    best_tokens = torch.empty(rows, width, dtype=torch.int32, device=rewards.device)
    best_of_rows(rewards.contiguous(), tokens.contiguous(), lists, best_rewards, best_tokens)
    return choose(best_rewards, best_tokens, lists, groups.contiguous(), num_groups, widths)
