"""The best candidates of every group of rows.

The best `width` of each row are put in order first (`ordering.py`): no more of a row can be chosen. Then each of those
counts who is before it in its group; the first `width` of a group are chosen, and the last program to be done writes
them in order of their rows.
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


@triton.jit
def _place(
    rewards_ptr, tokens_ptr, chosen_ptr, out_parent_ptr, out_token_ptr, out_reward_ptr, rows, width, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the chosen of all rows one after the other, and the empty places behind them."""
    lane = tl.arange(0, BLOCK)
    place = 0
    for first in range(0, rows * width, BLOCK):
        entry = first + lane
        chosen = tl.load(chosen_ptr + entry, entry < rows * width, 0).to(tl.int32)
        out = place + tl.cumsum(chosen, 0) - 1
        write = (chosen > 0) & (out < size)
        tl.store(out_parent_ptr + out, entry // width, write)
        tl.store(out_token_ptr + out, tl.load(tokens_ptr + entry, write, 0), write)
        tl.store(out_reward_ptr + out, tl.load(rewards_ptr + entry, write, 0.0), write)
        place += tl.sum(chosen)
    for first in range(place, size, BLOCK):
        out = first + lane
        tl.store(out_parent_ptr + out, tl.zeros([BLOCK], tl.int32) + rows, out < size)
        tl.store(out_token_ptr + out, tl.full([BLOCK], -1, tl.int32), out < size)
        tl.store(out_reward_ptr + out, tl.full([BLOCK], float("-inf"), tl.float32), out < size)


@triton.jit(do_not_specialize=["rows", "width", "num_groups", "stride", "capacity", "size"])
def _choose_kernel(
    rewards_ptr, tokens_ptr,  # [rows, width] the best of each row, in order
    start_ptr, stop_ptr, groups_ptr,
    widths_ptr,  # [num_groups] or None: `width` for all
    chosen_ptr,  # [rows, width] int8
    arrived_ptr,  # [1] int32, 0 at first: programs that are done
    out_parent_ptr, out_token_ptr, out_reward_ptr,  # [size]
    fault_ptr, rows, width, num_groups, stride, capacity, size,
    BLOCK: tl.constexpr, OTHERS: tl.constexpr, PLACED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    group = tl.load(groups_ptr + row)
    if (group < 0) | (group > num_groups):
        tl.atomic_or(fault_ptr, bits.GROUP)
    candidates = list_bounds(start_ptr, stop_ptr, row, stride, capacity, groups_ptr, num_groups)[1]
    limit = width
    if widths_ptr is not None:
        limit = tl.load(widths_ptr + group, (group >= 0) & (group < num_groups), 1)
        if (limit < 1) | (limit > width):
            tl.atomic_or(fault_ptr, bits.WIDTH)
        limit = tl.minimum(limit, width)
    valid = place < tl.minimum(candidates, width)
    entry = row * width + place
    reward = tl.load(rewards_ptr + entry, valid, 0.0).to(tl.float32)
    if tl.max((reward != reward).to(tl.int32)) > 0:
        tl.atomic_or(fault_ptr, bits.REWARD)
    rank = tl.zeros([BLOCK], tl.int32)
    for first in range(0, tl.where(candidates > 0, rows * width, 0), OTHERS):
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
    tl.debug_barrier()  # what all threads wrote, one announces
    if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == tl.num_programs(0) * tl.num_programs(1) - 1:
        _place(
            rewards_ptr,
            tokens_ptr,
            chosen_ptr,
            out_parent_ptr,
            out_token_ptr,
            out_reward_ptr,
            rows,
            width,
            size,
            PLACED,
        )


def choose(
    rewards: Tensor,
    tokens: Tensor,
    composites: Tensor,
    lists: Lists,
    best: tuple[Tensor, Tensor],
    all_lists: Lists,
    groups: Tensor,
    num_groups: int,
    widths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best of every group, as `select_beam` returns them; what `lists` name is sorted in blocks.

    Args:
        rewards, tokens, composites: candidates, in the storage of `lists`, and what sorting made of them.
        best: rewards and tokens `[rows, width]`: those of `lists` are written, the rows beyond are there.
        all_lists, groups: of all rows. Rows of group `num_groups` belong to none.
    """
    (rows, width), device = best[0].shape, rewards.device
    size = num_groups * width

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    parent, token, reward = new(size), new(size), new(size, dtype=rewards.dtype)
    if rows == 0:
        return parent.fill_(0), token.fill_(-1), reward.fill_(-torch.inf)
    arrived = new(1) if lists.stop.shape[0] else new(1).zero_()
    emit_in_order(
        composites, lists, tokens, rewards, None, best[1], best[0], out_stride=width, limit=width, arrived=arrived
    )
    block = min(64, next_power_of_2(width))
    launch(
        _choose_kernel, (rows, cdiv(width, block)),
        *best, all_lists.start, all_lists.stop, groups, None if widths is None else widths.contiguous(),
        new(rows, width, dtype=torch.int8), arrived, parent, token, reward, faults.word(device), rows, width,
        num_groups, all_lists.stride, all_lists.capacity, size, BLOCK=block, OTHERS=_PAIRS // block, PLACED=_BLOCK,
        num_warps=4,
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
    rewards, best = rewards.contiguous(), (best_rewards, best_tokens)
    composites = sort_blocks(rewards, lists)
    return choose(rewards, tokens.contiguous(), composites, lists, best, lists, groups.contiguous(), num_groups, widths)
