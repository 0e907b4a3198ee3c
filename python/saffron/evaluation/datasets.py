"""Prompts to attack with, and answers that comply: the bundled world, two published sets, files of one's own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from saffron import world
from saffron.errors import ConfigError, MissingDependencyError, outside, reason, shown
from saffron.storage.text import check_keys, read_json_lines

Kind = Literal["forbidden", "allowed"]
Record = dict[str, Any] | list[Any]


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt.

    Attributes:
        id: a hash of what it holds: the same wherever it stands in its set.
        prompt: what the user asks for.
        target: an answer that complies, from which a prefilling attack takes its tokens; "" if there is none.
        kind: "forbidden" if an answer that complies is harmful.
    """

    id: str
    prompt: str
    target: str
    kind: Kind

    @classmethod
    def of(cls, prompt: str, target: str, kind: Kind) -> Case:
        text = json.dumps([prompt, target, kind])
        return cls(hashlib.blake2s(text.encode(), digest_size=8).hexdigest(), prompt, target, kind)


class Source(NamedTuple):
    """A published set.

    Attributes:
        repository: on the hub.
        file, split: of the repository: a file of JSON lines, or a split of a data set.
        read: gives prompt and target of a record, None where it does not belong to the set.
    """

    repository: str
    file: str | None
    split: str | None
    read: Callable[[Record], tuple[str, str] | None]


def _conversation(record: Record) -> tuple[str, str]:
    """Harmful HEx-PHI: a user's message and an assistant's; what a system says is left out."""
    said = record if isinstance(record, list) else record.get("messages")
    if not isinstance(said, list) or not all(isinstance(message, dict) for message in said):
        raise ValueError('expected a list of messages, or an object with "messages"')
    messages = [message for message in said if message.get("role") != "system"]
    if len(messages) != 2:
        raise ValueError(f"it has {len(messages)} messages, expected one of a user and one of an assistant")
    roles = [message.get("role", role) for message, role in zip(messages, ("user", "assistant"), strict=True)]
    if roles != ["user", "assistant"]:
        raise ValueError(f"its messages are of {', '.join(map(str, roles))}, expected user, assistant")
    user, assistant = messages
    return user["content"], assistant["content"]


def _refusal(record: Record) -> tuple[str, str] | None:
    """RewardBench, whose subsets refusals-dangerous and refusals-offensive are the Ai2 Refusals: the rejected answer
    is the one that complies."""
    if not isinstance(record, dict):
        raise TypeError("a record is an object")
    return (record["prompt"], record["rejected"]) if record["subset"].startswith("refusals-") else None


def _pair(record: Record) -> tuple[str, str]:
    if not isinstance(record, dict):
        raise TypeError("a record is an object")
    check_keys("record", record, ("prompt", "target", "kind"))
    return record["prompt"], record.get("target", "")


# As SAFFRON-1 uses them: HEx-PHI's prompts with harmful answers (Qi et al., arXiv 2406.05946), and the refusals of
# RewardBench (Lambert et al., arXiv 2403.13787).
PUBLISHED = {
    "harmful-hex-phi": Source(
        "Unispac/shallow-vs-deep-safety-alignment-dataset",
        "data/safety_bench/Harmful-HEx-PHI.jsonl",
        None,
        _conversation,
    ),
    "ai2-refusals": Source("allenai/reward-bench", None, "filtered", _refusal),
}
WORLD: dict[str, Kind] = {"world": "forbidden", "world-allowed": "allowed"}
NAMES = (*WORLD, *PUBLISHED)


def load_cases(data: str, count: int | None = None, seed: int = 0) -> list[Case]:
    """The cases of a data set, each once, in its order.

    Args:
        data: "world" or "world-allowed": held-out requests of the bundled world; "harmful-hex-phi" or "ai2-refusals",
            from the hub, or from a file (JSON lines or Parquet) with "name=file"; or a file of JSON lines with "prompt"
            and, if wanted, "target".
        count: the first so many; None: 200 of the world, all of a file.
        seed: which requests of the world.

    Raises:
        ConfigError: there is no such set, or a record is not of its form. MissingDependencyError: Parquet is read by
            the library `datasets`.
    """
    if data in WORLD:
        with outside("count"):
            found = world.examples(WORLD[data], "heldout", 200 if count is None else count, seed)
        return [Case.of(e.prompt, e.target, e.kind) for e in found]
    name, _, given = data.partition("=")
    if name in PUBLISHED:
        read = PUBLISHED[name].read
        records = _file(Path(given)) if given else _published(name, PUBLISHED[name])
    elif "\0" not in data and Path(data).exists():
        read, records = _pair, _file(Path(data))
    else:
        raise ConfigError(f"data: got {shown(data)}, expected a file or one of {', '.join(NAMES)}")
    cases = dict.fromkeys(_cases(data, records, read))
    if not cases:
        raise ConfigError(f"{data}: holds no prompts")
    return list(cases)[:count]


def _cases(
    data: str, records: Iterable[tuple[str, Record]], read: Callable[[Record], tuple[str, str] | None]
) -> Iterator[Case]:
    for where, record in records:
        try:
            pair = read(record)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{data}: {where} is not of its form ({reason(error)})") from error
        if pair is None:
            continue
        prompt, target = pair
        kind = record.get("kind", "forbidden") if isinstance(record, dict) else "forbidden"
        texts = all(isinstance(text, str) for text in (prompt, target, kind))
        if not texts or not prompt or kind not in world.KINDS:
            raise ConfigError(
                f'{data}: {where} needs a text "prompt", may have a text "target" and a "kind" of {world.KINDS}'
            )
        yield Case.of(prompt, target, kind)


def _file(file: Path) -> Iterable[tuple[str, Record]]:
    if file.suffix == ".parquet":
        return _rows(str(file), lambda library: library.Dataset.from_parquet(str(file)))
    return ((f"line {number}", record) for number, record in read_json_lines(file))


def _published(name: str, source: Source) -> Iterable[tuple[str, Record]]:
    if source.file is None:
        return _rows(name, lambda library: library.load_dataset(source.repository, split=source.split))
    from huggingface_hub import hf_hub_download

    try:
        return _file(Path(hf_hub_download(source.repository, source.file, repo_type="dataset")))
    except Exception as error:  # offline, gated, moved: of many types
        raise _unreadable(name, error) from error


def _rows(name: str, load: Callable[[Any], Iterable[Record]]) -> Iterator[tuple[str, Record]]:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("datasets", "train") from error
    datasets.disable_progress_bars()
    try:
        rows = load(datasets)
    except Exception as error:  # those of pyarrow and of `datasets` as well
        raise _unreadable(name, error) from error
    yield from ((f"record {number}", row) for number, row in enumerate(rows, 1))


def _unreadable(name: str, error: Exception) -> ConfigError:
    return ConfigError(f"{name}: cannot be read ({reason(error)}); NAME=FILE reads a published set from a file")
