"""Hugging Face decoders over the trie: the same logits as transformers without our cache, and named refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GPTJConfig,
    GPTNeoConfig,
    Qwen3NextConfig,
    T5Config,
)

from saffron.errors import CheckpointError, ConfigError, PromptTooLongError, UnsupportedModelError
from saffron.models.inspection import check_supported
from saffron.models.policy import LLAMA3_CHAT_TEMPLATE, Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.models.trie_model import TrieModel
from saffron_kernels import CacheFullError

SEQUENCES = [[0, 5, 6, 7, 8], [0, 5, 6, 9], [0, 5, 6, 7], [3, 4], [0, 5, 6, 7, 8, 10, 11]]


def dense_logits(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0, -1]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_logits_equal_those_of_transformers(architecture: str) -> None:
    ours, theirs = TrieModel(tiny.model(architecture)), tiny.model(architecture, attention="sdpa")
    rows, logits = ours.prefill(SEQUENCES)
    for sequence, row in zip(SEQUENCES, logits, strict=True):
        assert (row - dense_logits(theirs, sequence)).abs().max() <= 1e-4

    texts = [list(s) for s in SEQUENCES]
    generator = np.random.default_rng(0)
    for _ in range(6):  # rows fork, die and come in any order
        parents = generator.integers(0, len(texts), size=6).tolist()
        tokens = generator.integers(2, 90, size=6).tolist()
        logits = ours.step(rows, parents, tokens)
        texts = [[*texts[p], t] for p, t in zip(parents, tokens, strict=True)]
        for text, row in zip(texts, logits, strict=True):
            assert (row - dense_logits(theirs, text)).abs().max() <= 1e-4
    ours.release(rows)
    assert ours.kv.num_nodes == 0


def test_equal_sequences_and_cached_prefixes() -> None:
    ours, theirs = TrieModel(tiny.model(), keep_prefixes=True), tiny.model(attention="sdpa")
    for _ in range(2):  # the second time all of it is cached but for the last tokens' outputs
        rows, logits = ours.prefill([[0, 5, 6], [0, 5, 6], [0, 5]])
        assert torch.equal(logits[0], logits[1])
        assert (logits[2] - dense_logits(theirs, [0, 5])).abs().max() <= 1e-4
        logits = ours.step(rows, [1, 0, 2], [7, 7, 8])
        assert (logits[1] - dense_logits(theirs, [0, 5, 6, 7])).abs().max() <= 1e-4
        assert (logits[2] - dense_logits(theirs, [0, 5, 8])).abs().max() <= 1e-4
        ours.release(rows)
        assert ours.kv.num_nodes == 5  # 0 5 6 7 and 8


def test_permuting_rows_permutes_results() -> None:
    permutation = [3, 0, 4, 2, 1]
    one, other = TrieModel(tiny.model()), TrieModel(tiny.model())
    _, a = one.prefill(SEQUENCES)
    _, b = other.prefill([SEQUENCES[i] for i in permutation])
    assert torch.allclose(a[permutation], b, atol=1e-6)


def test_same_input_same_bits() -> None:
    ours = TrieModel(tiny.model())
    outputs = []
    for _ in range(2):
        rows, logits = ours.prefill(SEQUENCES)
        outputs.append((logits, ours.step(rows, [0, 0, 4], [9, 12, 13])))
        ours.release(rows)
    assert torch.equal(outputs[0][0], outputs[1][0]) and torch.equal(outputs[0][1], outputs[1][1])


def test_a_fixed_cache_that_fills_up_says_so_and_loses_nothing() -> None:
    ours = TrieModel(tiny.model(), capacity=6, grow=False)
    with pytest.raises(CacheFullError):
        ours.prefill([[0, 1, 2, 3, 4, 5, 6]])
    assert ours.kv.num_nodes == 0
    rows, _ = ours.prefill([[0, 5, 6, 7]])
    with pytest.raises(CacheFullError):
        ours.step(rows, [0, 0, 0], [1, 2, 3])
    theirs = dense_logits(tiny.model(attention="sdpa"), [0, 5, 6, 7, 9])
    assert (ours.step(rows, [0], [9])[0] - theirs).abs().max() <= 1e-4


def test_a_failing_forward_pass_leaves_no_empty_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = TrieModel(tiny.model(), keep_prefixes=True)
    rows, _ = ours.prefill([[0, 5]])
    with monkeypatch.context() as patch:
        patch.setattr(ours.model, "forward", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            ours.prefill([[0, 5, 6]])
        with pytest.raises(KeyboardInterrupt):
            ours.step(rows, [0], [7])
    ours.release(rows)
    _, logits = ours.prefill([[0, 5, 7, 6]])
    assert (logits[0] - dense_logits(tiny.model(attention="sdpa"), [0, 5, 7, 6])).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("config", "feature"),
    [
        (T5Config(), "encoder-decoder"),
        (BloomConfig(), "ALiBi"),
        (FalconConfig(alibi=True), "ALiBi"),
        (Qwen3NextConfig(), "linear_attention layers"),
    ],
)
def test_unsupported_models_are_refused_by_feature(config: AutoConfig, feature: str) -> None:
    with pytest.raises(UnsupportedModelError, match=feature):
        check_supported(config)


@pytest.mark.parametrize("config_class", [FalconConfig, GPTJConfig, GPTNeoConfig, BloomConfig])
def test_models_without_the_attention_interface(config_class: type[AutoConfig], tmp_path: Path) -> None:
    """Whichever way the implementation is asked for; by themselves they fail with KeyError: 'saffron'."""
    config = config_class(vocab_size=97, hidden_size=48, num_attention_heads=6, bos_token_id=0, eos_token_id=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    reason = "it does not use the standard attention interface|ALiBi"
    with pytest.raises(UnsupportedModelError, match=reason):
        TrieModel(model)
    assert model.config._attn_implementation == "eager"
    with pytest.raises(UnsupportedModelError, match=reason):
        AutoModelForCausalLM.from_config(config, attn_implementation="saffron")
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=reason):
        Policy.from_pretrained(tmp_path)


def test_plain_calls_of_a_trie_model_run_as_with_sdpa() -> None:
    ids, mask = torch.tensor([[2, 2, 5, 6], [5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    ours, theirs = TrieModel(tiny.model()).model, tiny.model(attention="sdpa")
    outputs = [model(ids, attention_mask=mask, labels=ids) for model in (ours, theirs)]
    for output in outputs:
        output.loss.backward()
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None and torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("broken", ["{", "[1]", '{"eos_token_id": "end"}', '{"eos_token_id": [1, "end"]}'])
def test_a_broken_generation_configuration_is_named(broken: str, tmp_path: Path) -> None:
    folder = tiny.save_checkpoint(tmp_path)
    Policy.from_pretrained(folder)
    (folder / "generation_config.json").write_text(broken)
    with pytest.raises(CheckpointError, match="generation_config.json"):
        Policy.from_pretrained(folder)


def test_from_pretrained(tmp_path: Path) -> None:
    policy = Policy.from_pretrained(tiny.save_checkpoint(tmp_path / "policy"))
    assert policy.model.dtype == torch.float32 and policy.eos_token_id == (1,)
    ids = policy.chat("hello there", "the quick")
    assert policy.tokenizer is not None and ids[0] == 0
    assert policy.tokenizer.decode(ids) == "<s>[user] hello there\n[assistant] the quick"
    assert policy.chat("hello there", policy.encode("the quick")) == ids
    with pytest.raises(CheckpointError, match="nowhere"):
        Policy.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "policy" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="policy"):
        Policy.from_pretrained(tmp_path / "policy")


def test_llama3_template_is_used_where_a_tokenizer_has_none() -> None:
    made = tiny.tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]})
    made.chat_template = None
    policy = Policy(tiny.model(vocab_size=len(made)), made)
    assert made.decode(policy.chat("hello")) == (
        "<s><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert "eot_id" in LLAMA3_CHAT_TEMPLATE
    plain = tiny.tokenizer()
    plain.chat_template = None
    with pytest.raises(ConfigError, match="chat template"):
        Policy(tiny.model(vocab_size=len(plain)), plain).chat("hello")


def test_ids_and_lengths_are_checked_before_anything_runs() -> None:
    ours = TrieModel(tiny.model())
    for bad in ([], [-1], [97]):
        with pytest.raises(ConfigError, match=r"sequences\[1\]"):
            ours.prefill([[0], bad])
    assert ours.kv.num_nodes == 0
    with pytest.raises(PromptTooLongError, match="context of 256"):
        ours.check_length("prompt", 250, 7)
    with pytest.raises(ConfigError, match="tokenizer"):
        ours.encode("text")


def test_mrm_loads_the_published_format(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny.save_checkpoint(tmp_path / "guard")
    folder = tiny.save_mrm(tmp_path / "mrm", base)
    mrm = MultifurcationRewardModel.from_pretrained(folder, base=base)
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(folder))
    bias = torch.load(folder / "lm_head_bias.pt", weights_only=True)
    _, hidden = mrm.prefill([[0, 5, 6, 7]])
    full = mrm.full_bias(trained=True)
    assert full is not None
    rewards = hidden @ mrm.head_weight.T + full
    expected = dense_logits(reference, [0, 5, 6, 7]) + bias
    assert (rewards[0] - expected).abs().max() <= 1e-4
    assert mrm.full_bias(trained=False) is None

    torch.save(torch.zeros(5), folder / "lm_head_bias.pt")
    with pytest.raises(CheckpointError, match=r"lm_head_bias: got shape \[5\]"):
        MultifurcationRewardModel.from_pretrained(folder, base=base)
    (folder / "lm_head_bias.pt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="lm_head_bias.pt"):
        MultifurcationRewardModel.from_pretrained(folder, base=base)
    torch.save(torch.zeros(300), folder / "lm_head_bias.pt")
    (folder / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="adapter"):
        MultifurcationRewardModel.from_pretrained(folder, base=base)
