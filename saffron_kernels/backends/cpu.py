"""The ops in C++ (`csrc/cpu`): fp32 and bf16 storage, fp32 arithmetic, PyTorch's number of threads.

fp16 is converted to fp32 first, of caches and heads the rows that are used; what only moves it moves its bits.

The native functions take a tensor as (address, dtype code, shape, strides); outputs are allocated here, and what the
native loops assume of a layout is seen to here. They check the contents of tensors and raise ValueError.

The same input gives the same bits, however many threads there are. The instruction set is chosen at run time:
`SAFFRON_CPU_ISA=generic|avx2|avx512|avx512bf16|amx` asks for a lesser one. Head sizes up to 512.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from saffron_kernels._native import cpu as _native
from saffron_kernels.backends import reference_paged
from saffron_kernels.backends.contents import check_index, checked_count
from saffron_kernels.backends.reference import apart, rotate

View = tuple[int, int, Sequence[int], Sequence[int]]
_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.int32: 2, torch.bool: 3, torch.float64: 4}


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return "it runs on the CPU only"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.int32):
        return "it serves fp32, bf16 and fp16 only"
    return None


def why_not_op(op: str, dtype: torch.dtype) -> str | None:
    if op == "multifurcate" and dtype == torch.float16:
        return "it would have to convert the whole head"
    return None


def append_kv(
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    _k_scale: None,
    _v_scale: None,
) -> None:
    k, v = apart(k, k_cache, v_cache), apart(v, k_cache, v_cache)
    if cos is not None and sin is not None:
        k = rotate(k.float(), cos.float(), sin.float()).to(k.dtype)
    k, v, k_cache, v_cache = map(_bits, (k, v, k_cache, v_cache))
    _native.append_kv(view(k), view(v), view(slots), view(k_cache), view(v_cache), torch.get_num_threads())


def tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot: Tensor,
    begin: Tensor,
    end: Tensor,
    scale: float,
    count: Tensor | None,
    _k_scale: None,
    _v_scale: None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if count is not None:
        held = checked_count(count, slot.shape[0])
        slot, begin, end = slot[:held], begin[:held], end[:held]
    if q.dtype == torch.float16:
        seen = begin < end
        slot, begin, end = slot[seen], begin[seen], end[seen]
        check_index("slot", slot, k_cache.shape[0])
        k_cache, v_cache = k_cache[slot].float(), v_cache[slot].float()
        slot = torch.arange(slot.shape[0], dtype=torch.int32)
        out, lse = tree_attention(
            q.float(), k_cache, v_cache, slot, begin, end, scale, None, None, None, softcap, sinks
        )
        return out.half(), lse
    q, k_cache, v_cache = _rows(q), _rows(k_cache), _rows(v_cache)
    out = q.new_empty(*q.shape[:2], v_cache.shape[2])
    lse = torch.empty(q.shape[:2], dtype=torch.float32)
    sinks = None if sinks is None else sinks.float().contiguous()
    plan = view(slot), view(begin), view(end)
    inputs = view(q), view(k_cache), view(v_cache)
    outputs = view(out), view(lse), torch.get_num_threads()
    _native.tree_attention(*inputs, *plan, scale, softcap, _optional(sinks), *outputs)
    return out, lse


class PlannedAttention:
    """`tree_attention` with one plan in call after call, as of a model's layers: into `out`, without lse and checks.

    What does not change from layer to layer is prepared once: on short prompts that takes longer than the attention.
    The same numbers as the op's, for fp32 and bf16; the last dimension of every tensor is contiguous, `out` wholly.
    """

    def __init__(self, slot: Tensor, begin: Tensor, end: Tensor, queries: int, heads: int) -> None:
        self._plan = slot, begin, end  # kept alive: below there are only addresses
        self._plan_views = view(slot), view(begin), view(end)
        self._lse = torch.empty(queries, heads)
        self._last = view(self._lse), torch.get_num_threads()

    def __call__(self, q: Tensor, k_cache: View, v_cache: View, scale: float, out: Tensor) -> None:
        _native.tree_attention(view(q), k_cache, v_cache, *self._plan_views, scale, None, None, view(out), *self._last)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    if out_a.dtype == torch.float16:
        out, lse = merge_attention(out_a.float(), lse_a, out_b.float(), lse_b)
        return out.half(), lse
    out_a, out_b = _rows(out_a), _rows(out_b)
    out = torch.empty_like(out_a, memory_format=torch.contiguous_format)
    lse = torch.empty_like(lse_a, memory_format=torch.contiguous_format)
    pairs = view(out_a), view(lse_a), view(out_b), view(lse_b)
    _native.merge_attention(*pairs, view(out), view(lse), torch.get_num_threads())
    return out, lse


def gather_kv(k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    (sequences, length), (_, kv_heads, head_dim) = slots.shape, k_cache.shape
    k = k_cache.new_empty(sequences, kv_heads, length, head_dim)
    v = v_cache.new_empty(sequences, kv_heads, length, v_cache.shape[2])
    caches, gathered = map(view, map(_bits, (k_cache, v_cache))), map(view, map(_bits, (k, v)))
    _native.gather_kv(*caches, view(slots), *gathered, torch.get_num_threads())
    return k, v


def nucleus(logits: Tensor, top_p: float | Tensor, banned: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities are right to 1e-6; the sum is taken in fp64, where softmax in fp32 was 2e-5 off.

    So membership differs from the reference's for tokens alone before which the mass lies that near to `top_p`.
    """
    logits, top_p = _rows(_computable(logits)), _of_each_row(top_p, logits.shape[0])
    found = _native.nucleus(view(logits), view(top_p), _optional(banned), torch.get_num_threads())
    tokens, probabilities, offsets = map(torch.from_numpy, found)
    return tokens, probabilities, offsets


def multifurcation_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    unseen: Tensor | None,
    unseen_reward: float,
    tokens: Tensor,
    offsets: Tensor,
) -> Tensor:
    bias = None if bias is None else _computable(bias)
    if weight.dtype == torch.float16:
        check_index("tokens", tokens, weight.shape[0])
        named, tokens = tokens.unique(return_inverse=True)
        tokens, hidden, weight = tokens.int(), hidden.float(), weight[named].float()
        bias = None if bias is None else bias[named].float()
        unseen = None if unseen is None else unseen[named]
    hidden, weight = _rows(hidden), _rows(weight)
    rewards = torch.empty(tokens.shape, dtype=torch.float32)
    head = view(hidden), view(weight), _optional(bias), _optional(unseen), unseen_reward
    _native.multifurcation_head(*head, view(tokens), view(offsets), view(rewards), torch.get_num_threads())
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
    beam = _new_beam(num_groups * width)
    comparable = _computable(rewards)  # held until the native function returns
    candidates = view(comparable), view(tokens), view(offsets)
    _native.select_beam(*candidates, view(groups), num_groups, width, _optional(widths), *map(view, beam))
    return beam[0], beam[1], beam[2].to(rewards.dtype)


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
    logits, hidden, weight = _rows(logits), _rows(hidden), _rows(weight)
    top_p = _of_each_row(top_p, logits.shape[0])
    beam = _new_beam(num_groups * width)
    counts = torch.empty(logits.shape[0], dtype=torch.int32)
    all_unseen = torch.empty(num_groups, dtype=torch.bool)
    head = view(hidden), view(weight), _optional(bias), _optional(unseen), unseen_reward
    search = (
        view(groups),
        num_groups,
        width,
        _optional(widths),
        view(top_p),
        *map(_optional, (banned, scores, end_tokens)),
    )
    finished = _optional(finished_scores), _optional(finished_groups)
    outputs = *map(view, beam), view(counts), view(all_unseen)
    _native.multifurcate(view(logits), *head, *search, *finished, *outputs, torch.get_num_threads())
    return *beam, counts, all_unseen


def advance_tree(
    slot: Tensor,
    begin: Tensor,
    end: Tensor,
    parents: Tensor,
    new_slots: Tensor,
    queries: int,
    count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    room, fresh = slot.shape[0], parents.shape[0]
    held = room if count is None else checked_count(count, room - fresh)
    size = room + fresh if count is None else room
    plan = slot.new_empty(size), slot.new_empty(size), slot.new_empty(size)
    old = map(view, (slot[:held], begin[:held], end[:held], parents, new_slots))
    used = held + fresh
    _native.advance_tree(*old, queries, *(view(x[:used]) for x in plan))
    for x, dead in zip(plan, (-1, 0, 0), strict=True):
        x[used:] = dead
    return plan


def block_plan(
    block_table: Tensor, seq_lens: Tensor, query_start: Tensor, block_size: int, queries: int, size: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if block_table.numel() and int(block_table.max()) >= 2**31 // block_size:  # padding, or slots above int32
        return reference_paged.block_plan(block_table, seq_lens, query_start, block_size, queries, size)
    block_table = _rows(block_table)  # held until the native function returns
    inputs = view(block_table), view(seq_lens), view(query_start), block_size, queries
    order, *plan = map(torch.from_numpy, _native.block_plan(*inputs, -1 if size is None else size))
    count = seq_lens.new_tensor([len(plan[0])])
    room = 0 if size is None else size - len(plan[0])
    if room:
        plan = [pad(x, (0, room), value=dead) for x, dead in zip(plan, (-1, 0, 0), strict=True)]
    slot, begin, end = plan
    return order, slot, begin, end, count


def view(tensor: Tensor) -> View:
    return tensor.data_ptr(), _CODE[tensor.dtype], tensor.shape, tensor.stride()


def _computable(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.float16 else tensor


def _bits(tensor: Tensor) -> Tensor:
    """fp16 as bf16, for what moves numbers without a look at them."""
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.float16 else tensor


def _optional(tensor: Tensor | None) -> View | None:
    return None if tensor is None else view(tensor)


def _of_each_row(top_p: float | Tensor, rows: int) -> Tensor:
    """`[rows]` fp64."""
    return top_p.double() if isinstance(top_p, Tensor) else torch.tensor(top_p, dtype=torch.float64).expand(rows)


def _rows(tensor: Tensor) -> Tensor:
    """With the elements of the last dimension side by side, as the native loops read them."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _new_beam(size: int) -> tuple[Tensor, Tensor, Tensor]:
    parent = torch.empty(size, dtype=torch.int32)
    return parent, torch.empty_like(parent), torch.empty(size, dtype=torch.float32)
