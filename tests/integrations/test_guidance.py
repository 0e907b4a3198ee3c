"""MRM guidance as a logits processor: the rule against a dense computation, under the samplers of transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from saffron import MultifurcationRewardModel, Request, RewardGuidance, SaffronSearch, SearchConfig
from saffron.errors import ConfigError, PromptTooLongError

PROMPTS = [[0, 5, 6, 7, 8], [0, 9], [0, 5, 6, 11]]
CONTEXTS = [[3, 5, 6, 7, 4], [3, 9, 4], [3, 5, 6, 11, 12, 4]]
PAD, END = 13, 1


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[PAD] * (longest - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts]),
    }


INPUTS = padded(PROMPTS)


def guide(mrm: MultifurcationRewardModel, **options: Any) -> RewardGuidance:
    return RewardGuidance(mrm, INPUTS["input_ids"], **{"eos_token_id": END, "mrm_prompt": CONTEXTS, **options})


def generated(model: PreTrainedModel, guidance: RewardGuidance, **options: Any) -> torch.Tensor:
    call = {"max_new_tokens": 10, "pad_token_id": PAD, **INPUTS, **options}
    return model.generate(logits_processor=[guidance], **call)


def rewards_of(mrm: MultifurcationRewardModel, tokens: list[int]) -> torch.Tensor:
    """Rewards `[vocab]` of every next token, by transformers without our cache."""
    dense = AutoModelForCausalLM.from_config(copy.deepcopy(mrm.model.config), attn_implementation="sdpa").eval()
    dense.load_state_dict(mrm.model.state_dict())
    with torch.inference_mode():
        logits = dense(torch.tensor([tokens])).logits[0, -1]
    return logits if mrm.bias is None else logits + mrm.bias


def expected(mrm: MultifurcationRewardModel, context: list[int], response: list[int], scores: torch.Tensor,
             beta: float, top_p: float) -> torch.Tensor:  # fmt: skip
    """The rule, token by token."""
    unseen = set(mrm.unseen.nonzero().flatten().tolist()) if mrm.unseen is not None else set()
    p, order = scores.sort(descending=True, stable=True)
    p = p.softmax(-1)
    inside = order[(p.cumsum(-1) - p) < top_p].tolist()
    known = [t for t in inside if t not in unseen and t != END]
    rewards = rewards_of(mrm, context + response)
    spoken = [i for i, t in enumerate(response) if t not in unseen]
    inherited = 0.0
    if spoken:
        inherited = float(rewards_of(mrm, context + response[: spoken[-1]])[response[spoken[-1]]])
    result = torch.full_like(scores, -torch.inf)
    for t in inside:
        if not known:
            result[t] = scores[t]
        elif t == END or t not in unseen:
            result[t] = scores[t] + beta * (inherited if t == END else float(rewards[t]))
    return result


@pytest.mark.parametrize(("beta", "top_p"), [(0.0, 0.8), (0.7, 0.8), (2.0, 0.3), (1.0, 0.99)])
def test_the_rule(beta: float, top_p: float) -> None:
    generator = torch.Generator().manual_seed(3)
    mrm = tiny.pair()[1]
    guidance = guide(mrm, beta=beta, top_p=top_p)
    owners = [0, 0, 1, 2, 2]
    responses: list[list[int]] = [[] for _ in owners]
    for _ in range(6):  # rows fork, end and come in another order
        ids = torch.tensor([[*INPUTS["input_ids"][o].tolist(), *r] for o, r in zip(owners, responses, strict=True)])
        scores = torch.randn(len(owners), 97, generator=generator) * 3
        scores[:, END] += 4
        guided = guidance(ids, scores)
        for i, (owner, response) in enumerate(zip(owners, responses, strict=True)):
            want = expected(mrm, CONTEXTS[owner], response, scores[i], beta, top_p)
            assert torch.equal(guided[i].isinf(), want.isinf())
            torch.testing.assert_close(guided[i], want, rtol=1e-4, atol=1e-3)
        parents = torch.randint(len(owners), (5,), generator=generator).tolist()
        tokens = torch.randint(2, 97, (5,), generator=generator).tolist()
        owners = [owners[p] for p in parents]
        responses = [[*responses[p], t] for p, t in zip(parents, tokens, strict=True)]


def test_the_rule_where_the_mrm_knows_every_token_or_none_of_the_nucleus() -> None:
    scores = torch.randn(3, 97, generator=torch.Generator().manual_seed(1)) * 3
    mrm = tiny.pair()[1]
    mrm.unseen = torch.ones(97, dtype=torch.bool)
    all_unseen = guide(mrm, beta=3.0)(INPUTS["input_ids"], scores)
    assert torch.equal(all_unseen, guide(mrm, beta=0.0)(INPUTS["input_ids"], scores))  # the policy's own nucleus
    mrm.unseen = None
    guided = guide(mrm, beta=3.0)(INPUTS["input_ids"], scores)
    for i in range(3):
        want = expected(mrm, CONTEXTS[i], [], scores[i], 3.0, 0.8)
        torch.testing.assert_close(guided[i], want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_greedy_decoding_with_a_large_beta_is_the_search_of_width_one(seed: int) -> None:
    policy, mrm = tiny.pair(seed)
    requests = [Request(tuple(p), tuple(c)) for p, c in zip(PROMPTS, CONTEXTS, strict=True)]
    config = SearchConfig(width=1, top_p=0.9, max_new_tokens=10, min_new_tokens=0)
    answers = [r.token_ids for r in SaffronSearch(policy, mrm, config).search(requests)]
    out = generated(tiny.model(seed=seed, attention="sdpa"), guide(mrm, beta=1e6, top_p=0.9), do_sample=False)
    assert [row[: len(a)] for row, a in zip(out[:, 5:].tolist(), answers, strict=True)] == answers
    assert all(set(row[len(a) :]) <= {PAD} for row, a in zip(out[:, 5:].tolist(), answers, strict=True))


def test_samplers() -> None:
    model, mrm = tiny.model(attention="sdpa"), tiny.pair()[1]
    for options in (
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 0.7},
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 2, **{name: tensor[:1] for name, tensor in INPUTS.items()}},
    ):
        outputs = []
        for _ in range(2):
            torch.manual_seed(0)
            with_guidance = guide(mrm, beta=2.0)
            outputs.append(generated(model, with_guidance, **options))
            with_guidance.close()
            assert mrm.kv.num_nodes == 0
        assert torch.equal(*outputs), options
        unseen = mrm.unseen.nonzero().flatten().tolist()
        torch.manual_seed(0)
        unguided = generated(model, guide(mrm, beta=0.0), **options)
        assert outputs[0].shape != unguided.shape or not torch.equal(outputs[0], unguided), options
        assert unseen


def test_assisted_decoding_gives_what_greedy_decoding_gives() -> None:
    model, mrm = tiny.model(attention="sdpa"), tiny.pair()[1]
    one = {name: tensor[:1] for name, tensor in INPUTS.items()}
    greedy = generated(model, guide(mrm), do_sample=False, **one)
    assisted = generated(model, guide(mrm), do_sample=False, prompt_lookup_num_tokens=3, **one)
    assert torch.equal(greedy, assisted)


def test_only_new_tokens_are_run() -> None:
    model, mrm = tiny.model(attention="sdpa"), tiny.pair()[1]
    run: list[int] = []
    mrm.model.get_input_embeddings().register_forward_hook(lambda _, ids, out: run.append(ids[0].numel()))
    model.generation_config.eos_token_id = None
    generated(model, guide(mrm, eos_token_id=[]), num_beams=4)
    distinct = {tuple(c[:i]) for c in CONTEXTS for i in range(1, len(c) + 1)}
    assert len(run) == 10
    assert run[0] == len(distinct)  # the beams of a prompt are still one
    assert max(run[1:]) <= 4 * len(PROMPTS)


def test_ended_rows_keep_their_scores_and_are_not_read() -> None:
    mrm = tiny.pair()[1]
    guidance = guide(mrm)
    ids = torch.cat([INPUTS["input_ids"], torch.tensor([[7, END, PAD], [7, 8, 9], [END, PAD, PAD]])], 1)
    scores = torch.randn(3, 97)
    guided = guidance(ids, scores)
    assert torch.equal(guided[[0, 2]], scores[[0, 2]]) and not torch.equal(guided[1], scores[1])
    assert mrm.kv.num_nodes == len(CONTEXTS[1]) + 3
    assert guidance(ids[[0, 2]], scores[[0, 2]]) is not None
    several = guide(mrm, eos_token_id=[END, 9])
    assert torch.equal(several(ids, scores), scores)


def test_the_cache_is_given_back() -> None:
    mrm = tiny.pair()[1]
    guidance = guide(mrm)
    guidance(INPUTS["input_ids"], torch.randn(3, 97))
    assert mrm.kv.num_nodes > 0
    guidance.close()
    guidance.close()
    assert mrm.kv.num_nodes == 0
    guidance(INPUTS["input_ids"], torch.randn(3, 97))
    del guidance
    assert mrm.kv.num_nodes == 0


def test_the_text_of_the_row_is_the_default_prompt() -> None:
    made = tiny.tokenizer()
    small = tiny.model(seed=1, vocab_size=len(made), hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    mrm = MultifurcationRewardModel(small, made)
    ids = torch.tensor([made.encode("<s>hello there")])
    scores = torch.randn(1, len(made))
    default = RewardGuidance(mrm, ids, eos_token_id=1)(ids, scores)
    assert torch.equal(default, RewardGuidance(mrm, ids, eos_token_id=1, mrm_prompt="hello there")(ids, scores))
    assert not torch.equal(default, RewardGuidance(mrm, ids, eos_token_id=1, mrm_prompt="the lazy dog")(ids, scores))


def test_what_is_not_allowed_is_named() -> None:
    mrm = tiny.pair()[1]
    for options, named in (
        ({"beta": -1.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"top_p": 0.0}, "top_p"),
        ({"mrm_prompt": CONTEXTS[:1]}, "mrm_prompt"),
        ({"mrm_prompt": None}, "mrm_prompt"),
    ):
        with pytest.raises(ConfigError, match=named):
            guide(mrm, **options)
    with pytest.raises(ConfigError, match="equal prompts"):
        RewardGuidance(mrm, torch.tensor([[5], [5]]), eos_token_id=END, mrm_prompt=[[3, 5], [3, 6]])
    with pytest.raises(ConfigError, match="input_ids: got shape"):
        RewardGuidance(mrm, torch.tensor([5]), eos_token_id=END, mrm_prompt=[[3, 5]])
    guidance = guide(mrm)
    with pytest.raises(ConfigError, match="row 1 continues none"):
        guidance(torch.tensor([[*INPUTS["input_ids"][0].tolist(), 5], [8] * 6]), torch.randn(2, 97))
    with pytest.raises(ConfigError, match="98 tokens"):
        guidance(INPUTS["input_ids"], torch.randn(3, 98))
    long = torch.cat([INPUTS["input_ids"], torch.full((3, 260), 7)], 1)
    with pytest.raises(PromptTooLongError, match="256"):
        guidance(long, torch.randn(3, 97))
    assert mrm.kv.num_nodes == 0
