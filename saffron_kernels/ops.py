"""The public ops: tensors in, tensors out.

Every op is registered with PyTorch as `saffron_kernels::<name>` (hand-written schema, fake implementation), so it
works under `torch.compile(fullgraph=True)`. The functions below are what people call; each states the equivalent
PyTorch expression. Arguments are checked before anything is written. Inference only: outputs carry no gradient.

Index tensors (`slot`, `begin`, `end`, `tokens`, `offsets`, `parents`, `groups`, ...) are int32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saffron_kernels import checks
from saffron_kernels.backends import implementation
from saffron_kernels.checks import compute_dtype

_library = torch.library.Library("saffron_kernels", "DEF")

NAMES: list[str] = []  # of all ops, in the order of this file


def _register(schema: str, fake: Callable[..., object]) -> Callable[..., object]:
    """Defines one op and returns its handle. `checks.check_<op>` sees the arguments of every call, real or fake."""
    name = schema.split("(")[0]
    NAMES.append(name)
    check: Callable[..., None] = getattr(checks, f"check_{name}")
    _library.define(schema)

    def run(*args: Any) -> object:
        check(*args)
        with torch.no_grad():
            return implementation(name, args[0].device, *_storage(args))(*args)

    def trace(*args: Any) -> object:
        check(*args)
        return fake(*args)

    _library.impl(name, run, "CompositeExplicitAutograd")
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")  # no gradient, and no warning about one
    torch.library.register_fake(f"saffron_kernels::{name}", trace, lib=_library)
    return getattr(torch.ops.saffron_kernels, name).default


def _storage(args: tuple[Any, ...]) -> set[torch.dtype]:
    """The dtypes a backend has to serve: those of all floating-point arguments, or else of the first."""
    return {a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()} or {args[0].dtype}


# --- append_kv -------------------------------------------------------------------------------------------------------


_append_kv = _register(
    "append_kv(Tensor k, Tensor v, Tensor slots, Tensor(a!) k_cache, Tensor(b!) v_cache) -> ()",
    lambda *args: None,
)


def append_kv(k: Tensor, v: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    """Writes the K and V rows of new tokens into their slots.

    Equivalent to `k_cache[slots] = k; v_cache[slots] = v`, but slot -1 skips its token.

    Args:
        k, v: `[tokens, kv_heads, head_dim]`, the dtype of the caches, any strides.
        slots: `[tokens]` int32, -1 or a row of the caches; no slot twice.
        k_cache, v_cache: `[slots, kv_heads, head_dim]`, written in place.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, or a slot that does not exist.
    """
    _append_kv(k, v, slots, k_cache, v_cache)


# --- tree_attention --------------------------------------------------------------------------------------------------


def _fake_tree_attention(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[:2], dtype=compute_dtype(q.dtype), device=q.device)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


_tree_attention = _register(
    "tree_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor slot, Tensor begin, Tensor end, float scale)"
    " -> (Tensor, Tensor)",
    _fake_tree_attention,
)


def tree_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, slot: Tensor, begin: Tensor, end: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of queries over a flattened trie: query `i` sees cached token `t` iff `begin[t] <= i < end[t]`.

    Equivalent, for one query head and its KV head (query heads are grouped over KV heads as in GQA), to::

        i = torch.arange(queries)[:, None]
        scores = (q @ k_cache[slot].T * scale).masked_fill((i < begin) | (i >= end), -torch.inf)
        out, lse = scores.softmax(-1) @ v_cache[slot], scores.logsumexp(-1)

    Args:
        q: `[queries, heads, head_dim]`, the dtype of the caches.
        k_cache, v_cache: `[slots, kv_heads, head_dim]`; `heads` is a multiple of `kv_heads`. K and V of a token that
            any query sees must be finite.
        slot, begin, end: `[tokens]` int32. A token with `begin >= end` is seen by nobody, and its slot is not read.
        scale: multiplies the scores; usually `head_dim ** -0.5`.

    Returns:
        out `[queries, heads, head_dim]` in the dtype of `q`, and lse `[queries, heads]`, the natural logarithm of the
        softmax denominator, in fp32 (fp64 for fp64). A query that sees nothing: out 0, lse -inf.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, or a slot that does not exist.
    """
    return _tree_attention(q, k_cache, v_cache, slot, begin, end, scale)  # type: ignore[return-value]


# --- merge_attention -------------------------------------------------------------------------------------------------


_merge_attention = _register(
    "merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    lambda out_a, lse_a, out_b, lse_b: (
        torch.empty_like(out_a, memory_format=torch.contiguous_format),
        torch.empty_like(lse_a, memory_format=torch.contiguous_format),
    ),
)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Joins two attention results over disjoint sets of tokens, e.g. ours and another kernel's.

    Equivalent to::

        lse = torch.logaddexp(lse_a, lse_b)
        out = out_a * (lse_a - lse).exp()[..., None] + out_b * (lse_b - lse).exp()[..., None]

    Args:
        out_a, out_b: `[queries, heads, head_dim]`.
        lse_a, lse_b: `[queries, heads]`, natural logarithm, fp32 (fp64 for fp64); -inf where nothing was seen.

    Returns:
        out and lse of the union; out 0 and lse -inf where neither saw anything.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device.
    """
    return _merge_attention(out_a, lse_a, out_b, lse_b)  # type: ignore[return-value]


# --- gather_kv -------------------------------------------------------------------------------------------------------


def _fake_gather_kv(k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    (sequences, length), (_, kv_heads, head_dim) = slots.shape, k_cache.shape
    size = (sequences, kv_heads, length, head_dim)
    return k_cache.new_empty(size), v_cache.new_empty(size)


_gather_kv = _register(
    "gather_kv(Tensor k_cache, Tensor v_cache, Tensor slots) -> (Tensor, Tensor)",
    _fake_gather_kv,
)


def gather_kv(k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Copies the K and V of whole sequences out of the trie, for decoders that need contiguous caches.

    Equivalent to `k_cache[slots].transpose(1, 2)` (and the same for V), with zeros where `slots` is -1.

    Args:
        k_cache, v_cache: `[slots, kv_heads, head_dim]`.
        slots: `[sequences, length]` int32, -1 pads.

    Returns:
        k, v `[sequences, kv_heads, length, head_dim]`, contiguous.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, or a slot that does not exist.
    """
    return _gather_kv(k_cache, v_cache, slots)  # type: ignore[return-value]


# --- nucleus ---------------------------------------------------------------------------------------------------------


def _fake_nucleus(logits: Tensor, top_p: float, banned: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size()
    return (
        logits.new_empty(kept, dtype=torch.int32),
        logits.new_empty(kept, dtype=compute_dtype(logits.dtype)),
        logits.new_empty(logits.shape[0] + 1, dtype=torch.int32),
    )


_nucleus = _register(
    "nucleus(Tensor logits, float top_p, Tensor? banned) -> (Tensor, Tensor, Tensor)",
    _fake_nucleus,
)


def nucleus(logits: Tensor, top_p: float, banned: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
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
        top_p: above 0, at most 1.
        banned: `[banned tokens]` int32 token ids that get no probability, or None.

    Returns:
        tokens `[candidates]` int32 and probabilities `[candidates]`, row after row, and offsets `[rows + 1]` int32:
        row `r` owns candidates `offsets[r]` to `offsets[r + 1]`.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device; a row with NaN, +inf, or no token left.
    """
    return _nucleus(logits, top_p, banned)  # type: ignore[return-value]


# --- multifurcation_head ---------------------------------------------------------------------------------------------


_multifurcation_head = _register(
    "multifurcation_head(Tensor hidden, Tensor weight, Tensor? bias, Tensor? unseen, float unseen_reward,"
    " Tensor tokens, Tensor offsets) -> Tensor",
    lambda hidden, weight, bias, unseen, unseen_reward, tokens, offsets: hidden.new_empty(
        tokens.shape, dtype=compute_dtype(hidden.dtype)
    ),
)


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
        unseen_reward: what those score.
        tokens, offsets: candidates as `nucleus` returns them.

    Returns:
        rewards `[candidates]`, fp32 (fp64 for fp64).

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, or a token outside the vocabulary.
    """
    return _multifurcation_head(hidden, weight, bias, unseen, unseen_reward, tokens, offsets)  # type: ignore[return-value]


# --- select_beam -----------------------------------------------------------------------------------------------------


def _fake_beam(rewards: Tensor, num_groups: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    size = num_groups * width
    parent = rewards.new_empty(size, dtype=torch.int32)
    return parent, torch.empty_like(parent), rewards.new_empty(size, dtype=dtype)


_select_beam = _register(
    "select_beam(Tensor rewards, Tensor tokens, Tensor offsets, Tensor groups, SymInt num_groups, SymInt width)"
    " -> (Tensor, Tensor, Tensor)",
    lambda rewards, tokens, offsets, groups, num_groups, width: _fake_beam(rewards, num_groups, width, rewards.dtype),
)


def select_beam(
    rewards: Tensor, tokens: Tensor, offsets: Tensor, groups: Tensor, num_groups: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The best `width` candidates of every group of rows, ordered by parent. (SAFFRON-1: `argtopN`.)

    Equivalent, for one group, to::

        best = rewards.argsort(descending=True, stable=True)[:width]
        best = best.sort().values          # candidates lie row after row; siblings then stand by reward
        row[best], tokens[best], rewards[best]

    Between equal rewards the earlier candidate wins: the lower row, then the more probable token.

    Args:
        rewards: `[candidates]`, no NaN.
        tokens, offsets: candidates as `nucleus` returns them.
        groups: `[rows]` int32 in `0 .. num_groups - 1`: the search each row belongs to; ascending.
        num_groups, width: number of searches, beam width of each.

    Returns:
        parent (the row, int32), token (int32) and reward, each `[num_groups * width]`, ordered by parent, siblings by
        reward descending. Places that stay empty come last: parent `rows` (one past the last), token -1, reward -inf.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, or a reward that is NaN.
    """
    return _select_beam(rewards, tokens, offsets, groups, num_groups, width)  # type: ignore[return-value]


# --- multifurcate ----------------------------------------------------------------------------------------------------


def _fake_multifurcate(
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    unseen: Tensor | None,
    unseen_reward: float,
    groups: Tensor,
    num_groups: int,
    width: int,
    *_: object,
) -> tuple[Tensor, ...]:
    parent, token, reward = _fake_beam(logits, num_groups, width, compute_dtype(hidden.dtype))
    return parent, token, reward, torch.empty_like(groups), logits.new_empty(num_groups, dtype=torch.bool)


_multifurcate = _register(
    "multifurcate(Tensor logits, Tensor hidden, Tensor weight, Tensor? bias, Tensor? unseen, float unseen_reward,"
    " Tensor groups, SymInt num_groups, SymInt width, float top_p, Tensor? banned, Tensor? scores, Tensor? end_tokens,"
    " Tensor? carried_scores, Tensor? carried_groups) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_multifurcate,
)


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
    *,
    banned: Tensor | None = None,
    scores: Tensor | None = None,
    end_tokens: Tensor | None = None,
    carried_scores: Tensor | None = None,
    carried_groups: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One whole step of Saffron search: nucleus, rewards of its tokens, the best `width` of every group.

    Equivalent to::

        tokens, _, offsets = nucleus(logits, top_p, banned)
        rewards = multifurcation_head(hidden, weight, bias, unseen, unseen_reward, tokens, offsets)
        # candidates in end_tokens, and all candidates of a blind group, take scores[row] instead;
        # each carried node is one more row with the single candidate (token -1, its carried score)
        parent, token, reward = select_beam(rewards, tokens, offsets, groups, num_groups, width)

    A group is *blind* when it has unseen candidates and none, end tokens aside, that is not: the reward model then
    knows nothing, and with `scores` given the step keeps the policy's own order.

    Args:
        logits: `[rows, vocab]` of the policy, one row a live beam.
        hidden, weight, bias, unseen, unseen_reward: as for `multifurcation_head`.
        groups, num_groups, width: as for `select_beam`.
        top_p, banned: as for `nucleus`.
        scores: `[rows]`, what a child of the row inherits where it inherits; None: nothing inherits.
        end_tokens: int32 ids of the tokens whose children inherit; None for none.
        carried_scores, carried_groups: `[carried]`, finished nodes that compete for places in their group.

    Returns:
        parent, token, reward `[num_groups * width]` as `select_beam` returns them, where parent `rows + i` is the
        `i`-th carried node and `rows + carried` an empty place; the nucleus size of each row `[rows]` int32; and which
        groups were blind `[num_groups]` bool.

    Raises:
        ValueError, TypeError: as the three ops it joins.
    """
    return _multifurcate(  # type: ignore[return-value]
        logits, hidden, weight, bias, unseen, unseen_reward, groups, num_groups, width, top_p,
        banned, scores, end_tokens, carried_scores, carried_groups,
    )  # fmt: skip


# --- advance_tree ----------------------------------------------------------------------------------------------------


_advance_tree = _register(
    "advance_tree(Tensor slot, Tensor begin, Tensor end, Tensor parents, Tensor new_slots, SymInt queries)"
    " -> (Tensor, Tensor, Tensor)",
    lambda slot, begin, end, parents, new_slots, queries: tuple(
        slot.new_empty(slot.shape[0] + parents.shape[0]) for _ in range(3)
    ),
)


def advance_tree(
    slot: Tensor, begin: Tensor, end: Tensor, parents: Tensor, new_slots: Tensor, queries: int
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

    Returns:
        slot, begin, end `[tokens + new]` int32 for the new queries.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or device, or parents that descend.
    """
    return _advance_tree(slot, begin, end, parents, new_slots, queries)  # type: ignore[return-value]
