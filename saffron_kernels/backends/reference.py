"""The specification: every op in plain PyTorch, any floating dtype up to fp64, any device.

Each function has the signature of its op in `saffron_kernels.ops`, which documents shapes and checks them before
it calls a backend. What is checked here is the *content* of the tensors, which a backend has to look at anyway.
Storage below fp32 is computed in fp32, fp64 in fp64. All index tensors are int32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from saffron_kernels.backends.contents import (
    check_index,
    check_no_nan,
    check_offsets,
    check_top_ps,
    checked_count,
)
from saffron_kernels.backends.reference_paged import block_plan as block_plan
from saffron_kernels.checks import FP8, compute_dtype

# Scores held at once by `tree_attention`: bounds its memory at 256 MiB in fp32, whatever the size of a prefill.
_MAX_SCORES = 1 << 26


def why_not(device: torch.device, dtype: torch.dtype) -> None:
    """It runs everywhere."""


def append_kv(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    check_index("slots", slots, k_cache.shape[0], lowest=-1)
    keep = slots >= 0
    dtype = compute_dtype(k.dtype)
    k, v = k[keep].to(dtype), v[keep].to(dtype)
    if cos is not None and sin is not None:
        k = rotate(k, cos[keep].to(dtype), sin[keep].to(dtype))
    rows = slots[keep]
    _bits(k_cache)[rows] = _bits(_stored(k, k_cache.dtype, k_scale))
    _bits(v_cache)[rows] = _bits(_stored(v, v_cache.dtype, v_scale))


def rotate(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of the first dimensions of each head of `[tokens, heads, head_dim]`, as many as `cos` and `sin` have."""
    cos, sin = cos[:, None], sin[:, None]
    left, right, rest = k.tensor_split((cos.shape[-1] // 2, cos.shape[-1]), -1)
    rotated = torch.cat([left, right], -1) * cos + torch.cat([-right, left], -1) * sin
    return torch.cat([rotated, rest], -1)


def apart(rows: Tensor, *caches: Tensor) -> Tensor:
    """`rows`, or a copy where they share memory with a cache: what is appended is read before anything is written."""
    memory = rows.untyped_storage().data_ptr()
    return rows.clone() if any(cache.untyped_storage().data_ptr() == memory for cache in caches) else rows


def _stored(rows: Tensor, storage: torch.dtype, scale: Tensor | None) -> Tensor:
    """`[n, kv_heads, head_dim]` as a cache holds it; `scale` `[kv_heads]` is given for fp8 alone."""
    if storage != FP8:
        return rows.to(storage)
    largest = torch.finfo(FP8).max  # beyond it the conversion makes NaN
    return (rows if scale is None else rows / scale[:, None]).clamp(-largest, largest).to(FP8)


def _loaded(cache: Tensor, slot: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows `slot` of a cache, `[n, kv_heads, head_dim]`."""
    rows = _bits(cache)[slot].view(cache.dtype).to(dtype)
    return rows if scale is None else rows * scale[:, None]


def _bits(cache: Tensor) -> Tensor:
    """The same memory as a dtype that PyTorch indexes on every device, which fp8 is not."""
    return cache.view(torch.uint8) if cache.dtype == FP8 else cache


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    begin: Tensor,
    end: Tensor,
    scale: float,
    count: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    queries, heads, _ = q.shape
    (_, kv_heads, v_dim), group = v_cache.shape, heads // k_cache.shape[1]
    dtype = compute_dtype(q.dtype)
    out = q.new_empty(queries, heads, v_dim)
    lse = torch.empty(queries, heads, dtype=dtype, device=q.device)

    if count is not None:
        slot, begin, end = (x[: checked_count(count, slot.shape[0])] for x in (slot, begin, end))
    visible = begin < end  # a token that no query sees is not read: its slot may be -1, or already someone else's
    slot, begin, end = slot[visible], begin[visible], end[visible]
    check_index("slot", slot, k_cache.shape[0])
    k = _loaded(k_cache, slot, k_scale, dtype).permute(1, 2, 0)  # [kv_heads, head_dim, tokens]
    v = _loaded(v_cache, slot, v_scale, dtype).transpose(0, 1)  # [kv_heads, tokens, v_dim]
    # A weight of 0 times NaN is NaN: what is not finite in V must not meet the queries that do not see its token.
    unfit = v.isfinite().logical_not_()
    v = v.masked_fill(unfit, 0) if (spoils := bool(unfit.any())) else v
    sink = None if sinks is None else sinks.to(dtype).view(kv_heads, 1, group, 1)

    block = max(1, _MAX_SCORES // max(1, heads * slot.shape[0]))
    for first in range(0, queries, block):
        index = torch.arange(first, min(first + block, queries), device=q.device)[:, None]
        hidden = (index < begin) | (index >= end)  # [block, tokens]
        # Query heads that share a KV head become rows of one matrix: [kv_heads, block * group, head_dim].
        qb = q[first : first + block].to(dtype).unflatten(1, (kv_heads, -1)).transpose(0, 1)
        scores = torch.matmul(qb.flatten(1, 2) * scale, k).unflatten(1, qb.shape[1:3])
        if softcap is not None:
            scores = scores.div_(softcap).tanh_().mul_(softcap)
        scores.masked_fill_(hidden[:, None, :], -torch.inf)
        # An empty block of tokens has no maximum; a query that sees nothing has -inf, which must not make NaN.
        largest = (
            scores.amax(-1, keepdim=True) if scores.shape[-1] else scores.new_full((*scores.shape[:-1], 1), -torch.inf)
        )
        largest = largest if sink is None else torch.maximum(largest, sink)
        base = largest.masked_fill(largest == -torch.inf, 0)
        weights = scores.sub_(base).exp_()
        total = weights.sum(-1, keepdim=True)
        total = total if sink is None else total + (sink - base).exp()
        attended = torch.matmul(weights.flatten(1, 2), v).unflatten(1, qb.shape[1:3]) / total
        if spoils:
            touched = torch.matmul((~hidden).to(dtype), unfit.to(dtype)) > 0  # [kv_heads, block, v_dim]
            attended.masked_fill_(touched[:, :, None], torch.nan)
        attended.masked_fill_(hidden.all(-1)[:, None, None], 0)
        out[first : first + block] = attended.transpose(0, 1).reshape(-1, heads, v_dim)
        block_lse = (base + total.log()).squeeze(-1)
        lse[first : first + block] = block_lse.transpose(0, 1).reshape(-1, heads)
    return out, lse


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(out_a.dtype)
    lse = torch.logaddexp(lse_a, lse_b)
    base = lse.masked_fill(lse == -torch.inf, 0)
    weight_a, weight_b = (lse_a - base).exp().to(dtype), (lse_b - base).exp().to(dtype)
    out = out_a.to(dtype) * weight_a[..., None] + out_b.to(dtype) * weight_b[..., None]
    return out.to(out_a.dtype).contiguous(), lse.contiguous()


def gather_kv(k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    check_index("slots", slots, k_cache.shape[0], lowest=-1)
    present = slots >= 0

    def gathered(cache: Tensor) -> Tensor:
        bits = _bits(cache)
        rows = bits.new_zeros(*slots.shape, *cache.shape[1:])
        rows[present] = bits[slots[present]]
        return rows.transpose(1, 2).contiguous().view(cache.dtype)

    return gathered(k_cache), gathered(v_cache)


def nucleus(logits: Tensor, top_p: float | Tensor, banned: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.to(compute_dtype(logits.dtype))
    rows, vocab = logits.shape
    if isinstance(top_p, Tensor):
        check_top_ps(top_p)
        limit = top_p.double()
    else:
        limit = torch.full((rows,), top_p, dtype=torch.float64, device=logits.device)
    if banned is not None:
        check_index("banned", banned, vocab, lowest=-1)
        mask = torch.zeros(rows, vocab + 1, dtype=torch.bool, device=logits.device)  # padding bans the last, unused one
        mask.scatter_(1, torch.where(banned < 0, vocab, banned).long().expand(rows, -1), True)
        logits = logits.masked_fill(mask[:, :vocab], -torch.inf)
    largest = logits.amax(1) if logits.numel() else logits.new_zeros(logits.shape[0])
    if not bool(torch.isfinite(largest).all()):
        bad = int(torch.isfinite(largest).logical_not().nonzero()[0])
        raise ValueError(
            f"logits: row {bad} has maximum {float(largest[bad])}; every row needs finite logits (no NaN, no +inf) "
            "and one token that is neither -inf nor banned"
        )
    probability = logits.softmax(1)
    row, token = ((probability > 0) & (probability >= _lowest_in_nucleus(probability, limit))).nonzero(as_tuple=True)
    # By logits, which tell apart what exp rounds to one probability; stable: equal logits by ascending token id.
    order = logits[row, token].argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    row, token = row[order], token[order]
    chance = probability[row, token]
    # Each row is summed by itself: what stands before it must not change how its sums are rounded.
    first = torch.searchsorted(row, torch.arange(logits.shape[0], device=row.device))  # each row's most probable token
    place = torch.arange(row.shape[0], device=row.device) - first[row]
    longest = int(place.max()) + 1 if row.numel() else 0
    mass = torch.zeros(logits.shape[0], longest, dtype=torch.float64, device=row.device)
    mass[row, place] = chance.double()
    keep = (mass.cumsum(1) - mass)[row, place] < limit[row]
    counts = torch.bincount(row[keep], minlength=logits.shape[0])
    return token[keep].int(), chance[keep], _offsets(counts)


def _lowest_in_nucleus(probability: Tensor, top_p: Tensor) -> Tensor:
    """`[rows, 1]`: no token less probable than this is in the nucleus. Saves sorting the vocabulary.

    If the tokens of probability `p` and more hold `top_p` of the mass, all others are out. Bisection finds such a `p`.
    """
    low, high = probability.new_zeros(probability.shape[0], 1), probability.amax(1, keepdim=True)
    for _ in range(12):
        middle = (low + high) / 2
        mass = torch.where(probability >= middle, probability, 0).sum(1, keepdim=True, dtype=torch.float64)
        enough = mass > top_p[:, None] + 1e-9  # the margin covers the order of summation
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low


def multifurcation_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    unseen: Tensor | None,
    unseen_reward: float,
    tokens: Tensor,
    offsets: Tensor,
) -> Tensor:
    check_index("tokens", tokens, weight.shape[0])
    check_offsets(offsets, tokens.shape[0])
    dtype = compute_dtype(hidden.dtype)
    named, column = tokens.unique(return_inverse=True)  # each named weight row is read once for all rows
    scores = hidden.to(dtype) @ weight[named].to(dtype).T
    rewards = scores[_rows(offsets, tokens.shape[0]), column]
    if bias is not None:
        rewards = rewards + bias[tokens].to(dtype)
    if unseen is not None:
        rewards = rewards.masked_fill(unseen[tokens], unseen_reward)
    return rewards


def select_beam(
    rewards: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    groups: Tensor,
    num_groups: int,
    width: int,
    widths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, count = groups.shape[0], rewards.shape[0]
    check_index("groups", groups, num_groups + 1)
    if widths is None:
        widths = groups.new_full((num_groups,), width)
    check_index("widths", widths, width + 1, lowest=1)
    check_offsets(offsets, count)
    row = _rows(offsets, count)
    unknown = rewards.isnan() & (groups[row] < num_groups)
    if bool(unknown.any()):
        raise ValueError(f"rewards: candidate {int(unknown.nonzero()[0])} is NaN; rewards must be numbers")
    # Stable sorts, the last key first: group ascending, reward descending, and equal rewards in candidate order.
    order = rewards.argsort(descending=True, stable=True)
    order = order[groups[row[order]].argsort(stable=True)]
    group = groups[row[order]].long()
    first = torch.searchsorted(group, group)  # where the group of each candidate begins
    order = order[torch.arange(count, device=order.device) - first < pad(widths, (0, 1))[group]]  # of no group: none
    order = order[row[order].argsort(stable=True)]  # ordered by parent; siblings by reward

    chosen = order.shape[0]
    parent = tokens.new_full((num_groups * width,), rows)
    token = tokens.new_full((num_groups * width,), -1)
    reward = rewards.new_full((num_groups * width,), -torch.inf)
    parent[:chosen], token[:chosen], reward[:chosen] = row[order].int(), tokens[order], rewards[order]
    return parent, token, reward


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
    widths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_index("groups", groups, num_groups + 1)
    if finished_groups is not None:
        check_index("finished_groups", finished_groups, num_groups + 1)
    used = groups < num_groups  # all rows but the last ones
    top_p = top_p[used] if isinstance(top_p, Tensor) else top_p
    tokens, _, offsets = nucleus(logits[used], top_p, _of_rows(banned, used))
    rewards = multifurcation_head(hidden[used], weight, bias, unseen, unseen_reward, tokens, offsets)
    row = _rows(offsets, tokens.shape[0])
    end_tokens = _of_rows(end_tokens, used)
    ends = torch.zeros_like(tokens, dtype=torch.bool)
    if end_tokens is not None:
        ends = (tokens[:, None] == (end_tokens if end_tokens.dim() == 1 else end_tokens[row])).any(1)

    # A group is all unseen when the reward model has seen none of its candidates: it then keeps the policy's own order,
    # which is the candidate order that decides between equal rewards.
    seen = torch.ones_like(ends) if unseen is None else ~unseen[tokens]
    all_unseen = torch.zeros(num_groups, dtype=torch.bool, device=logits.device)
    all_unseen[groups[row[~seen & ~ends]].long()] = True
    all_unseen[groups[row[seen & ~ends]].long()] = False
    if scores is not None:
        inherits = ends | all_unseen[groups[row].long()]
        check_no_nan("scores: row", scores, row[inherits])
        rewards = torch.where(inherits, scores[row].to(rewards.dtype), rewards)
    if bool(rewards.isnan().any()):
        bad = int(rewards.isnan().nonzero()[0])
        raise ValueError(f"rewards: token {int(tokens[bad])} of row {int(row[bad])} has NaN; rewards must be numbers")

    counts = torch.zeros_like(groups)
    counts[used] = offsets.diff()
    offsets = _offsets(counts)
    if finished_scores is not None and finished_groups is not None:
        check_no_nan("finished_scores: node", finished_scores, (finished_groups < num_groups).nonzero()[:, 0])
        tokens = torch.cat([tokens, tokens.new_full(finished_scores.shape, -1)])
        rewards = torch.cat([rewards, finished_scores.to(rewards.dtype)])
        groups = torch.cat([groups, finished_groups])
        offsets = _offsets(torch.cat([counts, counts.new_ones(finished_scores.shape)]))
    parent, token, reward = select_beam(rewards, tokens, offsets, groups, num_groups, width, widths)
    return parent, token, reward, counts, all_unseen


def _of_rows(ids: Tensor | None, used: Tensor) -> Tensor | None:
    """Token ids for all rows as they are; those for each row, of the rows that are used."""
    return ids[used] if ids is not None and ids.dim() == 2 else ids


def advance_tree(
    slot: Tensor,
    begin: Tensor,
    end: Tensor,
    parents: Tensor,
    new_slots: Tensor,
    queries: int,
    count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if count is not None:
        room, held = slot.shape[0], checked_count(count, slot.shape[0] - parents.shape[0])
        plan = advance_tree(slot[:held], begin[:held], end[:held], parents, new_slots, queries, None)
        dead = room - held - parents.shape[0]
        slot, begin, end = (pad(x, (0, dead), value=v) for x, v in zip(plan, (-1, 0, 0), strict=True))
        return slot, begin, end
    if bool((parents.diff() < 0).any()):
        raise ValueError("parents: must be ascending (the new queries are numbered by parent)")
    check_index("parents", parents, 1 << 31)  # not negative; `queries` and above is no parent
    check_index("begin", begin, queries + 1)
    check_index("end", end, queries + 1)
    # children_before[i] = children of the queries before i: the exclusive prefix sum of the child counts.
    old = torch.arange(queries + 1, device=parents.device, dtype=torch.int32)
    children_before = torch.searchsorted(parents.contiguous(), old, out_int32=True)
    new = torch.arange(parents.shape[0], device=parents.device, dtype=torch.int32)
    return (
        torch.cat([slot, new_slots]),
        torch.cat([children_before[begin], new]),
        torch.cat([children_before[end], new + (parents < queries)]),
    )


def _offsets(counts: Tensor) -> Tensor:
    """Exclusive prefix sum with the total at its end, int32."""
    return pad(counts.cumsum(0, dtype=torch.int32), (1, 0))


def _rows(offsets: Tensor, count: int) -> Tensor:
    """The row each of `count` candidates belongs to."""
    rows = torch.arange(offsets.shape[0] - 1, device=offsets.device, dtype=torch.int32)
    return rows.repeat_interleave(offsets.diff(), output_size=count)
