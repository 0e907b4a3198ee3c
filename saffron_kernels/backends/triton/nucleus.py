"""The exact top-p set of every row without sorting the vocabulary.

One program a row: (1) the largest logit; (2) the softmax denominator, while tokens too improbable to matter are left
behind; (3) on what is left, the logit at which the mass above reaches `top_p`, four bits of its order-preserving
integer at a time; (4) the members, in token order, among equal logits only those that still fit. `ordering.py` then
sorts the members alone.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.contents import check_top_ps
from saffron_kernels.backends.triton import bits
from saffron_kernels.backends.triton.launch import cdiv, launch, next_power_of_2
from saffron_kernels.backends.triton.numerics import exp, is_one_of, order_key
from saffron_kernels.backends.triton.ordering import Lists, emit_in_order, sort_blocks

_BAN_BLOCK = 1024


@triton.jit(do_not_specialize=["num_groups", "num_banned", "vocab"])
def _ban_kernel(banned_ptr, groups_ptr, mask_ptr, fault_ptr, num_groups, num_banned, vocab, BLOCK: tl.constexpr):
    """`mask[row, token]` for every token of the vocabulary: whether it is banned. One row, or one for each."""
    row = tl.program_id(1)
    banned_ptr += row * num_banned
    if groups_ptr is not None:  # of a row of no group nothing is looked at
        num_banned = tl.where(tl.load(groups_ptr + row) < num_groups, num_banned, 0)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = is_one_of(token, banned_ptr, num_banned).to(tl.int8)
    tl.store(mask_ptr + row.to(tl.int64) * vocab + token, mask, token < vocab)
    if tl.program_id(0) == 0:
        for first in range(0, num_banned, BLOCK):
            i = first + tl.arange(0, BLOCK)
            banned = tl.load(banned_ptr + i, i < num_banned, 0)
            if tl.max(((banned < -1) | (banned >= vocab)).to(tl.int32)) > 0:
                tl.atomic_or(fault_ptr, bits.BANNED)


@triton.jit
def _load_logits(row_ptr, stride, banned_ptr, token, vocab, HAS_BANNED: tl.constexpr):
    """fp32 logits; -inf where there is no token or it is banned, +inf for NaN (either is an error as the maximum)."""
    x = tl.load(row_ptr + token.to(tl.int64) * stride, token < vocab, float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("inf"))
    if HAS_BANNED:
        x = tl.where(tl.load(banned_ptr + token, token < vocab, 0) != 0, float("-inf"), x)
    return x


@triton.jit
def _load_listed(values_ptr, first, count, largest, total, BLOCK: tl.constexpr):
    """Order-preserving keys (0 to 2^32 - 1, as int64) and probabilities (fp64; 0 beyond the list) of listed logits."""
    i = first + tl.arange(0, BLOCK)
    x = tl.load(values_ptr + i, i < count, float("-inf"))
    p = tl.div_rn(exp(x - largest), total)
    return order_key(x).to(tl.int64) + 2147483648, p.to(tl.float64)


@triton.jit(do_not_specialize=["top_p_bits", "num_groups", "stride_banned"])
def _nucleus_kernel(
    logits_ptr, banned_ptr,
    top_ps_ptr,  # [rows] fp32 or fp64, or None: `top_p_bits` for all
    groups_ptr,  # [rows] int32 or None: rows of a group that is not below `num_groups` have no members
    values_ptr, tokens_ptr,  # [rows, vocab] the lists
    counts_ptr,  # [rows] int32
    stats_ptr,  # [rows, 2] fp32: largest logit, softmax denominator relative to it
    flags_ptr,  # [rows] int32 or None: set to 0 for a later kernel
    fault_ptr, vocab, num_groups, stride_row, stride_token,
    stride_banned,  # from row to row
    top_p_bits: tl.int64,  # a float argument would be rounded to fp32
    HAS_BANNED: tl.constexpr, BLOCK: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if flags_ptr is not None:
        tl.store(flags_ptr + row, 0)
    row_ptr = logits_ptr + row * stride_row
    values_ptr += row * vocab
    tokens_ptr += row * vocab
    if groups_ptr is not None:
        vocab = tl.where(tl.load(groups_ptr + row) < num_groups, vocab, 0)
    if HAS_BANNED:
        banned_ptr += row * stride_banned
    top_p = top_p_bits.to(tl.int64).to(tl.float64, bitcast=True)
    if top_ps_ptr is not None:
        top_p = tl.load(top_ps_ptr + row).to(tl.float64)
        allowed = (top_p > 0) & (top_p <= 1)
        if (allowed == 0) & (vocab > 0):
            tl.atomic_or(fault_ptr, bits.TOP_P)
        vocab = tl.where(allowed, vocab, 0)
    # ln of a probability below which no token can be in the set: half of the bound, and nothing (-inf) near top_p = 1,
    # as rounding must not decide.
    least = (0.5 * (1 - top_p - 1e-4) / tl.maximum(vocab, 1).to(tl.float64)).to(tl.float32)
    log_least = tl.where(least > 0, tl.log(tl.maximum(least, 1e-37)), float("-inf"))
    lane = tl.arange(0, BLOCK)

    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for first in range(0, vocab, BLOCK):
        x = _load_logits(row_ptr, stride_token, banned_ptr, first + lane, vocab, HAS_BANNED)
        highest = tl.maximum(highest, x)
    largest = tl.max(highest)
    bad = (largest == float("inf")) | (largest == float("-inf"))
    if bad & (vocab > 0):
        tl.atomic_or(fault_ptr, bits.LOGITS)
    scan = tl.where(bad, 0, vocab)

    # A token's mass before it is at least that of all tokens above `least`: the rest weigh less than 1 - top_p. The
    # denominator is at least 1 (the largest logit's own term), so this bound in logits needs the maximum only.
    cut = largest + log_least
    masses = tl.zeros([BLOCK], tl.float64)
    listed = 0
    for first in range(0, scan, BLOCK):
        token = first + lane
        x = _load_logits(row_ptr, stride_token, banned_ptr, token, vocab, HAS_BANNED)
        masses += exp(x - largest).to(tl.float64)
        keep = ((x >= cut) & (x > float("-inf"))).to(tl.int32)
        kept = tl.sum(keep)
        if kept > 0:
            place = listed + tl.cumsum(keep, 0) - 1
            tl.store(values_ptr + place, x, keep > 0)
            tl.store(tokens_ptr + place, token, keep > 0)
        listed += kept
    total = tl.sum(masses).to(tl.float32)
    tl.debug_barrier()  # the lists are read by other threads than wrote them

    # The lowest key above which less than top_p of the mass lies, digit by digit: with the higher digits known, the
    # digit is the number of candidates whose largest continuation still has top_p or more above it.
    edge = tl.zeros([], tl.int64)
    unit = tl.zeros([], tl.int64) + 268435456  # 2^28: what the highest digit counts
    digits = tl.arange(0, 16).to(tl.int64)
    key, p = _load_listed(values_ptr, 0, listed, largest, total, SEARCH)
    for _ in range(8):
        bound = edge + digits * unit + unit - 1  # [16]
        above = tl.zeros([16], tl.float64)
        for first in range(0, listed, SEARCH):
            if listed > SEARCH:  # otherwise the whole list is at hand
                key, p = _load_listed(values_ptr, first, listed, largest, total, SEARCH)
            above += tl.sum(tl.where(key[:, None] > bound[None, :], p[:, None], 0.0), 0)
        edge += tl.sum((above >= top_p).to(tl.int64)) * unit
        unit = unit // 16

    before_edge = tl.zeros([], tl.float64)
    for first in range(0, listed, SEARCH):
        if listed > SEARCH:
            key, p = _load_listed(values_ptr, first, listed, largest, total, SEARCH)
        before_edge += tl.sum(tl.where(key > edge, p, 0.0))

    # Members move to the front of their list. Tokens with the edge's own logit follow each other by token id.
    members = 0
    ties = 0
    for first in range(0, listed, SEARCH):
        if listed > SEARCH:
            key, p = _load_listed(values_ptr, first, listed, largest, total, SEARCH)
        i = first + tl.arange(0, SEARCH)
        x = tl.load(values_ptr + i, i < listed, 0.0)
        token = tl.load(tokens_ptr + i, i < listed, 0)
        tie = ((key == edge) & (i < listed)).to(tl.int32)
        ties_before = ties + tl.cumsum(tie, 0) - tie
        fits = (tie > 0) & (before_edge + ties_before.to(tl.float64) * p < top_p)
        member = (((key > edge) | fits) & (p > 0)).to(tl.int32)
        place = members + tl.cumsum(member, 0) - 1
        tl.debug_barrier()  # every thread has read its part before another overwrites it
        tl.store(values_ptr + place, x, member > 0)
        tl.store(tokens_ptr + place, token, member > 0)
        members += tl.sum(member)
        ties += tl.sum(tie)

    tl.store(counts_ptr + row, members)
    tl.store(stats_ptr + 2 * row, largest)
    tl.store(stats_ptr + 2 * row + 1, total)


class Members(NamedTuple):
    """The nuclei of all rows, in a workspace that holds whole rows: its size does not depend on the content.

    Attributes:
        values, tokens: `[rows, vocab]` logits (fp32) and token ids of the members, in token order.
        counts: `[rows]` int32 or longer, members of each row; 0 for a row of bad logits or of no group.
        stats: `[rows, 2]` fp32, largest logit and softmax denominator.
    """

    values: Tensor
    tokens: Tensor
    counts: Tensor
    stats: Tensor

    def lists(self) -> Lists:
        rows, vocab = self.values.shape
        return Lists(None, self.counts[:rows], stride=vocab, capacity=vocab)


def find_members(
    logits: Tensor,
    top_p: float | Tensor,
    banned: Tensor | None,
    *,
    groups: Tensor | None = None,
    num_groups: int = 0,
    more_rows: int = 0,
    flags: Tensor | None = None,
) -> Members:
    """The members of every row's nucleus, found without a synchronisation.

    Args:
        groups: `[rows]` int32: rows of a group that is not below `num_groups` are not looked at.
        more_rows: so many entries of `counts`, beyond those of the rows, are left for the caller to write.
        flags: `[rows]` int32, set to 0 along the way.
    """
    rows, vocab = logits.shape
    faults.check_parameters(vocab, top_p, banned, groups, num_groups)
    device = logits.device
    mask = None
    if banned is not None:
        each = banned.dim() == 2
        mask = torch.empty(rows if each else 1, vocab, dtype=torch.int8, device=device)
        launch(
            _ban_kernel, (cdiv(vocab, _BAN_BLOCK), mask.shape[0]), banned.contiguous(), groups if each else None, mask,
            faults.word(device), num_groups, banned.shape[-1], vocab, BLOCK=_BAN_BLOCK,
        )  # fmt: skip
    members = Members(
        torch.empty(rows, vocab, dtype=torch.float32, device=device),
        torch.empty(rows, vocab, dtype=torch.int32, device=device),
        torch.empty(rows + more_rows, dtype=torch.int32, device=device),
        torch.empty(rows, 2, dtype=torch.float32, device=device),
    )
    top_ps, number = (top_p.contiguous(), 0.0) if isinstance(top_p, Tensor) else (None, top_p)
    launch(
        _nucleus_kernel, (rows,),
        logits, mask, top_ps, groups, *members, flags, faults.word(device), vocab, num_groups, *logits.stride(),
        vocab if banned is not None and banned.dim() == 2 else 0, struct.unpack("<q", struct.pack("<d", number))[0],
        HAS_BANNED=banned is not None, BLOCK=min(2048, max(128, next_power_of_2(vocab))),
        SEARCH=min(256, max(32, next_power_of_2(vocab))), num_warps=8,
    )  # fmt: skip
    return members


def nucleus(logits: Tensor, top_p: float | Tensor, banned: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    members = find_members(logits, top_p, banned)
    offsets = torch.nn.functional.pad(members.counts.cumsum(0, dtype=torch.int32), (1, 0))
    counts = members.counts.tolist()  # the one synchronisation: how large the result is
    if 0 in counts:
        faults.clear(logits.device)
        if isinstance(top_p, Tensor):
            check_top_ps(top_p)
        raise ValueError(
            f"logits: row {counts.index(0)} has no finite maximum; every row needs finite logits (no NaN, no +inf) and "
            "one token that is neither -inf nor banned"
        )
    size = sum(counts)
    tokens = torch.empty(size, dtype=torch.int32, device=logits.device)
    probability = torch.empty(size, dtype=torch.float32, device=logits.device)
    lists = members.lists()
    composites = sort_blocks(members.values, lists)
    emit_in_order(composites, lists, members.tokens, members.values, offsets, tokens, probability, stats=members.stats)
    return tokens, probability, offsets
