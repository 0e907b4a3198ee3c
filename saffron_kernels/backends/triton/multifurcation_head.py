"""Rewards of the candidates only: each program reads the head rows that its candidates name, and no others."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.triton import bits
from saffron_kernels.backends.triton.launch import cdiv, device_properties, launch, next_power_of_2
from saffron_kernels.backends.triton.numerics import is_one_of
from saffron_kernels.backends.triton.ordering import Lists, list_bounds

CANDIDATES = 8  # that a program scores together
SAW_UNSEEN = tl.constexpr(1)
SAW_SEEN = tl.constexpr(2)


@triton.jit(do_not_specialize=["stride", "capacity", "vocab", "num_end_tokens", "end_stride"])
def _head_kernel(
    hidden_ptr, weight_ptr, bias_ptr, unseen_ptr, tokens_ptr, start_ptr, stop_ptr, end_tokens_ptr,
    rewards_ptr,
    flags_ptr,  # [rows] int32: which kinds of candidates, end tokens aside, a row has
    fault_ptr, stride, capacity, vocab, width, unseen_reward, num_end_tokens,
    end_stride,  # from the end tokens of a row to those of the next
    hidden_stride_r, hidden_stride_c, weight_stride_r, weight_stride_c, bias_stride, unseen_stride,
    HAS_BIAS: tl.constexpr, HAS_UNSEEN: tl.constexpr, FLAGS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    first, size = list_bounds(start_ptr, stop_ptr, row, stride, capacity)
    hidden_ptr += row.to(tl.int64) * hidden_stride_r
    if end_tokens_ptr is not None:
        end_tokens_ptr += row * end_stride
    k = tl.arange(0, BLOCK_K)
    for block in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
        i = block + tl.arange(0, BLOCK)
        token = tl.load(tokens_ptr + first + i, i < size, 0)
        exists = (token >= 0) & (token < vocab)
        if tl.min(exists.to(tl.int32)) == 0:
            tl.atomic_or(fault_ptr, bits.CANDIDATE)
        valid = (i < size) & exists
        unknown = token != token
        if HAS_UNSEEN:
            unknown = tl.load(unseen_ptr + token * unseen_stride, valid, 0) != 0
        # Rows of tokens that the reward model was never trained on are not read either.
        read = valid & (unknown == 0)
        weight_row = weight_ptr + token.to(tl.int64) * weight_stride_r
        sums = tl.zeros([BLOCK, BLOCK_K], tl.float32)
        for start in range(0, width, BLOCK_K):
            column = start + k
            h = tl.load(hidden_ptr + column * hidden_stride_c, column < width, 0.0).to(tl.float32)
            mask = read[:, None] & (column < width)[None, :]
            w = tl.load(weight_row[:, None] + column[None, :] * weight_stride_c, mask, 0.0).to(tl.float32)
            sums = tl.fma(w, tl.broadcast_to(h[None, :], [BLOCK, BLOCK_K]), sums)
        reward = tl.where(exists, tl.sum(sums, 1), float("nan"))
        if HAS_BIAS:
            reward += tl.load(bias_ptr + token * bias_stride, read, 0.0).to(tl.float32)
        if HAS_UNSEEN:
            reward = tl.where(unknown, unseen_reward, reward)
        tl.store(rewards_ptr + first + i, reward, i < size)
        if FLAGS:
            word = valid & (is_one_of(token, end_tokens_ptr, num_end_tokens) == 0)
            saw_unseen = tl.max((word & unknown).to(tl.int32))
            saw_seen = tl.max((word & (unknown == 0)).to(tl.int32))
            tl.atomic_or(flags_ptr + row, saw_unseen * SAW_UNSEEN + saw_seen * SAW_SEEN)


def programs_per_row(rows: int, capacity: int, device: torch.device) -> int:
    """Programs that share the candidates of a row, whose number only the device knows: enough to fill the chip."""
    return max(1, min(cdiv(capacity, CANDIDATES), cdiv(4 * device_properties(device).processors, max(1, rows))))


def end_sizes(end_tokens: Tensor | None) -> tuple[int, int]:
    """How many end tokens a row has, and how far those of the next row are: 0 where they hold for all rows."""
    if end_tokens is None:
        return 0, 0
    return end_tokens.shape[-1], end_tokens.shape[-1] if end_tokens.dim() == 2 else 0


def score(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    unseen: Tensor | None,
    unseen_reward: float,
    tokens: Tensor,
    lists: Lists,
    rewards: Tensor,
    end_tokens: Tensor | None = None,
    flags: Tensor | None = None,
) -> None:
    """Writes the reward of every candidate to `rewards`, in the storage of the lists.

    Args:
        tokens, lists: the candidates of each row of `hidden`.
        end_tokens: contiguous, for all rows or for each.
        flags: `[rows]` int32, holding 0: set to what kinds of candidates, `end_tokens` aside, the row has.
    """
    rows, width = hidden.shape
    launch(
        _head_kernel, (rows, programs_per_row(rows, lists.capacity, hidden.device)),
        hidden, weight, bias, unseen, tokens, lists.start, lists.stop, end_tokens, rewards, flags,
        faults.word(hidden.device), lists.stride, lists.capacity, weight.shape[0], width, unseen_reward,
        *end_sizes(end_tokens),
        *hidden.stride(), *weight.stride(), 0 if bias is None else bias.stride(0),
        0 if unseen is None else unseen.stride(0),
        HAS_BIAS=bias is not None, HAS_UNSEEN=unseen is not None, FLAGS=flags is not None,
        BLOCK=CANDIDATES, BLOCK_K=min(256, max(16, next_power_of_2(width))), num_warps=4,
    )  # fmt: skip


def multifurcation_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    unseen: Tensor | None,
    unseen_reward: float,
    tokens: Tensor,
    offsets: Tensor,
) -> Tensor:
    size = tokens.shape[0]
    faults.check_index("tokens", tokens, weight.shape[0])
    faults.check_ascending("offsets", offsets, 0, size)
    rewards = torch.empty(size, dtype=torch.float32, device=hidden.device)
    lists = Lists.ragged(offsets, size)
    score(hidden, weight, bias, unseen, unseen_reward, tokens.contiguous(), lists, rewards)
    return rewards
