"""The guard as a process reward model, and decoding without a defence."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from saffron.errors import CheckpointError, ConfigError, UnsupportedModelError
from saffron.models.guard import ProcessRewardModel
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.search import GreedyConfig, GreedyDecoding

TEMPLATE = "{{ bos_token }}Task. User:{{ messages[0]['content'] }}\n\nAgent:{{ messages[1]['content'] }}\n\nIs it ok? "


def guard(template: str = TEMPLATE, **words: str) -> ProcessRewardModel:
    made = tiny.tokenizer()
    made.add_tokens(["safe", "unsafe"])
    made.chat_template = template
    return ProcessRewardModel(tiny.model(vocab_size=len(made)), made, **words)


def test_score_is_the_logit_difference_after_the_template() -> None:
    prm = guard()
    pairs = [("hello there", "the quick brown"), ("hello there", "the lazy dog"), ("hello there", ""), ("please", "a")]
    dense = tiny.model(attention="sdpa", vocab_size=prm.vocab_size)
    dense.load_state_dict(prm.model.state_dict())
    safe, unsafe = prm.encode("safe")[0], prm.encode("unsafe")[0]
    for (prompt, response), score in zip(pairs, prm.score(pairs), strict=True):
        ids = prm.sequence(prompt, response)
        assert prm.decode(ids) == f"Task. User:{prompt}\n\nAgent:{response}\n\nIs it ok? "
        with torch.no_grad():
            logits = dense(torch.tensor([ids])).logits[0, -1]
        assert abs(float(score) - float(logits[safe] - logits[unsafe])) <= 1e-4
    assert torch.equal(prm.score(pairs[:1]), prm.score([(pairs[0][0], prm.encode(pairs[0][1]))]))
    assert prm.score([]).shape == (0,) and prm.kv.num_nodes == 0


def test_templates_may_want_content_in_parts() -> None:
    in_parts = TEMPLATE.replace("['content']", "['content'][0]['text']")
    assert guard(in_parts).sequence("hello", "there") == guard().sequence("hello", "there")


def test_guards_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(CheckpointError, match="'hello world' must be one token"):
        guard(safe="hello world")
    with pytest.raises(CheckpointError, match="chat template"):
        guard("{{ messages[0]['content'] }}").score([("a", "b")])
    with pytest.raises(UnsupportedModelError, match="final_logit_softcapping"):
        model = tiny.model()
        model.config.final_logit_softcapping = 30.0
        MultifurcationRewardModel(model)
    with pytest.raises(CheckpointError, match="unseen_mask: got torch.float32"):
        MultifurcationRewardModel(tiny.model(), unseen=torch.zeros(97))


def test_greedy_decoding_equals_generate(tmp_path: Path) -> None:
    policy = Policy.from_pretrained(tiny.save_checkpoint(tmp_path))
    prompts, prefills = ["hello there", "please tell me", "hello there"], ["the quick", "", "the quick"]
    results = GreedyDecoding(policy, config=GreedyConfig(max_new_tokens=12)).generate(prompts, prefills)
    assert results[0].token_ids == results[2].token_ids
    dense = tiny.model(attention="sdpa", vocab_size=policy.vocab_size)
    dense.load_state_dict(policy.model.state_dict())
    for prompt, prefill, result in zip(prompts, prefills, results, strict=True):
        context = policy.chat(prompt, prefill)
        out = dense.generate(
            torch.tensor([context]),
            do_sample=False,
            max_new_tokens=12,
            return_dict_in_generate=True,
            output_scores=True,
        )
        assert result.token_ids == out.sequences[0, len(context) :].tolist()
        log_probabilities = [s.log_softmax(-1)[0, t] for s, t in zip(out.scores, result.token_ids, strict=True)]
        assert result.score == pytest.approx(float(sum(log_probabilities)), abs=1e-3)
        assert result.cost.reward_flops == 0 and result.cost.policy_flops > 0
    assert policy.kv.num_nodes == 0
    with pytest.raises(ConfigError, match="max_new_tokens"):
        GreedyDecoding(policy, config=GreedyConfig(max_new_tokens=0))
    with pytest.raises(ConfigError, match="prefill"):
        GreedyDecoding(policy).generate(prompts, ["one"])
