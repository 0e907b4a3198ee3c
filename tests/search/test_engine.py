"""The engine: limits, errors, threads."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import tiny
import torch
from engines import PAIR, PROMPTS, alone, doubles, make, same
from searches import CONFIG
from switching import in_threads

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
from saffron.search import GreedyConfig, GreedyDecoding, Handle, Request, SaffronSearch, parse_method


def test_rounding_stays_below_a_ten_thousandth() -> None:
    """In fp32 a forward pass over more rows adds up in another order: the docs' bound on scores."""
    policy, mrm = tiny.pair()
    engine = make((policy, mrm))
    handles = [engine.submit(request) for request in PROMPTS]
    engine.run(*handles)
    for handle, request in zip(handles, PROMPTS, strict=True):
        (result,) = SaffronSearch(policy, mrm, CONFIG).search([request])
        assert handle.result().token_ids == result.token_ids
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
    assert fourth.result().token_ids == second.result().token_ids
    engine.close()
    with pytest.raises(EngineClosedError):
        engine.submit(PROMPTS[0])


def test_numbers_that_are_not_finite_stop_one_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose last token is poisoned come out as NaN, in a prompt or in a step."""
    policy, mrm = PAIR
    expected = alone(PROMPTS[0], CONFIG, frozenset({1}), (), True).result()
    said = {node["token"] for step in expected.trace or [] for node in step["beam"]}
    poisoned = next(token for token in range(2, 97) if token not in said)
    read, step = policy.read, policy.step

    def poison(tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
        return logits.masked_fill(torch.tensor(tokens)[:, None] == poisoned, torch.nan)

    def bad_read(sequences):
        leaves, logits = read(sequences)
        return leaves, poison([s[-1] for s in sequences], logits)

    monkeypatch.setattr(policy, "read", bad_read)
    monkeypatch.setattr(policy, "step", lambda rows, parents, tokens: poison(tokens, step(rows, parents, tokens)))
    engine = make()
    good, bad = engine.submit(PROMPTS[0]), engine.submit(Request((0, poisoned), (0, 4)))
    late = engine.submit(Request((0, 5), (0, 4)), replace(CONFIG, top_p=1.0, width=97, max_new_tokens=3))
    engine.run()
    for handle in (bad, late):
        with pytest.raises(NumericalError, match="policy"):
            handle.result()
    assert not bad.tree.steps and late.tree.steps
    assert good.result().token_ids == expected.token_ids
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
    assert good.result().token_ids
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


def test_other_methods_run_between_the_steps() -> None:
    models = tiny.trio()
    engine = make((models.policy, models.mrm), prefill_tokens=None)
    prompt = Request(tuple(models.policy.chat("hello there")), tuple(models.guard.context_tokens("hello there")))
    methods = [parse_method(name, models, n=3, width=2, max_new_tokens=5) for name in ("best-of-n", "beam", "greedy")]
    long = engine.submit(PROMPTS[0], replace(CONFIG, max_new_tokens=40, min_new_tokens=40))
    jobs = [engine.submit_job(method, prompt) for method in methods]  # type: ignore[arg-type]
    stopped = engine.submit_job(methods[0], prompt)  # type: ignore[arg-type]
    engine.step()
    stopped.cancel()
    for steps in range(2, 40):
        engine.step()
        assert len(long.tree.steps) == steps
    assert isinstance(stopped.error, CancelledError) and not long.done
    for job, method in zip(jobs, methods, strict=True):
        (alone,) = method.search([prompt])  # type: ignore[attr-defined]
        assert job.result(0).token_ids == alone.token_ids and job.result(0).cost == alone.cost
    engine.close(drain=False)
    assert models.policy.kv.num_nodes == models.mrm.kv.num_nodes == models.guard.kv.num_nodes == 0


def test_other_methods_take_places_and_say_what_is_final() -> None:
    engine = make(doubles(), max_searches=2)
    greedy = GreedyDecoding(engine.policy, config=GreedyConfig(max_new_tokens=6, min_new_tokens=6))
    search = engine.submit(PROMPTS[0], replace(CONFIG, max_new_tokens=6, min_new_tokens=6))
    first, second, third = (engine.submit_job(greedy, PROMPTS[0]) for _ in range(3))
    third.cancel()
    engine.step()
    assert isinstance(third.error, CancelledError)
    assert (engine.running, engine.waiting) == (2, 1) and len(search.tree.steps) == 1
    (answer,) = greedy.search([PROMPTS[0]])
    for steps in range(1, 6):
        assert first.tokens == answer.token_ids[:steps] and second.tokens == [] and not first.done
        engine.step()
    engine.run()
    assert first.result(0).token_ids == second.result(0).token_ids == answer.token_ids == second.tokens
    assert search.done
    engine.close()


@pytest.mark.parametrize("shared", ["search", "policy"])
def test_threads_on_one_search_and_on_one_policy(shared: str) -> None:
    """Where no engine owns the models: every answer is right, whatever the caches do meanwhile."""
    policy, mrm = doubles(capacity=4)  # they grow while others are in them
    searches = [SaffronSearch(policy, mrm, CONFIG)]
    searches += searches if shared == "search" else [SaffronSearch(policy, mrm, CONFIG)]
    greedy = GreedyDecoding(policy, config=GreedyConfig(max_new_tokens=8))
    expected = [alone(request, CONFIG, frozenset({1}), (), False).result() for request in PROMPTS]
    undefended = [r.token_ids for r in greedy.search(PROMPTS)]
    wrong: list[object] = []

    def client(search: SaffronSearch, first: int) -> None:
        try:
            for i in range(len(PROMPTS)):
                which = (first + i) % len(PROMPTS)
                (result,) = search.search([PROMPTS[which]])
                (plain,) = greedy.search([PROMPTS[which]])
                if result.token_ids != expected[which].token_ids or plain.token_ids != undefended[which]:
                    wrong.append((which, result))
        except BaseException as error:
            wrong.append(error)

    in_threads(4, lambda i: client(searches[i % 2], i))
    assert not wrong
    for model in (policy, mrm):
        assert model.kv.num_nodes == model.kv.reserved == 0 and model.kv.capacity == model.kv.k.shape[1] > 4


@pytest.mark.parametrize("limit", ["queue", "max_searches", "cache_tokens", "prefill_tokens"])
@pytest.mark.parametrize("value", [0, -1, 0.5, "a", True])
def test_limits_are_whole_numbers(limit: str, value: object) -> None:
    search = SaffronSearch(*tiny.pair(0))
    with pytest.raises(ConfigError, match=limit):
        search.engine(**{limit: value})


@pytest.mark.parametrize("ends", [[-1], [1.5], [10**9], "x", 5, [True]])
def test_ends_are_token_ids(ends: object) -> None:
    policy, mrm = tiny.pair(0)
    with pytest.raises(ConfigError, match="eos_token_id"):
        SaffronSearch(policy, mrm, eos_token_id=ends)
    with pytest.raises(ConfigError, match="eos_token_id"):
        SaffronSearch(policy, mrm).engine().submit(Request((0, 5), (0, 5)), eos_token_id=ends)


def test_token_ids_are_whole_numbers() -> None:
    search = SaffronSearch(*tiny.pair(0))
    with pytest.raises(ConfigError, match="whole numbers"):
        search.search([Request((0, 5.7), (0, 5))])  # type: ignore[arg-type]
