"""Searches that respect the language: caps, tolerances, weights, path scores, candidates and commitment."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import tiny
import torch
from engines import PAIR, PROMPTS, alone, same
from hypothesis import given, settings
from hypothesis import strategies as st
from searches import CONFIG, REQUESTS, make, recorded
from searches import same as same_results

from saffron.errors import ConfigError, NumericalError
from saffron.search import Engine, Request, SaffronSearch, parse_config, reference
from saffron.search.captured_step import CapturedStep, why_not_captured
from saffron.search.config import SearchConfig
from saffron.search.model_pair import ModelPair
from saffron.search.selection import Rules, best, propose, propose_fixed

END = 30  # a token that the tiny policy often proposes
configs = st.builds(
    SearchConfig,
    width=st.integers(1, 5),
    top_p=st.sampled_from([0.5, 0.9, 1.0]),
    max_new_tokens=st.integers(1, 7),
    min_new_tokens=st.integers(0, 3),
    ranking=st.sampled_from(["paper", "paper", "released"]),
    eos_score=st.sampled_from(["parent", "mrm"]),
    unseen_reward=st.sampled_from([-1024.0, 0.0]),
    temperature=st.sampled_from([1.0, 0.7, 1.5]),
    min_p=st.sampled_from([0.0, 0.1, 0.5]),
    top_k=st.sampled_from([0, 1, 4, 30]),
    reward_cap=st.sampled_from([None, -0.3, 0.0, 0.4, 1.0]),
    reward_tolerance=st.sampled_from([0.0, 0.2, 1.0]),
    policy_weight=st.sampled_from([0.0, 0.1, 2.0]),
    policy_score=st.sampled_from(["path", "token"]),
    path_score=st.sampled_from(["last", "mean", "minimum", "discounted"]),
    discount=st.sampled_from([0.0, 0.3, 0.9]),
    commit_every=st.integers(0, 4),
)


@functools.cache
def dense_models() -> tuple[torch.nn.Module, torch.nn.Module]:
    """The weights of `PAIR` in plain models."""
    dense = tiny.model(seed=0, attention="sdpa")
    base = tiny.model(seed=1, attention="sdpa", hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    for model, ours in zip((dense, base), PAIR, strict=True):
        model.double().load_state_dict(ours.model.state_dict())
    return dense, base


def specified(request: Request, config: SearchConfig) -> list[reference.Response]:
    dense, base = dense_models()
    _, mrm = PAIR
    assert mrm.unseen is not None
    bias = mrm.full_bias(config.lm_head_bias)

    @torch.no_grad()
    def logits(response: list[int]) -> torch.Tensor:
        return dense(torch.tensor([[*request.policy, *response]])).logits[0, -1]

    @torch.no_grad()
    def rewards(response: list[int]) -> torch.Tensor:
        out = base(torch.tensor([[*request.reward, *response]])).logits[0, -1]
        return out if bias is None else out + bias

    return reference.search(logits, rewards, mrm.unseen, {END}, config)


@given(st.lists(st.tuples(st.integers(0, 3), configs), min_size=1, max_size=3))
@settings(max_examples=25, deadline=None)
def test_equals_the_specification_in_any_forest(plan) -> None:
    """Searches with different settings share a forest; each has the beam of the dense search."""
    with Engine(ModelPair(*PAIR)) as engine:
        handles = [engine.submit(PROMPTS[p], config, eos_token_id={END}) for p, config in plan]
        results = [handle.result(60) for handle in handles]
    for (prompt, config), handle, result in zip(plan, handles, results, strict=True):
        beam = specified(PROMPTS[prompt], config)
        assert result.token_ids == list(beam[0].tokens)
        assert result.score == pytest.approx(beam[0].score, abs=1e-9)
        assert sorted(n.tokens() for n in handle.tree.beam) == sorted(list(n.tokens) for n in beam)
        found = {tuple(n.tokens()): (n.score, n.reward, n.log_probability) for n in handle.tree.beam}
        for node in beam:
            expected = (node.score, node.reward, node.log_probability)
            if config.is_published:  # by the fused op, which knows scores alone
                expected = (node.score, node.score, 0.0)
            assert found[node.tokens] == pytest.approx(expected, abs=1e-9)


captured = st.builds(
    replace,
    configs.filter(lambda config: not config.is_published),
    ranking=st.just("paper"),
    eos_score=st.just("parent"),
    unseen_reward=st.just(-1024.0),
    top_k=st.integers(1, 6),
    max_new_tokens=st.integers(1, 18),
)


@given(st.lists(st.tuples(st.integers(0, 10), st.integers(0, 5), captured), min_size=1, max_size=4))
@settings(max_examples=15, deadline=None)
def test_captured_steps_answer_as_if_alone(plan) -> None:
    """The device takes every parameter of each search as a tensor, and commits at the right steps."""
    step = CapturedStep(ModelPair(*PAIR), replace(CONFIG, width=5, top_k=6), 2, capture=None)
    engine = Engine(ModelPair(*PAIR), CONFIG, step=step)
    handles = {}
    now = 0
    while len(handles) < len(plan) or engine.busy:
        for i, (joins, prompt, config) in enumerate(plan):
            if joins == now:
                handles[i] = engine.submit(PROMPTS[prompt], config, eos_token_id={END})
        engine.step()
        now += 1
    for i, (_, prompt, config) in enumerate(plan):
        same(handles[i], alone(PROMPTS[prompt], config, frozenset({END}), (), False), 1e-9)


def test_captured_steps_are_recorded_and_replayed(monkeypatch) -> None:
    """Nothing in a step needs the host."""
    config = SearchConfig.preset("fluent", width=4, max_new_tokens=6, min_new_tokens=2, commit_every=3)
    policy, mrm = tiny.pair(3)
    search = make(monkeypatch, recorded, policy, mrm, config)
    same_results(search.search(REQUESTS), SaffronSearch(policy, mrm, config).search(REQUESTS))
    assert search._captured is not None and search._captured.forest is not None
    assert search._captured.forest._replay is not None


def test_what_captured_steps_refuse() -> None:
    models = ModelPair(*PAIR)
    step = CapturedStep(models, replace(CONFIG, top_k=8), 2, capture=None)
    for config, name in (
        (CONFIG, "is_published"),
        (replace(CONFIG, top_k=9), "top_k"),
        (replace(CONFIG, min_p=0.1), "top_k"),
    ):
        with pytest.raises(ConfigError, match=name):
            Engine(models, CONFIG, step=step).submit(REQUESTS[0], config)
    assert "GPU" in str(why_not_captured(models, CONFIG))


def test_rewards_that_are_nan_end_their_search_alone() -> None:
    policy, mrm = tiny.pair()
    assert mrm.bias is not None
    mrm.bias[:] = torch.nan
    config = replace(CONFIG, reward_cap=0.0)
    engine = Engine(ModelPair(policy, mrm), config)
    bad, good = engine.submit(REQUESTS[0]), engine.submit(REQUESTS[1], replace(config, lm_head_bias=False))
    engine.run()
    assert isinstance(bad.error, NumericalError) and good.result().token_ids


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_best(data) -> None:
    """Against sorting tuples; equal scores, infinities, groups without candidates, candidates of no group."""
    count, groups, width = data.draw(st.integers(1, 25)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    few = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, math.inf])
    group, score, tie, parent = (
        data.draw(st.lists(of, min_size=count, max_size=count))
        for of in (st.integers(0, groups), few, few, st.integers(0, 5))
    )
    widths = data.draw(st.lists(st.integers(1, width), min_size=groups, max_size=groups))
    index, used = best(
        *(torch.tensor(x) for x in (group, score, tie, parent)), torch.tensor(widths, dtype=torch.int32), width
    )
    chosen = []
    for g in range(groups):
        own = [c for c in range(count) if group[c] == g]
        chosen += sorted(own, key=lambda c: (-score[c], -tie[c], c))[: widths[g]]
    chosen.sort(key=lambda c: parent[c])
    assert used.tolist() == [True] * len(chosen) + [False] * (groups * width - len(chosen))
    assert index[used].tolist() == chosen


@given(st.lists(configs, min_size=1, max_size=5), st.integers(0, 1 << 30))
@settings(max_examples=60, deadline=None)
def test_fixed_places_hold_the_same_candidates(settings_of_rows, seed) -> None:
    """With equal logits, banned tokens and logits of minus infinity."""
    vocab = 20
    rows = [replace(config, top_k=config.top_k or vocab) for config in settings_of_rows]
    random = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 4, (len(rows), vocab), generator=random).double()
    logits[logits == -3] = -torch.inf
    logits[:, 7] = 1.5
    banned = torch.randint(-1, 7, (len(rows), 3), generator=random, dtype=torch.int32)
    rules = Rules.of(rows)
    ragged, fixed = propose(logits, rules, banned), propose_fixed(logits, rules, banned, vocab)
    assert fixed.used is not None and fixed.counts.tolist() == ragged.counts.tolist() == ragged.offsets.diff().tolist()
    for name in ("tokens", "rows"):
        assert getattr(fixed, name)[fixed.used].tolist() == getattr(ragged, name).tolist()
    assert fixed.probabilities[fixed.used].tolist() == pytest.approx(ragged.probabilities.tolist(), abs=1e-12)


def test_commitment_brings_text_early() -> None:
    """After every third step all that has been chosen is final."""
    policy, mrm = tiny.pair()
    config = replace(CONFIG, width=8, top_p=1.0, commit_every=3, min_new_tokens=12)
    engine = Engine(ModelPair(policy, mrm), config)
    handle = engine.submit(REQUESTS[0])
    final = []
    while not handle.done:
        engine.step()
        if handle.tree.steps:
            final.append(len(handle.tokens))
    assert final[2::3] == [3, 6, 9, 12]
    assert handle.result().token_ids[: final[5]] == handle.tokens[: final[5]]


def test_a_cap_gives_way_to_the_policy() -> None:
    """All rewards above the cap are equal: the answer is what beam search by log-probability finds."""
    policy, mrm = PAIR
    config = replace(CONFIG, width=3, unseen_reward=0.0, reward_cap=-1e6, top_p=1.0)
    (capped,) = SaffronSearch(policy, mrm, config).search(REQUESTS[:1])
    (published,) = SaffronSearch(policy, mrm, replace(config, reward_cap=None)).search(REQUESTS[:1])
    assert capped.score == -1e6

    def fluency(tokens: list[int]) -> float:
        dense, _ = dense_models()
        with torch.no_grad():
            out = dense(torch.tensor([[*REQUESTS[0].policy, *tokens]])).logits[0].log_softmax(-1)
        first = len(REQUESTS[0].policy) - 1
        return sum(float(out[first + i, t]) for i, t in enumerate(tokens)) / len(tokens)

    assert fluency(capped.token_ids) > fluency(published.token_ids) + 0.1


@pytest.mark.parametrize(
    "name, value",
    [
        ("reward_cap", math.nan), ("reward_cap", 1e31), ("reward_cap", True), ("reward_tolerance", -1.0),
        ("policy_weight", math.inf), ("policy_score", "all"), ("path_score", "sum"), ("min_p", 1.5), ("discount", 1.0),
        ("temperature", 0.0), ("temperature", 1e-300), ("temperature", 1e300), ("temperature", math.nan),
        ("reward_tolerance", 1e-300), ("policy_weight", 1e300), ("top_k", -1), ("commit_every", 2.5),
    ],
)  # fmt: skip
def test_values_that_are_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: got "):
        SearchConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("digits", [400, 5000])  # no float is that large; Python does not write the second one out
@pytest.mark.parametrize(
    "name",
    ["width", "min_p", "temperature", "reward_cap", "top_p", "discount", "policy_weight", "ranking", "lm_head_bias"],
)
def test_numbers_of_many_digits_are_refused(name: str, digits: int) -> None:
    for value in (10**digits, -(10**digits)):
        with pytest.raises(ConfigError, match=f"^{name}: got .{{1,100}}, expected"):
            SearchConfig(**{name: value})  # type: ignore[arg-type]


def test_presets() -> None:
    assert SearchConfig.preset("paper") == SearchConfig() and SearchConfig().is_published
    fluent = SearchConfig.preset("fluent", width=3)
    assert fluent.asks_policy and fluent.width == 3
    assert parse_config("saffron:preset=fluent,width=3")[1] == fluent
    assert parse_config("saffron:preset=fluent,width=3,reward_cap=-2.5,path_score=mean")[1] == replace(
        fluent, reward_cap=-2.5, path_score="mean"
    )
    assert parse_config("saffron:reward_cap=none")[1] == SearchConfig()
    with pytest.raises(ConfigError, match="^preset: got 'free'"):
        parse_config("saffron:preset=free")
    with pytest.raises(ConfigError, match="preset"):
        parse_config("greedy:preset=fluent")
