"""Plans and logits to measure with."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from harness import FOLDER
from timing import DEVICE
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
def recorded() -> dict[str, dict[str, list[list[int]]]]:
    """The parent of every live beam at every step, by models and width; from `record_searches.py`."""
    return json.loads((FOLDER / "recorded_searches.json").read_text())


def search_plan(
    beams: int, prompt: int, levels: int, searches: int = 1, apart: bool = False, models: str = "random"
) -> Plan:
    """The plan of `searches` alike searches after `levels` steps, dead tokens dropped.

    `apart`: from the first step on no two beams share anything but the prompt; else as recorded with `models`.
    """
    steps = [list(range(beams))] * levels if apart else recorded()[models][str(beams)][:levels]
    if len(steps) < levels:
        raise ValueError(f"levels: got {levels}, recorded are {len(steps)}")
    slot = _int32(range(searches * prompt))
    begin = _int32([s for s in range(searches) for _ in range(prompt)])
    end, queries, used, before = begin + 1, searches, searches * prompt, 1
    for mine in steps:
        parents = [s * before + min(p, before - 1) for s in range(searches) for p in mine]
        new = range(used, used + len(parents))
        slot, begin, end = advance_tree(slot, begin, end, _int32(parents), _int32(new), queries)
        alive = begin < end
        slot, begin, end = slot[alive], begin[alive], end[alive]
        queries, used, before = len(parents), used + len(parents), len(mine)
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


def parse_tree(text: str) -> Plan:
    """`level_plan` of `nodes of each level/tokens a node of each level`, e.g. `1,10/4000,400`."""
    nodes, tokens = ([int(n) for n in part.split(",")] for part in text.split("/"))
    return level_plan(nodes, tokens)


# FastTree's list (MLSys 2025), so that figures can be compared with its plots.
TREES = (
    "1,2,64/8,256,32",
    "1,4,256/8,256,32",
    "1,4,8,256/8,256,256,32",
    "1,256/256,32",
    "1,1024/2048,32",
    "1,16,64/1024,256,32",
    "1,4,16,512/1024,256,128,32",
    "1,4,16,64,256,1024/256,8,256,64,32,256",
    "1,10/4000,400",
    "1,2,4,8,16,32,64,128,1024/16,16,16,16,16,16,16,16,16",
    "1,2,4,8,16,32,64,128,1024/256,128,64,16,16,16,16,16,16",
    "1,8,16,32,64,128,1024/256,128,64,16,16,16,16",
    "1,8,16,32,64,256,1024/256,128,64,16,16,16,16",
    "1,16,32,64,128,1024/256,128,64,16,16,16",
    "1,16,32,64,256,1024/256,128,64,16,16,16",
)


def chain_plan(tokens: int) -> Plan:
    """Prefill of one sequence."""
    return Plan(tokens, _int32(range(tokens)), _int32(range(tokens)), _int32([tokens] * tokens), tokens)


def peaked_logits(rows: int, vocab: int, size: float, top_p: float, dtype: torch.dtype) -> Tensor:
    """Logits like a language model's: a few likely tokens above a normal bulk, in nuclei of `size` on average.

    The likely ones fall off as a power of their rank; the power is found by bisection.
    """
    return _peaked_logits(rows, vocab, size, top_p).to(dtype).to(DEVICE)


@functools.cache
def _peaked_logits(rows: int, vocab: int, size: float, top_p: float) -> Tensor:
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
    return logits
