"""What ops require of their arguments, with one form of message: name, what was given, what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FP8 = torch.float8_e4m3fn  # the narrowest dtype that K and V are stored in


def compute_dtype(storage: torch.dtype) -> torch.dtype:
    """What results are computed in: fp64 for fp64 storage, else fp32."""
    return torch.float64 if storage == torch.float64 else torch.float32


def expect(condition: bool, name: str, given: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{name}: got {given}, expected {allowed}")


def whole(name: str, number: object, least: int | None = None) -> None:
    """Refuses what is no whole number (`TypeError`; a bool is none), or one below `least` (`ValueError`)."""
    if not isinstance(number, int | np.integer) or isinstance(number, bool):
        raise TypeError(f"{name}: got {number!r}, expected a whole number")
    expect(least is None or bool(number >= least), name, number, f"at least {least}")


def token_ids(name: str, tokens: object) -> NDArray[np.int64]:
    """A list or 1-D array of token ids as an array; nothing is rounded, parsed or cut.

    Raises:
        TypeError: something else than whole numbers. ValueError: none, several dimensions, or ids beyond int32.
    """
    if not isinstance(tokens, Sequence | np.ndarray | Tensor) or isinstance(tokens, str | bytes):
        raise TypeError(f"{name}: got a {type(tokens).__name__}, expected a list or an array of token ids")
    expect(len(tokens) > 0, name, "no tokens", "at least one")
    if not isinstance(tokens, np.ndarray | Tensor):
        for kind in set(map(type, tokens)):
            if not issubclass(kind, int | np.integer) or kind is bool:
                raise TypeError(f"{name}: got a {kind.__name__} among the tokens, expected whole numbers")
    array = np.asarray(tokens)
    if array.dtype.kind not in "iuO":  # objects: numbers of more than 64 bits
        raise TypeError(f"{name}: got an array of {array.dtype}, expected whole numbers")
    expect(array.ndim == 1, name, f"{array.ndim} dimensions", "1")
    low, high = int(array.min()), int(array.max())
    expect(low >= 0 and high < 1 << 31, name, f"tokens from {low} to {high}", "0 to 2**31 - 1")
    return array.astype(np.int64)


def shape(name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    """`expected` holds sizes, and names for the dimensions whose size is free."""
    fits = tensor.dim() == len(expected) and all(
        isinstance(want, str) or size == want for size, want in zip(tensor.shape, expected, strict=True)
    )
    if not fits:
        wanted = "[" + ", ".join(str(e) for e in expected) + "]"
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected {wanted}")


def floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name}: got {tensor.dtype}, expected a floating-point tensor")


def dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    if tensor.dtype not in allowed:
        raise TypeError(f"{name}: got {tensor.dtype}, expected {' or '.join(str(a) for a in allowed)}")


def index(name: str, tensor: Tensor, expected: Sequence[int | str]) -> None:
    dtype(name, tensor, torch.int32)
    shape(name, tensor, expected)


def same_device(first: tuple[str, Tensor], *others: tuple[str, Tensor | None]) -> None:
    for name, tensor in others:
        if tensor is not None and tensor.device != first[1].device:
            raise ValueError(f"{name}: got a tensor on {tensor.device}, expected {first[1].device} (as {first[0]})")


def caches(
    k_cache: Tensor,
    v_cache: Tensor,
    like: tuple[str, Tensor] | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """K and V caches are `[slots, kv_heads, head_dim]` and `[slots, kv_heads, v_dim]`, of one dtype, on one device.

    `like` has the dtype that they hold: theirs, or, where they are fp8, any that K and V may be computed in.
    """
    shape("k_cache", k_cache, ["slots", "kv_heads", "head_dim"])
    shape("v_cache", v_cache, [*k_cache.shape[:2], "v_dim"])
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        head_size(name, cache)
    floating("k_cache", k_cache)
    dtype("v_cache", v_cache, k_cache.dtype)
    same_device(("k_cache", k_cache), ("v_cache", v_cache), *([like] if like else []))
    fp8 = k_cache.dtype == FP8
    if like:
        dtype(like[0], like[1], *((torch.bfloat16, torch.float16, torch.float32) if fp8 else (k_cache.dtype,)))
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            expect(fp8, name, f"a scale for caches in {k_cache.dtype}", f"none, or caches in {FP8}")
            dtype(name, scale, torch.float32)
            shape(name, scale, [k_cache.shape[1]])
            same_device(("k_cache", k_cache), (name, scale))


def head_size(name: str, rows: Tensor) -> None:
    expect(rows.shape[-1] > 0, name, f"shape {list(rows.shape)}", "a head size of at least 1")


def check_count(count: Tensor | None, like: tuple[str, Tensor]) -> None:
    if count is not None:
        index("count", count, [1])
        same_device(like, ("count", count))


# One function an op, for everything but the content of its tensors. `check_<op>` takes the arguments of the op.


def check_append_kv(
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
    caches(k_cache, v_cache, ("k", k), k_scale, v_scale)
    shape("k", k, ["tokens", *k_cache.shape[1:]])
    shape("v", v, [k.shape[0], *v_cache.shape[1:]])
    dtype("v", v, k.dtype)
    index("slots", slots, [k.shape[0]])
    same_device(("k_cache", k_cache), ("v", v), ("slots", slots), ("cos", cos), ("sin", sin))
    expect((cos is None) == (sin is None), "sin" if sin is None else "cos", "one without the other", "both, or neither")
    if cos is not None and sin is not None:
        for name, rotary in (("cos", cos), ("sin", sin)):
            floating(name, rotary)
            shape(name, rotary, [k.shape[0], "rotated"])
        rotated, head_dim = cos.shape[1], k.shape[2]
        even = rotated % 2 == 0 and rotated <= head_dim
        expect(even, "cos", f"{rotated} rotated dimensions", f"an even number of at most {head_dim}")
        shape("sin", sin, list(cos.shape))
        dtype("sin", sin, cos.dtype)


def check_tree_attention(
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
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    caches(k_cache, v_cache, ("q", q), k_scale, v_scale)
    shape("q", q, ["queries", "heads", k_cache.shape[2]])
    heads, kv_heads = q.shape[1], k_cache.shape[1]
    expect(kv_heads > 0 and heads % kv_heads == 0, "q", f"{heads} heads", f"a multiple of {kv_heads} KV heads")
    index("slot", slot, ["tokens"])
    index("begin", begin, [slot.shape[0]])
    index("end", end, [slot.shape[0]])
    same_device(("q", q), ("slot", slot), ("begin", begin), ("end", end), ("sinks", sinks))
    check_count(count, ("q", q))
    if softcap is not None:  # NaN passes: it makes all scores NaN
        expect(not softcap <= 0 and softcap != math.inf, "softcap", softcap, "a finite number above 0")
    if sinks is not None:
        floating("sinks", sinks)
        shape("sinks", sinks, [heads])


def check_merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    floating("out_a", out_a)
    shape("out_a", out_a, ["queries", "heads", "head_dim"])
    head_size("out_a", out_a)
    shape("out_b", out_b, list(out_a.shape))
    dtype("out_b", out_b, out_a.dtype)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        shape(name, lse, list(out_a.shape[:2]))
        dtype(name, lse, compute_dtype(out_a.dtype))
    same_device(("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b))


def check_gather_kv(k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    caches(k_cache, v_cache)
    index("slots", slots, ["sequences", "length"])
    same_device(("k_cache", k_cache), ("slots", slots))


def check_top_p(top_p: float) -> None:
    expect(0 < top_p <= 1, "top_p", top_p, "a number above 0 and at most 1")


def check_token_ids(name: str, ids: Tensor, rows: int) -> None:
    """Token ids for all rows, or a list of them for each."""
    index(name, ids, [rows, name] if ids.dim() == 2 else [name])


def check_nucleus(logits: Tensor, top_p: float | Tensor, banned: Tensor | None) -> None:
    floating("logits", logits)
    shape("logits", logits, ["rows", "vocab"])
    expect(logits.shape[1] > 0, "logits", f"shape {list(logits.shape)}", "a vocabulary that is not empty")
    if isinstance(top_p, Tensor):
        dtype("top_p", top_p, torch.float32, torch.float64)
        shape("top_p", top_p, [logits.shape[0]])
        same_device(("logits", logits), ("top_p", top_p))
    else:
        check_top_p(top_p)
    if banned is not None:
        check_token_ids("banned", banned, logits.shape[0])
        same_device(("logits", logits), ("banned", banned))


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, unseen: Tensor | None, unseen_reward: float
) -> None:
    floating("hidden", hidden)
    shape("hidden", hidden, ["rows", "hidden"])
    shape("weight", weight, ["vocab", hidden.shape[1]])
    dtype("weight", weight, hidden.dtype)
    if bias is not None:
        floating("bias", bias)
        shape("bias", bias, [weight.shape[0]])
    if unseen is not None:
        dtype("unseen", unseen, torch.bool)
        shape("unseen", unseen, [weight.shape[0]])
    expect(unseen_reward == unseen_reward, "unseen_reward", unseen_reward, "a number, or an infinity")
    same_device(("hidden", hidden), ("weight", weight), ("bias", bias), ("unseen", unseen))


def check_multifurcation_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    unseen: Tensor | None,
    unseen_reward: float,
    tokens: Tensor,
    offsets: Tensor,
) -> None:
    check_head(hidden, weight, bias, unseen, unseen_reward)
    index("tokens", tokens, ["candidates"])
    index("offsets", offsets, [hidden.shape[0] + 1])
    same_device(("hidden", hidden), ("tokens", tokens), ("offsets", offsets))


def check_groups(groups: Tensor, rows: int, num_groups: int, width: int, widths: Tensor | None) -> None:
    index("groups", groups, [rows])
    expect(num_groups >= 0, "num_groups", num_groups, "at least 0")
    expect(width >= 1, "width", width, "at least 1")
    if widths is not None:
        index("widths", widths, [num_groups])
        same_device(("groups", groups), ("widths", widths))


def check_select_beam(
    rewards: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    groups: Tensor,
    num_groups: int,
    width: int,
    widths: Tensor | None,
) -> None:
    floating("rewards", rewards)
    shape("rewards", rewards, ["candidates"])
    index("tokens", tokens, [rewards.shape[0]])
    index("offsets", offsets, ["rows + 1"])
    expect(offsets.shape[0] > 0, "offsets", "an empty tensor", "[rows + 1] offsets")
    check_groups(groups, offsets.shape[0] - 1, num_groups, width, widths)
    same_device(("rewards", rewards), ("tokens", tokens), ("offsets", offsets), ("groups", groups))


def check_multifurcate(
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
) -> None:
    check_nucleus(logits, top_p, banned)
    check_head(hidden, weight, bias, unseen, unseen_reward)
    rows = logits.shape[0]
    shape("hidden", hidden, [rows, "hidden"])
    expect(
        logits.shape[1] <= weight.shape[0], "logits", f"a vocabulary of {logits.shape[1]}", f"at most {weight.shape[0]}"
    )
    check_groups(groups, rows, num_groups, width, widths)
    if scores is not None:
        floating("scores", scores)
        shape("scores", scores, [rows])
    if end_tokens is not None:
        check_token_ids("end_tokens", end_tokens, rows)
    both = (finished_scores is None) == (finished_groups is None)
    expect(both, "finished_groups", "one without the other", "finished_scores and finished_groups, or neither")
    if finished_scores is not None and finished_groups is not None:
        floating("finished_scores", finished_scores)
        shape("finished_scores", finished_scores, ["finished"])
        index("finished_groups", finished_groups, list(finished_scores.shape))
    optional = (("end_tokens", end_tokens), ("finished_scores", finished_scores), ("finished_groups", finished_groups))
    same_device(("logits", logits), ("hidden", hidden), ("groups", groups), ("scores", scores), *optional)


def check_advance_tree(
    slot: Tensor,
    begin: Tensor,
    end: Tensor,
    parents: Tensor,
    new_slots: Tensor,
    queries: int,
    count: Tensor | None,
) -> None:
    index("slot", slot, ["tokens"])
    index("begin", begin, [slot.shape[0]])
    index("end", end, [slot.shape[0]])
    index("parents", parents, ["new queries"])
    index("new_slots", new_slots, [parents.shape[0]])
    expect(queries >= 0, "queries", queries, "at least 0")
    others = (("begin", begin), ("end", end), ("parents", parents), ("new_slots", new_slots))
    same_device(("slot", slot), *others)
    check_count(count, ("slot", slot))


def check_block_plan(
    block_table: Tensor, seq_lens: Tensor, query_start: Tensor, block_size: int, queries: int, size: int | None
) -> None:
    index("block_table", block_table, ["requests", "blocks"])
    index("seq_lens", seq_lens, [block_table.shape[0]])
    index("query_start", query_start, [block_table.shape[0] + 1])
    expect(block_size >= 1, "block_size", block_size, "at least 1")
    expect(queries >= 0, "queries", queries, "at least 0")
    expect(size is None or size >= 0, "size", size, "at least 0")
    same_device(("block_table", block_table), ("seq_lens", seq_lens), ("query_start", query_start))
