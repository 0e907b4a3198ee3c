"""One step of Saffron search without a synchronisation: nucleus, rewards of its members, the best of every group.

Nine launches; nothing else runs on the device. All sizes follow from shapes, so a
step can be captured in a CUDA graph. The workspace is 16 bytes a logit. Bad logits (a row of NaN, or without a token),
which the other ops raise at once, stay recorded until `raise_faults` on a GPU; such a row has nucleus size 0, which no
other row of a group has. Rows of no group have empty lists, which no kernel looks into.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.triton.launch import cdiv, launch
from saffron_kernels.backends.triton.multifurcation_head import SAW_SEEN, SAW_UNSEEN, end_sizes, score
from saffron_kernels.backends.triton.nucleus import find_members
from saffron_kernels.backends.triton.numerics import is_one_of
from saffron_kernels.backends.triton.ordering import (
    Lists,
    block_size,
    emit_in_order,
    list_bounds,
    sort_block,
    sort_blocks,
)
from saffron_kernels.backends.triton.select_beam import choose


@triton.jit
def _is_all_unseen(flags_ptr, groups_ptr, group, rows, BLOCK: tl.constexpr):
    """1 if the rows of a group have unseen candidates and no seen one, else 0."""
    unseen = tl.zeros([BLOCK], tl.int32)
    seen = tl.zeros([BLOCK], tl.int32)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        own = (row < rows) & (tl.load(groups_ptr + row, row < rows, -1) == group)
        flags = tl.load(flags_ptr + row, own, 0)
        unseen = unseen | (flags & SAW_UNSEEN)
        seen = seen | (flags & SAW_SEEN)
    return ((tl.max(unseen) > 0) & (tl.max(seen) == 0)).to(tl.int32)


@triton.jit(
    do_not_specialize=["rows", "num_groups", "finished", "num_end_tokens", "end_stride", "stride", "capacity", "width"]
)
def _settle_kernel(
    rewards_ptr, tokens_ptr, stop_ptr, flags_ptr, groups_ptr, all_unseen_ptr, scores_ptr, end_tokens_ptr,
    finished_scores_ptr, finished_groups_ptr, best_rewards_ptr, best_tokens_ptr, all_groups_ptr, composites_ptr,
    fault_ptr, rows, num_groups, finished, num_end_tokens, end_stride, stride, capacity, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """What follows from all rewards: which groups are all unseen, who inherits, and the finished nodes as further rows.

    Program `x, y` serves group `x`, block `y` of row `x`, which it sorts, and, beyond the rows, a finished node.
    """
    x = tl.program_id(0)
    if tl.program_id(1) == 0:
        if x < num_groups:
            tl.store(all_unseen_ptr + x, _is_all_unseen(flags_ptr, groups_ptr, x, rows, BLOCK).to(tl.int8))
        if finished_scores_ptr is not None:
            if x < rows:
                tl.store(all_groups_ptr + x, tl.load(groups_ptr + x))
            elif x < rows + finished:
                tl.store(all_groups_ptr + x, tl.load(finished_groups_ptr + x - rows))
                tl.store(stop_ptr + x, 1)
                score = tl.load(finished_scores_ptr + x - rows).to(tl.float32)
                tl.store(best_rewards_ptr + x.to(tl.int64) * width, score)
                tl.store(best_tokens_ptr + x.to(tl.int64) * width, -1)
    if x < rows:
        first, size = list_bounds(None, stop_ptr, x, stride, capacity)
        if tl.program_id(1) * BLOCK < size:
            i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            reward = tl.load(rewards_ptr + first + i, i < size, 0.0)
            if scores_ptr is not None:
                # Children by end tokens, and all children in all-unseen groups, take the score of their row.
                if end_tokens_ptr is not None:
                    end_tokens_ptr += x * end_stride
                token = tl.load(tokens_ptr + first + i, i < size, 0)
                all_unseen = _is_all_unseen(flags_ptr, groups_ptr, tl.load(groups_ptr + x), rows, BLOCK)
                inherits = is_one_of(token, end_tokens_ptr, num_end_tokens).to(tl.int32) + all_unseen > 0
                reward = tl.where(inherits, tl.load(scores_ptr + x).to(tl.float32), reward)
                tl.store(rewards_ptr + first + i, reward, i < size)
            sort_block(reward, composites_ptr + first, size, fault_ptr, BLOCK)


def multifurcate(
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    unseen: Tensor | None,
    unseen_reward: float,
    groups: Tensor,
    num_groups: int,
    width: int,
    top_p: float | Tensor,
    banned: Tensor | None,
    scores: Tensor | None,
    end_tokens: Tensor | None,
    finished_scores: Tensor | None,
    finished_groups: Tensor | None,
    widths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if hidden.dtype == torch.float64:
        raise TypeError(f"hidden: got {hidden.dtype}, expected 32 bits at most: this backend computes in fp32")
    faults.check_index("groups", groups, num_groups + 1)
    faults.check_index("finished_groups", finished_groups, num_groups + 1)
    rows, vocab = logits.shape
    groups, end_tokens = groups.contiguous(), _contiguous(end_tokens)
    faults.check_index("widths", widths, width + 1, lowest=1)
    finished = 0 if finished_scores is None else finished_scores.shape[0]

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=logits.device)

    flags, all_unseen = new(rows), new(num_groups, dtype=torch.bool)
    best_rewards, best_tokens = new(rows + finished, width, dtype=torch.float32), new(rows + finished, width)
    members = find_members(logits, top_p, banned, groups=groups, num_groups=num_groups, more_rows=finished, flags=flags)
    lists = members.lists()
    # The same two buffers, once their content has been used, hold the tokens in order and then their rewards.
    tokens, rewards = members.values.view(torch.int32), members.tokens.view(torch.float32)
    composites = sort_blocks(members.values, lists, members.room)
    emit_in_order(composites, lists, members.tokens, members.values, None, tokens, None, out_stride=vocab)
    score(hidden, weight, bias, unseen, unseen_reward, tokens, lists, rewards, end_tokens, flags)
    all_groups = new(rows + finished) if finished else groups
    all_lists = Lists(None, members.counts, stride=0, capacity=vocab)
    block = block_size(vocab)
    launch(
        _settle_kernel, (max(rows + finished, num_groups), cdiv(vocab, block)),
        rewards, tokens, members.counts, flags, groups, all_unseen.view(torch.int8), _contiguous(scores), end_tokens,
        _contiguous(finished_scores) if finished else None, _contiguous(finished_groups) if finished else None,
        best_rewards, best_tokens, all_groups, composites, faults.word(logits.device), rows, num_groups, finished,
        *end_sizes(end_tokens), lists.stride, lists.capacity, width, BLOCK=block, num_warps=4,
    )  # fmt: skip
    parent, token, reward = choose(
        rewards, tokens, composites, lists, (best_rewards, best_tokens), all_lists, all_groups, num_groups, widths
    )
    faults.raise_if_eager(logits)
    return parent, token, reward, members.counts[:rows], all_unseen


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
