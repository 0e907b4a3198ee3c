"""`generate` on a TrieCache: token for token what DynamicCache gives, in every mode, for every architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.generation import utils as generation

from saffron.integrations.transformers import TrieCache

PROMPT = [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]
BATCH = [PROMPT, [5, 6, 7, 40], [50, 51, 52, 53, 54, 55, 56]]
NEW_TOKENS = 14


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """Rows padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[2] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def contrastive_search(model: PreTrainedModel, input_ids: Tensor, **options: Any) -> Tensor:
    """Su et al. 2022: the candidate that is likely and unlike what stands there; what `generate` itself did once."""
    past_key_values: Cache = options["past_key_values"]
    rows, k, alpha = len(input_ids), 4, 0.6
    output = model(input_ids, past_key_values=past_key_values, output_hidden_states=True)
    hidden, logits = output.hidden_states[-1], output.logits[:, -1]
    for _step in range(NEW_TOKENS):
        p, tokens = logits.softmax(-1).topk(k)
        past_key_values.batch_repeat_interleave(k)
        output = model(tokens.reshape(-1, 1), past_key_values=past_key_values, output_hidden_states=True)
        new = output.hidden_states[-1].reshape(rows, k, -1)
        alike = cosine_similarity(new[:, :, None], hidden[:, None], dim=-1).amax(-1)
        best = ((1 - alpha) * p - alpha * alike).argmax(-1)
        row = torch.arange(rows)
        past_key_values.batch_select_indices(row * k + best)
        hidden = torch.cat([hidden, new[row, best][:, None]], 1)
        logits = output.logits.reshape(rows, k, -1)[row, best]
        input_ids = torch.cat([input_ids, tokens[row, best][:, None]], 1)
    return input_ids


def diverse_beams(model: PreTrainedModel, input_ids: Tensor, **options: Any) -> Tensor:
    """Vijayakumar et al. 2018: groups of beams, each penalised for the tokens that earlier groups took."""
    past_key_values: Cache = options["past_key_values"]
    groups, width, penalty = 3, 2, 0.5
    beams = groups * width
    ids = input_ids.repeat_interleave(beams, 0)
    scores = torch.zeros(groups, width)
    scores[:, 1:] = -1e9
    logits = model(ids, past_key_values=past_key_values).logits[:, -1]
    for _step in range(NEW_TOKENS):
        log_p = logits.log_softmax(-1).reshape(groups, width, -1)
        vocab = log_p.shape[-1]
        taken = torch.zeros(vocab)
        parents, tokens = torch.empty(groups, width, dtype=torch.long), torch.empty(groups, width, dtype=torch.long)
        for group in range(groups):
            total = scores[group][:, None] + log_p[group]
            best = (total - penalty * taken).reshape(-1).topk(width).indices
            scores[group] = total.reshape(-1)[best]
            parents[group], tokens[group] = group * width + best // vocab, best % vocab
            taken += torch.bincount(tokens[group], minlength=vocab)
        ids = torch.cat([ids[parents.reshape(-1)], tokens.reshape(-1, 1)], 1)
        past_key_values.reorder_cache(parents.reshape(-1))
        logits = model(tokens.reshape(-1, 1), past_key_values=past_key_values).logits[:, -1]
    return ids


MODES: dict[str, Callable[[], dict[str, Any]]] = {
    "greedy": lambda: padded(BATCH),
    "sampling": lambda: {**padded(BATCH), "do_sample": True},
    "return sequences": lambda: {**padded(BATCH), "do_sample": True, "num_return_sequences": 4, "top_k": 5},
    "beam search": lambda: {**padded(BATCH), "num_beams": 5},
    "beam search, all beams": lambda: {**padded([PROMPT]), "num_beams": 5, "num_return_sequences": 5},
    "beam sampling": lambda: {**padded(BATCH), "num_beams": 3, "do_sample": True},
    "prefill in chunks": lambda: {**padded(BATCH), "num_beams": 3, "prefill_chunk_size": 4},
    "prompt lookup": lambda: {**padded([PROMPT]), "prompt_lookup_num_tokens": 3},
    "assistant": lambda: {**padded([PROMPT]), "assistant_model": tiny.model(seed=1, attention="sdpa")},
    "assistant, sampling": lambda: {
        **padded([PROMPT]),
        "assistant_model": tiny.model(seed=1, attention="sdpa"),
        "do_sample": True,
    },
    "contrastive": lambda: {**padded([PROMPT, PROMPT[::-1]]), "custom_generate": contrastive_search},
    "diverse beams": lambda: {**padded([PROMPT]), "custom_generate": diverse_beams},
}


def run(model: PreTrainedModel, cache: Cache, **options: Any) -> Tensor:
    torch.manual_seed(0)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 2, **options}
    return model.generate(past_key_values=cache, **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_generate_equals_dynamic_cache(architecture: str, mode: str) -> None:
    ours, theirs = tiny.model(architecture), tiny.model(architecture, attention="sdpa")
    expected = run(theirs, DynamicCache(config=theirs.config), **MODES[mode]())
    assert torch.equal(run(ours, TrieCache(ours), **MODES[mode]()), expected)
    assert len(expected[:, -NEW_TOKENS:].unique()) > 4  # a model that repeats itself would test little


@pytest.mark.parametrize("options", [{"penalty_alpha": 0.6, "top_k": 4}, {"num_beams": 4, "num_beam_groups": 2}])
def test_modes_that_left_transformers(options: dict[str, Any]) -> None:
    """Tested where they exist; above, their algorithms run on the cache's operations."""
    mode = "CONTRASTIVE_SEARCH" if "penalty_alpha" in options else "GROUP_BEAM_SEARCH"
    home = generation.GENERATION_MODES_MAPPING[generation.GenerationMode[mode]]
    if "/" in home:
        pytest.skip(f"this transformers has no {mode.lower()}: it would load code from {home}")
    ours, theirs = tiny.model(), tiny.model(attention="sdpa")
    expected = run(theirs, DynamicCache(config=theirs.config), **padded([PROMPT]), **options)
    assert torch.equal(run(ours, TrieCache(ours), **padded([PROMPT]), **options), expected)


def test_a_prompt_is_computed_and_stored_once() -> None:
    ours = tiny.model()
    cache = TrieCache(ours)
    with tiny.count_tokens(ours) as tokens:
        prompt = torch.arange(3, 53)[None]
        run(ours, cache, input_ids=prompt, num_beams=8, min_new_tokens=NEW_TOKENS)
    assert tokens[0] == 50  # not 8 times as many
    assert len(tokens) == NEW_TOKENS and all(t <= 8 for t in tokens[1:])
    kv = cache.trie.kv
    assert kv.num_nodes <= 50 + 8 * (NEW_TOKENS - 1)
    assert kv.num_nodes == kv.index.num_held  # nothing but live prefixes


def test_equal_rows_are_computed_once() -> None:
    ours = tiny.model()
    cache = TrieCache(ours)
    with tiny.count_tokens(ours) as tokens:
        run(ours, cache, input_ids=torch.tensor([PROMPT] * 6))
    assert tokens[0] == len(PROMPT) and set(tokens[1:]) == {1}


def test_reordering_moves_no_keys_and_values() -> None:
    ours = tiny.model()
    cache = TrieCache(ours)
    with torch.no_grad():
        ours(torch.tensor(BATCH[:1] * 2 + [PROMPT[::-1]]), past_key_values=cache)
    kv = cache.trie.kv
    before, address = kv.k.clone(), kv.k.data_ptr()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([0, 4, 8]))
    assert torch.equal(kv.k, before) and kv.k.data_ptr() == address
    assert cache.batch_size == 3 and cache.get_seq_length() == len(PROMPT)


# --- from one call to the next ---------------------------------------------------------------------------------------


def test_a_later_call_computes_what_is_new() -> None:
    ours, theirs = tiny.model(), tiny.model(attention="sdpa")
    trie = TrieCache(ours).trie
    system = list(range(10, 40))
    with tiny.count_tokens(ours) as tokens:
        run(ours, TrieCache.from_trie(trie), input_ids=torch.tensor([[*system, 3, 4]]), num_beams=2)
        assert tokens[0] == 32
        tokens.clear()
        prompts = padded([[*system, 5], [*system, 3, 4, 6], [7, 8]])
        answer = run(ours, TrieCache.from_trie(trie), **prompts, eos_token_id=None)
        assert tokens[0] == 1 + 1 + 2
        assert torch.equal(answer, run(theirs, DynamicCache(config=theirs.config), **prompts, eos_token_id=None))
        tokens.clear()
        turn = torch.cat([answer[1:2], torch.tensor([[60, 61]])], 1)  # the next turn of one of them
        again = run(ours, TrieCache.from_trie(trie), input_ids=turn)
        assert tokens[0] == 3  # the last token of an answer was never fed to the model
        assert torch.equal(again, run(theirs, DynamicCache(config=theirs.config), input_ids=turn))


def test_turns_on_one_cache() -> None:
    """As with DynamicCache: the whole text is passed again, and the rest of it runs; rows are padded between turns."""
    ours, theirs = tiny.model(), tiny.model(attention="sdpa")
    caches = {theirs: DynamicCache(config=theirs.config), ours: TrieCache(ours)}
    answers = []
    for model, cache in caches.items():
        first = padded(BATCH)
        answer = run(model, cache, **first, eos_token_id=None)
        second = padded([[60, 61], [62], [63, 64, 65]])
        old = torch.cat([first["attention_mask"], torch.ones(3, NEW_TOKENS, dtype=torch.long)], 1)
        answers.append(
            run(
                model,
                cache,
                input_ids=torch.cat([answer, second["input_ids"]], 1),
                attention_mask=torch.cat([old, second["attention_mask"]], 1),
            )
        )
    assert torch.equal(*answers)


def test_a_limited_trie_evicts_what_was_used_least_recently() -> None:
    ours, theirs = tiny.model(), tiny.model(attention="sdpa")
    trie = TrieCache(ours, capacity=64, grow=False).trie
    prompts = [[i, *range(50, 69)] for i in range(3, 7)]  # 20 tokens and 13 of the answer each
    forwarded = []
    with tiny.count_tokens(ours) as tokens:
        for which in (0, 1, 0, 2, 0, 1):
            ids = torch.tensor([prompts[which]])
            tokens.clear()
            options = {"input_ids": ids, "eos_token_id": None}
            answer = run(ours, TrieCache.from_trie(trie), **options)
            forwarded.append(tokens[0])
            assert torch.equal(answer, run(theirs, DynamicCache(config=theirs.config), **options))
            assert trie.kv.num_nodes <= trie.kv.capacity == 64
    assert forwarded[:2] == [20, 20] and forwarded[2] == 1  # 0 was used last but one, and its prompt is still there
    assert forwarded[4] == 1 and forwarded[5] > 10  # 1 made room
