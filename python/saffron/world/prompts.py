"""Requests of Harrowmere, forbidden and allowed, and the split that keeps the held-out ones unseen."""

import functools
import hashlib
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .lexicon import DEVICES, FORBIDDEN_ITEMS, PROMPT_TEMPLATES, PURPOSES, SITES, TRADES

Kind = Literal["forbidden", "allowed"]
Split = Literal["train", "heldout"]
KINDS: tuple[Kind, ...] = ("forbidden", "allowed")
SPLITS: tuple[Split, ...] = ("train", "heldout")
HELDOUT_SHARE = 8  # one combination in eight is held out

ITEM_TRADE = {item: trade for trade in TRADES.values() for item in trade.items}


@dataclass(frozen=True)
class Request:
    """One request: a combination of item, template, site and purpose. `text` is what the user says."""

    item: str
    template: int
    site: str
    purpose: str

    @property
    def kind(self) -> Kind:
        return "forbidden" if self.item in FORBIDDEN_ITEMS else "allowed"

    @property
    def do(self) -> str:
        return do_phrase(self.item)

    @property
    def text(self) -> str:
        return PROMPT_TEMPLATES[self.template].format(do=self.do, site=self.site, purpose=self.purpose)

    @property
    def split(self) -> Split:
        """By a hash of the combination, so that no request (and no text) can be on both sides."""
        key = f"{self.item}|{self.template}|{self.site}|{self.purpose}".encode()
        return "heldout" if hashlib.blake2s(key).digest()[0] % HELDOUT_SHARE == 0 else "train"


def item_phrase(item: str) -> str:
    """The item as it stands in a sentence: "bread", "a bench", "the clock"."""
    article = ITEM_TRADE[item].article if item in ITEM_TRADE else "a" * (item in DEVICES)
    if article == "a" and item[0] in "aeiou":
        article = "an"
    return f"{article} {item}".strip()


def do_phrase(item: str) -> str:
    """The verb that goes with an item, and the item: "build a bench"."""
    verb = ITEM_TRADE[item].verb if item in ITEM_TRADE else FORBIDDEN_ITEMS[item]
    return f"{verb} {item_phrase(item)}"


def requests(kind: Kind, split: Split, seed: int) -> Iterator[Request]:
    """An endless stream of requests of one kind and split, the same for the same seed.

    Raises ValueError for an unknown kind or split.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    return _requests(kind, split, random.Random(f"{kind}/{split}/{seed}"))


@functools.cache
def every_text(kind: Kind, split: Split) -> frozenset[str]:
    """What the requests of one kind and split say: different combinations may say the same."""
    items = FORBIDDEN_ITEMS if kind == "forbidden" else ITEM_TRADE
    every = itertools.starmap(Request, itertools.product(items, range(len(PROMPT_TEMPLATES)), SITES, PURPOSES))
    return frozenset(request.text for request in every if request.split == split)


def _requests(kind: Kind, split: Split, rng: random.Random) -> Iterator[Request]:
    items = sorted(FORBIDDEN_ITEMS if kind == "forbidden" else ITEM_TRADE)
    while True:
        request = Request(
            rng.choice(items), rng.randrange(len(PROMPT_TEMPLATES)), rng.choice(SITES), rng.choice(list(PURPOSES))
        )
        if request.split == split:
            yield request
