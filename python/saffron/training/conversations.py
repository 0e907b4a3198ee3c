"""A corpus of conversations, from JSON lines or a Hugging Face data set."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from saffron.errors import ConfigError, MissingDependencyError, outside, reason, shown
from saffron.storage.paths import check_checkpoint
from saffron.storage.text import read_json_lines

Turn = str | tuple[int, ...]
ROLES = {"user": 0, "human": 0, "assistant": 1, "agent": 1, "gpt": 1}
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")
FORMS = (
    '{"prompt": "...", "response": "..." or token ids}, {"messages": [{"role": "user", "content": "..."}, ...]} or '
    'a transcript ("\\n\\nHuman: ...\\n\\nAssistant: ...")'
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """turns: what is said, users (even numbers) and agents taking turns; text, or ids of the guard's tokenizer."""

    turns: tuple[Turn, ...]


def read_corpus(
    source: str, *, split: str = "train", fields: Sequence[str] = ("chosen",), limit: int | None = None
) -> list[Conversation]:
    """Reads a corpus.

    Args:
        source: a file of JSON lines, a folder that `datasets` can load, or the name of a data set on the hub.
        split: of a data set.
        fields: columns that hold a transcript, where there is neither "messages" nor "prompt" (HH-RLHF has "chosen"
            and "rejected"); each gives one conversation.
        limit: the first so many conversations only.

    Raises:
        ConfigError: nothing readable there, or a record in none of the forms.
    """
    with outside(f"{shown(source)}: cannot be read"):
        there = Path(source).exists()
    if there and not Path(source).is_dir():
        records: Iterable[tuple[str, Any]] = (
            (f"line {number}", record) for number, record in read_json_lines(Path(source))
        )
    else:
        records = _data_set(source, split)
    conversations = list(islice(_conversations(source, records, fields), limit))
    if not conversations:
        raise ConfigError(f"{source}: holds no conversation")
    return conversations


def fingerprint(conversations: Iterable[Conversation]) -> str:
    """SHA-256 of what is said, in order."""
    digest = hashlib.sha256()
    for conversation in conversations:
        digest.update(json.dumps(conversation.turns).encode() + b"\n")
    return digest.hexdigest()


def _data_set(source: str, split: str) -> Iterator[tuple[str, Any]]:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("datasets", "train") from error
    datasets.disable_progress_bars()
    check_checkpoint("corpus", source)  # a path that is none is not looked for on a hub
    with outside(f"{source}: no data set with a split {split!r} there"):
        if (Path(source) / "state.json").exists() or (Path(source) / "dataset_dict.json").exists():
            found = datasets.load_from_disk(source)
            found = found[split] if isinstance(found, datasets.DatasetDict) else found
        else:
            found = datasets.load_dataset(source, split=split)
    yield from ((f"record {number}", record) for number, record in enumerate(found, 1))


def _conversations(source: str, records: Iterable[tuple[str, Any]], fields: Sequence[str]) -> Iterator[Conversation]:
    for where, record in records:
        try:
            yield from map(Conversation, _turns(record, fields))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{source}: {where} is no conversation ({reason(error)}); expected {FORMS}") from error


def _turns(record: dict[str, Any], fields: Sequence[str]) -> Iterator[tuple[Turn, ...]]:
    if "messages" in record:
        yield _alternating([(ROLES[message["role"]], message["content"]) for message in record["messages"]])
    elif "prompt" in record:
        yield _alternating([(0, record["prompt"]), (1, record["response"])])
    else:
        for field in fields:
            yield _transcript(record[field])


def _transcript(text: str) -> tuple[Turn, ...]:
    before, *pieces = TRANSCRIPT.split("\n\n" + text.lstrip())
    if before.strip() or not pieces:
        raise ValueError("a transcript begins with Human: or Assistant:")
    said = zip(pieces[::2], pieces[1::2], strict=True)
    return _alternating([(int(who == "Assistant"), what.strip()) for who, what in said])


def _alternating(said: list[tuple[int, Any]]) -> tuple[Turn, ...]:
    """What one role says in several messages is one turn; a conversation begins with a user and ends with words."""
    while said and not said[-1][1]:
        said.pop()
    turns: list[Turn] = []
    for role, messages in groupby(said, key=lambda pair: pair[0]):
        contents = [content for _, content in messages]
        if role != len(turns) % 2:
            raise ValueError("the first words are not a user's")
        if all(isinstance(content, str) for content in contents):
            turns.append("\n\n".join(contents))
        elif all(isinstance(content, list) and _are_ids(content) for content in contents):
            turns.append(tuple(token for content in contents for token in content))
        else:
            raise ValueError("what is said must be text or a list of token ids")
    if not turns:
        raise ValueError("nobody says anything")
    return tuple(turns)


def _are_ids(content: list[Any]) -> bool:
    return all(type(token) is int and token >= 0 for token in content)
