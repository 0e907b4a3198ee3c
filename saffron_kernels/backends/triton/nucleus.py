"""The exact top-p set of every row without sorting the vocabulary.

A row is cut into parts, a program each, in two launches: (1) the largest logit and the softmax denominator of every
part; (2) with those of the whole row, tokens too improbable to matter are left behind, the others are listed and their
mass added up by 256 bins of the logit. In a third launch one program a row finds the bin in which the mass reaches
`top_p`; among its tokens the logit, four bits of its order-preserving integer at a time; and the members, in token
order, among equal logits only those that still fit. Mass is added up in integers: in any order the same. `ordering.py`
then sorts the members alone.
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
from saffron_kernels.backends.triton.numerics import exp, order_key
from saffron_kernels.backends.triton.ordering import Lists, emit_in_order, sort_blocks

_PART = 2048  # tokens of a part
_BINS = tl.constexpr(256)
_UNIT = tl.constexpr(4611686018427387904.0)  # 2^62: what a probability of 1 weighs
_ALL = tl.constexpr((1 << 63) - 1)  # more than all tokens weigh
_FARTHEST = tl.constexpr(104.0)  # e^-x is 0 in fp32 beyond


@triton.jit
def _load_logits(row_ptr, stride, mask_ptr, token, vocab, HAS_BANNED: tl.constexpr):
    """fp32 logits; -inf where there is no token or it is banned, +inf for NaN (either is an error as the maximum)."""
    x = tl.load(row_ptr + token.to(tl.int64) * stride, token < vocab, float("-inf")).to(tl.float32)
    x = tl.where(x == x, x, float("inf"))
    if HAS_BANNED:
        x = tl.where(tl.load(mask_ptr + token, token < vocab, 0) != 0, float("-inf"), x)
    return x


@triton.jit
def _mark_banned(mask_ptr, banned_ptr, num_banned, first, vocab, fault_ptr, BLOCK: tl.constexpr):
    """`mask[token]` for every token of a part: whether it is banned."""
    token = first + tl.arange(0, BLOCK)
    tl.store(mask_ptr + token, tl.zeros([BLOCK], tl.int8), token < vocab)
    tl.debug_barrier()
    for start in range(0, num_banned, BLOCK):
        i = start + tl.arange(0, BLOCK)
        banned = tl.load(banned_ptr + i, i < num_banned, -1)
        own = (banned >= first) & (banned < tl.minimum(first + BLOCK, vocab))
        tl.store(mask_ptr + banned, tl.full([BLOCK], 1, tl.int8), own)
        if (first == 0) & (tl.max(((banned < -1) | (banned >= vocab)).to(tl.int32)) > 0):
            tl.atomic_or(fault_ptr, bits.BANNED)
    tl.debug_barrier()  # others read the mask than wrote it


@triton.jit
def _has_group(groups_ptr, row, num_groups):
    there = row >= 0
    if groups_ptr is not None:
        there = tl.load(groups_ptr + row) < num_groups
    return there


@triton.jit(do_not_specialize=["num_groups", "num_banned", "stride_banned"])
def _measure_kernel(
    logits_ptr,
    banned_ptr,  # [rows, num_banned], padded with -1, or None
    mask_ptr,  # [rows, vocab] int8
    groups_ptr,  # [rows] int32 or None: rows of a group that is not below `num_groups` are not looked at
    largest_ptr, sums_ptr,  # [rows, parts] fp32, fp64: of each part
    masses_ptr,  # [rows, bins] int64: set to 0
    flags_ptr,  # [rows] int32 or None: set to 0 for a later kernel
    fault_ptr, vocab, num_groups, num_banned, stride_row, stride_token,
    stride_banned,  # from row to row
    HAS_BANNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if part == 0:
        tl.store(masses_ptr + row * _BINS + tl.arange(0, _BINS), tl.zeros([_BINS], tl.int64))
        if flags_ptr is not None:
            tl.store(flags_ptr + row, 0)
    if _has_group(groups_ptr, row, num_groups):
        first = part * BLOCK
        if HAS_BANNED:
            mask_ptr += row * vocab
            _mark_banned(mask_ptr, banned_ptr + row * stride_banned, num_banned, first, vocab, fault_ptr, BLOCK)
        token = first + tl.arange(0, BLOCK)
        x = _load_logits(logits_ptr + row * stride_row, stride_token, mask_ptr, token, vocab, HAS_BANNED)
        largest = tl.max(x)
        mass = exp(x - tl.where(largest > float("-inf"), largest, 0.0)).to(tl.float64)
        tl.store(largest_ptr + row * tl.num_programs(1) + part, largest)
        tl.store(sums_ptr + row * tl.num_programs(1) + part, tl.sum(mass))


@triton.jit
def _mass(x, largest, total):
    """What a token weighs: its probability, in fp32 and in integers."""
    p = tl.div_rn(exp(x - largest), total)
    return p, (p.to(tl.float64) * _UNIT).to(tl.int64)


@triton.jit
def _bin(x, largest, scale):
    """The bin of a logit; those of larger logits come first."""
    return tl.minimum((largest - x) * scale, _BINS - 1).to(tl.int32)


@triton.jit
def _load_listed(lists_ptr, starts_ptr, i, count, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Element `i` of the lists of all parts: its logit, and its token."""
    part = tl.zeros_like(i)  # the last that starts at i or before
    step = PARTS // 2
    while step > 0:
        part = tl.where(tl.load(starts_ptr + part + step) <= i, part + step, part)
        step = step // 2
    at = part.to(tl.int64) * BLOCK + i - tl.load(starts_ptr + part)
    packed = tl.load(lists_ptr + at, i < count, 0)
    key = (packed >> 32).to(tl.int32)
    x = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
    return x, (packed & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def _load_keys(values_ptr, first, count, largest, total, BLOCK: tl.constexpr):
    """Order-preserving keys (0 to 2^32 - 1, as int64) and masses (0 beyond the list) of logits."""
    i = first + tl.arange(0, BLOCK)
    x = tl.load(values_ptr + i, i < count, float("-inf"))
    return order_key(x).to(tl.int64) + 2147483648, _mass(x, largest, total)[1]


@triton.jit
def _find_edge(values_ptr, count, least, most, before, limit, largest, total, SEARCH: tl.constexpr):
    """The lowest key above which less than `limit` lies, `before` included, and how much does; of `count` logits with
    keys from `least` to `most`."""
    # Digit by digit: with the higher digits known, the digit is the number of candidates whose largest continuation
    # still has the limit or more above it. Digits that all keys share need no look: equal logits have no others.
    edge = tl.zeros([], tl.int64)
    unit = tl.zeros([], tl.int64) + 268435456  # 2^28: what the highest digit counts
    digits = tl.arange(0, 16).to(tl.int64)
    key, mass = _load_keys(values_ptr, 0, count, largest, total, SEARCH)
    for _ in range(8):
        if (least ^ most) < unit:
            edge += most // unit % 16 * unit
        else:
            bound = edge + digits * unit + unit - 1  # [16]
            above = tl.zeros([16], tl.int64) + before
            for first in range(0, count, SEARCH):
                if count > SEARCH:  # otherwise the whole list is at hand
                    key, mass = _load_keys(values_ptr, first, count, largest, total, SEARCH)
                above += tl.sum(tl.where(key[:, None] > bound[None, :], mass[:, None], 0), 0)
            edge += tl.sum((above >= limit).to(tl.int64)) * unit
        unit = unit // 16
    for first in range(0, count, SEARCH):
        if count > SEARCH:
            key, mass = _load_keys(values_ptr, first, count, largest, total, SEARCH)
        before += tl.sum(tl.where(key > edge, mass, 0))
    return edge, before


@triton.jit
def _row_of(largest_ptr, sums_ptr, top_ps_ptr, top_p_bits, row, parts, vocab, PARTS: tl.constexpr):
    """Of a row: its largest logit, softmax denominator and `top_p`, whether the first and the last are good, and how
    many bins there are to a unit of the logit and how far from the largest a token in the set can be."""
    top_p = top_p_bits.to(tl.int64).to(tl.float64, bitcast=True)
    if top_ps_ptr is not None:
        top_p = tl.load(top_ps_ptr + row).to(tl.float64)
    part = tl.arange(0, PARTS)
    tops = tl.load(largest_ptr + row * parts + part, part < parts, float("-inf"))
    sums = tl.load(sums_ptr + row * parts + part, part < parts, 0.0)
    largest = tl.max(tops)
    total = tl.sum(tl.where(tops > float("-inf"), sums * exp(tops - largest).to(tl.float64), 0.0)).to(tl.float32)
    good = (largest > float("-inf")) & (largest < float("inf"))
    # The logarithm of a probability below which no token can be in the set: a token's mass before it is at least that
    # of all tokens above it, and the rest weigh less than 1 - top_p. Half of the bound, and nothing (-inf) near
    # top_p = 1, as rounding must not decide.
    least = (0.5 * (1 - top_p - 1e-4) / vocab).to(tl.float32)
    log_least = tl.where(least > 0, tl.log(tl.maximum(least, 1e-37)), float("-inf"))
    span = tl.minimum(-(log_least + tl.log(total)), _FARTHEST)
    return largest, total, top_p, good, (top_p > 0) & (top_p <= 1), _BINS / span, span


@triton.jit(do_not_specialize=["top_p_bits", "num_groups", "parts"])
def _list_kernel(
    logits_ptr, mask_ptr,
    top_ps_ptr,  # [rows] fp32 or fp64, or None: `top_p_bits` for all
    groups_ptr, largest_ptr, sums_ptr, masses_ptr,  # as _measure_kernel left them
    lists_ptr,  # [rows, vocab] int64: the tokens of each part that may be members, from its first token's place on
    listed_ptr,  # [rows, PARTS] int32: how many they are
    vocab, num_groups, parts, stride_row, stride_token,
    top_p_bits: tl.int64,  # a float argument would be rounded to fp32
    HAS_BANNED: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if _has_group(groups_ptr, row, num_groups):
        token = part * BLOCK + tl.arange(0, BLOCK)
        if HAS_BANNED:
            mask_ptr += row * vocab
        x = _load_logits(logits_ptr + row * stride_row, stride_token, mask_ptr, token, vocab, HAS_BANNED)
        largest, total, top_p, good, allowed, scale, span = _row_of(
            largest_ptr, sums_ptr, top_ps_ptr, top_p_bits, row, parts, vocab, PARTS
        )
        if good & allowed:
            keep = largest - x <= span
            kept = keep.to(tl.int32)
            packed = (order_key(x).to(tl.int64) << 32) | token
            tl.store(lists_ptr + row * vocab + part * BLOCK + tl.cumsum(kept, 0) - 1, packed, keep)
            tl.store(listed_ptr + row * PARTS + part, tl.sum(kept))
            bin_ = tl.where(keep, _bin(x, largest, scale), 0)
            tl.atomic_add(masses_ptr + row * _BINS + bin_, _mass(x, largest, total)[1], keep, sem="relaxed")


@triton.jit(do_not_specialize=["top_p_bits", "num_groups", "parts"])
def _select_kernel(
    top_ps_ptr, groups_ptr, largest_ptr, sums_ptr, masses_ptr, lists_ptr, listed_ptr,  # as _list_kernel left them
    starts_ptr,  # [rows, PARTS] int32: how many are listed before a part
    values_ptr, tokens_ptr,  # [rows, vocab] the members
    counts_ptr,  # [rows] int32
    stats_ptr,  # [rows, 2] fp32: largest logit, softmax denominator relative to it
    fault_ptr, vocab, num_groups, parts, top_p_bits: tl.int64,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    there = _has_group(groups_ptr, row, num_groups)
    largest, total, top_p, good, allowed, scale, span = _row_of(
        largest_ptr, sums_ptr, top_ps_ptr, top_p_bits, row, parts, vocab, PARTS
    )
    if there & ((good & allowed) == 0):
        tl.atomic_or(fault_ptr, tl.where(allowed, bits.LOGITS, bits.TOP_P))
    part = tl.arange(0, PARTS)
    sizes = tl.load(listed_ptr + row * PARTS + part, part < tl.where(there & good & allowed, parts, 0), 0)
    listed = tl.sum(sizes)
    starts_ptr += row * PARTS
    tl.store(starts_ptr + part, tl.cumsum(sizes, 0) - sizes)
    tl.debug_barrier()  # others read what starts where than wrote it
    lists_ptr += row * vocab
    values_ptr += row * vocab
    tokens_ptr += row * vocab

    limit = tl.where(top_p < 1, tl.ceil(top_p * _UNIT).to(tl.int64), _ALL)
    bin_ = tl.arange(0, _BINS)
    in_bin = tl.load(masses_ptr + row * _BINS + bin_)
    edge_bin = tl.min(tl.where(tl.cumsum(in_bin, 0) >= limit, bin_, _BINS))  # _BINS: all tokens are members
    before = tl.sum(tl.where(bin_ < edge_bin, in_bin, 0))

    # The logits of the edge's bin go where members will stand.
    at_edge = 0
    least = tl.full([], (1 << 32), tl.int64)
    most = tl.zeros([], tl.int64)
    for first in range(0, tl.where(edge_bin < _BINS, listed, 0), BLOCK):
        i = first + tl.arange(0, BLOCK)
        x = _load_listed(lists_ptr, starts_ptr, i, listed, PARTS, BLOCK)[0]
        here = ((i < listed) & (_bin(x, largest, scale) == edge_bin)).to(tl.int32)
        tl.store(values_ptr + at_edge + tl.cumsum(here, 0) - 1, x, here > 0)
        at_edge += tl.sum(here)
        key = order_key(x).to(tl.int64) + 2147483648
        least = tl.minimum(least, tl.min(tl.where(here > 0, key, 1 << 32)))
        most = tl.maximum(most, tl.max(tl.where(here > 0, key, 0)))
    tl.debug_barrier()
    edge, before = _find_edge(values_ptr, at_edge, least, most, before, limit, largest, total, SEARCH)
    tl.debug_barrier()  # members are written over what was searched

    members = 0
    ties = 0
    for first in range(0, listed, BLOCK):
        i = first + tl.arange(0, BLOCK)
        x, token = _load_listed(lists_ptr, starts_ptr, i, listed, PARTS, BLOCK)
        own_bin, key = _bin(x, largest, scale), order_key(x).to(tl.int64) + 2147483648
        p, mass = _mass(x, largest, total)
        # Tokens with the edge's own logit follow each other by token id.
        tie = ((i < listed) & (own_bin == edge_bin) & (key == edge)).to(tl.int32)
        ties_before = ties + tl.cumsum(tie, 0) - tie
        fits = (tie > 0) & (before + ties_before.to(tl.int64) * mass < limit)
        above = (own_bin < edge_bin) | ((own_bin == edge_bin) & (key > edge))
        member = ((i < listed) & (above | fits) & (p > 0)).to(tl.int32)
        place = members + tl.cumsum(member, 0) - 1
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
        room: `[rows, vocab]` int64, of no use any more.
    """

    values: Tensor
    tokens: Tensor
    counts: Tensor
    stats: Tensor
    room: Tensor

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
    block = min(_PART, max(128, next_power_of_2(vocab)))
    parts, has_banned = cdiv(vocab, block), banned is not None
    at_once = max(16, next_power_of_2(parts))

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=logits.device)

    mask, banned = (new(rows, vocab, dtype=torch.int8), banned.contiguous()) if banned is not None else (None, None)
    measured = new(rows, parts, dtype=torch.float32), new(rows, parts, dtype=torch.float64)
    masses = new(rows, _BINS.value, dtype=torch.int64)
    members = Members(
        new(rows, vocab, dtype=torch.float32),
        new(rows, vocab),
        new(rows + more_rows),
        new(rows, 2, dtype=torch.float32),
        new(rows, vocab, dtype=torch.int64),
    )
    launch(
        _measure_kernel, (rows, parts),
        logits, banned, mask, groups, *measured, masses, flags, faults.word(logits.device), vocab, num_groups,
        banned.shape[-1] if banned is not None else 0, *logits.stride(),
        banned.shape[-1] if banned is not None and banned.dim() == 2 else 0,
        HAS_BANNED=has_banned, BLOCK=block, num_warps=8,
    )  # fmt: skip
    top_ps, number = (top_p.contiguous(), 0.0) if isinstance(top_p, Tensor) else (None, top_p)
    top_p_bits = struct.unpack("<q", struct.pack("<d", number))[0]
    listed, starts = new(rows, at_once), new(rows, at_once)
    values, tokens, counts, stats, lists = members
    launch(
        _list_kernel, (rows, parts),
        logits, mask, top_ps, groups, *measured, masses, lists, listed, vocab, num_groups, parts, *logits.stride(),
        top_p_bits, HAS_BANNED=has_banned, BLOCK=block, PARTS=at_once, num_warps=8,
    )  # fmt: skip
    launch(
        _select_kernel, (rows,),
        top_ps, groups, *measured, masses, lists, listed, starts, values, tokens, counts, stats,
        faults.word(logits.device), vocab, num_groups, parts, top_p_bits,
        BLOCK=block, PARTS=at_once, SEARCH=min(256, max(32, next_power_of_2(vocab))), num_warps=8,
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
    composites = sort_blocks(members.values, lists, members.room)
    emit_in_order(composites, lists, members.tokens, members.values, offsets, tokens, probability, stats=members.stats)
    return tokens, probability, offsets
