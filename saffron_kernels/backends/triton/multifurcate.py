"""One step of Saffron search without a synchronisation: nucleus, rewards of its members, the best of every group.

All sizes follow from shapes, so a step can be captured in a CUDA graph. The workspace is 16 bytes a logit. Bad logits
(a row of NaN, or without a token), which the other ops raise at once, stay recorded until `raise_faults` on a GPU; such
a row has nucleus size 0, which no good row has.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saffron_kernels.backends.triton import faults
from saffron_kernels.backends.triton.launch import launch
from saffron_kernels.backends.triton.multifurcation_head import (
    SAW_SEEN,
    SAW_UNSEEN,
    is_end_token,
    programs_per_row,
    score,
)
from saffron_kernels.backends.triton.nucleus import find_members
from saffron_kernels.backends.triton.ordering import Lists, emit_in_order, list_bounds, sort_blocks
from saffron_kernels.backends.triton.select_beam import best_of_rows, choose

_BLOCK = 256


@triton.jit(do_not_specialize=["rows"])
def _blind_kernel(flags_ptr, groups_ptr, blind_ptr, rows, BLOCK: tl.constexpr):
    """A group is blind when its rows have unseen candidates and no seen one."""
    group = tl.program_id(0)
    unseen = tl.zeros([BLOCK], tl.int32)
    seen = tl.zeros([BLOCK], tl.int32)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        own = (row < rows) & (tl.load(groups_ptr + row, row < rows, -1) == group)
        flags = tl.load(flags_ptr + row, own, 0)
        unseen = unseen | (flags & SAW_UNSEEN)
        seen = seen | (flags & SAW_SEEN)
    tl.store(blind_ptr + group, ((tl.max(unseen) > 0) & (tl.max(seen) == 0)).to(tl.int8))


@triton.jit(do_not_specialize=["num_end_tokens", "num_groups", "stride", "capacity"])
def _inherit_kernel(
    rewards_ptr, tokens_ptr, start_ptr, stop_ptr, groups_ptr, blind_ptr, scores_ptr, end_tokens_ptr,
    num_end_tokens, num_groups, stride, capacity, BLOCK: tl.constexpr,
):  # fmt: skip
    """Children by end tokens, and all children in blind groups, take the score of their row."""
    row = tl.program_id(0)
    first, size = list_bounds(start_ptr, stop_ptr, row, stride, capacity)
    group = tl.load(groups_ptr + row)
    blind = tl.load(blind_ptr + group, (group >= 0) & (group < num_groups), 0).to(tl.int32)
    row_score = tl.load(scores_ptr + row).to(tl.float32)
    for block in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
        i = block + tl.arange(0, BLOCK)
        token = tl.load(tokens_ptr + first + i, i < size, 0)
        inherits = is_end_token(token, end_tokens_ptr, num_end_tokens).to(tl.int32) + blind > 0
        tl.store(rewards_ptr + first + i, tl.zeros([BLOCK], tl.float32) + row_score, (i < size) & inherits)


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
    top_p: float,
    banned: Tensor | None,
    scores: Tensor | None,
    end_tokens: Tensor | None,
    carried_scores: Tensor | None,
    carried_groups: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if hidden.dtype == torch.float64:
        raise TypeError(f"hidden: got {hidden.dtype}, expected 32 bits at most: this backend computes in fp32")
    faults.check_index("groups", groups, num_groups)
    faults.check_index("carried_groups", carried_groups, num_groups)
    rows, vocab = logits.shape
    groups = groups.contiguous()
    end_tokens = None if end_tokens is None else end_tokens.contiguous()
    num_end_tokens = 0 if end_tokens is None else end_tokens.shape[0]

    members = find_members(logits, top_p, banned)
    lists = members.lists()
    # The same two buffers, once their content has been used, hold the tokens in order and then their rewards.
    tokens, rewards = members.values.view(torch.int32), members.tokens.view(torch.float32)
    composites = sort_blocks(members.values, lists)
    emit_in_order(composites, lists, members.tokens, members.values, lists.start, tokens, None, out_stride=vocab)
    flags = torch.zeros(rows, dtype=torch.int32, device=logits.device)
    score(hidden, weight, bias, unseen, unseen_reward, tokens, lists, rewards, end_tokens, flags)
    blind = torch.empty(num_groups, dtype=torch.bool, device=logits.device)
    launch(_blind_kernel, (num_groups,), flags, groups, blind.view(torch.int8), rows, BLOCK=_BLOCK, num_warps=1)
    if scores is not None:
        launch(
            _inherit_kernel, (rows, programs_per_row(rows, vocab, logits.device)),
            rewards, tokens, lists.start, lists.stop, groups, blind.view(torch.int8), scores.contiguous(), end_tokens,
            num_end_tokens, num_groups, lists.stride, lists.capacity, BLOCK=_BLOCK, num_warps=1,
        )  # fmt: skip

    carried = 0 if carried_scores is None else carried_scores.shape[0]
    best_rewards, best_tokens = best_of_rows(rewards, tokens, lists, width, rows + carried)
    if carried_scores is not None and carried_groups is not None:  # each is one more row with one candidate
        best_rewards[rows:, 0], best_tokens[rows:, 0] = carried_scores, -1
        groups = torch.cat([groups, carried_groups])
        stop = torch.cat([members.counts, members.counts.new_ones(carried)])
        lists = Lists(stop.new_zeros(rows + carried), stop, stride=0, capacity=vocab)
    parent, token, reward = choose(best_rewards, best_tokens, lists, groups, num_groups)
    faults.settle(logits)
    return parent, token, reward, members.counts, blind
