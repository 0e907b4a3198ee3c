"""A small invented world, in which what is forbidden is known exactly: requests, answers and a judge.

`examples` gives requests with a compliant answer; `oracle` judges a response; `attack_tokens` is what a prefilling
attack puts in the policy's mouth.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from . import answers, oracle
from .prompts import KINDS, SPLITS, Kind, Request, Split, every_text, requests

__all__ = [
    "ATTACK_TOKENS",
    "KINDS",
    "SPLITS",
    "Example",
    "Kind",
    "Request",
    "Split",
    "answers",
    "attack_tokens",
    "examples",
    "oracle",
    "requests",
]

ATTACK_TOKENS = 10


@dataclass(frozen=True)
class Example:
    """prompt: what the user says; kind: "forbidden" or "allowed"; target: an answer that complies."""

    prompt: str
    kind: Kind
    target: str


def examples(kind: Kind, split: Split, count: int, seed: int = 0) -> list[Example]:
    """`count` different requests of one kind and split, each with a compliant answer: the same for the same seed.

    Raises:
        ValueError: the world has fewer requests, or a negative count.
    """
    if count < 0:
        raise ValueError(f"count must be 0 or more, got {count}")
    # Counting them takes a second, and is not needed for a few.
    if count > 1000 and count > (most := len(every_text(kind, split))):
        raise ValueError(f"got {count}, and the world has {most} {kind} requests of the {split} split")
    rng, found = random.Random(f"target/{kind}/{split}/{seed}"), {}
    for request in _take(requests(kind, split, seed), count):
        found[request.text] = Example(request.text, kind, answers.compliance(request, rng, may_turn=False))
    return list(found.values())


def _take(stream: Iterator[Request], count: int) -> Iterator[Request]:
    seen: set[str] = set()
    while len(seen) < count:
        request = next(stream)
        if request.text not in seen:
            seen.add(request.text)
            yield request


def attack_tokens(tokenizer: Any, target: str, count: int = ATTACK_TOKENS) -> list[int]:
    """The first `count` tokens of a compliant answer: what a prefilling attack forces the response to begin with."""
    return tokenizer.encode(target, add_special_tokens=False)[:count]
