"""One decode step at serving scale on a GPU: Saffron search captured in CUDA graphs, and step by step.

Random weights in the geometry of Llama-3-8B and, for the MRM, Llama-3.2-1B, bf16. The floor of a step is reading the
weights of both once: the embeddings are gathered, the MRM's head is read where candidates name it. Times are those of
a whole search over its steps, so a share of the prefill is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from unittest.mock import patch

import pytest
import torch
from harness import Case, on_backend, usable
from timing import DEVICE
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from saffron import MultifurcationRewardModel, Policy, Request, SaffronSearch, SearchConfig
from saffron.models.attention import ATTENTION
from saffron.search import model_pair

VOCAB, WIDTH, NEW_TOKENS = 128_256, 32, 64
POLICY = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128}
MRM = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}

Search = Callable[[], list[int]]


def random_llama(seed: int, dtype: torch.dtype, vocab: int, **geometry: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=vocab,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
        bos_token_id=0,
        eos_token_id=1,
        **geometry,
    )
    torch.manual_seed(seed)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=ATTENTION)
    return model.eval()


def weight_bytes(model: PreTrainedModel) -> int:
    """Of what a step reads whole: all but the embeddings, of which it gathers rows."""
    return sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes


def search_of(models: tuple[Policy, MultifurcationRewardModel], config: SearchConfig, ids: tuple[int, ...]) -> Search:
    """Captured steps; the buffers and the graphs are of this search alone."""
    search = SaffronSearch(*models, config, eos_token_id=[1], capture=True)
    return lambda: search.search([Request(ids, ids)])[0].token_ids


def on_one_stream(search: Search) -> Search:
    """The same, with the MRM after the policy instead of at once with it."""

    def run() -> list[int]:
        with patch.object(model_pair, "at_once", lambda side, on_main, on_side: [on_main(), on_side()]):
            return search()

    return run


def measure_step(race, policy: PreTrainedModel, mrm: PreTrainedModel, config: SearchConfig, prompt: int) -> None:
    models, tokens = (Policy(policy), MultifurcationRewardModel(mrm)), config.max_new_tokens
    vocab, dtype = policy.config.vocab_size, policy.dtype
    ids = tuple(torch.randint(2, vocab, (prompt,), generator=torch.Generator().manual_seed(2)).tolist())
    plain, ours = SaffronSearch(*models, config, eos_token_id=[1]), search_of(models, config, ids)
    expected = ours()

    def check(result: object) -> None:
        """The same tokens every time. Another backend or another plan may round to others in bf16."""
        assert isinstance(result, list) and len(result) == tokens, "another number of tokens"

    assert len(expected) == tokens and ours() == expected
    others = usable({
        "cuda backend": partial(on_backend, "cuda", search_of(models, config, ids)),
        "one stream": partial(on_one_stream, search_of(models, config, ids)),
    }, check)  # fmt: skip
    contenders = {"step by step": lambda: plain.search([Request(ids, ids)])[0].token_ids, **others}
    race(Case(
        op="decode_step",
        shape={
            "policy_layers": policy.config.num_hidden_layers, "policy_hidden": policy.config.hidden_size,
            "mrm_layers": mrm.config.num_hidden_layers, "mrm_hidden": mrm.config.hidden_size,
            "prompt": prompt, "width": config.width, "tokens": tokens,
        },
        dtype=dtype,
        work=0,
        bytes=weight_bytes(policy) + weight_bytes(mrm.base_model),
        ours=ours,
        contenders=contenders,
        part=dict.fromkeys(["", *contenders], float(tokens)),
    ), seconds=5.0)  # fmt: skip


@pytest.fixture(scope="module")
def models() -> Iterator[tuple[PreTrainedModel, ...]]:
    """Shared by the prompts: they take longer to make than to measure."""
    yield tuple(random_llama(seed, torch.bfloat16, VOCAB, **geometry) for seed, geometry in enumerate((POLICY, MRM)))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU: models of 9 billion parameters")
@pytest.mark.parametrize("prompt", [512, 4096])
def test_decode_step(race, models: tuple[PreTrainedModel, ...], prompt: int) -> None:
    config = SearchConfig(width=WIDTH, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    measure_step(race, *models, config, prompt)
