"""Streams, for every kind of tokenizer: pieces that nothing takes back, which joined are the decoded answer."""

from __future__ import annotations

from functools import cache

import pytest
import tiny
import tokenizer_kinds
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_kinds import LOSSLESS, every_kind, hostile, ordinary
from transformers import PreTrainedTokenizerFast

from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.search import SaffronSearch
from saffron.search.config import SearchConfig
from saffron.search.undefended import GreedyDecoding

# Text that decoders change at its end: contractions, spaces before punctuation, halves of characters.
TURNS = [
    "do",
    " n",
    "'t",
    " '",
    "s ",
    " .",
    " ,",
    "😀",
    "\n😀",
    "e\u0301",
    "क्षि",
    "مرحبا",
    "👩‍👩‍👧",
    "\ufffd",
    "<0x41>",
]
said = st.lists(ordinary | hostile | st.sampled_from(TURNS), min_size=1, max_size=5).map("".join)


def tokenizer(kind: str, clean_up: bool) -> PreTrainedTokenizerFast:
    """`clean_up_tokenization_spaces` is on in the files of BERT and of Llama 3."""
    made = tokenizer_kinds.make(kind)
    made.clean_up_tokenization_spaces = clean_up
    return made


@cache
def policy(kind: str) -> Policy:
    made = tokenizer_kinds.make(kind)
    model = tiny.model(vocab_size=len(made), bos_token_id=1, eos_token_id=2, initializer_range=0.3)
    return Policy(model, made)


@cache
def mrm(kind: str) -> MultifurcationRewardModel:
    made = tokenizer_kinds.make(kind)
    bias = torch.randn(len(made), generator=torch.Generator().manual_seed(0))
    return MultifurcationRewardModel(tiny.model(seed=1, vocab_size=len(made)), made, bias=bias)


@every_kind
@pytest.mark.parametrize("clean_up", [False, True])
@given(data=st.data(), text=said)
@settings(max_examples=25)
def test_what_is_settled_stays(kind: str, clean_up: bool, data: st.DataObject, text: str) -> None:
    """Whatever tokens follow: those of a text, or any at all."""
    model, made = policy(kind), tokenizer(kind, clean_up)
    drawn = data.draw(st.lists(st.integers(0, len(made) - 1), max_size=12))
    tokens = model.encoder.text(text) + drawn
    whole = model.decode(tokens)
    for length in range(len(tokens) + 1):
        assert whole.startswith(model.settled_text(tokens[:length]))
    if kind in LOSSLESS and "\ufffd" not in text:
        assert model.decode(model.encoder.text(text)) == text
        # Only the byte tokens at the end and half a character are held back.
        assert kind == "SentencePiece BPE" or model.settled_text(model.encoder.text(text)) == text


@every_kind
def test_streams_joined_are_the_answer(kind: str) -> None:
    """With an MRM of the same tokenizer and one of another, after prefills in several scripts."""
    model = policy(kind)
    other = mrm("byte BPE, digits from the right" if kind == "Unigram" else "Unigram")
    config = SearchConfig(width=3, top_p=0.95, max_new_tokens=10, min_new_tokens=3)
    for reward in (mrm(kind), other):
        search = SaffronSearch(model, reward, config)
        for prefill in ("", "שלום 12345", "naïve 😀"):
            for width in (1, 3):
                settings_ = SearchConfig(width=width, top_p=0.95, max_new_tokens=10, min_new_tokens=3)
                (result,) = search.generate("hello there", prefill, config=settings_)
                assert "".join(search.stream("hello there", prefill, config=settings_)) == result.text
                opening = search.request("hello there", prefill).opening
                assert result.text == model.decode(result.token_ids, opening)


@every_kind
@given(prefill=ordinary, text=ordinary, cut=st.integers(1, 8))
@settings(max_examples=25)
def test_a_continuation_keeps_its_first_space(kind: str, prefill: str, text: str, cut: int) -> None:
    """The prefill and the answer, joined, are the text of their tokens, wherever between words the answer begins."""
    model = policy(kind)
    tokens = model.encoder.text(f"{prefill} and {text}")
    opening, answer = tokens[:cut], tokens[cut:]
    whole = model.decode(tokens)
    joined = model.decode(opening) + model.decode(answer, opening)
    assert joined == whole or "\ufffd" in model.decode(opening)  # half a character cannot be continued


@every_kind
def test_every_method_continues_its_prefill(kind: str) -> None:
    model = policy(kind)
    prefill = "hello there how are"
    forced = model.encoder.text(prefill)
    config = SearchConfig(width=2, max_new_tokens=4, min_new_tokens=3)
    search, greedy = SaffronSearch(model, mrm(kind), config), GreedyDecoding(model)
    for (result,) in (search.generate("hello", prefill), greedy.generate("hello", prefill)):
        assert model.decode(forced) + result.text == model.decode([*forced, *result.token_ids])
    assert "".join(search.stream("hello", prefill)) == search.generate("hello", prefill)[0].text


@every_kind
def test_jobs_of_an_engine_stream_their_answer(kind: str) -> None:
    """Greedy decoding says a token at each step."""
    model = policy(kind)
    search = SaffronSearch(model, mrm(kind), SearchConfig(width=2))
    engine = search.engine()
    job = engine.submit_job(GreedyDecoding(model), search.request("hello there"))
    heard = [""]
    job.listen(lambda: heard.append(job.text))
    while not job.done:
        engine.step()
    result = job.result(0)
    assert all(later.startswith(before) for before, later in zip(heard, heard[1:], strict=False))
    assert heard[-1] == result.text == model.decode(result.token_ids)


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram"])
def test_decoding_does_not_clean_up(kind: str) -> None:
    model, made = policy(kind), tokenizer(kind, True)
    tokens = model.encoder.text("hello ' s")
    assert model.decode(tokens) == made.decode(tokens, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("prefill", ["b 日本語", "日本語日本語", "日🙂本🙂", "クリスマス"])
def test_an_opening_does_not_begin_within_a_character(prefill: str) -> None:
    """Of SentencePiece a character is up to four tokens, of which the last eight of a prefill can begin with any."""
    model = policy("SentencePiece BPE")
    tokens = model.encoder.text(f"{prefill}国🙂")
    opening = model.opening("hello", prefill)
    answer = tokens[len(model.encoder.text(prefill)) :]
    assert len(answer) == 7  # bytes
    assert model.decode(answer, opening) == "国🙂"
