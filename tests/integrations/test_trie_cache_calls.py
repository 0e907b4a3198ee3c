"""TrieCache under calls of the model itself: operations in any order, what is refused, what failures leave behind."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from switching import in_threads
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from saffron import Policy
from saffron.errors import ConfigError, UnsupportedModelError
from saffron.integrations.transformers import TrieCache
from saffron.models.attention import ATTENTION
from saffron.models.trie_model import TrieModel
from saffron_kernels import CacheFullError

PROMPT = torch.tensor([[5, 6, 7, 8, 9]])


class Walk:
    """One batch under one cache; the same calls give the same walk."""

    def __init__(self, model: PreTrainedModel, cache: Cache, mask: Tensor) -> None:
        self.model, self.cache = model, cache
        self.mask = mask  # [rows, columns]

    def forward(self, ids: Tensor, **options: Any) -> Tensor:
        new = ids.shape[1]
        if self.mask.shape[1] == self.cache.get_seq_length():
            self.mask = torch.cat([self.mask, torch.ones_like(ids)], 1)
        positions = (self.mask.cumsum(1) - 1).clamp_min(0)[:, -new:]
        with torch.no_grad():
            output = self.model(
                ids, attention_mask=self.mask, position_ids=positions, past_key_values=self.cache, **options
            )
        return output.logits * self.mask[:, -output.logits.shape[1] :, None]  # nobody reads what stands over padding

    def select(self, rows: Tensor, reorder: bool) -> None:
        (self.cache.reorder_cache if reorder else self.cache.batch_select_indices)(rows)
        self.mask = self.mask[rows]

    def repeat(self, repeats: int) -> None:
        self.cache.batch_repeat_interleave(repeats)
        self.mask = self.mask.repeat_interleave(repeats, 0)

    def crop(self, columns: int) -> None:
        self.cache.crop(-columns)
        self.mask = self.mask[:, : self.mask.shape[1] - columns]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_operations_in_any_order(architecture: str, seed: int) -> None:
    """The logits of every token, against DynamicCache."""
    choose = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    models = tiny.model(architecture), tiny.model(architecture, attention="sdpa")
    ids = torch.randint(2, 12, (3, 8), generator=generator)  # few tokens, so that rows agree now and then
    mask = torch.ones_like(ids)
    mask[1, : choose.randrange(8)] = 0
    ours = Walk(models[0], TrieCache(models[0]), mask)
    walks = [ours, Walk(models[1], DynamicCache(config=models[1].config), mask)]

    def forward(ids: Tensor) -> None:
        a, b = (walk.forward(ids) for walk in walks)
        assert (a - b).abs().max() <= 1e-4

    forward(ids)
    for _ in range(25):
        rows = len(ours.mask)
        what = choose.choice(["forward", "forward", "forward", "select", "repeat", "crop", "fork"])
        if what == "forward":
            forward(torch.randint(2, 12, (rows, choose.choice([1, 1, 1, 2, 4])), generator=generator))
        elif what == "select":
            chosen = torch.randint(rows, (min(choose.randint(1, 6), 6),), generator=generator)
            reorder = choose.random() < 0.5
            for walk in walks:
                walk.select(chosen, reorder)
        elif what == "repeat" and rows <= 3:
            for walk in walks:
                walk.repeat(2)
        elif what == "crop" and ours.cache.get_seq_length() > 9:
            columns = choose.randint(0, ours.cache.get_seq_length() - 8)
            for walk in walks:
                walk.crop(columns)
        elif what == "fork":
            ours.cache = copy.deepcopy(ours.cache)
        assert ours.cache.get_seq_length() == walks[1].cache.get_seq_length() == ours.mask.shape[1]
        assert ours.cache.batch_size == len(ours.mask)
    ours.cache.reset()
    assert ours.cache.get_seq_length() == 0 and ours.cache.trie.kv.index.num_held == 0
    walks[1].cache = DynamicCache(config=models[1].config)  # whose own `reset` keeps the columns in transformers 5.17
    for walk in walks:
        walk.mask = mask
    forward(ids)


def test_crop_into_the_padding() -> None:
    """Rows that lose all their tokens go on from nothing."""
    models = tiny.model(), tiny.model(attention="sdpa")
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    ids = torch.tensor([[2, 2, 2, 5, 6], [5, 6, 7, 8, 9]])
    logits = []
    for model, cache in zip(models, (TrieCache(models[0]), DynamicCache(config=models[1].config)), strict=True):
        walk = Walk(model, cache, mask)
        walk.forward(ids)
        walk.crop(3)
        walk.mask = torch.cat([walk.mask, torch.tensor([[1, 1], [1, 1]])], 1)
        logits.append(walk.forward(torch.tensor([[5, 7], [7, 7]])))
        walk.crop(7)
        walk.mask = mask
        logits.append(walk.forward(ids))
    assert (logits[0] - logits[2]).abs().max() <= 1e-4 and (logits[1] - logits[3]).abs().max() <= 1e-4


def test_crop_over_padding_between_turns() -> None:
    models = tiny.model(), tiny.model(attention="sdpa")
    logits = []
    for model, cache in zip(models, (TrieCache(models[0]), DynamicCache(config=models[1].config)), strict=True):
        walk = Walk(model, cache, torch.ones(2, 5, dtype=torch.long))
        walk.forward(torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]]))
        walk.mask = torch.cat([walk.mask, torch.tensor([[0, 0, 1], [1, 1, 1]])], 1)
        logits.append(walk.forward(torch.tensor([[2, 2, 20], [20, 21, 22]])))
        walk.crop(2)  # one token of the first row, two of the second
        logits.append(walk.forward(torch.tensor([[30], [31]])))
    assert (logits[0] - logits[2]).abs().max() <= 1e-4 and (logits[1] - logits[3]).abs().max() <= 1e-4


@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([0, 3]), torch.tensor([4, 1])])
@pytest.mark.parametrize("cached", [False, True])
def test_outputs_that_are_asked_for(keep: int | Tensor, cached: bool) -> None:
    """Logits and hidden states where the caller wants them, although the tokens were cached before."""
    ours, theirs = tiny.model(), tiny.model(attention="sdpa")
    trie = TrieCache(ours).trie
    ids = torch.cat([PROMPT, PROMPT.flip(1)])
    with torch.no_grad():
        if cached:
            ours(ids, past_key_values=TrieCache.from_trie(trie))
        options: dict[str, Any] = {"logits_to_keep": keep, "output_hidden_states": True}
        a = ours(ids, past_key_values=TrieCache.from_trie(trie), **options)
        b = theirs(ids, past_key_values=DynamicCache(config=theirs.config), **options)
    assert list(a.keys()) == list(b.keys())
    assert (a.logits - b.logits).abs().max() <= 1e-4 and a.logits.shape == b.logits.shape
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        assert (x - y).abs().max() <= 1e-4


def test_positional_arguments_and_tuples() -> None:
    ours, theirs = tiny.model(), tiny.model(attention="sdpa")
    with torch.no_grad():
        cache = TrieCache(ours)
        logits, same = ours(PROMPT, None, None, cache, return_dict=False)
        assert same is cache and (logits - theirs(PROMPT).logits).abs().max() <= 1e-4


def test_a_copy_goes_on_by_itself() -> None:
    ours, theirs = tiny.model(), tiny.model(attention="sdpa")
    system = TrieCache(ours)
    with torch.no_grad():
        ours(PROMPT, past_key_values=system)
        for question in ([20, 21], [22]):
            ids = torch.cat([PROMPT, torch.tensor([question])], 1)
            with tiny.count_tokens(ours) as tokens:
                answer = ours.generate(ids, past_key_values=copy.deepcopy(system), max_new_tokens=5, do_sample=False)
            assert tokens[0] == len(question)
            assert torch.equal(answer, theirs.generate(ids, max_new_tokens=5, do_sample=False))
    assert system.get_seq_length() == 5
    del system
    assert TrieCache(ours).trie.kv.num_nodes == 0  # a trie of its own


def test_a_policy_shares_its_prompts() -> None:
    """Saffron search and `generate` on one trie, which grows in inference mode and is written outside of it."""
    policy = Policy(tiny.model(), keep_prefixes=True, capacity=4)
    rows, _ = policy.prefill([PROMPT[0].tolist()])
    policy.release(rows)
    ids = torch.cat([PROMPT, PROMPT], 1)
    with tiny.count_tokens(policy.model) as tokens:
        cache = TrieCache.from_trie(policy)
        answer = policy.model.generate(ids, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert tokens[0] == 5
    assert torch.equal(answer, tiny.model(attention="sdpa").generate(ids, max_new_tokens=5, do_sample=False))


def test_peft_models() -> None:
    from peft import LoraConfig, get_peft_model

    outputs = []
    for attention in (ATTENTION, "sdpa"):
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = get_peft_model(tiny.model(attention=attention), config)
        cache = TrieCache(model) if attention == ATTENTION else None
        outputs.append(
            model.generate(input_ids=PROMPT, past_key_values=cache, num_beams=3, max_new_tokens=8, do_sample=False)
        )
    assert torch.equal(*outputs)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_another_attention_implementation_is_refused() -> None:
    ours = tiny.model(attention="sdpa")
    with pytest.raises(ConfigError, match='got attn_implementation="sdpa", expected "saffron".*set_attn_implement'):
        TrieCache(ours)
    ours.set_attn_implementation(ATTENTION)
    cache = TrieCache(ours)
    ours.set_attn_implementation("sdpa")
    with pytest.raises(ConfigError, match='attn_implementation: got "sdpa"'):
        ours.generate(PROMPT, past_key_values=cache, max_new_tokens=2)


def test_models_and_tries_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = tiny.model()
    with pytest.raises(ConfigError, match="trie: got a KVTrie, expected a TrieModel"):
        TrieCache.from_trie(TrieCache(ours).trie.kv)  # type: ignore[arg-type]
    monkeypatch.setattr(ours, "_supports_logits_to_keep", lambda: False)
    with pytest.raises(UnsupportedModelError, match="llama model: its forward has no logits_to_keep"):
        TrieCache(ours)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"input_ids": None, "inputs_embeds": torch.zeros(1, 2, 48)}, ConfigError, "inputs_embeds: not served"),
        ({"input_ids": PROMPT[0]}, ConfigError, r"input_ids: got shape \[5\]"),
        ({"use_cache": False}, ConfigError, "use_cache: got False"),
        ({"output_attentions": True}, UnsupportedModelError, "output_attentions"),
        ({"output_router_logits": True}, UnsupportedModelError, "output_router_logits"),
        ({"labels": PROMPT}, UnsupportedModelError, "labels: not served"),
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, ConfigError, r"attention_mask: got shape \[1, 1, 5, 5\]"),
        ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}, ConfigError, "attention_mask: row 0 ends in padding"),
        ({"attention_mask": torch.zeros(1, 5, dtype=torch.long)}, ConfigError, "attention_mask: got padding only"),
        ({"position_ids": PROMPT}, ConfigError, "position_ids: got 5 in row 0, column 0, expected 0"),
    ],
)
@torch.no_grad()
def test_calls_that_a_trie_cannot_serve(options: dict[str, Any], error: type[Exception], message: str) -> None:
    ours = tiny.model()
    cache = TrieCache(ours)
    with pytest.raises(error, match=message):
        ours(**{"input_ids": PROMPT, "past_key_values": cache, **options})
    assert cache.trie.kv.num_nodes == 0 and cache.get_seq_length() == 0
    ours(PROMPT, past_key_values=cache)


@torch.no_grad()
def test_caches_in_the_wrong_place() -> None:
    ours, other = tiny.model(), tiny.model(seed=1)
    cache = TrieCache(ours)
    TrieCache(other)
    with pytest.raises(ConfigError, match="a TrieCache of another LlamaForCausalLM"):
        other(PROMPT, past_key_values=cache)
    with pytest.raises(UnsupportedModelError, match="filled when that model is called as a whole"):
        ours.model(PROMPT, past_key_values=cache)
    ours(PROMPT, past_key_values=cache)
    with pytest.raises(ConfigError, match="got 2 rows, expected the 1 rows"):
        ours(PROMPT.expand(2, -1), past_key_values=cache)
    with pytest.raises(ConfigError, match="tokens_to_remove: got 3, expected a negative number"):
        cache.crop(3)
    assert cache.get_seq_length() == 5


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_full_trie_says_so_and_loses_nothing() -> None:
    ours, theirs = tiny.model(), tiny.model(attention="sdpa")
    cache = TrieCache(ours, capacity=8, grow=False)
    assert cache.get_max_length() == 8
    with torch.no_grad():
        ours(PROMPT, past_key_values=cache)
        cache.batch_repeat_interleave(4)
        with pytest.raises(CacheFullError):
            ours(torch.tensor([[1], [2], [3], [4]]), past_key_values=cache)
        with pytest.raises(CacheFullError):
            ours(torch.arange(16).reshape(4, 4), past_key_values=cache)
        cache.batch_select_indices(torch.tensor([2]))
        ids = torch.tensor([[4, 3]])
        expected = theirs(torch.cat([PROMPT, ids], 1)).logits[:, -2:]
        assert (ours(ids, past_key_values=cache).logits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("decoding", [False, True])
def test_a_failing_forward_pass_leaves_no_empty_nodes(
    monkeypatch: pytest.MonkeyPatch, error: type[BaseException], decoding: bool
) -> None:
    ours, theirs = tiny.model(), tiny.model(attention="sdpa")
    trie = TrieModel(ours, keep_prefixes=True)
    cache = TrieCache.from_trie(trie)

    def fail(*_: object, **__: object) -> None:
        raise error

    with torch.no_grad():
        ours(PROMPT[:, :4], past_key_values=cache)
        with monkeypatch.context() as patch:
            patch.setattr(type(ours.model.layers[1].mlp), "forward", fail)
            with pytest.raises(error):
                ours(torch.tensor([[9]] if decoding else [[9, 10]]), past_key_values=cache)
        assert cache.get_seq_length() == (0 if decoding else 4)  # a decode step gives its old prefixes up first
        if error is RuntimeError:  # hooks do not see an interrupt; its nodes go with the next change of the trie
            assert trie.kv.index.num_held == trie.kv.num_nodes == (0 if decoding else 4)
        ids = torch.tensor([[*PROMPT[0].tolist(), 10, 11]])
        expected = theirs(ids).logits[:, -1]
        rows, logits = trie.prefill([ids[0].tolist()])  # not through a TrieCache: it must not find empty nodes either
        assert (logits - expected).abs().max() <= 1e-4
        trie.release(rows)
        logits = ours(ids, past_key_values=TrieCache.from_trie(trie), logits_to_keep=1).logits[:, -1]
        assert (logits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("shared", [True, False], ids=["one trie", "a trie each"])
def test_threads_on_one_model(shared: bool) -> None:
    """No thread gets another one's text, whatever they do to the caches in the meantime."""
    model = tiny.model().double()
    trie = TrieModel(model, capacity=4)
    prompts = [torch.tensor([[5 + i, 6, 7 + i, 9], [40 + i, 6, 8, 3]]) for i in range(4)]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}

    def generate(prompt: torch.Tensor) -> torch.Tensor:
        cache = TrieCache.from_trie(trie) if shared else TrieCache(model, capacity=4)
        return model.generate(prompt, past_key_values=cache, **options)

    expected = [generate(prompt) for prompt in prompts]
    wrong: list[object] = []

    def client(first: int) -> None:
        try:
            for i in range(8):
                which = (first + i) % len(prompts)
                if not torch.equal(answer := generate(prompts[which]), expected[which]):
                    wrong.append(answer)
        except Exception as error:
            wrong.append(error)

    in_threads(4, client)
    assert not wrong and trie.kv.index.num_held == 0


def test_the_rows_of_a_cache_end_with_it() -> None:
    ours = tiny.model()
    trie = TrieModel(ours)
    held: Callable[[], int] = lambda: trie.kv.index.num_held  # noqa: E731
    ours.generate(PROMPT, past_key_values=TrieCache.from_trie(trie), num_beams=3, max_new_tokens=4)
    assert held() == 0 and trie.kv.num_nodes > 5
    assert len(ours._forward_pre_hooks) == len(ours._forward_hooks) == 1
