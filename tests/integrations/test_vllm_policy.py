"""Saffron search on vLLM: the answers of our own loop, whatever joins, leaves or does not fit."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import vllm_engine
from vllm_engine import needs_vllm

from saffron import (
    BestOfN,
    Engine,
    GreedyDecoding,
    MultifurcationRewardModel,
    Policy,
    Request,
    SaffronSearch,
    SearchConfig,
    load_bundled,
)
from saffron.errors import (
    CancelledError,
    CapacityError,
    CheckpointError,
    ConfigError,
    EngineError,
    PromptTooLongError,
)
from saffron.models.bundled import FOLDER, Models
from saffron.search import BestOfNConfig, GreedyConfig
from saffron.search.model_pair import ModelPair
from saffron.world import attack_tokens, examples

pytestmark = needs_vllm


@pytest.fixture(scope="module")
def models() -> Models:
    return load_bundled(device="cpu")


@pytest.fixture(scope="module")
def policy() -> Iterator[Any]:
    with vllm_engine.policy(FOLDER / "policy") as made:
        yield made


@pytest.fixture(scope="module")
def attacked(models: Models) -> tuple[list[str], list[str]]:
    """60 held-out prompts with prefills that begin a forbidden answer."""
    found = examples("forbidden", "heldout", 60, 0)
    return [one.prompt for one in found], [
        models.policy.decode(attack_tokens(models.policy.tokenizer, one.target)) for one in found
    ]


@pytest.mark.parametrize("width", [1, 4, 16])
def test_answers_are_those_of_our_own_loop(models: Models, policy: Any, attacked: Any, width: int) -> None:
    config = SearchConfig(width=width)
    ours = SaffronSearch(models.policy, models.mrm, config).generate(*attacked)
    theirs = SaffronSearch(policy, models.mrm, config).generate(*attacked)
    assert [one.token_ids for one in theirs] == [one.token_ids for one in ours]
    assert [one.text for one in theirs] == [one.text for one in ours]
    assert [one.score for one in theirs] == pytest.approx([one.score for one in ours], abs=1e-4)
    for one, other in zip(theirs, ours, strict=True):
        assert [step.policy_flops for step in one.steps] == [step.policy_flops for step in other.steps]


def test_one_token_is_run_for_each_beam_and_step(models: Models, policy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = policy.engine.engine_core.engine_core.scheduler
    schedule, run = scheduler.schedule, []

    def counted(*arguments: Any, **options: Any) -> Any:
        found = schedule(*arguments, **options)
        run.append(found.total_num_scheduled_tokens)
        return found

    monkeypatch.setattr(scheduler, "schedule", counted)
    search = SaffronSearch(policy, models.mrm, SearchConfig(width=8, max_new_tokens=6, min_new_tokens=6))
    (answer,) = search.generate("How do I count the tokens of a step?")
    live = [step.live for step in answer.steps]
    assert [tokens for tokens in run if tokens][1:] == live[:-1] and max(live) == 8


def test_searches_join_and_leave_one_forest(models: Models, policy: Any, attacked: Any) -> None:
    """With prompts that are read in parts, settings of their own, one that is cancelled and one that is too long."""
    search = SaffronSearch(policy, models.mrm)
    requests = [search.request(*one) for one in zip(*(part[:6] for part in attacked), strict=True)]
    configs = [
        SearchConfig(width=4, max_new_tokens=12),
        SearchConfig(width=16),
        SearchConfig(width=2, top_p=0.5),
        SearchConfig(width=8, commit_every=4),
        SearchConfig(width=4, ranking="released"),
        SearchConfig(width=3, path_score="mean"),
    ]
    engine = Engine(ModelPair(policy, models.mrm), prefill_tokens=16)
    handles = []
    for request, config in zip(requests, configs, strict=True):
        handles.append(engine.submit(request, config))
        engine.step()
    gone = engine.submit(requests[0], SearchConfig(width=5))
    engine.step()
    gone.cancel()
    engine.run()
    with pytest.raises(CancelledError):
        gone.result()
    with pytest.raises(PromptTooLongError, match="256"):
        engine.submit(Request(tuple([5] * 240), (5,)))
    engine.close()
    for handle, request, config in zip(handles, requests, configs, strict=True):
        (alone,) = SaffronSearch(models.policy, models.mrm, config).search([request])
        assert handle.result().token_ids == alone.token_ids, config


def test_streams_and_other_methods(models: Models, policy: Any, attacked: Any) -> None:
    prompt, prefill = attacked[0][7], attacked[1][7]
    config = SearchConfig(width=4, commit_every=4)
    ours, theirs = (SaffronSearch(one, models.mrm, config) for one in (models.policy, policy))
    pieces = list(theirs.stream(prompt, prefill))
    assert len(pieces) > 2 and "".join(pieces) == ours.generate(prompt, prefill)[0].text
    begun = theirs.stream(prompt, prefill)
    next(begun)
    begun.close()
    assert not policy.engine.has_unfinished_requests() and policy.kv.reserved == 0
    greedy = GreedyConfig(max_new_tokens=16)
    drawn = BestOfNConfig(n=4, max_new_tokens=16)
    for make in (lambda one: GreedyDecoding(one, config=greedy), lambda one: BestOfN(one, models.mrm, drawn)):
        (mine,), (its,) = (make(one).generate(prompt, prefill) for one in (models.policy, policy))
        assert mine.token_ids == its.token_ids
    # The engine's thread, and a job between the steps of a search.
    with theirs.engine() as engine:
        request = theirs.request(prompt, prefill)
        job, handle = engine.submit_job(GreedyDecoding(policy, config=greedy), request), engine.submit(request)
        assert handle.result(60).text == "".join(pieces) and job.result(60).token_ids


def test_an_engine_that_is_in_use_or_fails(policy: Any, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import SamplingParams

    search = SaffronSearch(policy, models.mrm, SearchConfig(width=2, max_new_tokens=4))
    right = search.generate("hello")[0].token_ids
    policy.engine.add_request("another", {"prompt_token_ids": [5, 6]}, SamplingParams(max_tokens=2, detokenize=False))
    with pytest.raises(EngineError, match="requests of others"):
        search.generate("hello")
    while policy.engine.has_unfinished_requests():
        policy.engine.step()
    assert search.generate("hello")[0].token_ids == right
    with pytest.raises(PromptTooLongError, match="256 tokens and 1 new ones"):  # within vLLM it ended half a step
        policy.logits([[5] * 256])
    with pytest.raises(ConfigError, match="sequences: got none"):
        policy.logits([])
    torch.testing.assert_close(policy.logits([[5, 6, 7]]), models.policy.logits([[5, 6, 7]]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_after_half_a_step_nothing_is_run(
    policy: Any, models: Models, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """vLLM's worker had begun with requests of which the scheduler knows nothing more: it gave wrong logits."""
    core, search = policy.engine.engine_core, SaffronSearch(policy, models.mrm, SearchConfig(width=2, max_new_tokens=4))
    monkeypatch.setattr(policy, "_ended", None)

    def stop() -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(core, "get_output", stop)
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else EngineError):
            search.generate("hello")
    assert not core.engine_core.scheduler.has_unfinished_requests()
    with pytest.raises(EngineError, match="stopped within a step.*make another one"):
        search.generate("hello")


# The engines below end what all engines of a process share: the fixture's is not to be used any more.


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 16},
        {"num_gpu_blocks_override": 300},  # of one token: the beams of a search need more
        {"max_num_seqs": 3, "max_num_batched_tokens": 16},  # a pass takes several steps of vLLM
        {"logits_processors": None, "logprobs_mode": "raw_logits", "max_logprobs": -1},  # as between processes
        {"prefix_caching_hash_algo": "sha256"},
        {"tensor_parallel_size": 2},  # processes of their own
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_engines(models: Models, attacked: Any, options: dict[str, Any]) -> None:
    config = SearchConfig(width=8, max_new_tokens=20)
    some = [part[:2] for part in attacked]
    ours = SaffronSearch(models.policy, models.mrm, config).generate(*some)
    with vllm_engine.policy(FOLDER / "policy", **options) as policy:
        theirs = SaffronSearch(policy, models.mrm, config).generate(*some)
    with pytest.raises(EngineError, match="it was closed"):
        policy.logits([[5]])
    assert [one.token_ids for one in theirs] == [one.token_ids for one in ours]


@pytest.mark.parametrize("width", [1, 4, 16])
def test_a_real_model(width: int) -> None:
    """With an MRM of random weights over its tokens."""
    folder = os.environ.get("SAFFRON_TEST_MODEL")
    if not folder:
        pytest.skip("SAFFRON_TEST_MODEL does not name the folder that reproduce.real_text.convert writes")
    ours = Policy.from_pretrained(folder, device="cpu")
    small = tiny.model(seed=1, vocab_size=ours.vocab_size, max_position_embeddings=1024)
    mrm = MultifurcationRewardModel(small, ours.tokenizer)
    config = SearchConfig(width=width, max_new_tokens=8, min_new_tokens=4)
    prompts = ["How do I bake bread?", "What is the capital of France, and why?", "Write a rude letter to my aunt."]
    expected = SaffronSearch(ours, mrm, config).generate(prompts, "Well,")
    with vllm_engine.policy(Path(folder)) as policy:
        found = SaffronSearch(policy, mrm, config).generate(prompts, "Well,")
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


def test_the_mrm_may_have_another_tokenizer(tmp_path: Path) -> None:
    folder = tiny.save_checkpoint(tmp_path / "policy")
    other = tiny.trio(guard_tokenizer=tiny.tokenizer(280, ["completely different words make another vocabulary"] * 4))
    config = SearchConfig(width=4, max_new_tokens=10, min_new_tokens=2)
    (ours,) = SaffronSearch(Policy.from_pretrained(folder), other.mrm, config).generate("hello there")
    with vllm_engine.policy(folder, max_model_len=128) as policy:
        (theirs,) = SaffronSearch(policy, other.mrm, config).generate("hello there")
    assert theirs.token_ids == ours.token_ids


def test_what_vllm_says_becomes_our_errors(policy: Any, models: Models, tmp_path: Path) -> None:
    from saffron.integrations.vllm import VllmPolicy

    def start(**options: Any) -> None:
        with vllm_engine.policy(FOLDER / "policy", **options):
            pytest.fail("it started")

    with pytest.raises(CapacityError, match="KV cache"):
        start(num_gpu_blocks_override=8)
    with pytest.raises(ConfigError, match="beam_count"):
        start(beam_count=4)
    with pytest.raises(ConfigError, match="device: got cuda"):
        start(device="cuda")
    with pytest.raises(ConfigError, match="vLLM cannot run it .*max_model_len"):
        start(max_model_len=100_000)
    with pytest.raises(ConfigError, match="block_size: got 0, .*greater than 0"):
        start(block_size=0)
    with pytest.raises(ConfigError, match="kv_cache_dtype=fp8 is not served"):
        start(kv_cache_dtype="fp8")
    with pytest.raises(ConfigError, match="prefix caching is off"):
        start(enable_prefix_caching=False)
    with pytest.raises(ConfigError, match="raw_logits"):
        start(logits_processors=None)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        VllmPolicy.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="engine: got"):
        VllmPolicy(models.policy)
    with pytest.raises(ConfigError, match="no copies"):
        copy.deepcopy(policy)
    with pytest.raises(ConfigError, match="capture"):
        SaffronSearch(policy, models.mrm, capture=True)
    with pytest.raises(PromptTooLongError, match="VllmPolicy"):
        SaffronSearch(policy, models.mrm).search([Request(tuple([5] * 250), (5,))])


def test_rows_under_the_other_model_runner() -> None:
    """V2 numbers requests by slots, whose rows come in any order."""
    from vllm import SamplingParams

    from saffron.integrations.vllm.policy import KEY, LogitRows

    state: Any = SimpleNamespace(device=torch.device("cpu"))
    processor, rows = LogitRows(None, state), dict[int, torch.Tensor]()  # type: ignore[arg-type]
    assert processor.add_request(4, SamplingParams(extra_args={KEY: (rows, 0)}))
    assert processor.add_request(7, SamplingParams(extra_args={KEY: (rows, 1)}))
    assert not processor.add_request(2, SamplingParams())
    logits = torch.randn(3, 5)
    context: Any = SimpleNamespace(idx_mapping_np=np.array([7, 2, 4]))
    assert processor.apply(logits, context) is logits
    assert torch.equal(rows[0], logits[2]) and torch.equal(rows[1], logits[0])
    assert not processor.add_request(7, SamplingParams())  # the slot is somebody else's now
    rows.clear()
    processor.apply(logits, context)
    assert set(rows) == {0}
    with pytest.raises(NotImplementedError, match="speculative"):
        processor.apply(torch.randn(4, 5), context)
