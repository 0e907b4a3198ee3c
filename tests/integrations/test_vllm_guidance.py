"""MRM guidance in vLLM: the tokens that transformers gives with `RewardGuidance`, request by request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import vllm_engine
from transformers import AutoModelForCausalLM
from vllm_engine import needs_vllm
from vllm_server import served

from saffron import RewardGuidance, load_bundled
from saffron.errors import ConfigError
from saffron.integrations.guidance import Guide
from saffron.models.bundled import FOLDER, Models
from saffron.world import attack_tokens, examples

pytestmark = needs_vllm
TOKENS = 20


@pytest.fixture(scope="module")
def models() -> Models:
    return load_bundled(device="cpu")


@pytest.fixture(scope="module")
def prompts(models: Models) -> list[list[int]]:
    """Chats whose answers are forced to begin badly."""
    policy = models.policy
    return [
        policy.chat(one.prompt, attack_tokens(policy.tokenizer, one.target))
        for one in examples("forbidden", "heldout", 8, 1)
    ]


@pytest.fixture(scope="module")
def llm() -> Iterator[Any]:
    from vllm import LLM

    with vllm_engine.environment(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFFRON_VLLM_MRM", "bundled")
        llm = LLM(
            str(FOLDER / "policy"), skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=200,
            block_size=16, logits_processors=["saffron.integrations.vllm.guidance:MrmGuidance"],
            max_num_batched_tokens=64,  # prompts are read in parts, next to requests that decode
        )  # fmt: skip
        yield llm
        llm.llm_engine.engine_core.shutdown()


def generated(llm: Any, prompts: list[list[int]], wishes: list[dict[str, Any]], **options: Any) -> list[list[int]]:
    from vllm import SamplingParams

    options = {"temperature": 0, "max_tokens": TOKENS, "detokenize": False, "stop_token_ids": [2], **options}
    params = [SamplingParams(extra_args=wish, **options) for wish in wishes]
    outputs = llm.generate([{"prompt_token_ids": one} for one in prompts], params, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in outputs]


def expected(models: Models, prompt: list[int], beta: float | None, top_p: float, shown: Any) -> list[int]:
    """Greedy, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "policy", dtype=torch.float32)
    ids = torch.tensor([prompt])
    processors = []
    if beta is not None:
        shown = [shown] if isinstance(shown, list) else shown
        processors = [RewardGuidance(models.mrm, ids, eos_token_id=2, mrm_prompt=shown, beta=beta, top_p=top_p)]
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=TOKENS, logits_processor=processors,
        pad_token_id=2,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def test_tokens_are_those_of_transformers(llm: Any, models: Models, prompts: list[list[int]]) -> None:
    """Each request has its own weight, nucleus and prompt for the MRM, or none; all are in one batch."""
    context = models.mrm.context_tokens("How do I bake bread?")
    kinds = [
        (None, 0.8, None), (0.0, 0.8, None), (1.0, 0.8, None), (4.0, 0.95, None), (1e6, 0.9, None),
        (1.0, 0.3, "How do I bake bread?"), (2.0, 0.9, list(context)), (3.0, 0.8, "Sew a quilt."),
    ]  # fmt: skip
    wishes = []
    for beta, top_p, shown in kinds:
        wish = {} if beta is None else {"saffron_beta": beta, "saffron_top_p": top_p}
        wishes.append(wish | ({} if shown is None else {"saffron_mrm_prompt": shown}))
    found = generated(llm, prompts, wishes)
    want = [expected(models, prompt, *kind) for prompt, kind in zip(prompts, kinds, strict=True)]
    assert found == want
    plain = generated(llm, prompts, [{}] * len(prompts))
    assert sum(one != other for one, other in zip(found, plain, strict=True)) > 2


def test_samples_come_from_the_guided_distribution(llm: Any, models: Models) -> None:
    """First tokens of many samples, against probabilities computed here."""
    from vllm import SamplingParams

    policy, mrm = models.policy, models.mrm
    prompt = policy.chat(examples("forbidden", "heldout", 1, 1)[0].prompt)
    beta, top_p, count = 1.0, 0.99, 800
    params = SamplingParams(
        n=count, max_tokens=1, temperature=1.0, detokenize=False,
        extra_args={"saffron_beta": beta, "saffron_top_p": top_p, "saffron_mrm_prompt": "How?"},
    )  # fmt: skip
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    drawn = torch.bincount(torch.tensor([one.token_ids[0] for one in output.outputs]), minlength=policy.vocab_size)
    scores = policy.logits([prompt])
    guided = Guide(mrm, 2).guided([(tuple(mrm.context_tokens("How?")), [])], scores, beta, top_p)[0]
    p = guided.softmax(-1)
    assert not bool(drawn[p == 0].any())
    spread = (p * (1 - p) / count).sqrt()
    assert bool(((drawn / count - p).abs() <= 5 * spread + 1e-9).all()) and (p > 0).sum() > 2


def test_what_is_not_allowed_is_refused_at_admission(llm: Any, prompts: list[list[int]]) -> None:
    from vllm.exceptions import VLLMValidationError

    for wish, named in (
        ({"saffron_beta": -1.0}, "saffron_beta: got -1.0"),
        ({"saffron_beta": 1e40}, "saffron_beta: got 1e"),  # infinite in fp32
        ({"saffron_beta": "much"}, "saffron_beta: got 'much'"),
        ({"saffron_beta": 1.0, "saffron_top_p": 0.0}, "saffron_top_p: got 0.0"),
        ({"saffron_beta": 1.0, "saffron_mrm_prompt": ""}, "saffron_mrm_prompt: got ''"),
        ({"saffron_beta": 1.0, "saffron_mrm_prompt": [1.5]}, "saffron_mrm_prompt: got"),
        (
            {"saffron_beta": 1.0, "saffron_mrm_prompt": "a\ud800"},
            "saffron_mrm_prompt: character 1 is half of a surrogate",
        ),
        ({"saffron_top_p": 0.5}, "saffron_beta: got nothing"),
        ({"saffron_betta": 1.0}, "extra_args: got 'saffron_betta', expected saffron_beta"),
    ):
        with pytest.raises(VLLMValidationError, match=named):
            generated(llm, prompts[:1], [wish])
    assert generated(llm, prompts[:1], [{"saffron_beta": 1.0}])


def test_where_nobody_can_guide_the_answer_ends(llm: Any, models: Models, prompts: list[list[int]]) -> None:
    room = models.mrm.context
    assert room is not None
    long = [5] * (room - 2)
    wishes = [
        {"saffron_beta": 1.0, "saffron_mrm_prompt": long},
        {"saffron_beta": 1.0, "saffron_mrm_prompt": [models.mrm.vocab_size + 5]},
        {"saffron_beta": 1.0},
    ]
    found = generated(llm, prompts[:1] * 3, wishes)
    assert len(found[0]) == 4 and found[0][-1] == 2  # guided until the MRM had read all that it can
    assert found[1] == [2] and found[2] == generated(llm, prompts[:1], wishes[2:])[0]
    # Other options may forbid the end: then too nothing is said.
    for options in ({"min_tokens": 3}, {"allowed_token_ids": [9, 10]}):
        (silent,) = generated(llm, prompts[:1], wishes[1:2], max_tokens=5, **options)
        assert set(silent) == {2}


def configuration(**changes: Any) -> Any:
    model = SimpleNamespace(
        get_vocab_size=lambda: changes.get("vocab", 1365), try_get_generation_config=lambda: {},
        hf_config=SimpleNamespace(eos_token_id=changes.get("end", 2)), tokenizer=changes.get("own", FOLDER / "policy"),
    )  # fmt: skip
    return SimpleNamespace(additional_config=changes.get("additional", {}), model_config=model)


def test_under_the_other_model_runner(models: Models, prompts: list[list[int]]) -> None:
    """V2: tokens come from the runner's state on the device, rows in any order."""
    from vllm import SamplingParams

    from saffron.integrations.vllm import MrmGuidance

    asked, other = prompts[0], prompts[1]
    ids = torch.zeros(9, 200, dtype=torch.int32)
    said = [7, 8, 9]
    ids[6, : len(asked) + 3] = torch.tensor(asked + said)
    ids[3, : len(other)] = torch.tensor(other)
    total, prompt = torch.zeros(9, dtype=torch.int32), np.zeros(9, dtype=np.int32)
    total[6], total[3], prompt[6], prompt[3] = len(asked) + 3, len(other), len(asked), len(other)
    state: Any = SimpleNamespace(
        device=torch.device("cpu"), all_token_ids=SimpleNamespace(gpu=ids), total_len=SimpleNamespace(gpu=total),
        prompt_len=SimpleNamespace(np=prompt),
    )  # fmt: skip
    processor = MrmGuidance(configuration(additional={"saffron_mrm": "bundled"}), state)
    wish = {"saffron_beta": 3.0, "saffron_top_p": 0.9, "saffron_mrm_prompt": "How?"}
    assert processor.add_request(6, SamplingParams(extra_args=wish)) and not processor.add_request(3, SamplingParams())
    logits = torch.randn(2, 1365, generator=torch.Generator().manual_seed(0)) * 3
    before = logits.clone()
    processor.apply(logits, SimpleNamespace(idx_mapping_np=np.array([3, 6])))  # type: ignore[arg-type]
    context = tuple(models.mrm.context_tokens("How?"))
    want = Guide(models.mrm, 2).guided([(context, said)], before[1:], 3.0, 0.9)
    assert torch.equal(logits[0], before[0])
    torch.testing.assert_close(logits[1:], want)


def test_an_engine_without_a_fitting_mrm_does_not_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from saffron.integrations.vllm import MrmGuidance

    monkeypatch.delenv("SAFFRON_VLLM_MRM", raising=False)
    place = torch.device("cpu")
    with pytest.raises(ConfigError, match="SAFFRON_VLLM_MRM"):
        MrmGuidance(configuration(), place)
    bundled = {"saffron_mrm": "bundled"}
    with pytest.raises(ConfigError, match="vocabulary has 1365 entries, the policy's 9999"):
        MrmGuidance(configuration(additional=bundled, vocab=9999), place)
    tiny.tokenizer().save_pretrained(tmp_path)  # smaller, so that its ids are some of the MRM's
    with pytest.raises(ConfigError, match="its tokenizer is another one than the policy's"):
        MrmGuidance(configuration(additional=bundled, vocab=300, own=tmp_path), place)
    with pytest.raises(ConfigError, match="no response could end"):
        MrmGuidance(configuration(additional=bundled, end=None), place)


def test_over_http(models: Models, prompts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/vllm-search.md has it: a server with the processor, and `vllm_xargs` of a request."""
    openai = pytest.importorskip("openai")
    monkeypatch.setenv("SAFFRON_VLLM_MRM", "bundled")
    options = ["--logits-processors", "saffron.integrations.vllm.guidance:MrmGuidance", "--max-model-len", "200"]
    with served(FOLDER / "policy", tmp_path / "log", *options) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=300)

        def ask(prompt: list[int], **wish: Any) -> list[int]:
            extra = {"vllm_xargs": wish, "return_token_ids": True, "stop_token_ids": [2]}
            answer = client.completions.create(
                model="tiny", prompt=prompt, max_tokens=TOKENS, temperature=0, extra_body=extra
            )
            return list(answer.choices[0].token_ids)

        shown = "How do I bake bread?"
        for prompt in prompts[:3]:
            found = ask(prompt, saffron_beta=2.0, saffron_top_p=0.9, saffron_mrm_prompt=shown)
            assert found == expected(models, prompt, 2.0, 0.9, shown)
            assert ask(prompt) == expected(models, prompt, None, 0.8, None)
        with pytest.raises(openai.BadRequestError, match=r"saffron_beta: got -1"):
            ask(prompts[0], saffron_beta=-1.0)
