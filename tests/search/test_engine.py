"""The engine: searches that join and leave between steps answer as if each were alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from searches import CONFIG, REQUESTS

from saffron.errors import (
    CancelledError,
    CapacityError,
    ConfigError,
    EngineClosedError,
    EngineError,
    NumericalError,
    PromptTooLongError,
    QueueFullError,
)
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.search import Engine, Handle, Request, SaffronSearch
from saffron.search.captured_step import CapturedStep
from saffron.search.config import SearchConfig
from saffron.search.eager_step import ModelPair


def doubles(seed: int = 0, **options: object) -> tuple[Policy, MultifurcationRewardModel]:
    """`tiny.pair` in fp64: what rounding does stays far below the distance between two rewards."""
    policy, mrm = tiny.pair(seed)
    assert mrm.bias is not None
    return Policy(policy.model.double(), **options), MultifurcationRewardModel(  # type: ignore[arg-type]
        mrm.model.double(),
        bias=mrm.bias,
        unseen=mrm.unseen,
        **options,  # type: ignore[arg-type]
    )


PAIR = doubles()
PROMPTS = [*REQUESTS, Request(tuple(range(2, 40)), tuple(range(3, 50))), Request(tuple(range(2, 30)), (5,))]


def schedule(widths: tuple[int, ...]) -> Callable[[Handle], None]:
    """Sets the width of the next step by what the search has done."""

    def on_step(handle: Handle) -> None:
        if widths:
            handle.width = widths[len(handle.tree.steps) % len(widths)]

    return on_step


def alone(request: Request, config: SearchConfig, ends: frozenset[int], widths: tuple[int, ...], trace: bool) -> Handle:
    engine = Engine(ModelPair(*PAIR), prefill_tokens=None)
    handle = engine.submit(request, config, end_tokens=ends, max_width=8, trace=trace, on_step=schedule(widths))
    engine.run()
    return handle


def same(handle: Handle, other: Handle, tolerance: float) -> None:
    """Equal in all but the last bits of scores, and the time it took."""
    one, two = handle.result(), other.result()
    assert one.tokens == two.tokens and one.stop == two.stop and one.cost == two.cost and one.steps == two.steps
    assert [n.tokens() for n in handle.tree.beam] == [n.tokens() for n in other.tree.beam]
    assert [n.score for n in handle.tree.beam] == pytest.approx([n.score for n in other.tree.beam], abs=tolerance)
    assert (one.trace is None) == (two.trace is None)
    for step, expected in zip(one.trace or [], two.trace or [], strict=True):
        assert step["beam"] == [{**n, "score": pytest.approx(n["score"], abs=tolerance)} for n in expected["beam"]]
        for node, other_node in zip(step["expanded"], expected["expanded"], strict=True):
            assert [c["token"] for c in node["candidates"]] == [c["token"] for c in other_node["candidates"]]


configs = st.builds(
    SearchConfig,
    width=st.integers(1, 6),
    top_p=st.sampled_from([0.3, 0.8, 0.95, 1.0]),
    max_new_tokens=st.integers(1, 9),
    min_new_tokens=st.integers(0, 6),
    ranking=st.sampled_from(["paper", "released"]),
    eos_score=st.sampled_from(["parent", "mrm"]),
    unseen_reward=st.sampled_from([-1024.0, 0.0]),
    lm_head_bias=st.booleans(),
)
searches = st.tuples(
    st.integers(0, 12),  # the step before which it joins
    st.integers(0, len(PROMPTS) - 1),
    configs,
    st.sampled_from([frozenset({1}), frozenset({1, 30}), frozenset(range(40, 90)), frozenset[int]()]),
    st.lists(st.integers(1, 8), max_size=3).map(tuple),
    st.none() | st.integers(0, 8),  # steps after which it is cancelled
    st.booleans(),
)


@given(
    st.lists(searches, min_size=1, max_size=6),
    st.sampled_from([None, 1, 7, 30]),
    st.none() | st.integers(1, 3),
    st.sampled_from([None, 450]),
)
@settings(max_examples=40, deadline=None)
def test_answers_as_if_alone(plan, prefill_tokens, max_searches, cache_tokens) -> None:
    """Whatever else joins, leaves or is cancelled, whatever the others want, and however prompts are cut."""
    policy, mrm = PAIR
    engine = Engine(
        ModelPair(*PAIR), prefill_tokens=prefill_tokens, max_searches=max_searches, cache_tokens=cache_tokens
    )
    handles: dict[int, Handle] = {}
    step = 0
    while len(handles) < len(plan) or engine.busy:
        for i, (joins, prompt, config, ends, widths, _, trace) in enumerate(plan):
            if joins == step:
                handles[i] = engine.submit(
                    PROMPTS[prompt], config, end_tokens=ends, max_width=8, trace=trace, on_step=schedule(widths)
                )
        for i, (joins, _, _, _, _, cancelled, _) in enumerate(plan):
            if cancelled is not None and joins + cancelled == step and not handles[i].done:
                handles[i].cancel()
                assert handles[i].done and isinstance(handles[i].error, CancelledError)
        engine.step()
        assert policy.kv.num_nodes <= policy.kv.reserved and mrm.kv.num_nodes <= mrm.kv.reserved
        assert cache_tokens is None or max(policy.kv.reserved, mrm.kv.reserved) <= cache_tokens
        step += 1
    assert policy.kv.num_nodes == mrm.kv.num_nodes == policy.kv.reserved == mrm.kv.reserved == 0
    for i, (_, prompt, config, ends, widths, cancelled, trace) in enumerate(plan):
        handle = handles[i]
        if handle.error is None:
            same(handle, alone(PROMPTS[prompt], config, ends, widths, trace), 1e-9)
        else:
            assert cancelled is not None
            with pytest.raises(CancelledError):
                handle.result()


captured_searches = st.tuples(
    st.integers(0, 20),
    st.integers(0, len(PROMPTS) - 1),
    st.integers(1, 5),
    st.sampled_from([0.5, 0.8, 1.0]),
    st.integers(1, 20),
    st.integers(0, 12),
    st.sampled_from([frozenset({1}), frozenset(range(40, 47)), frozenset[int]()]),
    st.none() | st.integers(0, 20),
)


@given(st.lists(captured_searches, min_size=1, max_size=6), st.sampled_from([None, 5]), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_captured_steps_answer_as_if_alone(plan, prefill_tokens, groups) -> None:
    """Joining and leaving lays the buffers out anew; every search has its own parameters on the device."""
    policy, mrm = PAIR
    step = CapturedStep(ModelPair(*PAIR), replace(CONFIG, width=5), groups, capture=None)
    engine = Engine(ModelPair(*PAIR), CONFIG, prefill_tokens=prefill_tokens, step=step)
    handles: dict[int, Handle] = {}
    configs = [
        SearchConfig(width=width, top_p=top_p, max_new_tokens=most, min_new_tokens=least)
        for _, _, width, top_p, most, least, _, _ in plan
    ]
    now = 0
    while len(handles) < len(plan) or engine.busy:
        for i, (joins, prompt, *_, ends, _) in enumerate(plan):
            if joins == now:
                handles[i] = engine.submit(PROMPTS[prompt], configs[i], end_tokens=ends)
        for i, (joins, *_, cancelled) in enumerate(plan):
            if cancelled is not None and joins + cancelled == now and not handles[i].done:
                handles[i].cancel()
        engine.step()
        now += 1
    assert policy.kv.num_nodes == mrm.kv.num_nodes == policy.kv.reserved == mrm.kv.reserved == 0
    for i, (_, prompt, *_, ends, cancelled) in enumerate(plan):
        if handles[i].error is None:
            same(handles[i], alone(PROMPTS[prompt], configs[i], ends, (), False), 1e-5)  # fp32 on the device
        else:
            assert cancelled is not None and isinstance(handles[i].error, CancelledError)


# --- limits, errors, threads ---


def make(pair=PAIR, **limits: object) -> Engine:
    return Engine(ModelPair(*pair), CONFIG, **limits)  # type: ignore[arg-type]


def test_rounding_stays_below_a_ten_thousandth() -> None:
    """In fp32 a forward pass over more rows adds up in another order: the docs' bound on scores."""
    policy, mrm = tiny.pair()
    engine = make((policy, mrm))
    handles = [engine.submit(request) for request in PROMPTS]
    engine.run(*handles)
    for handle, request in zip(handles, PROMPTS, strict=True):
        (result,) = SaffronSearch(policy, mrm, CONFIG).search([request])
        assert handle.result().tokens == result.tokens
        assert handle.result().score == pytest.approx(result.score, abs=1e-4)


def test_a_long_prompt_is_read_in_chunks_between_the_steps_of_others() -> None:
    policy, mrm = PAIR
    engine = make(prefill_tokens=8)
    short = engine.submit(PROMPTS[1])
    engine.step()
    long = engine.submit(PROMPTS[4])
    with tiny.count_tokens(policy.model) as counts:
        steps = 0
        while not long.tree.steps:
            engine.step()
            steps += 1
    assert max(counts) <= 8 and steps == -(-len(PROMPTS[4].reward) // 8)
    assert len(short.tree.steps) == steps + 1  # it went on meanwhile
    long.cancel(), short.cancel()
    assert policy.kv.num_nodes == mrm.kv.num_nodes == 0


def test_a_short_request_does_not_wait_for_a_long_one() -> None:
    engine = make()
    long = engine.submit(PROMPTS[0], replace(CONFIG, max_new_tokens=100, min_new_tokens=100))
    engine.step()
    short = engine.submit(PROMPTS[1], replace(CONFIG, max_new_tokens=2))
    for _ in range(2):
        engine.step()
    assert short.done and not long.done
    long.cancel()
    assert long.done and engine.running == engine.waiting == 0


def test_bounds_of_the_queue_and_the_cache() -> None:
    policy, mrm = doubles(capacity=60, grow=False)
    engine = make((policy, mrm), queue=2)
    with pytest.raises(CapacityError, match=r"could need 83 slots of the Policy's cache, which holds 60"):
        engine.submit(PROMPTS[3], replace(CONFIG, width=6, max_new_tokens=14, min_new_tokens=0))
    with pytest.raises(ConfigError, match="request: got ids"):
        engine.submit(Request((3, 97), (3,)))
    with pytest.raises(PromptTooLongError, match="prompt: 250 tokens and 12 new"):
        engine.submit(Request((3,) * 250, (3,)))
    config = replace(CONFIG, width=3)
    first, second = (engine.submit(request, config) for request in PROMPTS[:2])
    with pytest.raises(QueueFullError, match="2 requests"):
        engine.submit(PROMPTS[2], config)
    engine.step()
    assert (engine.running, engine.waiting) == (1, 1)  # both together could fill the cache
    engine.run()
    for handle, request in ((first, PROMPTS[0]), (second, PROMPTS[1])):
        same(handle, alone(request, config, frozenset({1}), (), False), 1e-9)
    assert policy.kv.capacity == 60
    # Another engine on the same models counts what this one has set aside.
    third = engine.submit(PROMPTS[0], config)
    engine.step()
    other = make((policy, mrm))
    fourth = other.submit(PROMPTS[1], config)
    assert not other.step() and not fourth.done
    engine.run(third)
    other.run(fourth)
    assert fourth.result().tokens == second.result().tokens
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.submit(PROMPTS[0])


def test_numbers_that_are_not_finite_stop_one_search() -> None:
    policy, mrm = doubles()
    expected = alone(PROMPTS[0], CONFIG, frozenset({1}), (), True).result()
    said = {node["token"] for step in expected.trace or [] for node in step["beam"]}
    poisoned = next(token for token in range(2, 97) if token not in said)
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[poisoned] = torch.nan
    engine = make((policy, mrm))
    good, bad = engine.submit(PROMPTS[0]), engine.submit(Request((0, poisoned), (0, 4)))
    late = engine.submit(Request((0, 5), (0, 4)), replace(CONFIG, top_p=1.0, width=97, max_new_tokens=3))
    engine.run()
    for handle in (bad, late):
        with pytest.raises(NumericalError, match="policy"):
            handle.result()
    assert good.result().tokens == expected.tokens
    assert policy.kv.num_nodes == mrm.kv.num_nodes == policy.kv.reserved == 0


def test_an_error_that_is_nobodys_ends_all_and_leaves_the_cache_intact(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, mrm = PAIR
    engine = make()
    handles = [engine.submit(request) for request in PROMPTS[:2]]
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(mrm, "step", lambda *_: 1 / 0)
        engine.step()
    for handle in handles:
        with pytest.raises(EngineError, match="ZeroDivisionError: division by zero") as caught:
            handle.result()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert policy.kv.num_nodes == mrm.kv.num_nodes == policy.kv.reserved == mrm.kv.reserved == 0
    with monkeypatch.context() as patch:
        patch.setattr(policy, "step", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        interrupted = engine.submit(PROMPTS[0])
        engine.step()
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    assert isinstance(interrupted.error, EngineError) and policy.kv.num_nodes == mrm.kv.num_nodes == 0
    again = engine.submit(PROMPTS[0])
    engine.run()
    same(again, alone(PROMPTS[0], CONFIG, frozenset({1}), (), False), 1e-9)


def test_errors_of_a_caller_are_the_callers() -> None:
    def wrong(handle: Handle) -> None:
        raise KeyError("mine")

    engine = make()
    bad, good = engine.submit(PROMPTS[0], on_step=wrong), engine.submit(PROMPTS[1])
    with pytest.raises(ConfigError, match=r"width: got 9, expected a whole number from 1 to 5"):
        good.width = 9
    engine.run()
    with pytest.raises(EngineError, match="KeyError"):
        bad.result()
    assert good.result().tokens
    with pytest.raises(TimeoutError):
        engine.submit(PROMPTS[0]).result(timeout=0.01)
    engine.close(drain=False)
    assert PAIR[0].kv.num_nodes == 0


def test_a_thread_of_its_own() -> None:
    """Many threads submit, cancel and wait while one steps; every answer is the one of a lone search."""
    engine = make(queue=64, max_searches=5, cache_tokens=600)
    expected = [alone(request, CONFIG, frozenset({1}), (), False) for request in PROMPTS]
    answered, cancelled, wrong = [0], [0], list[BaseException]()

    def client(number: int) -> None:
        try:
            for i in range(6):
                which = (number + i) % len(PROMPTS)
                handle = engine.submit(PROMPTS[which])
                if (number + i) % 3 == 0:
                    handle.cancel()
                if handle.wait(60) and handle.error is not None:
                    cancelled[0] += 1
                else:
                    same(handle, expected[which], 1e-9)
                    answered[0] += 1
        except BaseException as error:
            wrong.append(error)

    with engine:
        threads = [threading.Thread(target=client, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong and answered[0] + cancelled[0] == 36 and answered[0] >= 24
    assert PAIR[0].kv.num_nodes == PAIR[1].kv.num_nodes == PAIR[0].kv.reserved == 0
