"""Searches whose policy and MRM share a trunk: one forward pass a step, and the answers of the merged MRM."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from engines import PROMPTS, schedule
from engines import same as same_handles
from hypothesis import given, settings
from hypothesis import strategies as st
from searches import CONFIG, REQUESTS, make, recorded
from searches import same as same_results
from test_captured import Watch, a_step
from test_engine_alone import searches

from saffron.errors import CapacityError, ConfigError, NumericalError, UnsupportedModelError
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.models.shared_trunk import LowRank, SharedTrunk
from saffron.models.trie_model import Rows, TrieModel
from saffron.search import Engine, Handle, SaffronSearch
from saffron.search.config import SearchConfig
from saffron.search.model_pair import ModelPair
from saffron_kernels import CacheFullError

Trio = tuple[Policy, MultifurcationRewardModel, MultifurcationRewardModel]
TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")


def trio(kind: str, seed: int = 0, **options: Any) -> Trio:
    """In fp64: a policy, an MRM on its trunk ("lora", "frozen"), and the same MRM merged."""
    policy = Policy(tiny.model(seed=seed).double(), **options)
    random = torch.Generator().manual_seed(seed + 1)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    merged: Any = copy.deepcopy(policy.model)
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    head = None
    if kind == "frozen":
        head = randn(97, 48)
        merged.lm_head.weight.data.copy_(head)
    else:
        for name in [f"model.layers.{layer}.{target}" for layer in (0, 2) for target in TARGETS]:
            weight = merged.get_submodule(name).weight.data
            down, up = randn(4, weight.shape[1]) * 0.2, randn(weight.shape[0], 4) * 0.2
            factors[name] = down, up
            weight += up @ down
    own = {"bias": randn(97) * 0.5, "unseen": torch.rand(97, generator=random) < 0.2, **options}
    shared = SharedTrunk(policy.model, factors, head)
    mrm = MultifurcationRewardModel(shared.model, shared=shared, **own)
    shared.check(policy, mrm)  # as `from_pretrained` does
    other = MultifurcationRewardModel(merged, **own)
    per_token = 2 * sum(down.numel() + up.numel() for down, up in factors.values())
    assert mrm.flops.per_token == other.flops.per_token + per_token  # what the factors cost is in the account
    other.flops = mrm.flops
    return policy, mrm, other


TRIOS = {kind: trio(kind) for kind in ("lora", "frozen")}


@pytest.mark.parametrize("kind", TRIOS)
@pytest.mark.parametrize("config", [CONFIG, SearchConfig.preset("fluent", width=3, max_new_tokens=9)])
def test_answers_are_those_of_the_merged_mrm(kind: str, config: SearchConfig) -> None:
    policy, mrm, merged = TRIOS[kind]
    results = SaffronSearch(policy, mrm, config).search(REQUESTS, trace=True)
    expected = SaffronSearch(policy, merged, config).search(REQUESTS, trace=True)
    for one, other in zip(results, expected, strict=True):
        assert one.token_ids == other.token_ids and one.cost == replace(other.cost, seconds=one.cost.seconds)
        assert one.score == pytest.approx(other.score, abs=1e-9)
        assert one.steps == other.steps
    assert policy.kv.num_nodes == mrm.kv.num_nodes == 0


@pytest.mark.parametrize("kind", TRIOS)
def test_a_step_reads_the_weights_once(kind: str) -> None:
    policy, mrm, merged = TRIOS[kind]
    config = replace(CONFIG, min_new_tokens=CONFIG.max_new_tokens)
    with tiny.count_tokens(policy.model) as one:
        SaffronSearch(policy, mrm, config).search(REQUESTS[:1])
    with tiny.count_tokens(policy.model) as policys, tiny.count_tokens(merged.model) as mrms:
        SaffronSearch(policy, merged, config).search(REQUESTS[:1])
    assert len(one) == len(policys) == CONFIG.max_new_tokens  # of which the first is the prefill
    assert one == [a + b for a, b in zip(policys, mrms, strict=True)]


@given(
    st.sampled_from([*TRIOS]),
    st.lists(searches, min_size=1, max_size=5),
    st.sampled_from([None, 1, 7, 30]),
    st.sampled_from([None, 450]),
)
@settings(max_examples=8, deadline=None)
def test_forests_of_searches_that_join_and_leave(kind, plan, prefill_tokens, cache_tokens) -> None:
    policy, mrm, merged = TRIOS[kind]
    found: list[list[Handle]] = []
    for reward in (mrm, merged):
        engine = Engine(ModelPair(policy, reward), prefill_tokens=prefill_tokens, cache_tokens=cache_tokens)
        handles: dict[int, Handle] = {}
        step = 0
        while len(handles) < len(plan) or engine.busy:
            for i, (joins, prompt, config, ends, widths, cancelled, trace) in enumerate(plan):
                if joins == step:
                    handles[i] = engine.submit(
                        PROMPTS[prompt], config, eos_token_id=ends, max_width=8, trace=trace, on_step=schedule(widths)
                    )
                if cancelled is not None and joins + cancelled == step:
                    handles[i].cancel()
            engine.step()
            step += 1
        found.append([handles[i] for i in range(len(plan))])
        assert policy.kv.num_nodes == reward.kv.num_nodes == policy.kv.reserved == reward.kv.reserved == 0
    for one, other in zip(*found, strict=True):
        if one.error is None and other.error is None:
            same_handles(one, other, 1e-9)
        else:
            assert type(one.error) is type(other.error)


@given(st.sampled_from([*TRIOS]), st.data())
@settings(max_examples=15, deadline=None)
def test_any_sequence_of_steps(kind: str, data: Any) -> None:
    """Rows fork, end, join and are regrouped; the policy's branch otherwise than the MRM's."""
    policy, mrm, merged = TRIOS[kind]
    alone = Policy(policy.model), merged
    pair, tokens = ModelPair(policy, mrm), st.integers(0, 96)
    texts = st.lists(st.lists(tokens, min_size=1, max_size=5), min_size=1, max_size=3)
    models = (policy, mrm, *alone)
    rows: list[Rows] = [model.new_rows() for model in models]
    try:
        for _ in range(data.draw(st.integers(1, 5))):
            if not len(rows[0].beam_of_row) or not len(rows[1].beam_of_row) or data.draw(st.booleans()):
                new = [data.draw(texts), data.draw(texts)]
                read: list[Any] = [None, None]
                for i, model in enumerate(models[2:]):
                    leaves, output = model.read(new[i])
                    model.regroup(rows[2 + i], range(len(rows[2 + i].beam_of_row)), new[i], leaves)
                    read[i] = output

                def join(i: int, new: Any = new) -> torch.Tensor:
                    leaves, output = models[i].read(new[i])
                    models[i].regroup(rows[i], range(len(rows[i].beam_of_row)), new[i], leaves)
                    return output

                outputs = pair.run(lambda j=join: j(0), lambda j=join: j(1))
            else:
                plans = []
                for i in range(2):
                    parent = st.integers(0, len(rows[i].beam_of_row) - 1)
                    chosen = data.draw(st.lists(st.tuples(parent, tokens), min_size=1, max_size=5))
                    plans.append(([p for p, _ in chosen], [t for _, t in chosen]))
                outputs = pair.run(*(lambda i=i, p=plans: models[i].step(rows[i], *p[i]) for i in range(2)))
                read = [models[2 + i].step(rows[2 + i], *plans[i]) for i in range(2)]
            for output, expected in zip(outputs, read, strict=True):
                torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    finally:
        for model, held in zip(models, rows, strict=True):
            model.release(held)
    assert policy.kv.num_nodes == mrm.kv.num_nodes == 0


def test_the_policy_alone_is_bit_identical() -> None:
    policy, mrm, _ = TRIOS["lora"]
    bare = Policy(copy.deepcopy(policy.model))
    sequences = [list(request.policy) for request in PROMPTS]
    mrm.logits(sequences)
    SaffronSearch(policy, mrm, CONFIG).search(REQUESTS)
    assert torch.equal(policy.logits(sequences), bare.logits(sequences))


def test_one_mrm_among_two_and_a_policy_that_is_another() -> None:
    """A policy steps with the MRM it was given; an MRM on another policy's trunk runs by itself."""
    policy, mrm, merged = TRIOS["lora"]
    other = Policy(copy.deepcopy(policy.model))
    assert ModelPair(policy, mrm).trunk is not None and ModelPair(other, mrm).trunk is None
    same_results(
        SaffronSearch(other, mrm, CONFIG).search(REQUESTS), SaffronSearch(other, merged, CONFIG).search(REQUESTS)
    )
    head = torch.randn(97, 48, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    shared = SharedTrunk(policy.model, {}, head)
    second = MultifurcationRewardModel(shared.model, shared=shared)
    engines = [Engine(ModelPair(policy, one), CONFIG) for one in (mrm, second, mrm)]
    handles = [engine.submit(request) for engine, request in zip(engines, REQUESTS, strict=False)]
    while any(engine.busy for engine in engines):
        for engine in engines:
            engine.step()
    for handle, one, request in zip(handles, (mrm, second, mrm), REQUESTS, strict=False):
        (expected,) = SaffronSearch(policy, one, CONFIG).search([request])
        assert handle.result().token_ids == expected.token_ids
        assert handle.result().score == pytest.approx(expected.score, abs=1e-9)


@pytest.mark.parametrize("recorder", [None, recorded])
@pytest.mark.parametrize("kind", TRIOS)
def test_captured_steps(kind: str, recorder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, mrm, merged = TRIOS[kind]
    config = replace(CONFIG, width=3, max_new_tokens=6)
    with tiny.count_tokens(policy.model) as rows:
        results = make(monkeypatch, recorder, policy, mrm, config).search(REQUESTS)
    same_results(results, SaffronSearch(policy, merged, config).search(REQUESTS))
    assert set(rows[1:]) == {2 * config.width * len(REQUESTS)}  # but for the prefill


@pytest.mark.parametrize("kind", TRIOS)
def test_a_captured_step_never_waits_for_the_device(kind: str) -> None:
    policy, mrm, _ = TRIOS[kind]
    with torch.inference_mode():
        step = a_step(policy, mrm)
        with Watch(), tiny.count_tokens(policy.model) as rows:
            step()
    assert len(rows) == 1  # one pass over both


def test_without_a_cache() -> None:
    """`share_prefixes=False`: each call runs whole sequences, those of both models at once."""
    policy, mrm, merged = trio("lora", share_prefixes=False)
    config = replace(CONFIG, width=2, max_new_tokens=5)
    with tiny.count_tokens(policy.model) as rows:
        results = SaffronSearch(policy, mrm, config).search(REQUESTS[:2])
    assert len(rows) == config.max_new_tokens
    same_results(results, SaffronSearch(policy, merged, config).search(REQUESTS[:2]))


class Interrupt(BaseException):
    pass


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), Interrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("call", [1, 3])
def test_errors_within_a_pass_leave_both_caches_as_they_were(
    error: BaseException, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the prefill and in a step, in the last layer; other rows on both tries stay good."""
    policy, mrm, merged = trio("lora", seed=3)
    held = [model.read([[0, 5, 6, 7]])[0] for model in (policy, mrm)]
    before = policy.kv.num_nodes, mrm.kv.num_nodes
    engine, calls, forward = Engine(ModelPair(policy, mrm), CONFIG), 0, LowRank.forward

    def fail(self: LowRank, x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2 * len(TARGETS) * call:
            raise error
        return forward(self, x)

    monkeypatch.setattr(LowRank, "forward", fail)
    handle = engine.submit(REQUESTS[0])
    if isinstance(error, Interrupt):
        with pytest.raises(Interrupt):
            engine.run()
    engine.run()
    assert handle.error is not None
    assert (policy.kv.num_nodes, mrm.kv.num_nodes) == before
    for model, leaves in zip((policy, mrm), held, strict=True):
        model.forget(leaves)
    (result,), (expected,) = (SaffronSearch(policy, m, CONFIG).search(REQUESTS[:1]) for m in (mrm, merged))
    assert result.token_ids == expected.token_ids and result.score == pytest.approx(expected.score, abs=1e-9)
    assert policy.kv.num_nodes == mrm.kv.num_nodes == 0


def test_a_full_cache_of_the_mrm_undoes_the_policys_plan() -> None:
    policy, mrm, _ = trio("lora")
    small = MultifurcationRewardModel(mrm.model, shared=mrm.shared, capacity=8, grow=False)
    pair = ModelPair(policy, small)
    rows = [model.prefill([[0, 5, 6, 7]])[0] for model in (policy, small)]
    with pytest.raises(CacheFullError):
        pair.run(
            *(lambda m=m, r=r: m.step(r, [0] * 6, [*range(10, 16)]) for m, r in zip((policy, small), rows, strict=True))
        )
    assert policy.kv.num_nodes == 0 and small.kv.num_nodes == 4  # the MRM's rows have not moved
    small.step(rows[1], [0], [10])
    for model, held in zip((policy, small), rows, strict=True):
        model.release(held)
    assert policy.kv.num_nodes == small.kv.num_nodes == 0
    with pytest.raises(CapacityError):
        Engine(pair, CONFIG).submit(REQUESTS[0])


def test_what_is_not_finite_ends_its_search() -> None:
    policy, mrm, _ = trio("lora")
    assert mrm.shared is not None
    with torch.no_grad():
        mrm.shared.own[1].weight.fill_(torch.nan)
    with pytest.raises(NumericalError, match="mrm"):
        SaffronSearch(policy, mrm, CONFIG).search(REQUESTS[:1])
    assert torch.isfinite(policy.logits([[0, 5, 6]])).all()


def test_weights_that_change_within_a_search_end_it() -> None:
    policy, mrm, merged = trio("lora")
    engine = Engine(ModelPair(policy, mrm), CONFIG)
    handle = engine.submit(REQUESTS[0])
    engine.step()
    for model in (policy.model, merged.model):
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(2)
    engine.run()
    assert isinstance(handle.error, ConfigError) and "the weights of its model changed" in str(handle.error)
    (result,), (expected,) = (SaffronSearch(policy, m, CONFIG).search(REQUESTS[:1]) for m in (mrm, merged))
    assert result.token_ids == expected.token_ids


def test_lora_where_rows_are_not_all_there_is_refused() -> None:
    """An expert, say, sees some rows: whose they are is not known there."""
    policy, mrm, _ = trio("lora")
    layer = policy.model.get_submodule("model.layers.1.mlp")
    layer.register_forward_hook(lambda module, inputs, out: out)  # of the policy: the view has it as well
    expert: Any = mrm.model.get_submodule("model.layers.2.mlp.down_proj")
    expert.register_forward_pre_hook(lambda module, inputs: (inputs[0][:, ::2],))
    expert.register_forward_hook(lambda module, inputs, out: out.repeat_interleave(2, 1))
    assert mrm.shared is not None
    sides: list[TrieModel] = [policy, mrm]
    with pytest.raises(UnsupportedModelError, match="LoRA on a layer that sees 4 of 8 rows"), torch.inference_mode():
        mrm.shared.together(policy, mrm, *(lambda m=m: m.run_alone([[0, 1, 2, 3]]) for m in sides))


def test_fp8_and_other_caches_of_one_side_only() -> None:
    policy, mrm, merged = trio("frozen")
    policy.model.float(), merged.model.float()
    half = {"bias": mrm.bias, "unseen": mrm.unseen, "cache_dtype": torch.float8_e4m3fn}
    assert mrm.shared is not None
    one = MultifurcationRewardModel(mrm.shared.refresh()[0], shared=mrm.shared, **half)  # type: ignore[arg-type]
    other = MultifurcationRewardModel(merged.model, **half)  # type: ignore[arg-type]
    rows = [model.prefill([np.arange(9).tolist()])[1] for model in (one, other)]
    assert torch.equal(*rows)
    same_results(
        SaffronSearch(policy, one, CONFIG).search(REQUESTS), SaffronSearch(policy, other, CONFIG).search(REQUESTS)
    )
