"""What the defence costs: Saffron search of width 1 to 64 against undefended greedy decoding of the same policy.

A random Llama policy of 8 layers and hidden size 512 and an MRM of 4 layers and 256; prompt 128, 16 new tokens. Times
are of whole answers, the prompt included: divide by `tokens` for the time per token.
"""

from __future__ import annotations

import functools

import pytest
import torch
from harness import Case
from timing import DEVICE
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from saffron import GreedyDecoding, MultifurcationRewardModel, Policy, Request, SaffronSearch, SearchConfig
from saffron.search import GreedyConfig
from saffron_kernels import backend

VOCAB, PROMPT, NEW_TOKENS = 8192, 128, 16
WIDTHS = [1, 2, 4, 8, 16, 32, 64]


def random_llama(seed: int, layers: int, hidden: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        max_position_embeddings=512,
        initializer_range=0.1,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().to(DEVICE)
    model.lm_head.weight.data.mul_(2.5)  # nuclei of some tens of tokens, as a trained model has
    return model


@functools.cache
def models() -> tuple[PreTrainedModel, Policy, MultifurcationRewardModel]:
    """The policy as transformers runs it, the same over the trie cache, and the MRM."""
    return random_llama(0, 8, 512), Policy(random_llama(0, 8, 512)), MultifurcationRewardModel(random_llama(1, 4, 256))


@pytest.mark.parametrize("width", WIDTHS)
def test_saffron_width(race, width: int) -> None:
    plain, policy, mrm = models()
    prompt = torch.randint(2, VOCAB, (PROMPT,), generator=torch.Generator().manual_seed(2)).tolist()
    config = SearchConfig(width=width, top_p=0.8, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    search, request = SaffronSearch(policy, mrm, config), Request(tuple(prompt), tuple(prompt))
    config = GreedyConfig(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
    greedy, ids = GreedyDecoding(policy, config=config), torch.tensor([prompt], device=DEVICE)

    def defended() -> list[int]:
        return search.search([request])[0].tokens

    def over_the_trie() -> list[int]:
        return greedy.search([request])[0].tokens

    def by_transformers() -> list[int]:
        out = plain.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        return out[0, PROMPT:].tolist()

    with backend("reference"):
        expected = defended()
    assert defended() == expected and len(expected) == NEW_TOKENS
    assert over_the_trie() == by_transformers()
    race(Case(
        op="saffron_width",
        shape={"layers": 8, "hidden": 512, "vocab": VOCAB, "prompt": PROMPT, "tokens": NEW_TOKENS, "width": width},
        dtype=torch.float32,
        work=0,
        bytes=0,
        ours=defended,
        contenders={"greedy, trie": over_the_trie, "greedy, transformers": by_transformers},
    ), seconds=2.0)  # fmt: skip
