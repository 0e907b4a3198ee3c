"""Schemas of the ops: what is registered with PyTorch as `saffron_kernels::<name>`, and what each returns for fakes.

Schemas are written by hand: fixed arity, and what is written in place is said. `ops.py` holds the functions that people
call, with the documentation; an implementation is chosen (`backends`) once for the same shapes, dtypes and devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import compress
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from saffron_kernels import backends, checks
from saffron_kernels.backends import forced_backend, implementation
from saffron_kernels.checks import compute_dtype

_library = torch.library.Library("saffron_kernels", "DEF")

# Entries per op in `_chosen`: sizes change from step to step, and a long run must not fill memory.
_MOST_CHOSEN = 4096
_chosen: dict[str, dict[tuple[object, ...], Callable[..., object]]] = {}

NAMES: list[str] = []  # of all ops, in the order of this file
# Read in whatever dtype they are: they choose no backend.
_PARAMETERS = {"cos", "sin", "k_scale", "v_scale", "sinks", "top_p"}


def register(schema: str, fake: Callable[..., object]) -> Callable[..., Any]:
    """Defines one op and returns its handle. `checks.check_<op>` sees the arguments of every call, real or fake.

    `<op>.<overload>(...)` takes a tensor where `<op>` takes a number; both have one check and one implementation.
    """
    name, _, overload = schema.split("(")[0].partition(".")
    if not overload:
        NAMES.append(name)
    qualified = f"{name}.{overload}" if overload else name
    check: Callable[..., None] = getattr(checks, f"check_{name}")
    declared = schema[schema.index("(") + 1 : schema.index(") ->")].split(",")
    parameters = [parameter.split()[-1] for parameter in declared]
    stored = [parameter not in _PARAMETERS for parameter in parameters]
    is_tensor = ["Tensor" in parameter for parameter in declared]
    tensors = itemgetter(*[i for i, is_one in enumerate(is_tensor) if is_one])
    others = [i for i, is_one in enumerate(is_tensor) if not is_one]
    forced, grad_enabled = forced_backend, torch.is_grad_enabled
    _library.define(schema)

    # What was chosen for arguments that passed the check, by all that check and choice depend on.
    chosen: dict[tuple[object, ...], Callable[..., object]] = _chosen.setdefault(name, {})

    def run(*args: Any) -> object:
        given = tensors(args)
        if grad_enabled():
            for a in given:
                if a is not None and a.requires_grad:
                    refuse_gradients(args)
        key = (
            forced(),
            *[None if a is None else (a.shape, a.dtype, a.device) for a in given],
            *[args[i] for i in others],
        )
        function = chosen.get(key)
        if function is None:
            check(*args)
            function = implementation(name, args[0].device, *_storage(compress(args, stored)))
            if len(chosen) >= _MOST_CHOSEN:
                chosen.clear()
            chosen[key] = function
        return function(*args)

    def trace(*args: Any) -> object:
        if grad_enabled():
            refuse_gradients(args)
        check(*args)
        return fake(*args)

    def refuse_gradients(args: tuple[Any, ...]) -> None:
        for parameter, a in zip(parameters, args, strict=True):
            if isinstance(a, Tensor) and a.requires_grad:
                raise RuntimeError(
                    f"{name}: {parameter} requires a gradient, which this op does not compute; call it under "
                    "torch.inference_mode() or torch.no_grad(), and train with a DynamicCache of transformers in place "
                    "of a trie"
                )

    _library.impl(qualified, run, "CompositeExplicitAutograd")
    _library.impl(qualified, torch.library.fallthrough_kernel, "Autograd")  # `run` sees what requires a gradient
    torch.library.register_fake(f"saffron_kernels::{qualified}", trace, lib=_library)
    return getattr(getattr(torch.ops.saffron_kernels, name), overload or "default")


def forget_choices() -> None:
    """Has every op check its next arguments and choose its backend again: after the environment changed."""
    for chosen in _chosen.values():
        chosen.clear()
    backends.asked_by_environment.cache_clear()


def _storage(args: Iterable[Any]) -> set[torch.dtype]:
    """The dtypes a backend has to serve: those of all floating-point tensors, or else of the indices."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    return {a.dtype for a in tensors if a.is_floating_point()} or {tensors[0].dtype}


append_kv = register(
    "append_kv(Tensor k, Tensor v, Tensor slots, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? cos, Tensor? sin,"
    " Tensor? k_scale, Tensor? v_scale) -> ()",
    lambda *args: None,
)


def _fake_tree_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse = torch.empty(q.shape[:2], dtype=compute_dtype(q.dtype), device=q.device)
    return q.new_empty(*q.shape[:2], v_cache.shape[2]), lse


tree_attention = register(
    "tree_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor slot, Tensor begin, Tensor end, float scale,"
    " Tensor? count, Tensor? k_scale, Tensor? v_scale, float? softcap, Tensor? sinks) -> (Tensor, Tensor)",
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
    size = (sequences, kv_heads, length)
    return k_cache.new_empty(*size, head_dim), v_cache.new_empty(*size, v_cache.shape[2])


gather_kv = register(
    "gather_kv(Tensor k_cache, Tensor v_cache, Tensor slots) -> (Tensor, Tensor)",
    _fake_gather_kv,
)


def _fake_nucleus(logits: Tensor, top_p: float | Tensor, banned: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
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
nucleus_rows = register(
    "nucleus.rows(Tensor logits, Tensor top_p, Tensor? banned) -> (Tensor, Tensor, Tensor)",
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
    "select_beam(Tensor rewards, Tensor tokens, Tensor offsets, Tensor groups, SymInt num_groups, SymInt width,"
    " Tensor? widths) -> (Tensor, Tensor, Tensor)",
    lambda rewards, tokens, offsets, groups, num_groups, width, widths: _fake_beam(
        rewards, num_groups, width, rewards.dtype
    ),
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


_MULTIFURCATE = (
    "(Tensor logits, Tensor hidden, Tensor weight, Tensor? bias, Tensor? unseen, float unseen_reward, Tensor groups,"
    " SymInt num_groups, SymInt width, {} top_p, Tensor? banned, Tensor? scores, Tensor? end_tokens,"
    " Tensor? finished_scores, Tensor? finished_groups, Tensor? widths) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
multifurcate = register("multifurcate" + _MULTIFURCATE.format("float"), _fake_multifurcate)
multifurcate_rows = register("multifurcate.rows" + _MULTIFURCATE.format("Tensor"), _fake_multifurcate)


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
