"""Schemas of the ops: what is registered with PyTorch as `saffron_kernels::<name>`, and what each returns for fakes.

Schemas are written by hand: fixed arity, and what is written in place is said. `ops.py` holds the functions that people
call, with the documentation; an implementation is chosen at every call (`backends`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from saffron_kernels import checks
from saffron_kernels.backends import implementation
from saffron_kernels.checks import compute_dtype

_library = torch.library.Library("saffron_kernels", "DEF")

NAMES: list[str] = []  # of all ops, in the order of this file
_MULTIPLIERS = {"cos", "sin", "k_scale", "v_scale"}  # read in whatever dtype they are: no backend is chosen by them


def register(schema: str, fake: Callable[..., object]) -> Callable[..., Any]:
    """Defines one op and returns its handle. `checks.check_<op>` sees the arguments of every call, real or fake."""
    name = schema.split("(")[0]
    NAMES.append(name)
    check: Callable[..., None] = getattr(checks, f"check_{name}")
    stored = [parameter.split()[-1] not in _MULTIPLIERS for parameter in schema[: schema.index(") ->")].split(",")]
    _library.define(schema)

    def run(*args: Any) -> object:
        check(*args)
        with torch.no_grad():
            return implementation(name, args[0].device, *_storage(compress(args, stored)))(*args)

    def trace(*args: Any) -> object:
        check(*args)
        return fake(*args)

    _library.impl(name, run, "CompositeExplicitAutograd")
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")  # no gradient, and no warning about one
    torch.library.register_fake(f"saffron_kernels::{name}", trace, lib=_library)
    return getattr(torch.ops.saffron_kernels, name).default


def _storage(args: Iterable[Any]) -> set[torch.dtype]:
    """The dtypes a backend has to serve: those of all floating-point tensors, or else of the indices."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    return {a.dtype for a in tensors if a.is_floating_point()} or {tensors[0].dtype}


append_kv = register(
    "append_kv(Tensor k, Tensor v, Tensor slots, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? cos, Tensor? sin,"
    " Tensor? k_scale, Tensor? v_scale) -> ()",
    lambda *args: None,
)


def _fake_tree_attention(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[:2], dtype=compute_dtype(q.dtype), device=q.device)
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


tree_attention = register(
    "tree_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor slot, Tensor begin, Tensor end, float scale,"
    " Tensor? count, Tensor? k_scale, Tensor? v_scale) -> (Tensor, Tensor)",
    _fake_tree_attention,
)


merge_attention = register(
    "merge_attention(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor)",
    lambda out_a, lse_a, out_b, lse_b: (
        torch.empty_like(out_a, memory_format=torch.contiguous_format),
        torch.empty_like(lse_a, memory_format=torch.contiguous_format),
    ),
)


def _fake_gather_kv(k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    (sequences, length), (_, kv_heads, head_dim) = slots.shape, k_cache.shape
    size = (sequences, kv_heads, length, head_dim)
    return k_cache.new_empty(size), v_cache.new_empty(size)


gather_kv = register(
    "gather_kv(Tensor k_cache, Tensor v_cache, Tensor slots) -> (Tensor, Tensor)",
    _fake_gather_kv,
)


def _fake_nucleus(logits: Tensor, top_p: float, banned: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size()
    return (
        logits.new_empty(kept, dtype=torch.int32),
        logits.new_empty(kept, dtype=compute_dtype(logits.dtype)),
        logits.new_empty(logits.shape[0] + 1, dtype=torch.int32),
    )


nucleus = register(
    "nucleus(Tensor logits, float top_p, Tensor? banned) -> (Tensor, Tensor, Tensor)",
    _fake_nucleus,
)


multifurcation_head = register(
    "multifurcation_head(Tensor hidden, Tensor weight, Tensor? bias, Tensor? unseen, float unseen_reward,"
    " Tensor tokens, Tensor offsets) -> Tensor",
    lambda hidden, weight, bias, unseen, unseen_reward, tokens, offsets: hidden.new_empty(
        tokens.shape, dtype=compute_dtype(hidden.dtype)
    ),
)


def _fake_beam(rewards: Tensor, num_groups: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    size = num_groups * width
    parent = rewards.new_empty(size, dtype=torch.int32)
    return parent, torch.empty_like(parent), rewards.new_empty(size, dtype=dtype)


select_beam = register(
    "select_beam(Tensor rewards, Tensor tokens, Tensor offsets, Tensor groups, SymInt num_groups, SymInt width)"
    " -> (Tensor, Tensor, Tensor)",
    lambda rewards, tokens, offsets, groups, num_groups, width: _fake_beam(rewards, num_groups, width, rewards.dtype),
)


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


multifurcate = register(
    "multifurcate(Tensor logits, Tensor hidden, Tensor weight, Tensor? bias, Tensor? unseen, float unseen_reward,"
    " Tensor groups, SymInt num_groups, SymInt width, float top_p, Tensor? banned, Tensor? scores, Tensor? end_tokens,"
    " Tensor? carried_scores, Tensor? carried_groups) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_multifurcate,
)


advance_tree = register(
    "advance_tree(Tensor slot, Tensor begin, Tensor end, Tensor parents, Tensor new_slots, SymInt queries,"
    " Tensor? count) -> (Tensor, Tensor, Tensor)",
    lambda slot, begin, end, parents, new_slots, queries, count: tuple(
        slot.new_empty(slot.shape[0] + (parents.shape[0] if count is None else 0)) for _ in range(3)
    ),
)


def _fake_block_plan(
    _table: Tensor, seq_lens: Tensor, _start: Tensor, _block_size: int, queries: int, size: int | None
) -> tuple[Tensor, ...]:
    tokens = torch.library.get_ctx().new_dynamic_size() if size is None else size
    return tuple(seq_lens.new_empty(n) for n in (queries, tokens, tokens, tokens, 1))


block_plan = register(
    "block_plan(Tensor block_table, Tensor seq_lens, Tensor query_start, SymInt block_size, SymInt queries,"
    " SymInt? size) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_block_plan,
)
