"""The step with static buffers: the answers are those of step by step, and nothing in it needs the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import architectures
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
from saffron.models.attention import ATTENTION
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.search import Request, SaffronSearch, static_forest
from saffron.search.captured_step import CapturedStep
from saffron.search.model_pair import ModelPair
from saffron.search.static_forest import EVERY, StaticForest, intervals
from saffron_kernels import multifurcate
from saffron_kernels.backends import faults


@pytest.mark.parametrize("seed, eos_score", [(0, "parent"), (1, "mrm"), (2, "parent")])
def test_equals_the_search_step_by_step(seed, eos_score, monkeypatch) -> None:
    policy, mrm = tiny.pair(seed)
    config = replace(CONFIG, eos_score=eos_score, width=1 + 3 * seed, max_new_tokens=2 * EVERY + 3)
    expected = SaffronSearch(policy, mrm, config).search(REQUESTS)
    same(make(monkeypatch, None, policy, mrm, config).search(REQUESTS), expected)
    assert policy.kv.num_nodes == mrm.kv.num_nodes == 0


def test_equals_it_when_recorded_and_replayed(monkeypatch) -> None:
    """Steps that must not end and steps that may are one graph; and again, with the buffers that are there."""
    policy, mrm = tiny.pair(3)
    search = make(monkeypatch, recorded, policy, mrm, replace(CONFIG, width=4, max_new_tokens=6, eos_score="mrm"))
    plain = SaffronSearch(policy, mrm, search.config)
    same(search.search(REQUESTS), plain.search(REQUESTS))
    step = search._captured
    assert step is not None and step.forest is not None
    buffers, replay = step.forest, step.forest._replay
    others = [Request((0, 9 + i), (0, 4, 9 + i)) for i in range(len(REQUESTS))]
    same(search.search(others), plain.search(others))
    assert search._captured is step and step.forest is buffers and buffers._replay is replay and replay is not None
    same(search.search(REQUESTS[:1]), plain.search(REQUESTS[:1]))  # another number of searches: other buffers
    assert search._captured is not step


def test_values_of_another_size_than_keys(monkeypatch) -> None:
    """MLA models: the buffers of K and V have their own forms."""
    policy = Policy(architectures.model("DeepseekV3Config", ATTENTION))
    mrm = MultifurcationRewardModel(architectures.model("DeepseekV2Config", ATTENTION, seed=5))
    assert policy.kv.k.shape[3] != policy.kv.v.shape[3]
    search = make(monkeypatch, None, policy, mrm)
    same(search.search(REQUESTS[:2]), SaffronSearch(policy, mrm, CONFIG).search(REQUESTS[:2]))
    step = search._captured
    assert step is not None and step.forest is not None
    cache = step.forest.policy.cache
    assert (cache.k.shape[2:], cache.v.shape[2:]) == (policy.kv.k.shape[2:], policy.kv.v.shape[2:])


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
    choose = StaticForest._choose

    def counting(*arguments: object) -> None:
        nonlocal steps
        steps += 1
        choose(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(StaticForest, "_choose", counting)
    same(search.search(REQUESTS), SaffronSearch(policy, mrm, config).search(REQUESTS))
    assert 0 < steps < 2 * EVERY


def test_a_traced_search_runs_step_by_step(monkeypatch) -> None:
    policy, mrm = tiny.pair()
    search = make(monkeypatch, None, policy, mrm)
    (traced,) = search.search(REQUESTS[:1], trace=True)
    assert search._captured is None and traced.trace


class Watch(TorchDispatchMode):
    """Refuses what a graph cannot hold: values and sizes that the host would learn, tensors made of host data."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "is_nonzero", "equal")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        masks = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dtype == torch.bool]
        if any(name.startswith(f) for f in self.FORBIDDEN) or (name in ("index", "index_put_") and len(masks) > 0):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


def a_step(policy, mrm) -> Callable[[], object]:
    """One step of buffers that hold nothing."""
    forest = StaticForest(ModelPair(policy, mrm), CONFIG, 3, (300, 300), None)
    forest._nodes.copy_(forest._nothing)
    forest._ends.fill_(-1)
    forest._top_p.fill_(1.0)
    forest._widths.fill_(1)

    def step() -> Tensor:
        sides = forest.policy.step(64), forest.mrm.step(64)
        forest._choose(*forest._models.outputs(forest._tokens.long(), *sides, forest._side))
        return forest._records

    return step


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_step_never_waits_for_the_device(architecture) -> None:
    policy, mrm = tiny.pair()
    policy = Policy(tiny.model(architecture))
    with torch.inference_mode():
        step = a_step(policy, mrm)
        with Watch():
            step()
            step()


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
        step()
        assert isinstance(step(), FakeTensor)


@given(forests())
def test_plan_in_the_order_of_the_caller(forest: Forest) -> None:
    """Rows in any order, and several on one query, see what their query saw but for one token, which is their own."""
    random = np.random.default_rng(forest.queries)
    order = random.permutation(np.repeat(np.arange(forest.queries), 2)).astype(np.int32)
    alive = forest.begin < forest.end
    begin, end = (x[alive].numpy() for x in (forest.begin, forest.end))
    seen = [[t for t in range(len(begin)) if begin[t] <= query < end[t]] for query in order]
    if not all(seen):
        return
    own = np.array([random.choice(tokens) for tokens in seen], dtype=np.int32)
    token, first, last = intervals(begin, end, order, own)
    for row, tokens in enumerate(seen):
        now = [t for t, f, e in zip(token.tolist(), first.tolist(), last.tolist(), strict=True) if f <= row < e]
        assert now == [t for t in tokens if t != own[row]]
    assert len(token) <= sum(map(len, seen))


def test_outputs_that_are_not_finite(monkeypatch) -> None:
    """As on a GPU, where ops do not look at what tensors hold."""
    policy, mrm = tiny.pair()

    def unchecked(logits: Tensor, hidden: Tensor, *rest: object, **more: object) -> object:
        return multifurcate(logits.nan_to_num(0), hidden.nan_to_num(0), *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(static_forest, "multifurcate", unchecked)
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


@torch.no_grad()
def test_buffers_do_not_outlive_the_weights(monkeypatch) -> None:
    """A graph holds the weights that it was captured with."""
    captures: list[int] = []
    policy, mrm = tiny.pair()
    search = make(monkeypatch, lambda body: captures.append(1) or body, policy, mrm)
    search.search(REQUESTS)
    known = len(captures)
    search.search(REQUESTS)
    assert len(captures) == known > 0  # the buffers of the call before
    head = mrm.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(-head.weight)
    changed = search.search(REQUESTS)
    assert len(captures) > known
    same(changed, SaffronSearch(policy, mrm, CONFIG).search(REQUESTS))


@torch.no_grad()
def test_weights_that_change_in_captured_steps(monkeypatch) -> None:
    policy, mrm = tiny.pair()
    search = SaffronSearch(policy, mrm, CONFIG)
    engine = search.engine(step=CapturedStep(search.models, CONFIG, 2, None))
    running = engine.submit(REQUESTS[0])
    engine.step()
    assert not running.done
    mrm.model.get_output_embeddings().weight.mul_(-1)
    joining = engine.submit(REQUESTS[1])
    engine.run()
    for handle in (running, joining):
        with pytest.raises(ConfigError, match="weights: they changed while searches run"):
            handle.result()
    assert policy.kv.reserved == mrm.kv.reserved == 0


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
def test_captured_on_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(faults, "_EAGER", False)  # an op that checks what tensors hold cannot be captured
    policy, mrm = (m.__class__(m.model.cuda()) for m in tiny.pair())
    plain, search = SaffronSearch(policy, mrm, CONFIG), SaffronSearch(policy, mrm, CONFIG, capture=True)
    for requests in (REQUESTS, [Request((0, 9 + i), (0, 4, 9 + i)) for i in range(len(REQUESTS))]):
        same(search.search(requests), plain.search(requests))
