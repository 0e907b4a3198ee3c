"""`model.generate(custom_generate=saffron.generate)`: the answers of the search; options are honoured or refused."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from transformers import DynamicCache, MaxTimeCriteria, PreTrainedModel
from transformers.generation import BaseStreamer

import saffron
from saffron import MultifurcationRewardModel, Policy, Request, SaffronSearch, SearchConfig
from saffron.errors import ConfigError, PromptTooLongError, UnsupportedModelError
from saffron.integrations.custom_generate import SaffronOutput

PROMPTS = [[0, 5, 6, 7, 8], [0, 9], [0, 5, 6, 11]]
CONTEXTS = [[3, 5, 6, 7, 4], [3, 9, 4], [3, 5, 6, 11, 12, 4]]
PAD = 13


def ordinary(seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model as people load it."""
    return tiny.model(seed=seed, attention="sdpa", **changes)


def padded(prompts: list[list[int]], pad: int = PAD) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
    }


def searched(config: SearchConfig, end_tokens: tuple[int, ...] = (1,), seed: int = 0) -> list[list[int]]:
    """What the search itself answers."""
    policy, mrm = tiny.pair(seed)
    requests = [Request(tuple(p), tuple(c)) for p, c in zip(PROMPTS, CONTEXTS, strict=True)]
    return [r.tokens for r in SaffronSearch(policy, mrm, config, end_tokens=end_tokens).search(requests)]


def generated(model: PreTrainedModel, mrm: MultifurcationRewardModel, **options: Any) -> Any:
    call = {"mrm": mrm, "mrm_prompt": CONTEXTS, "max_new_tokens": 12, "pad_token_id": PAD, **padded(PROMPTS), **options}
    return model.generate(custom_generate=saffron.generate, **call)


@pytest.mark.parametrize(("width", "minimum"), [(1, 0), (4, 0), (4, 7), (16, 0)])
@pytest.mark.parametrize("seed", [0, 1])
def test_answers_are_those_of_the_search(width: int, minimum: int, seed: int) -> None:
    mrm = tiny.pair(seed)[1]
    out = generated(ordinary(seed), mrm, width=width, top_p=0.7, min_new_tokens=minimum)
    config = SearchConfig(width=width, top_p=0.7, max_new_tokens=12, min_new_tokens=minimum)
    answers = searched(config, seed=seed)
    longest = max(map(len, answers))
    assert out[:, :5].tolist() == padded(PROMPTS)["input_ids"].tolist()
    assert out[:, 5:].tolist() == [answer + [PAD] * (longest - len(answer)) for answer in answers]
    assert mrm.kv.num_nodes == 0


def test_the_cases_above_hold_answers_that_end_and_such_that_do_not() -> None:
    lengths = {len(a) for seed in (0, 1) for a in searched(SearchConfig(4, 0.7, 12, 0), seed=seed)}
    assert len(lengths) > 1 and 12 in lengths


def test_end_tokens_and_lengths_come_from_the_generation_configuration() -> None:
    mrm, model = tiny.pair()[1], ordinary()
    config = SearchConfig(width=4, max_new_tokens=10, min_new_tokens=0)
    first = searched(config)[0]
    ends = (1, first[2])
    out = generated(model, mrm, width=4, max_new_tokens=10, eos_token_id=list(ends))
    assert out[0, 5:].tolist()[: len(first)] == searched(config, ends)[0] + [PAD] * (
        out.shape[1] - 5 - len(searched(config, ends)[0])
    )
    out = generated(model, mrm, width=4, max_new_tokens=None, max_length=9)  # counts the padded prompt
    assert out.shape[1] <= 9
    model.generation_config.eos_token_id = None
    assert generated(model, mrm, width=4).shape[1] == 5 + 12  # nothing ends


def test_dictionary_output() -> None:
    mrm = tiny.pair()[1]
    out = generated(ordinary(), mrm, width=4, return_dict_in_generate=True)
    assert isinstance(out, SaffronOutput)
    assert out.sequences_scores.tolist() == pytest.approx([r.score for r in out.results])
    for row, result in zip(out.sequences.tolist(), out.results, strict=True):
        assert row[5 : 5 + len(result.tokens)] == result.tokens
        assert result.stop in ("eos", "length") and len(result.steps) >= len(result.tokens)


def test_the_model_is_left_as_it_was() -> None:
    mrm, model = tiny.pair()[1], ordinary().train()
    plain = {**padded(PROMPTS), "max_new_tokens": 6, "pad_token_id": PAD, "do_sample": False}
    before = model.eval().generate(**plain)
    model.train()
    generated(model, mrm)
    assert model.config._attn_implementation == "sdpa" and model.training
    with pytest.raises(PromptTooLongError):
        generated(model, mrm, max_new_tokens=400)
    assert model.config._attn_implementation == "sdpa" and model.training
    assert torch.equal(model.eval().generate(**plain), before)


def test_with_one_beam_and_the_smallest_nucleus_it_is_greedy_decoding_with_all_its_processors() -> None:
    mrm, model = tiny.pair()[1], ordinary()
    for options in (
        {},
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 1, "min_new_tokens": 5},
        {"suppress_tokens": list(range(20, 60)), "bad_words_ids": [[70]]},
        {"logits_processor": [lambda ids, scores: scores.roll(1, 1)]},
    ):
        greedy = model.generate(**padded(PROMPTS), do_sample=False, max_new_tokens=12, pad_token_id=PAD, **options)
        assert torch.equal(generated(model, mrm, width=1, top_p=1e-6, **options), greedy), options


def test_processors_see_the_rows_of_the_search_behind_their_padded_prompts() -> None:
    mrm, seen = tiny.pair()[1], []

    def record(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ids.clone())
        return scores

    out = generated(ordinary(), mrm, width=4, logits_processor=[record], return_dict_in_generate=True)
    prompts = set(map(tuple, padded(PROMPTS)["input_ids"].tolist()))
    assert [ids.shape[1] for ids in seen] == list(range(5, 5 + len(seen)))
    rows = {tuple(row) for ids in seen for row in ids.tolist()}
    assert all(row[:5] in prompts for row in rows)
    for row, result in zip(out.sequences.tolist(), out.results, strict=True):  # every prefix of an answer was seen
        assert all(tuple(row[: 5 + i]) in rows for i in range(len(result.tokens)))


def test_sampling_that_the_model_brings_along_is_left_aside() -> None:
    mrm, model = tiny.pair()[1], ordinary()
    expected = generated(model, mrm, width=4)
    model.generation_config.update(do_sample=True, temperature=0.2, top_k=3, top_p=0.4, min_p=0.3)
    assert torch.equal(generated(model, mrm, width=4), expected)


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        assert not self.ended
        self.values.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_streamer() -> None:
    streamer, mrm = Recorder(), tiny.pair()[1]
    one = {"input_ids": torch.tensor(PROMPTS[:1]), "attention_mask": None, "mrm_prompt": CONTEXTS[:1]}
    out = generated(ordinary(), mrm, width=4, streamer=streamer, **one)
    assert streamer.ended and streamer.values[0] == PROMPTS[0]
    assert [token for value in streamer.values for token in value] == out[0].tolist()
    assert all(len(value) == 1 for value in streamer.values[1:])
    with pytest.raises(ConfigError, match="streamer: got 3 prompts"):
        generated(ordinary(), mrm, streamer=Recorder())


def test_tokens_are_streamed_while_the_search_runs() -> None:
    streamer, mrm, put = Recorder(), tiny.pair()[1], []

    def count(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        put.append(len(streamer.values) - 1)
        return scores

    one = {"input_ids": torch.tensor(PROMPTS[:1]), "attention_mask": None, "mrm_prompt": CONTEXTS[:1]}
    generated(ordinary(), mrm, width=1, streamer=streamer, logits_processor=[count], **one)
    assert put == list(range(len(put)))  # with one beam every token is settled at once


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"do_sample": True}, "do_sample"),
        ({"num_beams": 3}, "num_beams"),
        ({"do_sample": True, "num_return_sequences": 2}, "num_return_sequences"),
        ({"prompt_lookup_num_tokens": 1}, "prompt_lookup_num_tokens"),
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"output_logits": True, "return_dict_in_generate": True}, "output_logits"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states"),
        ({"max_time": 5.0}, "MaxTimeCriteria"),
        ({"stopping_criteria": [MaxTimeCriteria(5.0)]}, "MaxTimeCriteria"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [4, 5]}, "PrefixConstrainedLogitsProcessor"),
        ({"guidance_scale": 1.5}, "UnbatchedClassifierFreeGuidanceLogitsProcessor"),
        ({"assistant_model": ordinary(3)}, "assistant_model"),
        ({"synced_gpus": True}, "synced_gpus"),
        ({"width": 0}, "width"),
        ({"top_p": 0.0}, "top_p"),
        ({"mrm": ordinary(3)}, "mrm"),
        ({"mrm_prompt": CONTEXTS[:2]}, "mrm_prompt: got 2 for 3 rows"),
        ({"mrm_prompt": [[3], [], [4]]}, "mrm_prompt: row 1 is empty"),
        ({"mrm_prompt": [[3], [97], [4]]}, "mrm_prompt, row 1"),
        ({"mrm_prompt": None}, "mrm_prompt"),
        ({"attention_mask": torch.tensor([[1] * 5, [0] * 5, [1] * 5])}, "attention_mask"),
        ({"position_ids": torch.arange(5).expand(3, 5) + 4}, "position_ids"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_honoured_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    mrm, model = tiny.pair()[1], ordinary()
    with pytest.raises(ConfigError, match=named):
        generated(model, **{"mrm": mrm, **options})
    assert model.config._attn_implementation == "sdpa" and mrm.kv.num_nodes == 0


def test_a_cache_that_holds_tokens_and_embeddings_are_refused() -> None:
    mrm, model = tiny.pair()[1], ordinary()
    cache = DynamicCache(config=model.config)
    model(torch.tensor(PROMPTS[:1]), past_key_values=cache)
    one = {"input_ids": torch.tensor([[*PROMPTS[0], 4]]), "attention_mask": None, "mrm_prompt": CONTEXTS[:1]}
    with pytest.raises(ConfigError, match="past_key_values"):
        generated(model, mrm, past_key_values=cache, **one)
    embeddings = model.get_input_embeddings()(torch.tensor(PROMPTS[:1]))
    with pytest.raises(ConfigError, match="inputs_embeds"):
        generated(model, mrm, inputs_embeds=embeddings, **{**one, "input_ids": torch.tensor(PROMPTS[:1])})


def test_models_that_the_trie_cannot_serve_are_refused_and_left_alone() -> None:
    from transformers import AutoModelForCausalLM, DiffLlamaConfig

    config = DiffLlamaConfig(**tiny.SHAPE)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with pytest.raises(UnsupportedModelError, match="runs attention twice in one step"):
        generated(model, tiny.pair()[1])
    assert model.config._attn_implementation == "eager"


def texts_model() -> tuple[PreTrainedModel, MultifurcationRewardModel]:
    """A policy and an MRM with one tokenizer."""
    made = tiny.tokenizer()
    small = tiny.model(seed=1, vocab_size=len(made), hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    return ordinary(vocab_size=len(made)), MultifurcationRewardModel(small, made)


def test_by_default_the_mrm_is_shown_the_text_of_the_row() -> None:
    model, mrm = texts_model()
    assert mrm.tokenizer is not None
    texts = ["<s>hello there", "<s>the quick brown fox"]
    inputs = padded([mrm.encode(text) for text in texts], pad=1)
    out = model.generate(
        **inputs, custom_generate=saffron.generate, mrm=mrm, width=4, max_new_tokens=6, return_dict_in_generate=True
    )
    requests = [Request(tuple(mrm.encode(t)), tuple(mrm.context_tokens(t.removeprefix("<s>")))) for t in texts]
    policy = Policy(tiny.model(vocab_size=mrm.vocab_size), mrm.tokenizer)
    expected = SaffronSearch(policy, mrm, SearchConfig(4, 0.8, 6, 0)).search(requests)
    assert [(r.tokens, r.text) for r in out.results] == [(r.tokens, r.text) for r in expected]
    again = model.generate(
        **inputs, custom_generate=saffron.generate, mrm=mrm, width=4, max_new_tokens=6,
        mrm_prompt=[t.removeprefix("<s>") for t in texts],
    )  # fmt: skip
    assert torch.equal(out.sequences, again)


def test_a_policy_with_another_tokenizer_reaches_the_mrm_through_text() -> None:
    _, mrm = texts_model()
    other = tiny.tokenizer(280, ["hello to you and the quick green fox"] * 4)
    ids = other.encode("<s>hello there")
    out = ordinary(vocab_size=len(other)).generate(
        torch.tensor([ids]), custom_generate=saffron.generate, mrm=mrm, mrm_prompt="hello there",
        policy_tokenizer=other, width=4, max_new_tokens=6, search_config=SearchConfig(top_p=0.6),
    )  # fmt: skip
    policy = Policy(tiny.model(vocab_size=len(other)), other)
    request = Request(tuple(ids), tuple(mrm.context_tokens("hello there")))
    expected = SaffronSearch(policy, mrm, SearchConfig(4, 0.6, 6, 0)).search([request])[0]
    assert out[0, len(ids) :].tolist() == expected.tokens
