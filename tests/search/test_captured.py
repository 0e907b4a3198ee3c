"""The step with static buffers: the answers are those of step by step, and nothing in it needs the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from cases import Forest, forests
from hypothesis import given
from searches import CONFIG, REQUESTS, make, recorded, same
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saffron.errors import ConfigError, NumericalError
from saffron.models.policy import Policy
from saffron.models.trie_model import Rows
from saffron.search import Request, SaffronSearch, captured
from saffron.search import saffron as module
from saffron.search.captured import EVERY, StaticStep, context_plan
from saffron_kernels import Beams, multifurcate


@pytest.mark.parametrize("seed, eos_score", [(0, "parent"), (1, "mrm"), (2, "parent")])
def test_equals_the_search_step_by_step(seed, eos_score, monkeypatch) -> None:
    policy, mrm = tiny.pair(seed)
    config = replace(CONFIG, eos_score=eos_score, width=1 + 3 * seed, max_new_tokens=2 * EVERY + 3)
    expected = SaffronSearch(policy, mrm, config).search(REQUESTS)
    same(make(monkeypatch, None, policy, mrm, config).search(REQUESTS), expected)
    assert policy.kv.num_nodes == mrm.kv.num_nodes == 0


def test_equals_it_when_recorded_and_replayed(monkeypatch) -> None:
    """Both kinds of steps, those that must not end and those that may; and again, with the buffers that are there."""
    policy, mrm = tiny.pair(3)
    search = make(monkeypatch, recorded, policy, mrm, replace(CONFIG, width=4, max_new_tokens=6, eos_score="mrm"))
    plain = SaffronSearch(policy, mrm, search.config)
    same(search.search(REQUESTS), plain.search(REQUESTS))
    buffers = search._static
    others = [Request((0, 9 + i), (0, 4, 9 + i)) for i in range(len(REQUESTS))]
    same(search.search(others), plain.search(others))
    assert search._static is buffers and buffers is not None and len(buffers._replays) == 2
    same(search.search(REQUESTS[:1]), plain.search(REQUESTS[:1]))  # another number of searches: other buffers
    assert search._static is not buffers


@pytest.mark.parametrize("max_new_tokens", [1, 2, EVERY, EVERY + 1])
def test_lengths_around_a_look(max_new_tokens, monkeypatch) -> None:
    policy, mrm = tiny.pair(1)
    config = replace(CONFIG, max_new_tokens=max_new_tokens, min_new_tokens=0)
    expected = SaffronSearch(policy, mrm, config).search(REQUESTS)
    same(make(monkeypatch, None, policy, mrm, config).search(REQUESTS), expected)


def test_ends_soon_after_all_searches_have_ended(monkeypatch) -> None:
    policy, mrm = tiny.pair(2)
    config = replace(CONFIG, width=3, top_p=1.0, min_new_tokens=0, max_new_tokens=64, eos_score="mrm")
    assert mrm.bias is not None and mrm.unseen is not None
    mrm.bias[1], mrm.unseen[1] = 1e3, False  # the end is what it likes best
    search = make(monkeypatch, None, policy, mrm, config)
    steps = 0

    def counted(*arguments: object, **options: object) -> StaticStep:
        made = StaticStep(*arguments, **options, capture=None)  # type: ignore[arg-type]
        run = made._run

        def counting(*a: object) -> None:
            nonlocal steps
            steps += 1
            run(*a)  # type: ignore[arg-type]

        made._run = counting  # type: ignore[method-assign]
        return made

    monkeypatch.setattr(module, "StaticStep", counted)
    same(search.search(REQUESTS), SaffronSearch(policy, mrm, config).search(REQUESTS))
    assert steps < 2 * EVERY


def test_a_traced_search_runs_step_by_step(monkeypatch) -> None:
    policy, mrm = tiny.pair()
    search = make(monkeypatch, None, policy, mrm)
    (traced,) = search.search(REQUESTS[:1], trace=True)
    assert search._static is None and traced.trace


class Watch(TorchDispatchMode):
    """Refuses what a graph cannot hold: values and sizes that the host would learn, tensors made of host data."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        masks = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dtype == torch.bool]
        if any(name.startswith(f) for f in self.FORBIDDEN) or (name in ("index", "index_put_") and len(masks) > 0):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def a_step(policy, mrm) -> StaticStep:
    head = SaffronSearch(policy, mrm, CONFIG).head
    return StaticStep(policy, mrm, head, torch.tensor([1], dtype=torch.int32), CONFIG, 3, 300, 300, capture=None)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_step_never_waits_for_the_device(architecture) -> None:
    policy, mrm = tiny.pair()
    policy = Policy(tiny.model(architecture))
    with torch.inference_mode():
        step = a_step(policy, mrm)
        step._nodes.copy_(step._nothing)
        with Watch():
            step._run(1, True, 64)
            step._run(2, False, 64)


def test_waiting_would_be_seen() -> None:
    for wait in (lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x + torch.tensor([1.0]), torch.nonzero):
        with pytest.raises(AssertionError, match="waits for the device"), Watch():
            wait(torch.ones(3))


def test_sizes_and_devices_are_known_before() -> None:
    """The step runs on tensors that hold nothing."""
    policy, mrm = tiny.pair()
    with FakeTensorMode() as mode, torch.inference_mode():
        for model in (policy, mrm):
            for part in model.model.modules():
                for held in (part._parameters, part._buffers):
                    for name, x in held.items():
                        held[name] = None if x is None else mode.from_tensor(x)
        assert mrm.bias is not None and mrm.unseen is not None
        mrm.bias, mrm.unseen = mode.from_tensor(mrm.bias), mode.from_tensor(mrm.unseen)
        step = a_step(policy, mrm)
        step._run(1, True, 64)
        step._run(2, False, 64)
        assert isinstance(step._records, FakeTensor)


@given(forests())
def test_plan_in_the_order_of_the_caller(forest: Forest) -> None:
    order = np.random.default_rng(forest.queries).permutation(np.repeat(np.arange(forest.queries), 2)).astype(np.int32)
    alive = forest.begin < forest.end
    slot, begin, end = (x[alive] for x in (forest.slot, forest.begin, forest.end))
    beams = Beams(order, np.arange(forest.queries, dtype=np.int64), slot, begin, end)
    token, first, last, lengths = context_plan(Rows(beams, order))
    assert lengths.tolist() == (order + 1).tolist()
    for row, beam in enumerate(order.tolist()):
        seen = [t for t, f, e in zip(token.tolist(), first.tolist(), last.tolist(), strict=True) if f <= row < e]
        assert seen == [t for t in range(len(slot)) if begin[t] <= beam < end[t]]
    assert len(token) <= sum(int(e - b) for b, e in zip(begin, end, strict=True)) * 2


def test_outputs_that_are_not_finite(monkeypatch) -> None:
    """As on a GPU, where ops do not look at what tensors hold."""
    policy, mrm = tiny.pair()

    def unchecked(logits: Tensor, hidden: Tensor, *rest: object, **more: object) -> object:
        return multifurcate(logits.nan_to_num(0), hidden.nan_to_num(0), *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(captured, "multifurcate", unchecked)
    for name, model in (("policy", policy), ("mrm", mrm)):
        search = make(monkeypatch, None, policy, mrm)
        weight = model.model.get_input_embeddings().weight
        kept = weight.detach().clone()
        search.search(REQUESTS)
        with torch.no_grad():
            weight[2:] = torch.nan  # the begin and the end token alone are good
        short = make(monkeypatch, None, policy, mrm, replace(CONFIG, max_new_tokens=1, min_new_tokens=0))
        for searching, context in ((search, (0,)), (short, (0, 9))):  # bad in a step; in the prefill
            with pytest.raises(NumericalError, match=name):
                searching.search([Request(context, context)])
        with torch.no_grad():
            weight.copy_(kept)
        assert policy.kv.num_nodes == mrm.kv.num_nodes == 0


def test_what_cannot_be_captured_is_refused() -> None:
    policy, mrm = tiny.pair()
    with pytest.raises(ConfigError, match="capture: .*GPU.*cpu"):
        SaffronSearch(policy, mrm, CONFIG, capture=True)


def test_a_capture_that_fails_says_so(monkeypatch) -> None:
    def fails(body: object) -> Callable[[], object]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    search = make(monkeypatch, fails, *tiny.pair())
    with pytest.raises(ConfigError, match="cannot be captured .operation not permitted when stream is capturing.$"):
        search.search(REQUESTS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_captured_on_a_gpu() -> None:
    policy, mrm = (m.__class__(m.model.cuda()) for m in tiny.pair())
    plain, search = SaffronSearch(policy, mrm, CONFIG), SaffronSearch(policy, mrm, CONFIG, capture=True)
    for requests in (REQUESTS, [Request((0, 9 + i), (0, 4, 9 + i)) for i in range(len(REQUESTS))]):
        same(search.search(requests), plain.search(requests))
