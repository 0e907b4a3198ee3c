"""Names of control tokens (`</s>`, `<|eot_id|>`) as plain text, for every kind of tokenizer.

A tokenizer finds the names of its special tokens wherever they stand, in a template or in what a user wrote.
`transformers` can leave them unfound (`split_special_tokens`), but some tokenizers hold the same names as ordinary
pieces (Unigram, WordLevel), and that switch is a state of the tokenizer that threads share. So what a user wrote is
encoded by a twin of the tokenizer, in which control tokens have names that nobody can guess. It splits, normalises and
merges as the tokenizer does: text without such names gets the same ids.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from saffron.errors import ConfigError


def control_tokens(tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> dict[str, int]:
    """Ids of the tokens that people must not be able to write: special ones, and added ones that the template writes.

    Args:
        chat_template: None: the tokenizer's own, if it has one.
    """
    template = chat_template or tokenizer.chat_template or ""
    if isinstance(template, dict):  # several, by name
        template = "\n".join(map(str, template.values()))
    found: dict[str, int] = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    for index, token in tokenizer.added_tokens_decoder.items():
        if token.special or (token.content in template and not token.content.isspace()):
            found[token.content] = index
    return found


class PlainEncoder:
    """Encodes text with and without control tokens.

    Args:
        tokenizer: may be used by others meanwhile; it is not changed.
        control: names and ids of the control tokens.
        owner: what to call the model in messages of errors.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: dict[str, int], owner: str) -> None:
        self._tokenizer, self._control, self._owner = tokenizer, control, owner
        self._size = len(tokenizer)
        self._ids = frozenset(control.values())
        self._unknown = tokenizer.unk_token_id
        longest_first = "|".join(re.escape(name) for name in sorted(control, key=len, reverse=True)) or "(?!)"
        self._names = re.compile(longest_first)
        self._twin: tuple[Tokenizer, dict[str, str]] | None = None

    def serves(self, tokenizer: PreTrainedTokenizerBase, control: dict[str, int]) -> bool:
        """Whether it was made for this, and nothing has been added since."""
        return self._tokenizer is tokenizer and self._size == len(tokenizer) and self._control == control

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of plain texts."""
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            return [self._encode_slowly(text) for text in texts]
        found: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        # Where no control token came out, none was found: the twin would say the same.
        for i in [i for i, ids in enumerate(found) if not self._ids.isdisjoint(ids)]:
            found[i] = self._twin_of(backend)[0].encode(texts[i], add_special_tokens=False).ids
        return found

    @property
    def names(self) -> list[str]:
        """Of the control tokens."""
        return list(self._control)

    def marked(self, text: str, marks: Sequence[str]) -> str:
        """The text with marks around every name of a control token, so that a template's own can be told from it.

        Args:
            marks: one character that stands before a name, and one for each of `names` that stands behind it.
        """
        behind = dict(zip(self._control, marks[1:], strict=True))
        return self._names.sub(lambda name: marks[0] + name[0] + behind[name[0]], text)

    def encode_marked(self, text: str, marks: Sequence[str]) -> list[int]:
        """Token ids of what a template made of texts that were marked."""
        start, behind = marks[0], dict(zip(self._control, marks[1:], strict=True))
        every = f"[{''.join(marks)}]"
        found = re.compile(f"({start}?)({self._names.pattern})({every}?)")

        def written(name: re.Match[str]) -> bool:
            """By a person. One of the marks is enough, as a template may cut texts into parts; the mark of another name
            belongs to a text that was cut before it."""
            return bool(name[1]) or name[3] == behind[name[2]]

        from_template = [name[2] for name in found.finditer(text) if not written(name)]
        if re.search(every, text) is None:
            ids = self._tokenizer.encode(text, add_special_tokens=False)
            control = [i for i in ids if i in self._ids and i != self._unknown]
            if control == [i for i in map(self._control.__getitem__, from_template) if i != self._unknown]:
                return ids
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"{self._owner}: its tokenizer cannot spell the name of a control token that the prompt holds"
            )
        twin, names = self._twin_of(backend)
        text = found.sub(lambda name: (name[2] if written(name) else names[name[2]]) + name[3], text)
        return twin.encode(re.sub(every, "", text), add_special_tokens=False).ids

    def _encode_slowly(self, text: str) -> list[int]:
        """With a tokenizer written in Python."""
        ids = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if not (self._ids - {self._unknown}).isdisjoint(ids):
            raise ConfigError(f"{self._owner}: its tokenizer cannot spell the name of a control token in a text")
        return ids

    def _twin_of(self, backend: Tokenizer) -> tuple[Tokenizer, dict[str, str]]:
        """The twin, and what control tokens are called there; made when the first text needs it."""
        if self._twin is None:
            names = {name: _unguessable(i) for i, name in enumerate(self._control)}
            twin = Tokenizer.from_str(json.dumps(_renamed(json.loads(backend.to_str()), names)))
            for name, index in self._control.items():
                if twin.token_to_id(names[name]) != index:
                    raise ConfigError(f"{self._owner}: its tokenizer holds {name!r} in a way that is not supported")
            self._twin = twin, names
        return self._twin


def _unguessable(number: int) -> str:
    """A name of lowercase letters, which no normalisation changes; none begins like another."""
    letters = "".join(secrets.choice(string.ascii_lowercase) for _ in range(40))
    return letters + "".join(string.ascii_lowercase[int(digit)] for digit in f"{number:06d}")


def _renamed(data: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """A tokenizer (as in `tokenizer.json`) in which tokens have other names and the same ids."""
    for token in data["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = data["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(token, token): index for token, index in vocabulary.items()}
    else:  # Unigram: pieces and scores, in the order of their ids
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        prefix = len(model.get("continuing_subword_prefix") or "")
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [
            [left, right]
            for left, right in pairs
            if names.keys().isdisjoint((left, right, left + right, left + right[prefix:]))
        ]
    data.update(post_processor=None, truncation=None, padding=None)
    return data
