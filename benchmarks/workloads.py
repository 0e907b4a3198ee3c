"""Plans and logits to measure with."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from harness import DEVICE, FOLDER
from torch import Tensor

from saffron_kernels import advance_tree


@dataclass(frozen=True, slots=True)
class Plan:
    """A flattened trie, and the number of slots it takes."""

    queries: int
    slot: Tensor
    begin: Tensor
    end: Tensor
    slots: int

    @property
    def pairs(self) -> int:
        """(query, token) pairs that see each other."""
        return int((self.end - self.begin).sum())

    @property
    def mask(self) -> Tensor:
        query = torch.arange(self.queries, device=self.slot.device)[:, None]
        return (self.begin <= query) & (query < self.end)

    def sequences(self) -> list[Tensor]:
        """Slots that each query sees."""
        return [self.slot[seen].long() for seen in self.mask]


def _int32(values: Sequence[int] | range) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=DEVICE)


@functools.cache
def recorded() -> dict[str, list[list[int]]]:
    """Parents of the beams at every step, from searches with a random policy and MRM, by width."""
    return json.loads((FOLDER / "recorded_searches.json").read_text())


def search_plan(beams: int, prompt: int, levels: int, searches: int = 1, apart: bool = False) -> Plan:
    """The plan of `searches` alike searches after `levels` steps, dead tokens dropped.

    `apart`: from the first step on no two beams share anything but the prompt; else parents as recorded.
    """
    steps = [list(range(beams))] * levels if apart else recorded()[str(beams)][:levels]
    slot = _int32(range(searches * prompt))
    begin = _int32([s for s in range(searches) for _ in range(prompt)])
    end, queries, used = begin + 1, searches, searches * prompt
    for step, mine in enumerate(steps):
        before = 1 if step == 0 else beams
        parents = [s * before + min(p, before - 1) for s in range(searches) for p in mine]
        new = range(used, used + len(parents))
        slot, begin, end = advance_tree(slot, begin, end, _int32(parents), _int32(new), queries)
        alive = begin < end
        slot, begin, end = slot[alive], begin[alive], end[alive]
        queries, used = len(parents), used + len(parents)
    return Plan(queries, slot, begin, end, used)


def level_plan(nodes: Sequence[int], tokens: Sequence[int]) -> Plan:
    """A tree with `nodes[i]` nodes of `tokens[i]` tokens at level i, children spread evenly; a query a leaf."""
    queries = nodes[-1]
    begin, end = [], []
    for count, length in zip(nodes, tokens, strict=True):
        bounds = [queries * node // count for node in range(count + 1)]
        for low, high in pairwise(bounds):
            begin += [low] * length
            end += [high] * length
    return Plan(queries, _int32(range(len(begin))), _int32(begin), _int32(end), len(begin))


def chain_plan(tokens: int) -> Plan:
    """Prefill of one sequence."""
    return Plan(tokens, _int32(range(tokens)), _int32(range(tokens)), _int32([tokens] * tokens), tokens)


def peaked_logits(rows: int, vocab: int, size: float, top_p: float, dtype: torch.dtype) -> Tensor:
    """Logits like a language model's: a few likely tokens above a normal bulk, in nuclei of `size` on average.

    The likely ones fall off as a power of their rank; the power is found by bisection.
    """
    generator = torch.Generator().manual_seed(0)
    bulk = torch.randn(rows, vocab, generator=generator) * 1.5 - 16
    rank = torch.rand(rows, vocab, generator=generator).argsort(1).argsort(1).float()
    low, high = 0.2, 6.0
    for _ in range(16):
        power = (low + high) / 2
        logits = torch.maximum(-power * (rank + 1).log(), bulk)
        p = logits.softmax(1).topk(min(vocab, 2048)).values
        mean = float(((p.cumsum(1) - p) < top_p).sum(1).float().mean())
        low, high = (power, high) if mean > size else (low, power)
    return logits.to(dtype).to(DEVICE)
