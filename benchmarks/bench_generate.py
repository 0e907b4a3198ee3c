"""Beam search through `generate`: the trie cache against the caches of transformers, by beams and prompt.

A random Llama of 100 million parameters (12 layers, hidden size 768, 12 heads, 4 KV heads of 64), in fp32, on a GPU in
bf16. The prompt but its last token is cached beforehand, so a call is `tokens` decode steps; each call starts from the
same cache. `kv_mb` is what the trie has allocated, `kv_mb_dynamic` what the K and V of `DynamicCache` take in the end.

`generate_prefill` is the call for one token on an empty cache: what happens before the first decode step.

A part of the grid by default; `SAFFRON_BENCH_GRID=full` runs all of it (as a GPU does), which takes much memory.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable

import pytest
import torch
from harness import Case
from timing import DEVICE
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel, StaticCache

from saffron import TrieModel
from saffron.integrations.transformers import TrieCache
from saffron.models.attention import ATTENTION

DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
FULL = os.environ.get("SAFFRON_BENCH_GRID") == "full" or DEVICE.type == "cuda"
GRID = (
    [(beams, prompt) for beams in (1, 4, 16, 32, 64) for prompt in (128, 512, 2048, 4096)]
    if FULL
    else [(32, 128), (8, 2048), (1, 2048), (64, 512), (32, 2048)]
)
TOKENS = 4
VOCAB = 16000


@functools.cache
def models() -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same weights under our attention and under PyTorch's."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=8192,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=1,
    )
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=DTYPE).eval().to(DEVICE)
    ours = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=ATTENTION, dtype=DTYPE)
    ours.to(DEVICE).load_state_dict(theirs.state_dict(), assign=True)
    return ours.eval(), theirs


@functools.cache
def prefilled(prompt: int) -> tuple[Tensor, DynamicCache]:
    """A prompt, and the K and V of all but its last token."""
    ids = torch.randint(2, VOCAB, (1, prompt), generator=torch.Generator().manual_seed(prompt)).to(DEVICE)
    cache = DynamicCache(config=models()[1].config)
    with torch.no_grad():
        models()[1](ids[:, :-1], past_key_values=cache, logits_to_keep=1)
    return ids, cache


def beam_search(model: PreTrainedModel, ids: Tensor, beams: int, cache: object, tokens: int = TOKENS) -> Tensor:
    return model.generate(ids, past_key_values=cache, num_beams=beams, do_sample=False, max_new_tokens=tokens)


def on_trie(beams: int, prompt: int) -> tuple[Callable[[], Tensor], TrieModel]:
    ids, _ = prefilled(prompt)
    trie = TrieModel(models()[0], capacity=prompt + beams * TOKENS, grow=False)
    with torch.no_grad():
        trie.model(ids[:, :-1], past_key_values=TrieCache.from_trie(trie), logits_to_keep=1)
    return lambda: beam_search(trie.model, ids, beams, TrieCache.from_trie(trie)), trie


def on_dynamic(beams: int, prompt: int) -> tuple[Callable[[], Tensor], DynamicCache]:
    ids, start = prefilled(prompt)
    cache = copy.deepcopy(start)
    cache.batch_repeat_interleave(beams)

    def run() -> Tensor:
        result = beam_search(models()[1], ids, beams, cache)
        cache.crop(-TOKENS)
        return result

    return run, cache


def on_static(beams: int, prompt: int) -> Callable[[], Tensor]:
    ids, start = prefilled(prompt)
    cache = StaticCache(config=models()[1].config, max_cache_len=prompt + TOKENS)
    for number, layer in enumerate(start.layers):
        cache.update(layer.keys.expand(beams, -1, -1, -1), layer.values.expand(beams, -1, -1, -1), number)

    def run() -> Tensor:
        result = beam_search(models()[1], ids, beams, cache)
        for layer in cache.layers:
            layer.cumulative_length.fill_(prompt - 1)
        return result

    return run


def kv_bytes(cache: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize(("beams", "prompt"), GRID)
def test_generate(race, beams: int, prompt: int) -> None:
    ours, trie = on_trie(beams, prompt)
    dynamic, cache = on_dynamic(beams, prompt)
    static = on_static(beams, prompt)
    expected = dynamic()
    if torch.float32 == DTYPE:  # bf16 rounds differently where matrix products have other shapes
        assert torch.equal(ours(), expected) and torch.equal(static(), expected)
    ends = kv_bytes(cache) // (prompt - 1) * (prompt + TOKENS - 1)  # what it was before `dynamic` cut it back
    race(Case(
        op="generate",
        shape={
            "beams": beams,
            "prompt": prompt,
            "tokens": TOKENS,
            "kv_mb": round((trie.kv.k.nbytes + trie.kv.v.nbytes) / 1e6, 1),
            "kv_mb_dynamic": round(ends / 1e6, 1),
        },
        dtype=DTYPE,
        work=0,
        bytes=0,
        ours=ours,
        contenders={"DynamicCache": dynamic, "StaticCache": static},
    ), seconds=1.0)  # fmt: skip


@pytest.mark.parametrize(("beams", "prompt"), GRID if FULL else [(8, 128)])
def test_generate_prefill(race, beams: int, prompt: int) -> None:
    ids, _ = prefilled(prompt)
    ours, theirs = models()

    def on_trie() -> Tensor:
        return beam_search(ours, ids, beams, TrieCache(ours, capacity=prompt), 1)

    def on_dynamic() -> Tensor:
        return beam_search(theirs, ids, beams, DynamicCache(config=theirs.config), 1)

    if DEVICE.type == "cpu":
        assert torch.equal(on_trie(), on_dynamic())
    race(Case(
        op="generate_prefill",
        shape={"beams": beams, "prompt": prompt},
        dtype=DTYPE,
        work=0,
        bytes=0,
        ours=on_trie,
        contenders={"DynamicCache": on_dynamic},
    ), seconds=1.0)  # fmt: skip
