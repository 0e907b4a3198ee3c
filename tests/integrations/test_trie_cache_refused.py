"""Adapters and padding that a TrieCache would read otherwise than DynamicCache: refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, PreTrainedModel

from saffron.errors import ConfigError, UnsupportedModelError
from saffron.integrations.transformers import TrieCache
from saffron.models.attention import ATTENTION

PROMPT = torch.tensor([[5, 6, 7, 8, 9]])


def prompt_tuning(kind: str) -> Any:
    import peft

    options = {"encoder_hidden_size": 16} if kind == "PromptEncoderConfig" else {}
    return getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4, **options)


@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig"])
def test_adapters_that_stand_before_the_text_are_refused_by_name(kind: str) -> None:
    from peft import get_peft_model

    model = get_peft_model(tiny.model(), prompt_tuning(kind)).eval()
    with pytest.raises(UnsupportedModelError, match=f"{kind}: .*prefix tuning, prompt tuning, p-tuning"):
        TrieCache(model)
    cache = TrieCache(model.get_base_model())
    with pytest.raises((UnsupportedModelError, ConfigError), match="prefix tuning|inputs_embeds"):
        model.generate(input_ids=PROMPT, past_key_values=cache, max_new_tokens=2)


def test_adapters_that_act_from_a_token_on_are_refused_by_name() -> None:
    """aLoRA: where it begins differs from row to row. Also where it becomes active after the cache was made."""
    from peft import LoraConfig, get_peft_model

    plain = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    late = LoraConfig(
        task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[7]
    )  # fmt: skip
    model = get_peft_model(tiny.model(), plain)
    model.add_adapter("late", late)
    model.eval()
    cache = TrieCache(model)
    model.set_adapter("late")
    for call in (lambda: TrieCache(model), lambda: model(input_ids=PROMPT, past_key_values=cache)):
        with torch.no_grad(), pytest.raises(UnsupportedModelError, match="alora_invocation_tokens"):
            call()
    model.set_adapter("default")
    with torch.no_grad():
        model(input_ids=PROMPT, past_key_values=cache)


def test_an_adapter_for_each_row_is_refused_by_name() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(tiny.model(), config).eval()
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="adapter_names: one adapter for each row"):
        model(
            input_ids=PROMPT.expand(2, -1), adapter_names=["default", "__base__"], past_key_values=TrieCache(model)
        )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("mask", [[1, 0, 1, 1, 1], [0, 1, 1, 0, 1], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
def test_padding_without_positions_is_as_with_dynamic_cache_or_refused(architecture: str, mask: list[int]) -> None:
    """Columns are then positions: a hole, and padding on the left of learned positions, make a difference."""
    logits = []
    refused = "[1, 0" in str(mask) or "0, 1]" in str(mask) or (architecture == "gpt2" and 0 in mask)
    for attention in (ATTENTION, "sdpa"):
        model = positioned(architecture, attention)
        cache = TrieCache(model) if attention == ATTENTION else DynamicCache(config=model.config)
        call = {"input_ids": PROMPT, "attention_mask": torch.tensor([mask]), "past_key_values": cache}
        if refused and attention == ATTENTION:
            with pytest.raises(ConfigError, match="position_ids: got None, and row 0 holds padding"):
                model(**call)
            positions = (call["attention_mask"].cumsum(1) - 1).clamp_min(0)
            model(**call, position_ids=positions)
            return
        model(**call)
        more = torch.tensor([[*mask, 1]])
        logits.append(model(torch.tensor([[11]]), attention_mask=more, past_key_values=cache).logits)
    assert (logits[0] - logits[1]).abs().max() <= 1e-4


def positioned(architecture: str, attention: str) -> PreTrainedModel:
    if architecture != "gpt2":
        return tiny.model(architecture, attention=attention)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=48, n_head=6, n_layer=2, n_positions=64, initializer_range=0.15)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.complex64, torch.bool])
def test_token_ids_are_whole_numbers(dtype: torch.dtype) -> None:
    ours = tiny.model()
    cache = TrieCache(ours)
    with pytest.raises(ConfigError, match=f"input_ids: got {dtype}, expected whole numbers"):
        ours(PROMPT.to(dtype), past_key_values=cache)
    if dtype.is_floating_point:
        with pytest.raises(ConfigError, match=f"position_ids: got {dtype}, expected whole numbers"):
            ours(PROMPT, position_ids=torch.arange(5)[None].to(dtype), past_key_values=cache)


@torch.no_grad()
def test_masks_that_contradict_earlier_ones_are_refused() -> None:
    ours = tiny.model()
    cache = TrieCache(ours)
    mask, new = torch.tensor([[0, 0, 1, 1, 1]]), torch.tensor([[11]])
    one = torch.ones(1, 1, dtype=torch.long)
    ours(PROMPT, attention_mask=mask, past_key_values=cache)
    for given, message in [
        (None, "attention_mask: got None, expected a mask"),
        (one, r"attention_mask: got shape \[1, 1\], expected \[1, 6\]"),
        (torch.tensor([[0, 0, 1, 0, 1, 1]]), "attention_mask: got 0 in row 0, column 3, where an earlier call said 1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            ours(new, attention_mask=given, past_key_values=cache)
    whole = torch.cat([mask, one], 1)
    with pytest.raises(ConfigError, match="position_ids: pass them in every call of rows that hold padding"):
        ours(new, attention_mask=whole, position_ids=torch.tensor([[3]]), past_key_values=cache)
    ours(new, attention_mask=whole, past_key_values=cache)


@torch.no_grad()
def test_padding_within_a_window_is_refused() -> None:
    ours = tiny.model("phi3", sliding_window=4)
    mask = torch.tensor([[1, 1, 0, 1, 1]])
    positions = mask.cumsum(1) - 1
    with pytest.raises(UnsupportedModelError, match="sliding windows of 4 columns, in which padding would count"):
        ours(PROMPT, attention_mask=mask, position_ids=positions, past_key_values=TrieCache(ours))


@pytest.mark.parametrize("rows", [[-1, 0], [0, 2]])
@torch.no_grad()
def test_beams_that_are_not_there_are_refused(rows: list[int]) -> None:
    model = tiny.model()
    cache = TrieCache(model)
    model(torch.tensor([[5, 6], [7, 8]]), past_key_values=cache)
    with pytest.raises(ConfigError, match=r"beam_idx: got \[.*\], expected rows from 0 to 1"):
        cache.reorder_cache(torch.tensor(rows))
    cache.reorder_cache(torch.tensor([1, 0]))
