"""What attention of other projects is given to compare with: the same tree as we are, in their terms."""

from __future__ import annotations

import inspect
import sys

import competitors
import fake_flashinfer
import harness
import pytest
import timing
import torch
from test_benchmarks import PLANS, plan_of
from torch import Tensor

from saffron_kernels import backend, tree_attention

SCALE = 0.25


def inputs(plan, dtype: torch.dtype, layers: int = 2) -> tuple[Tensor, list[tuple[Tensor, Tensor]], list[Tensor]]:
    """Q, the caches of some layers, and the reference's result for each."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype).to(timing.DEVICE)

    q = normal(plan.queries, 4, 16)
    caches = [(normal(plan.slots, 2, 16), normal(plan.slots, 2, 16)) for _ in range(layers)]
    with backend("reference"):
        expected = [tree_attention(q, k, v, plan.slot, plan.begin, plan.end, SCALE)[0] for k, v in caches]
    return q, caches, expected


@PLANS
def test_flex_attention_is_given_the_tree(name: str) -> None:
    plan = plan_of(name)
    q, layers, expected = inputs(plan, torch.float32)
    for result, right in zip(
        competitors.flex_attention(plan, q, layers, SCALE, compiled=False)(), expected, strict=True
    ):
        torch.testing.assert_close(result, right, rtol=1e-4, atol=1e-4)


@PLANS
@pytest.mark.parametrize("competitor", competitors.FLASHINFER)
def test_flashinfer_is_given_the_tree(competitor: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    monkeypatch.setattr(competitors, "_WORKSPACE", 128 << 20)
    plan = plan_of(name)
    q, layers, expected = inputs(plan, torch.bfloat16)
    call = competitors.FLASHINFER[competitor](plan, q, layers, SCALE)
    for _ in range(2):  # a second call starts from the plan, not from the first one's result
        for result, right in zip(call(), expected, strict=True):
            harness.assert_close(result, right, torch.bfloat16)


def test_fake_has_the_signatures_of_flashinfer() -> None:
    real = pytest.importorskip("flashinfer")
    for name, kind in vars(fake_flashinfer).items():
        if not inspect.isclass(kind) or kind.__module__ != fake_flashinfer.__name__:
            continue
        for method in ("__init__", "plan", "run"):
            theirs = inspect.signature(getattr(getattr(real, name), method)).parameters
            ours = inspect.signature(getattr(kind, method)).parameters
            positional = [p for p in ours if ours[p].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD]
            assert positional == list(theirs)[: len(positional)], (name, method)
            takes_any = any(p.kind == inspect.Parameter.VAR_KEYWORD for p in theirs.values())
            assert takes_any or ours.keys() <= theirs.keys(), (name, method)


def test_nothing_else_is_compared_with_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(competitors, "DEVICE", torch.device("cuda"))
    plan = plan_of("search")
    q, layers, _ = inputs(plan, torch.bfloat16, layers=1)
    assert list(competitors.on_gpu(plan, q, layers, SCALE, flex=True)) == list(competitors.NAMES)
    fp8 = [(k.to(torch.float8_e4m3fn), v.to(torch.float8_e4m3fn)) for k, v in layers]
    assert list(competitors.on_gpu(plan, q, fp8, SCALE, flex=True)) == ["FlashInfer fa2 with mask"]
    assert not competitors.on_gpu(plan, q.float(), layers, SCALE)


@PLANS
def test_cascade_levels_hold_what_each_query_sees(name: str) -> None:
    plan = plan_of(name)
    bounds, shared, own = competitors.cascade_levels(plan)
    assert bounds[0] == 0 and bounds[-1] == plan.queries and len(own) == plan.queries
    assert len(shared) == len(bounds) - 1 == (3 if name == "forest" else 1)
    for query, sequence in enumerate(plan.sequences()):
        tree = next(i for i, end in enumerate(bounds[1:]) if query < end)
        assert sorted([*shared[tree].tolist(), *own[query].tolist()]) == sorted(sequence.tolist())
    assert all(len(s) > 0 for s in shared)


def test_page_lists() -> None:
    offsets, slots, last = competitors._lists([torch.tensor([4, 2]), torch.tensor([], dtype=torch.int64)])
    assert (offsets.tolist(), slots.tolist(), last.tolist()) == ([0, 2, 2], [4, 2], [1, 0])
