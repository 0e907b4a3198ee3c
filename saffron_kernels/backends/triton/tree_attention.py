"""Attention over a flattened trie. Rows of a tile are (query, query head) pairs that share a KV head (GQA packed).

The cached tokens are split over programs; each leaves a partial result in fp32, which a second kernel joins in a fixed
order, so results are the same from run to run. Within a split a program first finds the tiles of tokens whose
intervals meet its queries, then loops over those alone: tiles that do not meet cost neither a load nor a branch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.triton import bits
from saffron_kernels.backends.triton.launch import DeviceProperties, cdiv, device_properties, launch, next_power_of_2
from saffron_kernels.backends.triton.numerics import dot, narrow, tanh

_LOG2E = 1.4426950408889634
_LOWEST_SEEN = tl.constexpr(-3.4028234663852886e38)  # the largest negative fp32 number
_TILES = 16  # tiles that are inspected together for whether they meet the queries
_PROGRAMS_PER_PROCESSOR = 2  # enough of them to hide each other's latency; more splits only add partials


class Config(NamedTuple):
    """Tile sizes and launch options of the attention kernel."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def config(head_dim: int, rows: int, element_size: int, arch: int) -> Config:
    """The configuration for `rows` (queries x group) of one KV head.

    Chosen so that nothing spills and a program's shared memory fits the architecture: `tests/support/triton_report.py`
    verifies both.
    """
    dim = max(64, next_power_of_2(head_dim))
    if element_size > 2:  # fp32 products run on the ordinary cores: small tiles
        if dim == 64:
            return Config(16, 32, num_warps=8 if arch >= 100 else 4, num_stages=1)
        if dim == 128 and arch < 90:
            return Config(16, 32, num_warps=4, num_stages=2)
        return Config(16, 32, num_warps=8, num_stages=2)
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    if dim > 128:  # the pass that keeps V from other rows holds twice as much of the result
        block_m = min(block_m, 32)
        return Config(block_m, 32, num_warps=8 if block_m == 32 else 4, num_stages=2)
    block_n = 64
    stages = 3 if arch >= 90 else 2
    return Config(block_m, block_n, num_warps=8 if block_m >= 64 else 4, num_stages=stages)


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, slot_ptr, begin_ptr, end_ptr, fault_ptr,
    scale_log2, cap_inner, cap_outer, queries, group, slots, first_token, last_token,
    q_stride_n, q_stride_h, q_stride_d,
    k_stride_s, k_stride_h, k_stride_d,
    v_stride_s, v_stride_h, v_stride_d,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, CAPPED: tl.constexpr, CAREFUL: tl.constexpr,
):  # fmt: skip
    """The largest score, the sum of weights and the result of each row.

    CAREFUL = 1: what is not finite in V counts as 0; = 2: in place of the result, how much of that a row sees.
    """
    kv_head = tl.program_id(1)
    first_row = tl.program_id(0) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)  # [BLOCK_M] (query, head of the group) pairs
    query = row // group
    head = (kv_head * group + row % group).to(tl.int64)
    first_query = first_row // group
    last_query = tl.minimum((first_row + BLOCK_M - 1) // group, queries - 1)
    dim, dim_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    in_dim, in_v = dim < D, dim_v < D_V
    q_row = query.to(tl.int64) * q_stride_n + head * q_stride_h
    exists_q = (query < queries)[:, None] & in_dim[None, :]
    q = tl.load(q_ptr + q_row[:, None] + dim[None, :] * q_stride_d, exists_q, 0.0)

    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    tile = tl.arange(0, TILES)
    lane = tl.arange(0, BLOCK_N)
    for chunk in range(first_token, last_token, TILES * BLOCK_N):
        token = chunk + tile[:, None] * BLOCK_N + lane[None, :]  # [TILES, BLOCK_N]
        exists = token < last_token
        begin = tl.load(begin_ptr + token, exists, 0)
        end = tl.load(end_ptr + token, exists, 0)
        meets = (begin < end) & (begin <= last_query) & (end > first_query)
        if kv_head == 0:
            slot = tl.load(slot_ptr + token, begin < end, 0)
            if tl.max(((begin < end) & ((slot < 0) | (slot >= slots))).to(tl.int32)) > 0:
                tl.atomic_or(fault_ptr, bits.SLOT)
        live = tl.max(meets.to(tl.int32), 1)  # [TILES]
        position = tl.cumsum(live, 0) - 1  # of each live tile among the live ones

        for i in range(tl.sum(live)):
            this = tl.sum(tl.where((position == i) & (live > 0), tile, 0))
            token_n = chunk + this * BLOCK_N + lane  # [BLOCK_N]
            exists_n = token_n < last_token
            begin_n = tl.load(begin_ptr + token_n, exists_n, 0)
            end_n = tl.load(end_ptr + token_n, exists_n, 0)
            needed = (begin_n < end_n) & (begin_n <= last_query) & (end_n > first_query)
            slot_n = tl.load(slot_ptr + token_n, needed, -1)
            needed = needed & (slot_n >= 0) & (slot_n < slots)
            slot_n = slot_n.to(tl.int64)

            k_row = slot_n * k_stride_s + kv_head * k_stride_h  # rows that no query of this tile sees stay unread
            read_k = needed[:, None] & in_dim[None, :]
            k = tl.load(k_ptr + k_row[:, None] + dim[None, :] * k_stride_d, read_k, 0.0)  # [BLOCK_N, BLOCK_D]
            scores = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            scores = tanh(scores * cap_inner) * cap_outer if CAPPED else scores * scale_log2
            seen = (begin_n[None, :] <= query[:, None]) & (query[:, None] < end_n[None, :]) & needed[None, :]
            scores = tl.where(seen, scores, float("-inf"))

            # Of a row that sees anything at least _LOWEST_SEEN, even if its scores are NaN or -inf.
            numbers = tl.where(seen, tl.where(scores > _LOWEST_SEEN, scores, _LOWEST_SEEN), float("-inf"))
            new_largest = tl.maximum(largest, tl.max(numbers, 1))
            base = tl.where(new_largest == float("-inf"), 0.0, new_largest)  # no -inf - -inf
            weight = tl.exp2(scores - base[:, None])
            decay = tl.exp2(largest - base)
            total = total * decay + tl.sum(weight, 1)
            v_row = slot_n * v_stride_s + kv_head * v_stride_h
            read_v = needed[:, None] & in_v[None, :]
            v = tl.load(v_ptr + v_row[:, None] + dim_v[None, :] * v_stride_d, read_v, 0.0)
            if CAREFUL:
                wide = v.to(tl.float32)
                unfit = wide - wide != 0.0
                if CAREFUL == 1:
                    acc = dot(narrow(weight, v.dtype), tl.where(unfit, 0.0, wide).to(v.dtype), acc * decay[:, None])
                else:
                    acc = dot(tl.where(seen, 1.0, 0.0).to(v.dtype), tl.where(unfit, 1.0, 0.0).to(v.dtype), acc)
            else:
                acc = dot(narrow(weight, v.dtype), v, acc * decay[:, None])
            largest = new_largest
    return largest, total, acc


@triton.jit
def _tokens_of_split(count_ptr, fault_ptr, tokens, tokens_per_split):
    """The first token of this program's split and the one past its last."""
    split = tl.program_id(2)
    if count_ptr is not None:
        count = tl.load(count_ptr)
        if (count < 0) | (count > tokens):
            tl.atomic_or(fault_ptr, bits.PLAN)
        tokens = tl.minimum(tl.maximum(count, 0), tokens)
        tokens_per_split = tl.cdiv(tokens, tl.num_programs(2))  # however many there are, all splits get their share
    first_token = split * tokens_per_split
    return first_token, tl.minimum(first_token + tokens_per_split, tokens)


@triton.jit
def _rows_of_program(queries, group, BLOCK_M: tl.constexpr):
    """Where the partial results of this program's rows lie, and which rows there are."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    query, kv_heads = row // group, tl.num_programs(1)
    head = (tl.program_id(1) * group + row % group).to(tl.int64)
    place = (tl.program_id(2).to(tl.int64) * queries + query) * kv_heads * group + head
    return place, query < queries


@triton.jit
def _result(largest, total, acc):
    """Outputs and LSE (base 2). No mass but something seen: all scores are -inf; NaN, if no other split has more."""
    mass = tl.where(total == 0, 1.0, total)
    out = tl.where((total == 0)[:, None], float("nan"), acc / mass[:, None])
    lse = tl.where(total == 0, _LOWEST_SEEN, largest + tl.log2(mass))
    return out, tl.where(largest == float("-inf"), float("-inf"), lse)


@triton.jit(do_not_specialize=["queries", "group", "slots", "tokens", "tokens_per_split"])
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, slot_ptr, begin_ptr, end_ptr,
    count_ptr,  # [1] int32 or None: how many of the tokens there are
    part_ptr,  # [splits, queries, heads, D_V] fp32
    lse_ptr,  # [splits, queries, heads] fp32, base 2
    fault_ptr,
    scale_log2, cap_inner, cap_outer, queries, group, slots, tokens, tokens_per_split,
    q_stride_n, q_stride_h, q_stride_d,
    k_stride_s, k_stride_h, k_stride_d,
    v_stride_s, v_stride_h, v_stride_d,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    first_token, last_token = _tokens_of_split(count_ptr, fault_ptr, tokens, tokens_per_split)
    largest, total, acc = _attend(
        q_ptr, k_ptr, v_ptr, slot_ptr, begin_ptr, end_ptr, fault_ptr,
        scale_log2, cap_inner, cap_outer, queries, group, slots, first_token, last_token,
        q_stride_n, q_stride_h, q_stride_d, k_stride_s, k_stride_h, k_stride_d, v_stride_s, v_stride_h, v_stride_d,
        D, D_V, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, TILES, CAPPED, CAREFUL=0,
    )  # fmt: skip
    out, lse = _result(largest, total, acc)
    place, present = _rows_of_program(queries, group, BLOCK_M)
    tl.store(lse_ptr + place, lse, present)
    # A partial that saw nothing is not written: its lse says so, and the join does not read it.
    written, dim = present & (largest > float("-inf")), tl.arange(0, BLOCK_V)
    elements = written[:, None] & (dim < D_V)[None, :]
    tl.store(part_ptr + place[:, None] * D_V + dim[None, :], out, elements)


@triton.jit(do_not_specialize=["queries", "group", "slots", "tokens", "tokens_per_split"])
def _mend_kernel(
    q_ptr, k_ptr, v_ptr, slot_ptr, begin_ptr, end_ptr, count_ptr, part_ptr, lse_ptr, fault_ptr,
    scale_log2, cap_inner, cap_outer, queries, group, slots, tokens, tokens_per_split,
    q_stride_n, q_stride_h, q_stride_d,
    k_stride_s, k_stride_h, k_stride_d,
    v_stride_s, v_stride_h, v_stride_d,
    D: tl.constexpr, D_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """Computes again the partial results of `_attention_kernel` that are not finite, and ends at once where all are.

    0 times NaN is NaN: V of a token that only some rows see may have spoilt the others. A kernel of its own, as the
    registers of the usual one do not hold two results.
    """
    place, present = _rows_of_program(queries, group, BLOCK_M)
    dim = tl.arange(0, BLOCK_V)
    lse = tl.load(lse_ptr + place, present, float("-inf"))
    elements = (present & (lse > float("-inf")))[:, None] & (dim < D_V)[None, :]  # a NaN lse is right as it is
    out = tl.load(part_ptr + place[:, None] * D_V + dim[None, :], elements, 0.0)
    if tl.max((out - out != 0.0).to(tl.int32)) > 0:
        first_token, last_token = _tokens_of_split(count_ptr, fault_ptr, tokens, tokens_per_split)
        largest, total, acc = _attend(
            q_ptr, k_ptr, v_ptr, slot_ptr, begin_ptr, end_ptr, fault_ptr,
            scale_log2, cap_inner, cap_outer, queries, group, slots, first_token, last_token,
            q_stride_n, q_stride_h, q_stride_d, k_stride_s, k_stride_h, k_stride_d, v_stride_s, v_stride_h, v_stride_d,
            D, D_V, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, TILES, CAPPED, CAREFUL=1,
        )  # fmt: skip
        out, _ = _result(largest, total, acc)
        tl.store(part_ptr + place[:, None] * D_V + dim[None, :], out, elements)
        _, _, touched = _attend(
            q_ptr, k_ptr, v_ptr, slot_ptr, begin_ptr, end_ptr, fault_ptr,
            scale_log2, cap_inner, cap_outer, queries, group, slots, first_token, last_token,
            q_stride_n, q_stride_h, q_stride_d, k_stride_s, k_stride_h, k_stride_d, v_stride_s, v_stride_h, v_stride_d,
            D, D_V, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N, TILES, CAPPED, CAREFUL=2,
        )  # fmt: skip
        nan = tl.full([BLOCK_M, BLOCK_V], float("nan"), tl.float32)
        tl.store(part_ptr + place[:, None] * D_V + dim[None, :], nan, elements & (touched > 0.0))


@triton.jit(do_not_specialize=["splits", "rows", "heads"])
def _join_kernel(
    part_ptr, part_lse_ptr,
    sinks_ptr,  # [heads] fp32, or None
    out_ptr, lse_ptr, splits, rows, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # (query, head)
    some = tl.arange(0, BLOCK_S)
    largest = tl.full([BLOCK_S], float("-inf"), tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + some
        lse = tl.load(part_lse_ptr + split.to(tl.int64) * rows + row, split < splits, float("-inf"))
        largest = tl.where(lse > largest, lse, largest)  # of the numbers
    seen = tl.max(largest)
    top = seen
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + row % heads) * 1.4426950408889634
        top = tl.where(sink > seen, sink, seen)
    base = tl.where(top == float("-inf"), 0.0, top)

    dim = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_S], tl.float32)
    acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for first in range(0, splits, BLOCK_S):
        split = first + some
        place = split.to(tl.int64) * rows + row
        lse = tl.load(part_lse_ptr + place, split < splits, float("-inf"))
        weight = tl.exp2(lse - base)
        total += weight
        read = (weight > 0)[:, None] & (dim < D)[None, :]
        acc += weight[:, None] * tl.load(part_ptr + place[:, None] * D + dim[None, :], read, 0.0)
    mass = tl.sum(total)
    nothing = (seen == float("-inf")) & (mass == 0)  # not where a partial is NaN
    empty = (seen == _LOWEST_SEEN) & (mass == mass)  # all scores are -inf
    if sinks_ptr is not None:
        empty = empty & (sink == float("-inf"))
        mass += tl.exp2(sink - base)
    out = tl.where(nothing, 0.0, tl.sum(acc, 0) / tl.where(mass == 0, 1.0, mass))
    tl.store(out_ptr + row * D + dim, narrow(out, out_ptr.dtype.element_ty), dim < D)
    lse = (base + tl.log2(tl.where(mass == 0, 1.0, mass))) * 0.6931471805599453
    tl.store(lse_ptr + row, tl.where(empty | (mass == 0), float("-inf"), lse))


def num_splits(tokens: int, row_tiles: int, kv_heads: int, block_n: int, on: DeviceProperties) -> tuple[int, int]:
    """Splits of the tokens, and tokens in each (a multiple of `block_n`): enough programs to fill the chip."""
    wanted = cdiv(_PROGRAMS_PER_PROCESSOR * on.processors, row_tiles * kv_heads)
    tiles = max(1, cdiv(tokens, block_n))
    tiles_per_split = cdiv(tiles, wanted)
    return cdiv(tiles, tiles_per_split), tiles_per_split * block_n


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    begin: Tensor,
    end: Tensor,
    scale: float,
    count: Tensor | None = None,
    _k_scale: None = None,
    _v_scale: None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    (queries, heads, head_dim), (slots, kv_heads, v_dim), tokens = q.shape, v_cache.shape, slot.shape[0]
    slot, begin, end = slot.contiguous(), begin.contiguous(), end.contiguous()
    held = faults.check_count(count, tokens)
    if faults.eager(slot):
        faults.check_index("slot", slot[:held][begin[:held] < end[:held]], slots)
    out = q.new_empty(queries, heads, v_dim)
    lse = torch.empty(queries, heads, dtype=torch.float32, device=q.device)
    if not queries:
        return out, lse
    rows = queries * heads // kv_heads
    on = device_properties(q.device)
    block_m, block_n, num_warps, num_stages = config(max(head_dim, v_dim), rows, q.element_size(), on.arch)
    row_tiles = cdiv(rows, block_m)
    splits, tokens_per_split = num_splits(tokens, row_tiles, kv_heads, block_n, on)
    part = torch.empty(splits, queries, heads, v_dim, dtype=torch.float32, device=q.device)
    part_lse = torch.empty(splits, queries, heads, dtype=torch.float32, device=q.device)
    block_d, block_v = (next_power_of_2(max(16, size)) for size in (head_dim, v_dim))
    capped = softcap is not None
    cap = softcap if softcap is not None else 1.0
    for kernel in (_attention_kernel, _mend_kernel):
        launch(
            kernel, (row_tiles, kv_heads, splits),
            q, k_cache, v_cache, slot, begin, end, count, part, part_lse, faults.word(q.device),
            scale * _LOG2E, scale / cap, cap * _LOG2E, queries, heads // kv_heads, slots, tokens, tokens_per_split,
            *q.stride(), *k_cache.stride(), *v_cache.stride(),
            D=head_dim, D_V=v_dim, BLOCK_D=block_d, BLOCK_V=block_v, BLOCK_M=block_m, BLOCK_N=block_n, TILES=_TILES,
            CAPPED=capped,
            num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True,
        )  # fmt: skip
    launch(
        _join_kernel, (queries * heads,), part, part_lse, None if sinks is None else sinks.float().contiguous(),
        out, lse, splits, queries * heads, heads, D=v_dim, BLOCK_D=block_v, BLOCK_S=16, num_warps=4,
    )  # fmt: skip
    return out, lse
