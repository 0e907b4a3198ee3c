"""The public ops: tensors in, tensors out.

Every op is registered with PyTorch as `saffron_kernels::<name>` (`schemas.py`), so it works under
`torch.compile(fullgraph=True)`. The functions below are what people call; each states the equivalent PyTorch
expression. Arguments are checked before anything is written. Inference only: every op raises a RuntimeError where
gradients are enabled and an argument requires one.

Index tensors (`slot`, `begin`, `end`, `tokens`, `offsets`, `parents`, `groups`, ...) are int32.
"""

from __future__ import annotations

from torch import Tensor

from saffron_kernels import schemas

NAMES = schemas.NAMES  # of all ops, in the order of this file


def append_kv(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Writes the K and V rows of new tokens into their slots.

    Equivalent to `k_cache[slots] = k; v_cache[slots] = v`, but slot -1 skips its token. With `cos` and `sin`, K is
    rotated by its position first (RoPE, Su et al. 2021, in the half-split form that Llama checkpoints have)::

        left, right, rest = k[..., : r // 2], k[..., r // 2 : r], k[..., r:]        # r = cos.shape[1]
        k = torch.cat([k[..., :r] * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None], rest], -1)

    Caches in fp8 (e4m3) hold `(k / k_scale[:, None]).clamp(-448, 448)`, and V likewise. Everything is computed in fp32
    and rounded once, to the caches' dtype.

    Args:
        k: `[tokens, kv_heads, head_dim]`, the dtype of the caches (bf16, fp16 or fp32 for fp8 caches), any strides.
            It may be a view of its own cache: it is read before anything is written. NaN stays NaN, in fp8 too.
        v: `[tokens, kv_heads, v_dim]`, likewise.
        slots: `[tokens]` int32, -1 or a row of the caches; no slot twice.
        k_cache: `[slots, kv_heads, head_dim]`, written in place.
        v_cache: `[slots, kv_heads, v_dim]`, written in place; `v_dim` need not be `head_dim` (MLA models).
        cos, sin: `[tokens, r]` floating, `r` even and at most `head_dim`; or None: K is rotated already.
        k_scale, v_scale: `[kv_heads]` fp32, above 0, for fp8 caches only; None: 1.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, or a slot that does not exist.
    """
    schemas.append_kv(k, v, slots, k_cache, v_cache, cos, sin, k_scale, v_scale)


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    begin: Tensor,
    end: Tensor,
    scale: float,
    *,
    count: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of queries over a flattened trie: query `i` sees cached token `t` iff `begin[t] <= i < end[t]`.

    Equivalent, for one query head and its KV head (query heads are grouped over KV heads as in GQA), to::

        i = torch.arange(queries)[:, None]
        scores = q @ k_cache[slot].T * scale
        scores = softcap * (scores / softcap).tanh()                                     # with softcap
        scores = scores.masked_fill((i < begin) | (i >= end), -torch.inf)
        lse = torch.cat([scores, sinks.expand(queries, 1)], -1).logsumexp(-1)            # without sinks: of scores
        out = (scores - lse[:, None]).exp() @ v_cache[slot]

    where K and V of fp8 caches are `k_cache * k_scale[:, None]` and `v_cache * v_scale[:, None]`. Soft-capping of
    scores is that of Gemma 2 (Gemma Team 2024, section 2), sinks are those of gpt-oss (Xiao et al. 2023).

    NaN is never lost, and reaches nobody else: not the queries that do not see its token. In a row of q, in K, `scale`,
    `softcap`, a sink or a `k_scale` it makes NaN of all of `out` and `lse` that depends on it, in V or a `v_scale` of
    the elements of `out` that do. A score of inf counts as NaN; an infinity in V gives NaN or infinity.

    Args:
        q: `[queries, heads, head_dim]`, the dtype of the caches (bf16, fp16 or fp32 for fp8 caches).
        k_cache: `[slots, kv_heads, head_dim]`; `heads` is a multiple of `kv_heads`.
        v_cache: `[slots, kv_heads, v_dim]`; `v_dim` need not be `head_dim` (MLA models).
        slot, begin, end: `[tokens]` int32. A token with `begin >= end` is seen by nobody, and its slot is not read.
        scale: multiplies the scores; usually `head_dim ** -0.5`.
        count: `[1]` int32, how many tokens there are: what stands behind them in `slot`, `begin` and `end` is not read
            (buffers of a captured CUDA graph, whose plan grows). None: all of them.
        k_scale, v_scale: `[kv_heads]` fp32, for fp8 caches only; None: 1.
        softcap: bounds the scaled scores; finite, above 0. None: they are not bounded.
        sinks: `[heads]` floating, a logit per query head that joins the softmax denominator alone. None: there is none.

    Returns:
        out `[queries, heads, v_dim]` in the dtype of `q`, and lse `[queries, heads]`, the natural logarithm of the
        softmax denominator, sink included, in fp32 (fp64 for fp64). A query that sees nothing: out 0, lse -inf (with
        sinks: its sink). Two results over disjoint tokens join by `merge_attention` only if one alone has the sinks.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, or a slot that does not exist.
    """
    plan = slot, begin, end
    return schemas.tree_attention(q, k_cache, v_cache, *plan, scale, count, k_scale, v_scale, softcap, sinks)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Joins two attention results over disjoint sets of tokens, e.g. ours and another kernel's.

    Equivalent to::

        lse = torch.logaddexp(lse_a, lse_b)
        out = out_a * (lse_a - lse).exp()[..., None] + out_b * (lse_b - lse).exp()[..., None]

    Args:
        out_a, out_b: `[queries, heads, head_dim]`.
        lse_a, lse_b: `[queries, heads]`, natural logarithm, fp32 (fp64 for fp64); -inf where nothing was seen. NaN
            in one makes NaN of out and lse, NaN in `out_a` or `out_b` of the elements of out that it stands in.

    Returns:
        out and lse of the union; out 0 and lse -inf where neither saw anything.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device.
    """
    return schemas.merge_attention(out_a, lse_a, out_b, lse_b)


def gather_kv(k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Copies the K and V of whole sequences out of the trie, for decoders that need contiguous caches.

    Equivalent to `k_cache[slots].transpose(1, 2)` (and the same for V), with zeros where `slots` is -1. Rows of fp8
    caches come as they are stored: their scales are the caller's to apply. NaN is copied as any number.

    Args:
        k_cache: `[slots, kv_heads, head_dim]`.
        v_cache: `[slots, kv_heads, v_dim]`.
        slots: `[sequences, length]` int32, -1 pads.

    Returns:
        k `[sequences, kv_heads, length, head_dim]` and v `[sequences, kv_heads, length, v_dim]`, contiguous.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, or a slot that does not exist.
    """
    return schemas.gather_kv(k_cache, v_cache, slots)


def nucleus(logits: Tensor, top_p: float | Tensor, banned: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The exact top-p set of every row: the tokens before which less than `top_p` of the probability mass lies.

    Order: probability descending (by the logits, before exp rounds), then token id ascending. The most probable token
    is always in; a token of probability 0 never is. (SAFFRON-1, section 4: `N_p(s)`.) Equivalent, for one row, to::

        logits[banned] = -torch.inf
        p, token = logits.float().sort(descending=True, stable=True)
        p = p.softmax(-1)
        keep = (p.cumsum(-1) - p < top_p) & (p > 0)
        token[keep], p[keep]

    Args:
        logits: `[rows, vocab]`; computed in fp32 (fp64 for fp64), the cumulative mass in fp64.
        top_p: above 0, at most 1, for all rows; or one for each, `[rows]` fp32 or fp64. (A number of Python is fp64:
            0.8 in fp32 is a little more.)
        banned: int32 token ids that get no probability: `[banned]` for all rows, or `[rows, banned]` for each; -1 pads.
            None: all get theirs. What their logits hold is not looked at.

    Returns:
        tokens `[candidates]` int32 and probabilities `[candidates]`, row after row, and offsets `[rows + 1]` int32:
        row `r` owns candidates `offsets[r]` to `offsets[r + 1]`.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; a row with NaN, +inf, or no token left;
            a `top_p` that is NaN or out of range; a banned token outside the vocabulary.
    """
    op = schemas.nucleus_rows if isinstance(top_p, Tensor) else schemas.nucleus
    return op(logits, top_p, banned)


def multifurcation_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    unseen: Tensor | None,
    unseen_reward: float,
    tokens: Tensor,
    offsets: Tensor,
) -> Tensor:
    """The rewards of the candidates only: reads just the head rows that candidates name. (SAFFRON-1: `M(s)_a`.)

    Equivalent, where `row` is the row of each candidate, to::

        rewards = torch.where(unseen, unseen_reward, hidden @ weight.T + bias)[row, tokens]

    Args:
        hidden: `[rows, hidden]`, last hidden state of the reward model.
        weight: `[vocab, hidden]`, its unembedding matrix, in the dtype of `hidden`.
        bias: `[vocab]`, or None for none.
        unseen: `[vocab]` bool, tokens the reward model was never trained on (conservative exploration), or None.
        unseen_reward: what those score; not NaN.
        tokens, offsets: candidates as `nucleus` returns them.

    Returns:
        rewards `[candidates]`, fp32 (fp64 for fp64). NaN if NaN stands anywhere in the candidate's row of `hidden`, its
        row of `weight` or its `bias`; a candidate that is unseen scores `unseen_reward` whatever those hold.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, or a token outside the vocabulary.
    """
    return schemas.multifurcation_head(hidden, weight, bias, unseen, unseen_reward, tokens, offsets)


def select_beam(
    rewards: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    groups: Tensor,
    num_groups: int,
    width: int,
    *,
    widths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best `width` candidates of every group of rows, ordered by parent. (SAFFRON-1: `argtopN`.)

    Equivalent, for one group, to::

        best = rewards.argsort(descending=True, stable=True)[:width]
        best = best.sort().values          # candidates lie row after row; siblings then stand by reward
        row[best], tokens[best], rewards[best]

    Between equal rewards the earlier candidate wins: the lower row, then the more probable token.

    Args:
        rewards: `[candidates]`, no NaN; infinities are rewards like others.
        tokens, offsets: candidates as `nucleus` returns them.
        groups: `[rows]` int32 in `0 .. num_groups`: the search each row belongs to; ascending. Rows of group
            `num_groups` belong to none: nothing of theirs is looked at (unused places of a captured CUDA graph).
        num_groups, width: number of searches, beam width of each.
        widths: `[num_groups]` int32, each from 1 to `width`: the beam width of each group, where they differ. The
            result has room for `width` per group all the same. None: `width` for all.

    Returns:
        parent (the row, int32), token (int32) and reward, each `[num_groups * width]`, ordered by parent, siblings by
        reward descending. Places that stay empty come last: parent `rows` (one past the last), token -1, reward -inf.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, a reward that is NaN, or a width out of
            range.
    """
    return schemas.select_beam(rewards, tokens, offsets, groups, num_groups, width, widths)


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
    *,
    banned: Tensor | None = None,
    scores: Tensor | None = None,
    end_tokens: Tensor | None = None,
    finished_scores: Tensor | None = None,
    finished_groups: Tensor | None = None,
    widths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One whole step of Saffron search: nucleus, rewards of its tokens, the best `width` of every group.

    Equivalent to::

        tokens, _, offsets = nucleus(logits, top_p, banned)
        rewards = multifurcation_head(hidden, weight, bias, unseen, unseen_reward, tokens, offsets)
        # candidates in end_tokens, and all candidates of an all-unseen group, take scores[row] instead;
        # each finished node is one more row with the single candidate (token -1, its finished score)
        parent, token, reward = select_beam(rewards, tokens, offsets, groups, num_groups, width, widths=widths)

    A group is *all unseen* when it has unseen candidates and none, end tokens aside, that is not: the reward model then
    knows nothing, and with `scores` given the step keeps the policy's own order.

    Args:
        logits: `[rows, vocab]` of the policy, one row per live beam.
        hidden, weight, bias, unseen, unseen_reward: as for `multifurcation_head`.
        groups, num_groups, width, widths: as for `select_beam`. Of rows of group `num_groups` nothing is looked at:
            neither logits, hidden states and scores nor their `top_p`, `banned` and `end_tokens`.
        top_p, banned: as for `nucleus`.
        scores: `[rows]`, what a child of the row inherits where it inherits (then not NaN); None: nothing inherits.
        end_tokens: int32 ids of the tokens whose children inherit: `[end]` for all rows, or `[rows, end]` for each;
            -1 pads. None for none.
        finished_scores, finished_groups: `[finished]`, finished nodes that compete for places in their group (those of
            group `num_groups` for none). Scores of nodes that compete are not NaN.

    Returns:
        parent, token, reward `[num_groups * width]` as `select_beam` returns them, where parent `rows + i` is the
        `i`-th finished node and `rows + finished` an empty place; the nucleus size of each row `[rows]` int32 (0 for
        rows of no group); and which groups were all unseen `[num_groups]` bool.

    Raises:
        ValueError, TypeError: as the three ops it joins.
    """
    op = schemas.multifurcate_rows if isinstance(top_p, Tensor) else schemas.multifurcate
    return op(
        logits, hidden, weight, bias, unseen, unseen_reward, groups, num_groups, width, top_p,
        banned, scores, end_tokens, finished_scores, finished_groups, widths,
    )  # fmt: skip


def advance_tree(
    slot: Tensor,
    begin: Tensor,
    end: Tensor,
    parents: Tensor,
    new_slots: Tensor,
    queries: int,
    *,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The plan after one search step: old query `i` is replaced by its children, each with one token of its own.

    Equivalent, with `C[i]` the number of children of the queries before `i` (`C` has `queries + 1` entries), to::

        slot = torch.cat([slot, new_slots])
        begin = torch.cat([C[begin], torch.arange(new)])
        end = torch.cat([C[end], torch.arange(new) + 1])

    Tokens left with `begin == end` are dead: their slots are free, and the caller may drop them from the plan.

    Args:
        slot, begin, end: `[tokens]` int32, the plan for `queries` queries.
        parents: `[new]` int32, ascending: the old query of each new one; `queries` and above: no parent (an empty
            place), whose token nobody sees.
        new_slots: `[new]` int32, the slot of each new query's own token.
        queries: number of old queries.
        count: `[1]` int32, how many tokens the plan holds, with room for the new ones behind them: the result is then
            as long as the plan (buffers of a captured CUDA graph), and what is left of the room is dead (slot -1,
            interval 0 to 0). None: all of them, and the result is longer by the new ones.

    Returns:
        slot, begin, end `[tokens + new]` (with `count`: `[tokens]`) int32 for the new queries.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, parents that descend, or no room behind
            `count`.
    """
    return schemas.advance_tree(slot, begin, end, parents, new_slots, queries, count)


def block_plan(
    block_table: Tensor,
    seq_lens: Tensor,
    query_start: Tensor,
    block_size: int,
    queries: int,
    size: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The plan for `tree_attention` over a paged KV cache, in which requests share blocks: no trie is built.

    Requests are sorted by their rows of the block table, so that requests with a common prefix are neighbours. A block
    that is full and stands in the same column of neighbouring rows becomes one run of tokens that all of them see; it
    is read once. Tokens of this step, and those of a block that is not full yet, belong to their own request. For
    request `r`, whose `n` queries are its last tokens, position `p` and `context = seq_lens[r] - n`, this is the mask::

        slot = block_table[r, p // block_size] * block_size + p % block_size
        visible = p <= context + arange(n)[:, None]                              # causal

    Args:
        block_table: `[requests, blocks]` int32, the block of each `block_size` tokens of a request; only the first
            `ceil(seq_lens[r] / block_size)` are read.
        seq_lens: `[requests]` int32, tokens of each request, the queries of this step included.
        query_start: `[requests + 1]` int32, ascending from 0 to at most `queries`: request `r` owns the queries
            `query_start[r]` to `query_start[r + 1]`. A request without queries is left out (padding); queries of no
            request stand behind all others and see nothing.
        block_size: tokens per block.
        queries: number of queries.
        size: tokens for which there is room (buffers of a captured CUDA graph); the sum of `seq_lens` is always enough.
            None: as many as the plan has, for which the host waits. (Bad content on a GPU: see `raise_faults`.)

    Returns:
        order `[queries]`: the caller's query at each place of the plan, so that `tree_attention` is called with
        `q[order]` and its result belongs to `out[order]`; slot, begin, end `[size]`, the plan; count `[1]`, how many
        tokens it has. Behind them slot is -1 and the interval 0 to 0. All int32.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; a request with more queries than tokens
            or more tokens than blocks; no room.
    """
    return schemas.block_plan(block_table, seq_lens, query_start, block_size, queries, size)
