"""What every op means, written from its docstring as plainly as Python can say it: loops over floats, in fp64.

Nothing here shares code or method with a backend. Tensors come in on any device; fp64 tensors on the CPU go out.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

INF = math.inf


def floats(tensor: Tensor) -> list:
    return tensor.double().tolist()


def f64(values: list, *shape: int) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(shape)


def dot(a: list[float], b: list[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def logsumexp(values: list[float]) -> float:
    largest = max(values, default=-INF)
    return largest if largest == -INF else largest + math.log(math.fsum(math.exp(v - largest) for v in values))


def append_kv(k: Tensor, v: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> tuple[Tensor, Tensor]:
    """The caches afterwards."""
    k_after, v_after = k_cache.clone(), v_cache.clone()
    for i, slot in enumerate(slots.tolist()):
        if slot != -1:
            k_after[slot], v_after[slot] = k[i], v[i]
    return k_after, v_after


def rotated(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Dimension pairs (d, d + half) of every head rotated, in fp64; what lies behind them is left."""
    half, result = cos.shape[1] // 2, floats(k)
    for heads, c, s in zip(result, floats(cos), floats(sin), strict=True):
        for x in heads:
            for left, right in zip(range(half), range(half, 2 * half), strict=True):
                x[left], x[right] = x[left] * c[left] - x[right] * s[left], x[right] * c[right] + x[left] * s[right]
    return f64(result, *k.shape)


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    begin: Tensor,
    end: Tensor,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    (queries, heads, _), (_, kv_heads, v_dim) = q.shape, v_cache.shape
    sink = None if sinks is None else floats(sinks)
    qs, ks, vs = floats(q), floats(k_cache), floats(v_cache)
    tokens = list(zip(slot.tolist(), begin.tolist(), end.tolist(), strict=True))
    out, lse = [], []
    for i in range(queries):
        seen = [s for s, b, e in tokens if b <= i < e]
        for h in range(heads):
            kv = h // (heads // kv_heads)
            scores = [scale * dot(qs[i][h], ks[s][kv]) for s in seen]
            if softcap is not None:
                scores = [softcap * math.tanh(score / softcap) for score in scores]
            total = logsumexp(scores if sink is None else [*scores, sink[h]])
            weights = [math.exp(score - total) for score in scores]
            lse.append(total)
            out.append([math.fsum(w * vs[s][kv][d] for w, s in zip(weights, seen, strict=True)) for d in range(v_dim)])
    return f64(out, queries, heads, v_dim), f64(lse, queries, heads)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    head_dim = out_a.shape[2]
    rows = [floats(x.flatten(0, 1)) for x in (out_a, out_b)]
    lses = [floats(x.flatten()) for x in (lse_a, lse_b)]
    out, lse = [], []
    for a, b, la, lb in zip(*rows, *lses, strict=True):
        total = logsumexp([la, lb])
        lse.append(total)
        wa, wb = (0.0 if x == -INF else math.exp(x - total) for x in (la, lb))
        out.append([wa * a[d] + wb * b[d] for d in range(head_dim)])
    return f64(out, *out_a.shape), f64(lse, *lse_a.shape)


def gather_kv(k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    (sequences, length), kv_heads = slots.shape, k_cache.shape[1]
    k, v = (cache.new_zeros(sequences, kv_heads, length, cache.shape[2]) for cache in (k_cache, v_cache))
    for i, row in enumerate(slots.tolist()):
        for j, slot in enumerate(row):
            if slot != -1:
                k[i, :, j], v[i, :, j] = k_cache[slot], v_cache[slot]
    return k, v


def ids_of_rows(ids: Tensor | None, rows: int) -> list[list[int]]:
    """The token ids that hold for each row: the same for all, or a list for each; -1 is none."""
    lists = [[]] * rows if ids is None else [ids.tolist()] * rows if ids.dim() == 1 else ids.tolist()
    return [[token for token in tokens if token != -1] for tokens in lists]


def nucleus(logits: Tensor, banned: Tensor | None) -> list[list[tuple[int, float, float]]]:
    """For every row all tokens that have a probability: (token, probability, mass before it), in the total order."""
    lists = ids_of_rows(banned, logits.shape[0])
    result = []
    for row, forbidden in zip(floats(logits), lists, strict=True):
        tokens = [t for t, x in enumerate(row) if t not in forbidden and x != -INF]
        total = logsumexp([row[t] for t in tokens])
        tokens.sort(key=lambda t: (-row[t], t))
        probabilities = [math.exp(row[t] - total) for t in tokens]
        before = [0.0, *itertools.accumulate(probabilities)][: len(tokens)]
        result.append(list(zip(tokens, probabilities, before, strict=True)))
    return result


def rows_of(offsets: Tensor) -> list[int]:
    """The row of each candidate."""
    bounds = offsets.tolist()
    return [r for r in range(len(bounds) - 1) for _ in range(bounds[r], bounds[r + 1])]


def multifurcation_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    unseen: Tensor | None,
    unseen_reward: float,
    tokens: Tensor,
    offsets: Tensor,
) -> Tensor:
    hs, ws = floats(hidden), floats(weight)
    rewards = []
    for row, token in zip(rows_of(offsets), tokens.tolist(), strict=True):
        if unseen is not None and bool(unseen[token]):
            rewards.append(unseen_reward)
        else:
            rewards.append(dot(hs[row], ws[token]) + (0.0 if bias is None else float(bias[token])))
    return f64(rewards, len(rewards))


def select_beam(
    rewards: list[float],
    tokens: list[int],
    rows: list[int],
    groups: list[int],
    num_groups: int,
    width: int,
    widths: list[int] | None = None,
) -> tuple[list[int], list[int], list[float]]:
    """As the op, with the row of each candidate in place of offsets. Those of group `num_groups` are in no `own`."""
    chosen: list[int] = []
    for group in range(num_groups):
        own = [c for c in range(len(rewards)) if groups[rows[c]] == group]
        chosen += sorted(own, key=lambda c: (-rewards[c], c))[: width if widths is None else widths[group]]
    chosen.sort(key=lambda c: (rows[c], -rewards[c], c))
    empty = num_groups * width - len(chosen)
    return (
        [rows[c] for c in chosen] + [len(groups)] * empty,
        [tokens[c] for c in chosen] + [-1] * empty,
        [rewards[c] for c in chosen] + [-INF] * empty,
    )


def multifurcate(
    tokens: list[int],
    rewards: list[float],
    rows: list[int],
    unseen: list[bool] | None,
    groups: list[int],
    num_groups: int,
    width: int,
    scores: list[float] | None,
    end_tokens: list[list[int]],
    finished_scores: list[float],
    finished_groups: list[int],
    widths: list[int] | None = None,
) -> tuple[list[int], list[int], list[float], list[bool]]:
    """Parent, token, reward and whether all is unseen, given the nuclei of the rows of a group and their rewards.

    `end_tokens` has those of each row.
    """
    unknown = [unseen is not None and unseen[t] for t in tokens]
    ends = [t in end_tokens[rows[c]] for c, t in enumerate(tokens)]
    all_unseen = []
    for group in range(num_groups):
        words = [c for c in range(len(tokens)) if groups[rows[c]] == group and not ends[c]]
        all_unseen.append(len(words) > 0 and all(unknown[c] for c in words))
    if scores is not None:
        inherits = [ends[c] or all_unseen[groups[rows[c]]] for c in range(len(tokens))]
        rewards = [scores[rows[c]] if inherits[c] else reward for c, reward in enumerate(rewards)]
    finished = range(len(groups), len(groups) + len(finished_scores))
    selected = select_beam(
        [*rewards, *finished_scores],
        [*tokens, *[-1] * len(finished)],
        [*rows, *finished],
        [*groups, *finished_groups],
        num_groups,
        width,
        widths,
    )
    return *selected, all_unseen


def advance_tree(
    slot: list[int], begin: list[int], end: list[int], parents: list[int], new_slots: list[int], queries: int
) -> list[set[int]]:
    """The slots that each new query sees: those its parent saw, and its own. (No parent: its own goes unseen.)"""
    seen = [{s for s, b, e in zip(slot, begin, end, strict=True) if b <= i < e} for i in range(queries)]
    return [seen[p] | {own} if p < queries else set() for p, own in zip(parents, new_slots, strict=True)]
