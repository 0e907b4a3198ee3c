"""KVTrie, models and searches over caches in fp8."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F
from searches import CONFIG, REQUESTS, make, recorded, same
from torch import Tensor, nn
from transformers import AttentionInterface

from saffron.errors import ConfigError
from saffron.integrations.transformers import TrieCache
from saffron.models.trie_model import TrieModel
from saffron.search import SaffronSearch
from saffron_kernels import KVTrie, append_kv
from saffron_kernels.checks import FP8

SCALES = {"k_scale": 0.05, "v_scale": 0.03}  # of the first head; no other is alike


def scales(name: str, layers: int, kv_heads: int = 2) -> Tensor:
    return SCALES[name] * (1 + 0.3 * torch.arange(layers * kv_heads).view(layers, kv_heads))


def scaled(trie: TrieModel) -> TrieModel:
    """The model with its cache's scales set."""
    for name in SCALES:
        own = getattr(trie.kv, name)
        own.copy_(scales(name, *own.shape))
    return trie


def rounded(x: Tensor, name: str, layer: int) -> Tensor:
    """`[batch, kv_heads, tokens, head_dim]` as fp8 gives it back."""
    scale = scales(name, layer + 1)[layer][:, None, None]
    return (x / scale).clamp(-448, 448).to(FP8).to(x.dtype) * scale


def dense_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object, scaling=None, **__):
    """Causal attention over one sequence, whose K and V are rounded first."""
    key, value = rounded(key, "k_scale", module.layer_idx), rounded(value, "v_scale", module.layer_idx)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("dense_fp8", dense_attention)


def trie_model(seed: int = 0, **options) -> TrieModel:
    return scaled(TrieModel(tiny.model(seed=seed), cache_dtype=FP8, **options))


@torch.no_grad()
def dense(sequence, seed: int = 0) -> Tensor:
    return tiny.model(seed=seed, attention="dense_fp8")(torch.tensor([sequence]), use_cache=False).logits[0, -1]


# --- KVTrie ----------------------------------------------------------------------------------------------------------


def test_half_the_bytes_and_scales_of_one() -> None:
    trie, wide = KVTrie(3, 2, 8, dtype=FP8), KVTrie(3, 2, 8, dtype=torch.bfloat16)
    assert trie.k.dtype == trie.v.dtype == FP8 and 2 * trie.bytes_per_token == wide.bytes_per_token
    assert torch.equal(trie.k_scale, torch.ones(3, 2)) and torch.equal(trie.v_scale, torch.ones(3, 2))
    assert wide.k_scale is wide.v_scale is None


def test_scales_are_copied() -> None:
    given = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    trie = KVTrie(1, 2, 8, dtype=FP8, k_scale=given)
    given.fill_(7)
    assert torch.equal(trie.k_scale, torch.tensor([[1.0, 2.0]])) and torch.equal(trie.v_scale, torch.ones(1, 2))


@pytest.mark.parametrize(
    "options, error, message",
    [
        (
            {"dtype": torch.bfloat16, "k_scale": torch.ones(1, 2)},
            ValueError,
            "k_scale: got scales for caches in",
        ),
        ({"dtype": FP8, "v_scale": torch.ones(2)}, ValueError, r"v_scale: got shape \[2\], expected \[1, 2\]"),
        ({"dtype": FP8, "k_scale": torch.ones(1, 2, dtype=torch.int32)}, TypeError, "k_scale"),
        ({"dtype": FP8, "k_scale": torch.tensor([[1.0, 0.0]])}, ValueError, "k_scale: got .*, expected finite numbers"),
        ({"dtype": FP8, "k_scale": torch.tensor([[1.0, torch.nan]])}, ValueError, "k_scale"),
        ({"dtype": FP8, "v_scale": torch.tensor([[torch.inf, 1.0]])}, ValueError, "v_scale"),
        ({"dtype": torch.float8_e5m2}, ValueError, "dtype: got torch.float8_e5m2"),
        ({"dtype": torch.int8}, ValueError, "dtype: got torch.int8"),
    ],
)
def test_what_does_not_fit(options, error, message) -> None:
    with pytest.raises(error, match=message):
        KVTrie(1, 2, 8, **options)


def test_growing_keeps_what_is_cached() -> None:
    trie = KVTrie(2, 2, 16, capacity=4, dtype=FP8)
    fill = trie.insert([[1, 2, 3]])
    k = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0))
    for layer in range(2):
        append_kv(k, -k, fill.step.write_slots, trie.k[layer], trie.v[layer])
    trie.insert([[5, *range(6)]])
    assert trie.capacity > 4
    written = fill.step.write_slots.long()
    for layer in range(2):
        assert torch.equal(trie.k[layer].float()[written], k.to(FP8).float())
        assert torch.equal(trie.v[layer].float()[written], -k.to(FP8).float())


# --- models ----------------------------------------------------------------------------------------------------------

PROMPTS = [[5, 9, 33, 2, 71], [5, 9, 33, 60], [8] * 12]


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_logits_are_those_of_dense_attention_over_rounded_k_and_v(share_prefixes) -> None:
    """Prefill and steps; unrounded K and V would be far off."""
    trie = trie_model(share_prefixes=share_prefixes)
    rows, logits = trie.prefill(PROMPTS)
    for prompt, found in zip(PROMPTS, logits, strict=True):
        assert torch.allclose(found, dense(prompt), rtol=1e-4, atol=1e-4)
    parents, tokens = [0, 0, 1, 2], [4, 70, 11, 3]
    logits = trie.step(rows, parents, tokens)
    exact = TrieModel(tiny.model())
    off = 0.0
    for parent, token, found in zip(parents, tokens, logits, strict=True):
        sequence = [*PROMPTS[parent], token]
        assert torch.allclose(found, dense(sequence), rtol=1e-4, atol=1e-4)
        off = max(off, float((found - exact.logits([sequence])[0]).abs().max()))
    assert off > 0.01
    trie.release(rows)


@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float8_e5m2, torch.int8])
def test_cache_dtypes_that_are_not_served(wanted) -> None:
    with pytest.raises(ConfigError, match=f"cache_dtype: got {wanted}, expected torch.float32 or torch.float8_e4m3fn"):
        TrieModel(tiny.model(), cache_dtype=wanted)
    with pytest.raises(ConfigError, match="expected torch.float64 for a model in torch.float64"):
        TrieModel(tiny.model().double(), cache_dtype=FP8)


def test_the_models_own_dtype_may_be_named() -> None:
    named = TrieModel(tiny.model(), cache_dtype=torch.float32)
    assert torch.equal(named.logits(PROMPTS), TrieModel(tiny.model()).logits(PROMPTS))


def test_generate_over_a_cache_in_fp8() -> None:
    """Greedy: every token is the best by dense attention over rounded K and V."""
    model = tiny.model()
    cache = TrieCache(model, cache_dtype=FP8)
    scaled(cache.trie)
    out = model.generate(
        torch.tensor([PROMPTS[0]]), past_key_values=cache, max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert cache.trie.kv.k.dtype == FP8
    for n in range(len(PROMPTS[0]), out.shape[1]):
        logits = dense(out[0, :n].tolist())
        assert float(logits[out[0, n]]) >= float(logits.max()) - 1e-3


# --- searches --------------------------------------------------------------------------------------------------------


def test_captured_search_over_fp8_is_the_search_step_by_step(monkeypatch) -> None:
    policy, mrm = map(scaled, tiny.pair(3, cache_dtype=FP8))
    config = replace(CONFIG, width=4, max_new_tokens=6)
    search = make(monkeypatch, recorded, policy, mrm, config)
    found = search.search(REQUESTS)
    assert search._captured is not None and search._captured.forest is not None
    assert search._captured.forest.policy.cache.k.dtype == FP8
    same(found, SaffronSearch(policy, mrm, config).search(REQUESTS))
    wide = SaffronSearch(*tiny.pair(3), config).search(REQUESTS)
    assert any(x.score != pytest.approx(y.score, abs=1e-3) for x, y in zip(found, wide, strict=True))
