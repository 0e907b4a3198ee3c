"""A whole search at the speed point, against the same search on the reference backend.

Random Llama models of 4 layers, hidden size 256 and a vocabulary of 4096; prompt 512, 32 beams, 32 new tokens.
"""

from __future__ import annotations

import torch
from harness import Case
from timing import DEVICE
from transformers import AutoModelForCausalLM, LlamaConfig

from saffron import MultifurcationRewardModel, Policy, Request, SaffronSearch, SearchConfig
from saffron.models.attention import ATTENTION
from saffron_kernels import backend

VOCAB, PROMPT, WIDTH, NEW_TOKENS = 4096, 512, 32, 32


def random_llama(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).eval().to(DEVICE)


def random_models() -> tuple[Policy, MultifurcationRewardModel]:
    return Policy(random_llama(0)), MultifurcationRewardModel(random_llama(1))


def random_request(tokens: int) -> Request:
    prompt = tuple(torch.randint(2, VOCAB, (tokens,), generator=torch.Generator().manual_seed(2)).tolist())
    return Request(prompt, prompt)


def test_search(race) -> None:
    config = SearchConfig(width=WIDTH, top_p=0.8, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    search, request = SaffronSearch(*random_models(), config, eos_token_id=[1]), random_request(PROMPT)

    def run() -> list[int]:
        return search.search([request])[0].token_ids

    def on_reference() -> list[int]:
        with backend("reference"):
            return run()

    assert run() == on_reference() == run()
    race(Case(
        op="search",
        shape={"layers": 4, "hidden": 256, "vocab": VOCAB, "prompt": PROMPT, "width": WIDTH, "tokens": NEW_TOKENS},
        dtype=torch.float32,
        work=0,
        bytes=0,
        ours=run,
        contenders={"reference backend": on_reference},
    ), seconds=15.0)  # fmt: skip
