"""Small tokenizers of every kind that language models have, with special tokens, added tokens and a chat template."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|end|>"]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
CORPUS = [
    "hello there, how are you today?\n\nI am fine, thanks; isn't it 12345678 o'clock?",
    "the quick brown fox jumps over the lazy dog 42 times in 2024",
    "def add(a, b):\n    return a + b  # 1000000 + 1",
    "Grüße aus München, naïve café; שלום עולם, مرحبا بالعالم",
    "你好，世界。今天天气很好。 😀 👩‍👩‍👧 🇩🇪",
    "please tell me how to bake good bread at home </ s> < | end | >",
] * 4
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m['role'] }}: {{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant:{% if brief %} (briefly){% endif %}{% endif %}"
)


def _byte_bpe() -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return _trained(raw, trainers.BpeTrainer(**_trainer(), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))


def _split_bpe(pattern: str) -> Tokenizer:
    raw = Tokenizer(models.BPE(ignore_merges=True))
    raw.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    raw.decoder = decoders.ByteLevel()
    return _trained(raw, trainers.BpeTrainer(**_trainer(), initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))


def _digits_from_right() -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d{1,3}(?=(?:\d{3})*\b)"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    raw.decoder = decoders.ByteLevel()
    numbers = [f"{n} " * 3 for n in range(1000)]
    return _trained(
        raw,
        trainers.BpeTrainer(**{**_trainer(), "vocab_size": 1500}, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
        numbers,
    )


def _sentencepiece_bpe() -> Tokenizer:
    """As Llama 2 has it: no words at all, spaces are symbols, unknown characters become bytes."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained = _trained(trained, trainers.BpeTrainer(**_trainer()))
    import json

    data = json.loads(trained.to_str())["model"]
    vocab = data["vocab"]
    for byte in range(256):
        vocab.setdefault(f"<0x{byte:02X}>", len(vocab))
    raw.model = models.BPE(
        vocab, [tuple(pair) for pair in data["merges"]], unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return raw


def _metaspace(scheme: str) -> Tokenizer:
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    raw.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return _trained(raw, trainers.BpeTrainer(**_trainer()))


def _unigram() -> Tokenizer:
    """As T5 and XLM-R have it: NFKC, and special tokens that are pieces of the model, better than any other."""
    raw = Tokenizer(models.Unigram())
    raw.normalizer = normalizers.NFKC()
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    return _trained(raw, trainers.UnigramTrainer(**_trainer(), unk_token="<unk>"))


def _wordpiece() -> Tokenizer:
    raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    return _trained(raw, trainers.WordPieceTrainer(**_trainer()))


def _wordlevel() -> Tokenizer:
    raw = Tokenizer(models.WordLevel(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _trained(raw, trainers.WordLevelTrainer(**_trainer()))


def _trainer() -> dict[str, object]:
    return {"vocab_size": 420, "special_tokens": list(SPECIAL), "show_progress": False}


def _trained(raw: Tokenizer, trainer: object, more: list[str] | None = None) -> Tokenizer:
    raw.train_from_iterator(CORPUS + (more or []), trainer)
    return raw


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte BPE": _byte_bpe,
    "byte BPE, words as Llama 3": lambda: _split_bpe(LLAMA3),
    "byte BPE, digits from the right": _digits_from_right,
    "SentencePiece BPE": _sentencepiece_bpe,
    "metaspace, always": lambda: _metaspace("always"),
    "metaspace, first": lambda: _metaspace("first"),
    "Unigram": _unigram,
    "WordPiece": _wordpiece,
    "WordLevel": _wordlevel,
}
LOSSLESS = tuple(kind for kind in KINDS if kind.startswith(("byte", "SentencePiece")))  # any text has tokens


CONTROL = ["<s>", "</s>", "<unk>", "<|user|>", "<|end|>", "<|note|>"]
WORDS = [
    *CONTROL,
    "<",
    "/s>",
    "<|",
    "|>",
    "end",
    "hello",
    " ",
    "\n",
    "12345678",
    "é",
    "😀",
    "שלום",
    "＜/s＞",
    "<|tool|>",
]
hostile = st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map("".join)
ordinary = st.lists(
    st.sampled_from([*CORPUS[:6], "hello", " ", "  ", "\n", "\t", "12345", "it's", "é", "e\u0301", "😀", "עולם", "{}"])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    min_size=1, max_size=6,
).map("".join).filter(lambda text: not any(name in text for name in [*CONTROL, "<|tool|>"]))  # fmt: skip
every_kind = pytest.mark.parametrize("kind", list(KINDS))


@cache
def make(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of `KINDS`; the template writes the added token `<|tool|>` nowhere, and `<|note|>` somewhere."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=KINDS[kind](), unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<|user|>", "<|end|>"],
    )  # fmt: skip
    made.add_tokens([AddedToken("<|note|>", special=False, normalized=False), AddedToken("<|tool|>", special=False)])
    made.chat_template = TEMPLATE + "{% if note %}<|note|>{% endif %}"
    return made
