"""The attention backend in vLLM: the same tokens as with vLLM's own, and nothing where it cannot serve."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from saffron.integrations import vllm as integration

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
SCRIPT = Path(__file__).parents[1] / "support" / "vllm_run.py"


def generate(model: Path, block_size: int, caching: str, ours: str) -> dict[str, object]:
    command = [sys.executable, str(SCRIPT), str(model), str(block_size), caching]
    run = subprocess.run(command, env=os.environ | {"SAFFRON_VLLM": ours}, capture_output=True, text=True)
    lines = [line for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, run.stderr[-3000:]
    return json.loads(lines[0].removeprefix("RESULT "))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with grouped heads and random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@needs_vllm
@pytest.mark.parametrize("caching", ["caching", "plain"])
def test_equals_vllms_own_attention(model: Path, caching: str) -> None:
    """Greedy and sampled tokens, with and without prefix caching; prompts in chunks; and with a block size of 1."""
    theirs = generate(model, 32, caching, "0")
    for block_size in (32, 1):
        ours = generate(model, block_size, caching, "1")
        assert (theirs.pop("backend", "CPUAttentionBackendImpl"), ours.pop("backend")) == (
            "CPUAttentionBackendImpl",
            "SaffronAttention",
        )
        assert ours == theirs


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAFFRON_VLLM", raising=False)
    assert integration.why_not("0.32.0") is None and integration.why_not("0.32.1rc1") is None
    assert "0.33.0" in str(integration.why_not("0.33.0")) and "0.320.0" in str(integration.why_not("0.320.0"))
    monkeypatch.setenv("SAFFRON_VLLM", "force")
    assert integration.why_not("0.33.0") is None


@needs_vllm
@pytest.mark.parametrize(
    "option, value, message",
    [
        ("alibi_slopes", [1.0], "ALiBi"),
        ("sliding_window", 8, "sliding window"),
        ("logits_soft_cap", 30.0, "soft-capped"),
        ("attn_type", "encoder", "encoder"),
        ("kv_sharing_target_layer_name", "a", "KV sharing"),
        ("sinks", torch.zeros(4), "sinks"),
        ("kv_cache_dtype", "fp8", "fp8"),
    ],
)
def test_what_is_not_served_is_refused(option: str, value: object, message: str) -> None:
    from saffron.integrations.vllm.backend import SaffronAttention

    with pytest.raises(NotImplementedError, match=message):
        SaffronAttention(4, 32, 0.2, 2, **{option: value})


@needs_vllm
def test_the_environment_variable_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFFRON_VLLM", "yes")
    with pytest.raises(ValueError, match="SAFFRON_VLLM"):
        integration.register()
