"""The same tokens as with vLLM's own attention, case by case: on a small random Llama, and on a real model.

Each backend runs all cases in a process of its own; `vllm.sh` next to this file runs everything that needs vLLM.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
SCRIPT = Path(__file__).parents[1] / "support" / "vllm_run.py"
LLAMA: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}  # fmt: skip
Results = dict[str, dict[str, Any]]

FP32 = [
    "caching", "plain", "chunks", "chunks, plain", "block 1", "block 16", "block 128", "preemption",
    "preemption, block 1", "lora", "compiled", "speculative",
]  # fmt: skip
HALVES = ["bfloat16", "float16"]
REAL = ["caching", "chunks, plain", "block 1", "preemption", "compiled"]
# vLLM's own kernel takes blocks of multiples of 32 alone: there the answers of another case are what is right.
STAND_IN = {"block 1": "chunks, plain", "block 16": "chunks, plain", "preemption, block 1": "preemption"}


def save_adapter(folder: Path, rank: int = 4) -> None:
    """LoRA matrices on all projections of Q, in the format of PEFT."""
    torch.manual_seed(1)
    width, prefix = LLAMA["hidden_size"], "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (rank, width), "B": (width, rank)}
    layers = range(tiny.SHAPE["num_hidden_layers"])  # type: ignore[call-overload]
    folder.mkdir()
    save_file(
        {prefix.format(i, name): 0.3 * torch.randn(shape) for i in layers for name, shape in shapes.items()},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def run(model: Path, cases: list[str], ours: str) -> Results:
    output = model / f"answers-{ours}.json"
    command = [sys.executable, str(SCRIPT), str(model), str(output), *cases]
    done = subprocess.run(command, env=os.environ | {"SAFFRON_VLLM": ours}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


def both(model: Path, cases: list[str]) -> tuple[Results, Results]:
    """(vLLM's own, ours), at the same time."""
    with ThreadPoolExecutor(2) as threads:
        theirs = threads.submit(run, model, [case for case in cases if case not in STAND_IN], "0")
        ours = threads.submit(run, model, cases, "1")
        return theirs.result(), ours.result()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Results]:
    """A Llama with grouped heads and random weights, and an adapter for it."""
    folder = tmp_path_factory.mktemp("llama")
    tiny.save_checkpoint(folder, **LLAMA)
    save_adapter(folder / "adapter")
    shared = [2 + 7 * i % 250 for i in range(200)]
    prompts = [shared + [i + 5] * 5 for i in range(6)] + [[7, 8, 9]]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return both(folder, [*HALVES, *FP32])  # with either attention vLLM 0.32 starts no engine after speculation


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Results]:
    """SmolLM2-135M-Instruct under a system prompt that its requests share."""
    source = os.environ.get("SAFFRON_TEST_MODEL")
    if source is None:
        pytest.skip("SAFFRON_TEST_MODEL does not name the folder that reproduce.real_text.convert writes")
    folder = tmp_path_factory.mktemp("real")
    for file in Path(source).iterdir():
        (folder / file.name).symlink_to(file.resolve())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    system = (
        "You are a careful assistant of a garden shop. Answer in one sentence. The shop sells seeds, benches, sheds, "
        "tools and soil, and it is open from nine to five on every day but Sunday. "
    ) * 5
    asked = ["How do I build a bench?", "When are you open?", "Which soil do roses need?", "Write a poem about spring."]
    prompts = [tokenizer(f"{system}User: {text}")["input_ids"] for text in asked] + [tokenizer("Hello")["input_ids"]]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    return both(folder, [*REAL, "bfloat16"])


def check_equal(results: tuple[Results, Results], case: str) -> None:
    theirs, ours = (found[name] for found, name in zip(results, (STAND_IN.get(case, case), case), strict=True))
    assert "error" not in theirs and "error" not in ours, (theirs.get("error"), ours.get("error"))
    assert (theirs["backend"], ours["backend"]) == ("CPUAttentionBackendImpl", "SaffronAttention")
    for kind in ("greedy", "samples", "groups", "adapter", "beams"):
        assert ours.get(kind) == theirs.get(kind), kind
    if case == "lora":
        # Every other request asks for the adapter. On CPUs vLLM 0.32 gives it to all rows of a mixed batch, with either
        # attention: the index -1, which stands for none, picks the last one.
        assert all(a != b for a, b in zip(ours["adapter"][1::2], ours["greedy"][1::2], strict=True))
    assert ours["again"] == ours["greedy"]
    if case.startswith("preemption"):
        assert ours["preemptions"] > 0 and theirs["preemptions"] > 0
    if "probabilities" in theirs:
        assert error(ours["probabilities"], theirs["probabilities"]) < 1e-4


def error(one: list[list[float]], other: list[list[float]]) -> float:
    pairs = [pair for rows in zip(one, other, strict=True) for pair in zip(*rows, strict=True)]
    return max(abs(a - b) for a, b in pairs)


@pytest.mark.parametrize("case", FP32)
def test_a_small_llama(small: tuple[Results, Results], case: str) -> None:
    check_equal(small, case)


@pytest.mark.parametrize("case", REAL)
def test_a_real_model(real: tuple[Results, Results], case: str) -> None:
    check_equal(real, case)


@pytest.mark.parametrize("model, case", [("small", "bfloat16"), ("small", "float16"), ("real", "bfloat16")])
def test_16_bits_round_no_worse(request: pytest.FixtureRequest, model: str, case: str) -> None:
    """Tokens may differ there, as the two round elsewhere; log-probabilities are as near to those of fp32."""
    theirs, ours = request.getfixturevalue(model)
    exact = theirs["caching"]["probabilities"]
    assert ours[case]["backend"] == "SaffronAttention"
    own, other = (error(found[case]["probabilities"], exact) for found in (ours, theirs))
    assert 0 < own <= 2 * other


@pytest.mark.parametrize("kind, message", [("mistral", "a sliding window"), ("gemma2", "a sliding window|soft-capped")])
def test_models_that_are_not_served_are_refused(tmp_path: Path, kind: str, message: str) -> None:
    shape = {name: value for name, value in tiny.SHAPE.items() if name != "pad_token_id"} | LLAMA | {"vocab_size": 300}
    model = {
        "mistral": lambda: MistralForCausalLM(MistralConfig(sliding_window=64, **shape)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(head_dim=32, sliding_window=64, **shape)),
    }[kind]()
    model.save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    found = run(tmp_path, ["caching"], "1")["caching"]["error"]
    assert found.startswith("NotImplementedError: SAFFRON: ") and any(part in found for part in message.split("|"))
