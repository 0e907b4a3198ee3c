"""Policies and reward models with other tokenizers: what is read equals encoding the whole text."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import tiny
import tokenizer_kinds
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import every_kind, hostile, ordinary
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saffron.models import vocabulary
from saffron.models.bundled import Models
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.models.vocabulary import EMPTY, TextMapper, head_for, same_tokens
from saffron.search import Request, SaffronSearch, parse_method
from saffron.search.config import SearchConfig

LOCAL = ("byte BPE", "byte BPE, words as Llama 3")  # kinds that need not encode everything again


class _Text:
    """A policy, as far as text goes: a token for each character, or the byte BPE of `tiny`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
        self.tokenizer = tokenizer

    def decode(self, tokens: list[int]) -> str:
        if self.tokenizer is None:
            return "".join(map(chr, tokens))
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            return [ord(c) for c in text]
        return self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def mrm(kind: str) -> MultifurcationRewardModel:
    made = tokenizer_kinds.make(kind)
    return MultifurcationRewardModel(tiny.model(vocab_size=len(made)), made, capacity=16)


MRMS: dict[str, MultifurcationRewardModel] = {}
POLICIES = {"characters": _Text(), "bytes": _Text(tiny.tokenizer(258)), "words": _Text(tiny.tokenizer())}


@every_kind
@pytest.mark.parametrize("policy", list(POLICIES))
@given(text=ordinary | hostile | st.text("0123456789 ,", max_size=16))
@settings(max_examples=15)
def test_every_prefix_is_read_as_encoding_all_of_it(kind: str, policy: str, text: str) -> None:
    """Token by token, whatever the policy's tokens cut in half: digits in groups, emoji, letters with accents."""
    ours, model = POLICIES[policy], MRMS.setdefault(kind, mrm(kind))
    mapper = TextMapper(ours, model)  # type: ignore[arg-type]
    tokens, rows = ours.encode(text), [EMPTY]
    for length in range(1, len(tokens) + 1):
        rows = mapper.extend(rows, [tokens[:length]])
        assert list(rows[0].ids) == model.encoder.text(ours.decode(tokens[:length]))


@every_kind
@given(data=st.data(), first=ordinary, ends=st.lists(ordinary | hostile, min_size=1, max_size=4))
@settings(max_examples=10)
def test_branches_do_not_disturb_one_another(kind: str, data: st.DataObject, first: str, ends: list[str]) -> None:
    ours, model = POLICIES["words"], MRMS.setdefault(kind, mrm(kind))
    mapper = TextMapper(ours, model)  # type: ignore[arg-type]
    beam = [(EMPTY, ours.encode(first))]
    for _ in range(3):
        chosen = [(p, e) for p in range(len(beam)) for e in ends]
        picked = data.draw(st.lists(st.sampled_from(chosen), min_size=1, max_size=4))
        responses = [beam[p][1] + ours.encode(end) for p, end in picked]
        rows = mapper.extend([beam[p][0] for p, _ in picked], responses)
        for row, response in zip(rows, responses, strict=True):
            assert list(row.ids) == model.encoder.text(ours.decode(response))
        beam = list(zip(rows, responses, strict=True))


def test_a_text_that_changes_at_its_end_is_encoded_anew() -> None:
    """Decoders may take back a space: "do n" goes on as "don't"."""
    texts = iter(["do n", "don't", "a b", "x b c"])
    policy, model = _Text(), mrm("byte BPE")
    policy.decode = lambda tokens: next(texts)  # type: ignore[method-assign, assignment]
    mapper = TextMapper(policy, model)  # type: ignore[arg-type]
    for _ in range(2):
        (row,) = mapper.extend([EMPTY], [[1]])
        assert row.text in ("do", "a")  # what follows cannot change its ids
        (grown,) = mapper.extend([row], [[1, 2]])
        assert list(grown.ids) == model.encoder.text("don't" if row.text == "do" else "x b c")


@pytest.mark.parametrize("kind", LOCAL)
def test_long_responses_are_encoded_from_their_last_words(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, model = POLICIES["words"], mrm(kind)
    encoded: list[int] = []
    texts = model.encoder.texts
    monkeypatch.setattr(model.encoder, "texts", lambda pieces: encoded.append(sum(map(len, pieces))) or texts(pieces))
    mapper = TextMapper(ours, model)  # type: ignore[arg-type]
    tokens, rows = ours.encode("the quick brown fox jumps over the lazy dog " * 20), [EMPTY]
    for length in range(1, len(tokens) + 1):
        rows = mapper.extend(rows, [tokens[:length]])
    assert max(encoded) <= 40
    assert TextMapper(ours, mrm("Unigram"))._local is False  # type: ignore[arg-type]


def big_tokenizer(size: int = 128_256) -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(a + b for a in letters for b in letters), *(f"word{i}" for i in range(size))][:size]
    raw = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=names[0])


def test_vocabularies_of_real_size_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    ours, theirs = big_tokenizer(), big_tokenizer()
    calls: list[int] = []
    get_vocab = PreTrainedTokenizerFast.get_vocab
    monkeypatch.setattr(PreTrainedTokenizerFast, "get_vocab", lambda t: calls.append(len(t)) or get_vocab(t))
    ours.chat_template = "{{ messages[0]['content'] }}"
    policy = Policy(tiny.model(vocab_size=len(ours), eos_token_id=0, **shape), ours)
    reward = MultifurcationRewardModel(tiny.model(vocab_size=len(ours), **shape), theirs)
    search = SaffronSearch(policy, reward, SearchConfig(width=2, max_new_tokens=2, min_new_tokens=0))
    assert calls == [128_256, 128_256]
    for prompt in ("hello", "there", "you"):
        search.generate([prompt])
    SaffronSearch(policy, reward)
    assert calls == [128_256, 128_256] and same_tokens(policy, reward)
    started = time.process_time()
    for _ in range(100):
        same_tokens(policy, reward)
    assert time.process_time() - started < 0.1  # 100 comparisons take more than ten seconds
    theirs.add_tokens(["one more"])
    assert not same_tokens(policy, reward) and len(calls) == 2  # another size: no need to look


def pair_with_other_tokenizers() -> tuple[Policy, MultifurcationRewardModel]:
    ours, theirs = tiny.tokenizer(), tiny.tokenizer(280, ["completely different words make another vocabulary"] * 4)
    generator = torch.Generator().manual_seed(0)
    reward = MultifurcationRewardModel(
        tiny.model(seed=1, vocab_size=len(theirs)), theirs, bias=torch.randn(len(theirs), generator=generator)
    )
    return Policy(tiny.model(vocab_size=len(ours)), ours), reward


def test_a_head_is_made_once_and_again_when_weights_change(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reward = pair_with_other_tokenizers()
    made: list[int] = []
    counterparts = vocabulary._counterparts
    monkeypatch.setattr(vocabulary, "_counterparts", lambda *models: made.append(1) or counterparts(*models))
    head = head_for(policy, reward, True)
    assert head_for(policy, reward, True) is head and len(made) == 1
    token = policy.encode("completely")[0]
    counterpart = reward.encode(policy.decode([token]))[0]
    assert torch.equal(head.weight[token], reward.head_weight[counterpart])
    assert head.bias is not None and reward.bias is not None
    with torch.no_grad():
        reward.model.get_output_embeddings().weight[counterpart] += 1
    changed = head_for(policy, reward, True)
    assert torch.equal(changed.weight[token], head.weight[token] + 1)
    reward.bias[counterpart] = 7.0
    again = head_for(policy, reward, True)
    assert again.bias is not None and again.bias[token] == 7.0
    without = head_for(policy, reward, False)
    assert without.bias is None and head_for(policy, reward, True).bias is not None


@pytest.mark.parametrize("kind", ["same tokens", "other tokens"])
@pytest.mark.parametrize("method", ["saffron", "best-of-n-mrm", "beam-mrm"])
@torch.no_grad()
def test_methods_read_the_head_of_now(method: str, kind: str) -> None:
    """A head that was put into the MRM after a method was made: not the new trunk with the old head."""
    policy, mrm = tiny.pair() if kind == "same tokens" else pair_with_other_tokenizers()
    both, options = Models(policy, mrm, None), {"max_new_tokens": 5, "min_new_tokens": 0}
    request = Request((0, 5, 6), (0, 5, 6))
    made = parse_method(method, both, **options)
    before = made.search([request])
    head = torch.nn.Linear(*mrm.head_weight.shape[::-1], bias=False, dtype=mrm.head_weight.dtype)
    head.weight.copy_(-3 * mrm.head_weight.roll(1, 0))
    mrm.model.set_output_embeddings(head)
    after, expected = made.search([request]), parse_method(method, both, **options).search([request])
    assert after[0].token_ids == expected[0].token_ids and after[0].score == expected[0].score
    assert after[0].score != before[0].score


def test_an_mrm_that_knows_none_of_the_tokens_is_warned_of() -> None:
    policy, reward = pair_with_other_tokenizers()
    reward.unseen = torch.ones(reward.vocab_size, dtype=torch.bool)
    reward.unseen[1] = False  # "</s>", which is nobody's text
    counterpart = vocabulary._counterparts(policy, reward)
    reward.unseen[counterpart[list(policy.eos_token_id)]] = True
    reward.unseen[0] = False
    with pytest.warns(UserWarning, match="mrm: no token of the policy has a counterpart"):
        head_for(policy, reward, True)


def test_searches_through_text_read_whole_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, _ = pair_with_other_tokenizers()
    made = tokenizer_kinds.make("byte BPE, digits from the right")
    reward = MultifurcationRewardModel(tiny.model(seed=1, vocab_size=len(made)), made)
    read: list[list[int]] = []
    plain = reward.read
    monkeypatch.setattr(reward, "read", lambda sequences: read.extend(map(list, sequences)) or plain(sequences))
    search = SaffronSearch(policy, reward, SearchConfig(width=4, top_p=0.9, max_new_tokens=12, min_new_tokens=12))
    request = search.request("count 12345678", "")
    expected = [list(request.reward)]
    for (handle,) in search.run([request]):
        tree = handle.tree
        texts = [policy.decode(node.tokens()) for node in tree.live if node.depth < 12]
        expected += [[*request.reward, *reward.encoder.text(text)] for text in texts]
    assert len(expected) > 12 and sorted(read) == sorted(expected)
