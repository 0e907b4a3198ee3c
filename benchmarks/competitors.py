"""Attention of other projects over the same trie, for GPUs: FlexAttention and FlashInfer (0.5 to 0.7).

Each function prepares a call over one or more layers that share the plan; only the call is timed. Whatever these
kernels need to know about the tree (a block mask, FlashInfer's plan, K and V in the order of the plan) is made
beforehand, although a decoder would have to make it again at every step; our op takes the plan as it is.
`harness.usable` checks each result, and leaves out what is not installed or does not work, with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from harness import assert_close, left_out, usable
from timing import DEVICE
from torch import Tensor
from workloads import Plan, search_plan

from saffron_kernels import tree_attention

Layers = Sequence[tuple[Tensor, Tensor]]  # K and V caches, `[slots, kv_heads, head_dim]` each
Call = Callable[[], list[Tensor]]  # `[queries, heads, head_dim]` of every layer

_WORKSPACE = 512 << 20  # bytes; FlashInfer recommends 128 MiB, which partial results of wide trees outgrow


def flex_attention(plan: Plan, q: Tensor, layers: Layers, scale: float, compiled: bool = True) -> Call:
    """PyTorch's FlexAttention, with a block mask from the intervals."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    begin, end = plan.begin, plan.end

    def sees(batch: Tensor, head: Tensor, query: Tensor, token: Tensor) -> Tensor:
        return (begin[token] <= query) & (query < end[token])

    mask = create_block_mask(sees, None, None, plan.queries, len(plan.slot), device=str(q.device))
    slots = plan.slot.long()
    queries = q.transpose(0, 1)[None]
    in_order = [tuple(x[slots].transpose(0, 1)[None] for x in (k, v)) for k, v in layers]
    if compiled:
        torch._dynamo.reset()  # every case is compiled for its own sizes
    run = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def call() -> list[Tensor]:
        outs = (run(queries, k, v, block_mask=mask, scale=scale, enable_gqa=True) for k, v in in_order)
        return [out[0].transpose(0, 1) for out in outs]

    return call


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def _lists(slots: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Page lists as FlashInfer takes them: offsets, slots, and tokens in the last page of each (0 of an empty list)."""
    ends = torch.tensor([len(s) for s in slots]).cumsum(0).tolist()
    return _int32([0, *ends]), torch.cat(slots).int(), _int32([min(1, len(s)) for s in slots])


def _over_layers(q: Tensor, layers: Layers, run: Callable[..., Tensor]) -> Call:
    """A call of `run(q, pages, out=)` a layer; pages hold one token: `[slots, 1, kv_heads, head_dim]`."""
    outs = [torch.empty_like(q) for _ in layers]  # else it fills one with zeros, which is a launch more
    pages = [(k[:, None], v[:, None]) for k, v in layers]

    def call() -> list[Tensor]:
        return [run(q, page, out=out) for page, out in zip(pages, outs, strict=True)]

    return call


def _sizes(q: Tensor, layers: Layers) -> tuple[int, int, int, int]:
    """Query heads, KV heads, head size, page size: what every `plan` takes after the page lists."""
    return q.shape[1], layers[0][0].shape[1], q.shape[2], 1


def _kinds(q: Tensor, layers: Layers, scale: float) -> dict[str, object]:
    return {"sm_scale": scale, "q_data_type": q.dtype, "kv_data_type": layers[0][0].dtype}


def _workspace() -> Tensor:
    return torch.zeros(_WORKSPACE, dtype=torch.uint8, device=DEVICE)


def flashinfer_mask(plan: Plan, q: Tensor, layers: Layers, scale: float) -> Call:
    """FlashInfer's prefill (fa2): the flattened trie as one request, with the tree as its mask."""
    import flashinfer

    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD", backend="fa2")
    wrapper.plan(
        _int32([0, plan.queries]), *_lists([plan.slot]), *_sizes(q, layers),
        custom_mask=plan.mask.flatten(), **_kinds(q, layers, scale),
    )  # fmt: skip
    return _over_layers(q, layers, wrapper.run)


def flashinfer_decode(plan: Plan, q: Tensor, layers: Layers, scale: float) -> Call:
    """FlashInfer's batch decode: a request a query, with all its tokens; shared ones are read by each.

    On tensor cores with fa2: by itself it takes fa3 on Hopper, which does not split K and V.
    """
    import flashinfer

    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(), "NHD", use_tensor_cores=True, backend="fa2")
    wrapper.plan(*_lists(plan.sequences()), *_sizes(q, layers), **_kinds(q, layers, scale))
    return _over_layers(q, layers, wrapper.run)


def cascade_levels(plan: Plan) -> tuple[list[int], list[Tensor], list[Tensor]]:
    """Two levels: what all queries of a tree share, and what each query sees besides.

    Returns:
        bounds of the trees' queries, the shared slots of each tree, and the further slots of each query.
    """
    begin, end = plan.begin.tolist(), plan.end.tolist()
    bounds = [0]
    while bounds[-1] < plan.queries:  # a tree ends where no token's interval reaches across
        reach = bounds[-1] + 1
        while (further := max((e for b, e in zip(begin, end, strict=True) if b < reach), default=reach)) > reach:
            reach = further
        bounds.append(reach)
    trees = list(zip(bounds, bounds[1:], strict=False))
    shared = [(plan.begin <= low) & (plan.end >= high) & (plan.begin < high) for low, high in trees]
    sees = plan.mask
    own = [sees[query] & ~shared[tree] for tree, (low, high) in enumerate(trees) for query in range(low, high)]
    return bounds, [plan.slot[seen] for seen in shared], [plan.slot[seen] for seen in own]


def _cascade_lists(plan: Plan) -> tuple[list[Tensor], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Of both levels: offsets of the queries, and page lists."""
    bounds, shared, own = cascade_levels(plan)
    return [_int32(bounds), _int32(list(range(plan.queries + 1)))], _lists(shared), _lists(own)


def flashinfer_cascade(plan: Plan, q: Tensor, layers: Layers, scale: float) -> Call:
    """FlashInfer's cascade of two levels, the prompts and the tokens of each query, with the kernel that it chooses."""
    import flashinfer

    queries, *lists = _cascade_lists(plan)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(2, _workspace(), "NHD")
    wrapper.plan(queries, *map(list, zip(*lists, strict=True)), *_sizes(q, layers), **_kinds(q, layers, scale))
    return _over_layers(q, layers, lambda q, page, out: wrapper.run(q, page))


def flashinfer_cascade_fa2(plan: Plan, q: Tensor, layers: Layers, scale: float) -> Call:
    """The same cascade with fa2 for both levels, which its wrapper cannot be told: as that does it, from its parts."""
    import flashinfer

    queries, *lists = _cascade_lists(plan)
    levels = []
    for offsets, pages in zip(queries, lists, strict=True):
        levels.append(flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(), "NHD", backend="fa2"))
        levels[-1].plan(offsets, *pages, *_sizes(q, layers), **_kinds(q, layers, scale))

    def run(q: Tensor, page: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
        out, lse = levels[1].run(q, page, out=out, return_lse=True)
        flashinfer.merge_state_in_place(out, lse, *levels[0].run(q, page, return_lse=True))
        return out

    return _over_layers(q, layers, run)


FLASHINFER: dict[str, Callable[..., Call]] = {
    "FlashInfer fa2 with mask": flashinfer_mask,
    "FlashInfer cascade fa2": flashinfer_cascade_fa2,
    "FlashInfer cascade auto": flashinfer_cascade,
    "FlashInfer decode": flashinfer_decode,
}
NAMES = (*FLASHINFER, "FlexAttention")  # none of them waits for anything


def on_gpu(plan: Plan, q: Tensor, layers: Layers, scale: float, flex: bool = False) -> dict[str, Callable[[], Call]]:
    """What can be compared with on this device: functions that prepare a call, which returns a result a layer.

    FlexAttention compiles for long. Caches in fp8 (scaled by 1) are read by one competitor alone.
    """
    if DEVICE.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
        return {}
    makers = {**FLASHINFER, **({"FlexAttention": flex_attention} if flex else {})}
    if layers[0][0].dtype != q.dtype:
        makers = {"FlashInfer fa2 with mask": flashinfer_mask}
    return {name: partial(make, plan, q, layers, scale) for name, make in makers.items()}


def main() -> None:
    """Calls each once, so that what compiles itself at the first call has done so before anything is timed."""
    plan = search_plan(8, 100, levels=8)
    for head_dim in (128, 64):
        q, k, v = (
            torch.randn(n, heads, head_dim, device=DEVICE).bfloat16()
            for n, heads in ((plan.queries, 32), (plan.slots, 8), (plan.slots, 8))
        )
        expected = tree_attention(q, k, v, plan.slot, plan.begin, plan.end, head_dim**-0.5)[0]
        makers = on_gpu(plan, q, [(k, v)], head_dim**-0.5, flex=True)
        found = usable(makers, lambda result, right=expected: assert_close(result[0], right, torch.bfloat16))
        print(f"head size {head_dim}: {', '.join(found) or 'none'}", flush=True)
    for reason in dict.fromkeys(left_out):
        print(f"left out: {reason}")


if __name__ == "__main__":
    main()
