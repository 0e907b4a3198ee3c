"""Every causal model class of the installed transformers: equal to eager attention, or refused by name.

All parameters are random, so that biases, norms, learned masks and scales count.
"""

from __future__ import annotations

import warnings
from typing import Any

import architectures
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from saffron import TrieModel
from saffron.errors import UnsupportedModelError
from saffron.integrations.transformers import TrieCache
from saffron.models.attention import TrieStep

NAMES = [name for name in architectures.classes() if name not in architectures.NOT_BUILT]
TEXTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [5, 6, 7, 20], [30, 31, 5, 6, 7, 8]]
PADDED = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 11], [2, 2, 2, 30, 31, 5, 6]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]]),
}
TOLERANCE = 1e-4  # of the largest logit

REASONS = (
    "encoder-decoder", "layers are not served", "standard attention interface", "twice", "mask", "bidirectional",
    "K and V", "ALiBi", "keyword arguments", "order of tokens", "logits_to_keep", "it returns",
    "run attention once", "positions", "cannot serve",
)  # fmt: skip


class Differs(AssertionError):
    pass


def same(ours: Tensor, theirs: Tensor) -> None:
    difference = (ours - theirs).abs().max().item()
    if not difference <= TOLERANCE * theirs.abs().max().item():
        raise Differs(f"logits differ by {difference}, of at most {theirs.abs().max().item()}")


def search(trie: TrieModel, eager: PreTrainedModel, texts: list[list[int]], steps: int = 4) -> None:
    """A prefill of several texts, and steps in which branches fork and end."""

    @torch.no_grad()
    def dense(texts: list[list[int]]) -> Tensor:
        return torch.stack([eager(torch.tensor([text]), use_cache=False).logits[0, -1] for text in texts])

    choose = np.random.default_rng(0)
    rows, logits = trie.prefill(texts)
    same(logits, dense(texts))
    for _ in range(steps):
        parents = sorted(choose.integers(0, len(texts), size=4).tolist())
        tokens = choose.integers(2, 90, size=4).tolist()
        texts = [[*texts[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        logits = trie.step(rows, parents, tokens)
        same(logits, dense(texts))
    trie.release(rows)


def generate(ours: PreTrainedModel, eager: PreTrainedModel, **options: Any) -> None:
    """Beams and a prefill in chunks, against the cache that the model brings along."""
    options = {
        "max_new_tokens": 9, "do_sample": False, "num_beams": 3, "pad_token_id": 2, "eos_token_id": None, **options,
    }  # fmt: skip
    expected = eager.generate(**PADDED, **options)
    for more in ({}, {"prefill_chunk_size": 3}):
        answer = ours.generate(**PADDED, past_key_values=TrieCache(ours), **options, **more)
        if not torch.equal(answer, expected):
            raise Differs(f"generate: {answer.tolist()}, expected {expected.tolist()}")


def outcome(name: str, texts: list[list[int]] = TEXTS, **changes: Any) -> str:
    """ "equal", or why the model was refused, at construction. Anything else is raised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, eager = (architectures.model(name, "eager", **changes) for _ in range(2))
        try:
            trie = TrieModel(ours)
            TrieCache.from_trie(trie)
        except UnsupportedModelError as error:
            told_by_the_cache = "logits_to_keep" in str(error) or "it returns" in str(error)
            assert ours.config._attn_implementation == "eager" or told_by_the_cache
            return str(error)
        search(trie, eager, texts)
        generate(ours, eager)
    return "equal"


# What is served: a release of transformers or of ours that refuses one of these is to be noticed.
SERVED = {
    "GPT2", "Afmoe", "Apertus", "Arcee", "AriaText", "BitNet", "Cohere", "Cohere2", "Cohere2Moe", "CTRL", "Cwm",
    "Dots1", "Ernie4_5", "Ernie4_5_Moe", "Exaone4", "ExaoneMoe", "FlexOlmo", "Gemma", "Gemma3Text", "Glm", "Glm4",
    "Glm4Moe", "GPTBigCode", "GPTNeoX", "Granite", "GraniteMoe", "GraniteMoeShared", "Helium", "HunYuanDenseV1",
    "HunYuanMoEV1", "HYV3", "Llama", "Jais2", "JetMoe", "MiniMaxM2", "Ministral", "Ministral3", "Mistral",
    "Mixtral", "NanoChat", "Olmo", "Olmo2", "Olmo3", "Olmoe", "OPT", "Persimmon", "Phi", "Phi3", "Phimoe", "Qwen2",
    "Qwen2Moe", "Qwen3", "Qwen3Moe", "SeedOss", "SmolLM3", "SolarOpen", "Starcoder2", "Gemma2", "GptOss",
    "GraniteSWA", "GraniteMoeSWA", "Flint", "VaultGemma", "DeepseekV2", "DeepseekV3", "Glm4MoeLite", "LongcatFlash",
    "MiniCPM3", "Youtu", "AXK1", "Dbrx", "ModernBertDecoder", "Gemma3nText",
}  # fmt: skip


# What would be served wrongly in silence.
REFUSED = {
    "DiffLlama": "layer 0 runs attention twice in one step",
    "Doge": "layer 0 has an attention mask of its own",
}


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_eager_attention_or_refused(name: str) -> None:
    result = outcome(name)
    if name.removesuffix("Config") in SERVED:
        assert result == "equal"
    assert REFUSED.get(name.removesuffix("Config"), "") in result
    assert result == "equal" or any(reason in result for reason in REASONS)


ENCODERS = ["Bert", "BertGeneration", "Camembert", "Data2VecText", "Electra", "Ernie", "RoCBert", "Roberta",
            "RobertaPreLayerNorm", "XLMRoberta", "XLMRobertaXL", "Xmod"]  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_read_both_ways_unless_they_are_decoders(name: str) -> None:
    """Read causally they would answer all the same, from other logits."""
    assert "bidirectional mask" in outcome(f"{name}Config")
    result = outcome(f"{name}Config", is_decoder=True)
    if f"{name}Config" in architectures.PADDED_POSITIONS:
        assert "positions that it counts by itself do not begin at 0" in result
    else:
        assert result == "equal"


class Twice(torch.nn.Module):
    """A layer that runs attention twice, in a model that did not when it was inspected."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **options: Any) -> Any:
        self.layer(*args, **options)
        return self.layer(*args, **options)


class Skipped(Twice):
    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Any:
        return hidden


@pytest.mark.parametrize(("change", "message"), [(Twice, "layer 1 runs attention twice"), (Skipped, "layers 1 of 3")])
def test_models_that_change_after_they_were_inspected(change: type[Twice], message: str) -> None:
    model = architectures.model("LlamaConfig", "eager")
    trie = TrieModel(model)
    caches = [TrieCache.from_trie(trie), TrieCache(model)]
    with torch.no_grad():
        model(torch.tensor([[5, 6]]), past_key_values=caches[1])
    layers = model.model.layers
    layers[1] = change(layers[1])
    with pytest.raises(UnsupportedModelError, match=message):
        trie.prefill([[5, 6]])
    for cache in caches:
        with torch.no_grad(), pytest.raises(UnsupportedModelError, match=message):
            model(torch.tensor([[7, 8]]), past_key_values=cache)
    assert trie.kv.num_nodes == 0  # what was not computed is not found again


def test_masks_are_not_dropped() -> None:
    trie = TrieModel(architectures.model("LlamaConfig", "eager"))
    fill = trie.kv.insert([[5, 6, 7]])
    step = TrieStep(trie.kv, fill.step)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="layer 0: got an attention mask of its own"):
        trie.model(fill.tokens[None], **{**step.arguments(), "attention_mask": torch.zeros(1, 1, 3, 3)})


ROPES: dict[str, dict[str, Any]] = {
    "Phi3Config": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "original_max_position_embeddings": 12,
    },
    "LlamaConfig": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 12},
}


@pytest.mark.parametrize("name", ROPES)
def test_rotary_embeddings_that_change_with_the_length(name: str) -> None:
    """A prefix that is cached would be rotated differently in a longer text."""
    changes = {"rope_parameters": ROPES[name], "max_position_embeddings": 12, "original_max_position_embeddings": 12}
    ours, eager = (architectures.model(name, "eager", **changes) for _ in range(2))
    trie = TrieModel(ours)
    search(trie, eager, [text[:8] for text in TEXTS], steps=4)
    rows, _ = trie.prefill([list(range(5, 17))])
    message = "change with the text's length beyond 12 tokens .* the text has 13"
    with pytest.raises(UnsupportedModelError, match=message):
        trie.step(rows, [0], [3])
    with pytest.raises(UnsupportedModelError, match=message):
        trie.prefill([list(range(5, 18))])
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=message):
        ours(torch.arange(5, 18)[None], past_key_values=TrieCache.from_trie(trie))
    assert trie.kv.num_nodes == 12
