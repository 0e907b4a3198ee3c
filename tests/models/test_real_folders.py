"""Folders as people have them: their dtypes, end tokens and chains of thought; what is refused is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from saffron.errors import CheckpointError, ConfigError, UnsupportedModelError
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.search import SaffronSearch, parse_method
from saffron.search.config import SearchConfig

THINKING = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] <think>\n"
    "{% if enable_thinking is defined and not enable_thinking %}\n</think>\n{% endif %}"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_folders_of_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    made = tiny.tokenizer()
    tiny.model(attention="eager", vocab_size=len(made)).to(dtype).save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    on_cpu = Policy.from_pretrained(tmp_path, device="cpu")
    assert on_cpu.model.dtype == torch.float32  # which CPUs are fast in
    ids = on_cpu.chat("hello there")
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
        exact = dense(torch.tensor([ids])).logits[0, -1]
    assert torch.allclose(on_cpu.logits([ids])[0].float(), exact, atol=1e-4)
    kept = Policy.from_pretrained(tmp_path, device="cpu", dtype=dtype)
    assert kept.model.dtype == kept.geometry.dtype == dtype
    assert (kept.logits([ids])[0].float() - exact).abs().max() < 0.05 * exact.abs().max()
    mrm = MultifurcationRewardModel(kept.model, made)
    (result,) = SaffronSearch(kept, mrm, SearchConfig(width=3, max_new_tokens=6)).generate("hello there")
    assert len(result.token_ids) == 6 and result.text == kept.decode(result.token_ids)


def test_any_of_several_end_tokens_ends_an_answer(tmp_path: Path) -> None:
    folder = tiny.save_checkpoint(tmp_path)
    GenerationConfig(eos_token_id=[1, 40, 41]).save_pretrained(folder)
    policy = Policy.from_pretrained(folder, device="cpu")
    assert policy.eos_token_id == (1, 40, 41)
    mrm = MultifurcationRewardModel(tiny.model(seed=1, vocab_size=policy.vocab_size), policy.tokenizer)
    models = tiny.trio()._replace(policy=policy, mrm=mrm)
    ends = set()
    for first, second in ((40, 41), (41, 40)):
        with torch.no_grad():  # of the two it likes one best, whatever it has read, and nothing else at all
            head = policy.model.get_output_embeddings().weight.zero_()
            head[first], head[second] = 20, -20
        for spec in ("greedy", "sample", "saffron:width=2", "args-mrm", "cards-mrm:attempts=1"):
            method = parse_method(spec, models, max_new_tokens=64, min_new_tokens=2, top_p=0.5)
            (result,) = method.generate("hello there")
            assert result.finish_reason == "eos" and len(result.token_ids) == 3
            assert [token in policy.eos_token_id for token in result.token_ids] == [False, False, True]
            ends.add(result.token_ids[-1])
    assert ends == {40, 41}


def test_files_of_gguf_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "model.gguf"):
        with pytest.raises(CheckpointError, match=r"a GGUF file, .* convert it to a folder first \(docs/defend.md\)"):
            Policy.from_pretrained(path)


@pytest.mark.parametrize(
    "given", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "gptq", "bits": 8}]
)
def test_quantised_weights_are_refused(given: dict[str, object], tmp_path: Path) -> None:
    folder = tiny.save_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": given}))
    with pytest.raises(UnsupportedModelError, match=rf"quantised \({given['quant_method']}\); expected fp32"):
        Policy.from_pretrained(folder)


def test_prompts_that_leave_a_thought_open_are_refused() -> None:
    made = tiny.tokenizer()
    made.add_tokens(["<think>", "</think>"])
    made.chat_template = THINKING
    model = tiny.model(vocab_size=len(made))
    with pytest.raises(ConfigError, match="leaves a chain of thought open .*'enable_thinking': False"):
        Policy(model, made).chat("hello there")
    closed = Policy(model, made, chat_template_kwargs={"enable_thinking": False})
    assert made.decode(closed.chat("hello there")).endswith("<think>\n</think>\n")
    # What a user writes of it is text, and closes nothing.
    assert closed.chat("hello <think>", "the quick")
    with pytest.raises(ConfigError, match="chain of thought"):
        Policy(model, made).chat("hello </think>", "the </think> quick")
    thought = made.convert_tokens_to_ids("</think>")
    assert Policy(model, made).chat("hello there", [thought])[-1] == thought
