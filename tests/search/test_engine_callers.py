"""Engines whose callers forget them, wait for themselves, or hand in something else."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import tiny
import torch
from engines import PROMPTS, doubles, make
from searches import CONFIG

from saffron import Engine, Policy, ProcessRewardModel, SaffronSearch, TrieModel, parse_method
from saffron.errors import CapacityError, ConfigError, EngineClosedError, EngineError, NumericalError
from saffron.search import GreedyDecoding, Handle, Request

LONG = replace(CONFIG, max_new_tokens=20, min_new_tokens=20)


def test_a_dropped_engine_gives_its_room_back() -> None:
    policy, mrm = doubles(capacity=400, grow=False)
    engine = make((policy, mrm), max_searches=1)
    running, waiting = engine.submit(PROMPTS[0], LONG), engine.submit(PROMPTS[1], LONG)
    engine.step(), engine.step()
    assert policy.kv.reserved > 0 and policy.kv.num_nodes > 0
    del engine
    gc.collect()
    for model in (policy, mrm):
        assert model.kv.reserved == model.kv.num_nodes == 0
    for handle in (running, waiting):
        with pytest.raises(EngineClosedError, match="the engine was dropped"):
            handle.result(timeout=5)
        handle.cancel()
    assert running.text == ""


def test_a_closed_engine_leaves_its_step_to_others() -> None:
    models = doubles()
    engine = make(models)
    step, closed = engine._step, []
    engine.close()
    step.close = lambda: closed.append(True)  # type: ignore[method-assign]
    del engine
    gc.collect()
    assert not closed


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("what", ["close", "run", "step", "result", "wait", "pieces"])
def test_callbacks_that_would_wait_for_themselves(what: str, started: bool) -> None:
    engine = make(doubles())
    calls: dict[str, Callable[[Handle], object]] = {
        "close": lambda handle: engine.close(),
        "run": lambda handle: engine.run(handle),
        "step": lambda handle: engine.step(),
        "result": lambda handle: handle.result(),
        "wait": lambda handle: handle.wait(timeout=60),
        "pieces": lambda handle: list(handle.pieces()),
    }
    handle = engine.submit(PROMPTS[0], LONG, on_step=lambda handle: calls[what](handle) and None)
    other = engine.submit(PROMPTS[1], replace(CONFIG, max_new_tokens=3))
    if started:
        engine.start()
    else:
        engine.run(handle, other)
    with pytest.raises(EngineError, match="called by a callback"):
        handle.result(timeout=60)
    assert other.result(timeout=60).token_ids
    engine.close()


def test_a_search_that_waits_for_a_stream_of_its_own_thread_is_refused() -> None:
    policy, mrm = tiny.pair()
    request = PROMPTS[0]
    needed = len(request.policy) + len(request.reward) + CONFIG.width * 20
    policy, mrm = tiny.pair(capacity=needed, grow=False)
    search = SaffronSearch(policy, mrm, LONG)
    running = search.run([request])
    next(running)
    with pytest.raises(CapacityError, match="this thread has begun and not ended"):
        search.search([PROMPTS[1]])
    found: list[object] = []
    other = threading.Thread(target=lambda: found.extend(search.search([PROMPTS[1]])))  # which may well wait
    other.start()
    assert not found
    running.close()
    other.join(60)
    assert len(found) == 1 and len(search.search([request])) == 1


def wrong_arguments() -> dict[str, tuple[Callable[[], object], str]]:
    policy, mrm = tiny.pair()
    search, greedy = SaffronSearch(policy, mrm), GreedyDecoding(policy)
    engine = search.engine()
    return {
        "Engine(policy)": (lambda: Engine(policy), "models: got a value of type Policy, expected ModelPair"),
        "TrieModel('x')": (lambda: TrieModel("x"), "model: got a value of type str, expected PreTrainedModel"),
        "Policy(None)": (lambda: Policy(None), "model: got None, expected PreTrainedModel"),
        "submit(str)": (lambda: engine.submit("hello"), "request: got a value of type str, expected Request"),
        "submit(list)": (lambda: engine.submit([0, 5]), "request: got a value of type list, expected Request"),
        "search(str)": (lambda: search.search("hello"), "requests: got 'hello', expected a list of Request"),
        "search(texts)": (lambda: search.search(["hello"]), r"requests\[0\]: got a value of type str"),
        "search(None)": (lambda: search.search(None), "requests: got None, expected a list of Request"),
        "greedy.search(str)": (lambda: greedy.search("hello"), "requests: got 'hello', expected a list of Request"),
        "greedy.search(ids)": (lambda: greedy.search([0, 5]), r"requests\[0\]: got a value of type int"),
        "parse_method(None)": (lambda: parse_method(None, None), "method: got None, expected str"),
        "parse_method models": (lambda: parse_method("greedy", None), "models: got None without policy, mrm, guard"),
        "policy.logits(ids)": (lambda: policy.logits([0, 5]), r"sequences\[0\]: got 0, expected a list of token ids"),
        "policy.logits(str)": (lambda: policy.logits("ab"), "sequences: got 'ab', expected a list of token sequences"),
        "mrm.logits(None)": (lambda: mrm.logits(None), "sequences: got None, expected a list of token sequences"),
        "prefill(int)": (lambda: policy.prefill(5), "sequences: got 5, expected a list of token sequences"),
        "Request of text": (lambda: search.search([Request("ab", (5,))]), r"requests\[0\]: got 'ab', expected a list"),
    }  # fmt: skip


@pytest.mark.parametrize("call", wrong_arguments())
def test_wrong_arguments_are_named(call: str) -> None:
    function, message = wrong_arguments()[call]
    with pytest.raises(ConfigError, match=message):
        function()


def test_steps_take_whole_numbers() -> None:
    policy, _ = tiny.pair()
    rows, _ = policy.prefill([[5, 6]])
    for tokens in ([7.5], [True], ["7"], [97], "7"):
        with pytest.raises(ConfigError, match="tokens: got"):
            policy.step(rows, [0], tokens)  # type: ignore[arg-type]
    policy.step(rows, [0], [7])
    policy.release(rows)


def test_a_guard_names_pairs_and_rewards_that_are_none() -> None:
    guard = ProcessRewardModel(tiny.model(tie_word_embeddings=False), tiny.tokenizer(), safe="a", unsafe="b")
    for pairs, message in [
        ("ab", "pairs: got 'ab'"),
        (["ab"], r"pairs\[0\]: got 'ab'"),
        ([("a", None)], "response: got None"),
    ]:
        with pytest.raises(ConfigError, match=message):
            guard.score(pairs)  # type: ignore[arg-type]
    with torch.no_grad():
        guard.model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="guard: a reward is not finite"):
        guard.score_tokens([[5, 6, 7]])
