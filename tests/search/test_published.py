"""What was published: recorded searches and the MRM checkpoint. Read from where environment variables point."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from saffron.errors import CheckpointError
from saffron.models.attention import ATTENTION
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.models.vocabulary import head_for
from saffron.parity import replay
from saffron.search import Request, SaffronSearch
from saffron.search.config import SearchConfig
from saffron_kernels import multifurcation_head

PARITY = os.environ.get("SAFFRON_PARITY")
CHECKPOINT = os.environ.get("SAFFRON1_CHECKPOINT")

needs_parity = pytest.mark.skipif(PARITY is None, reason="SAFFRON_PARITY names no folder of recorded searches")


@needs_parity
@pytest.mark.parametrize("folder", ["a", "b"])
def test_recorded_searches_are_reproduced(folder: str) -> None:
    reports = list(replay(Path(str(PARITY)) / folder))
    assert len(reports) == 8 and all(report.identical for report in reports)


@needs_parity
@pytest.mark.parametrize("number", [0, 1, 4])
@pytest.mark.parametrize("folder", ["a", "b"])
def test_small_recorded_searches_are_reproduced(folder: str, number: int, tmp_path: Path) -> None:
    """The narrowest, for backends that are slow where the tests run (`SAFFRON_BACKEND`)."""
    source = Path(str(PARITY)) / folder
    for name in ("policy", "guard", "mrm"):
        (tmp_path / name).symlink_to(source / name)
    cases = json.loads((source / "cases.json").read_text())
    (tmp_path / "cases.json").write_text(json.dumps([cases[number]]))
    assert [report.identical for report in replay(tmp_path)] == [True]


@needs_parity
def test_memory_on_recorded_searches_is_that_of_proposition_2() -> None:
    """The trie holds one node per distinct prefix of the recorded live beams: `sum LCP` less than one cache each."""
    source = Path(str(PARITY)) / "b"
    case = json.loads((source / "cases.json").read_text())[3]
    policy = Policy.from_pretrained(source / "policy")
    mrm = MultifurcationRewardModel.from_pretrained(source / "mrm", base=source / "guard")
    config = SearchConfig(
        width=case["width"], top_p=case["top_p"], max_new_tokens=case["max_new_tokens"],
        min_new_tokens=case["min_new_tokens"], ranking="released", eos_score="mrm",
    )  # fmt: skip
    prompt = (case["policy"]["bos"], *case["prompt"], *case["policy"]["infix"])
    request = Request(prompt, (*case["mrm"]["prefix"], *case["prompt"], *case["mrm"]["infix"]))
    held = [len(prompt)]
    search = SaffronSearch(policy, mrm, config, eos_token_id=[case["policy"]["eos"]])
    for step, _ in enumerate(search.run([request])):
        assert policy.kv.num_nodes == held[-1]  # what was chosen in a step is run, and cached, in the next
        live = sorted(sequence for sequence, finished in case["steps"][step] if not finished)
        shared = sum(tiny.common_prefix(a, b) for a, b in zip(live, live[1:], strict=False))
        held.append(len(prompt) + sum(map(len, live)) - shared)
    assert len(held) > 10 and max(held) < len(prompt) * case["width"]


@needs_parity
def test_a_changed_record_is_noticed(tmp_path: Path) -> None:
    source = Path(str(PARITY)) / "a"
    for name in ("policy", "guard", "mrm"):
        (tmp_path / name).symlink_to(source / name)
    case = json.loads((source / "cases.json").read_text())[4]
    changed = [json.loads(json.dumps(case)) for _ in range(4)]
    changed[1]["steps"][5][0][0][0] += 1
    changed[2]["output"][0] += 1
    changed[3]["finished"][0][1] += 0.1
    (tmp_path / "cases.json").write_text(json.dumps(changed))
    good, step, output, reward = replay(tmp_path)
    assert good.identical
    assert step.same_steps == 5 and not step.identical
    assert not output.same_output and output.same_steps == output.steps
    assert not reward.same_finished and not reward.identical


def test_parity_without_records(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cases\.json"):
        list(replay(tmp_path))
    (tmp_path / "cases.json").write_text('{"no": "list"}')
    with pytest.raises(CheckpointError, match="list of recorded runs"):
        list(replay(tmp_path))


def llama_guard_3_1b() -> PreTrainedModel:
    """The geometry of Llama-Guard-3-1B with random weights, bf16 (2.5 GB)."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        bos_token_id=128000,
        eos_token_id=128001,
    )
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=ATTENTION)
    model.tie_weights()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1) if "norm" in name else weight.uniform_(-0.03, 0.03)
    return model


@pytest.mark.skipif(CHECKPOINT is None, reason="SAFFRON1_CHECKPOINT does not say where the published MRM lies")
def test_the_published_mrm_loads_onto_llama_guard_geometry(tmp_path: Path) -> None:
    base = llama_guard_3_1b()
    frozen = base.model.layers[3].self_attn.v_proj.weight.detach().clone()
    mrm = MultifurcationRewardModel.from_pretrained(str(CHECKPOINT), base=base)

    # The LoRA factors are merged: W + (alpha / r) B A.
    from safetensors.torch import load_file

    adapter = load_file(Path(str(CHECKPOINT)) / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.model.layers.3.self_attn.v_proj.lora_{x}.weight"].float() for x in "AB")
    merged = mrm.model.model.layers[3].self_attn.v_proj.weight.float()
    assert torch.allclose(merged, frozen.float() + b @ a, atol=2e-3) and not torch.equal(merged, frozen.float())

    assert mrm.unseen is not None and int(mrm.unseen.sum()) == 92_013
    assert mrm.unseen[128001] and mrm.unseen[128009]  # both end tokens
    bias = torch.load(Path(str(CHECKPOINT)) / "lm_head_bias.pt", map_location="cpu", weights_only=True).detach()
    assert not mrm.bias.requires_grad  # type: ignore[union-attr]

    # The bias is added to every logit.
    rows, hidden = mrm.prefill([[128000, 271, 1502, 25, 9906]])
    mrm.release(rows)
    vocab = torch.arange(128256, dtype=torch.int32)
    whole = torch.tensor([0, 128256], dtype=torch.int32)
    with_bias, without = (
        multifurcation_head(hidden, mrm.head_weight, mrm.full_bias(trained), None, 0.0, vocab, whole)
        for trained in (True, False)
    )
    assert (with_bias - without - bias.float()).abs().max() < 1e-6
    assert bias.abs().max() > 0.02

    # A search with it: unseen tokens score what the configuration says.
    policy = Policy(tiny.model(vocab_size=128256, hidden_size=16, num_attention_heads=2, num_key_value_heads=1))
    head = head_for(policy, mrm, trained_bias=True)
    assert head.unseen is mrm.unseen and head.bias is not None
    config = SearchConfig(width=2, max_new_tokens=2, top_p=0.01)
    (result,) = SaffronSearch(policy, mrm, config, eos_token_id=[128001]).search([Request((128000, 5), (128000, 271))])
    assert len(result.token_ids) == 2


def test_formats_of_llama_3() -> None:
    """The MRM's prefix and infix are the published text, which a Llama-3 tokenizer encodes to the published ids."""
    made = tiny.tokenizer()
    made.add_special_tokens({"bos_token": "<|begin_of_text|>"})
    mrm = MultifurcationRewardModel(tiny.model(vocab_size=len(made)), made)
    ids = mrm.context_tokens("how are you")
    assert made.decode(ids) == "<|begin_of_text|>\n\nUser:how are you\n\nAgent:"
    # Prompt and surroundings are encoded apart, as published, so that prompts share what comes before them.
    assert ids == [
        made.bos_token_id,
        *mrm.encode("\n\nUser:"),
        *mrm.encode("how are you"),
        *mrm.encode("\n\nAgent:"),
    ]
