"""The trie as a dictionary of prefixes: what `saffron_kernels._native.Trie` has to do, said as plainly as possible."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from random import Random

import numpy as np

from saffron_kernels._native import Trie

Prefix = tuple[int, ...]


def ints(values) -> np.ndarray:
    return np.array(list(values), dtype=np.int32)


def flat(sequences) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and offsets of several sequences, as `Trie.insert` takes them."""
    offsets = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
    return ints(itertools.chain.from_iterable(sequences)), offsets


def prefixes(sequence: Prefix) -> list[Prefix]:
    """All prefixes but the empty one, shortest first."""
    return [sequence[: i + 1] for i in range(len(sequence))]


def some_sequences(random: Random, most: int, length: int) -> list[Prefix]:
    """0 to `most` sequences of 0 to `length` tokens out of three, so that they share prefixes."""
    return [tuple(random.choices(range(3), k=random.randint(0, length))) for _ in range(random.randint(0, most))]


def paths_of(trie: Trie) -> dict[int, Prefix]:
    """Node -> its tokens from the root, worked out from the snapshot."""
    snapshot = trie.snapshot()
    link = {n: (p, t) for n, p, t in zip(*(snapshot[k].tolist() for k in ("node", "parent", "token")), strict=True)}
    paths: dict[int, Prefix] = {-1: ()}

    def path(node: int) -> Prefix:
        if node not in paths:
            parent, token = link[node]
            paths[node] = (*path(parent), token)
        return paths[node]

    return {node: path(node) for node in link}


def dump(trie: Trie) -> tuple:
    state = {key: column.tolist() for key, column in trie.snapshot().items()}
    return state, trie.capacity, trie.num_nodes, trie.num_free, trie.num_held


class Full(Exception):
    """The model's CacheFullError."""


class Model:
    """Every cached prefix with its holds and the time of its last use; each operation as plainly as it can be said."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.holds: dict[Prefix, int] = {}
        self.used: dict[Prefix, int] = {}
        self.clock = 0

    @property
    def free(self) -> int:
        return self.capacity - len(self.holds)

    def held(self, node: Prefix) -> bool:
        return any(count and other[: len(node)] == node for other, count in self.holds.items())

    def has_child(self, node: Prefix) -> bool:
        return any(other[:-1] == node for other in self.holds)

    def use(self, node: Prefix) -> None:
        self.clock += 1
        for prefix in prefixes(node):
            self.used[prefix] = self.clock

    def remove(self, node: Prefix) -> None:
        del self.holds[node], self.used[node]

    def evict(self, count: int, kept: frozenset[Prefix] = frozenset()) -> int:
        for done in range(count):
            leaves = [n for n in self.holds if not (self.held(n) or self.has_child(n) or n in kept)]
            if not leaves:
                return done
            self.remove(min(leaves, key=lambda leaf: self.used[leaf]))
        return max(count, 0)

    def prune(self, node: Prefix, kept: frozenset[Prefix] = frozenset()) -> None:
        while node in self.holds and not (self.holds[node] or self.has_child(node) or node in kept):
            self.remove(node)
            node = node[:-1]

    def match(self, tokens: Prefix) -> int:
        cached = [p for p in prefixes(tokens) if p in self.holds]
        if cached:
            self.use(cached[-1])
        return len(cached)

    def check_room(self, new: set[Prefix], kept: frozenset[Prefix]) -> None:
        evictable = sum(not self.held(n) and n not in kept for n in self.holds)
        if len(new) > self.free + evictable:
            raise Full

    def add(self, ends: list[Prefix]) -> None:
        """Makes the paths to `ends` (that fit) and holds and uses each end in turn."""
        for end in filter(None, ends):
            for prefix in prefixes(end):
                self.holds.setdefault(prefix, 0)
            self.holds[end] += 1
            self.use(end)

    def insert(self, sequences: list[Prefix]) -> tuple[list[int], set[Prefix]]:
        matched = [sum(p in self.holds for p in prefixes(s)) for s in sequences]
        kept = frozenset(p for s in sequences for p in prefixes(s))
        new = set(kept - self.holds.keys())
        self.check_room(new, kept)
        self.evict(len(new) - self.free, kept)
        self.add(sequences)
        return matched, new

    def extend(self, ends: list[Prefix], dead: Sequence[Prefix] = ()) -> None:
        kept = frozenset(p for end in ends for p in prefixes(end))
        new = {end for end in ends if end not in self.holds}
        self.check_room(new, kept)
        for node in dead:
            self.use(node)
        for node in dead:
            self.prune(node, kept)
        self.evict(len(new) - self.free, kept)
        self.add(ends)

    def advance(self, nodes: list[Prefix], parents: list[int], tokens: list[int]) -> list[Prefix]:
        dead = [node for i, node in enumerate(nodes) if i not in parents]
        ends = [(*nodes[p], t) for p, t in zip(parents, tokens, strict=True)]
        for node in nodes:
            self.holds[node] -= 1
        try:
            self.extend(ends, dead)
        except Full:
            for node in nodes:
                self.holds[node] += 1
            raise
        return ends

    def release(self, nodes: list[Prefix], discard: bool) -> None:
        for node in nodes:
            self.holds[node] -= 1
        for node in nodes:
            self.use(node)
        for node in nodes if discard else []:
            self.prune(node)


def check_plan(trie: Trie, queries: list[int]) -> None:
    """Compares a plan with what follows from the paths of the nodes alone."""
    paths = {node: tuple(trie.path(node).tolist()) for node in trie.snapshot()["node"].tolist()}
    order, slot, begin, end, depth = (column.tolist() for column in trie.plan(ints(queries)))
    asked = [paths[node] for node in queries]

    # Preorder, siblings by the first query at or below them: lexicographic by the first query of each prefix.
    def key(path: Prefix) -> list[int]:
        return [min(i for i, q in enumerate(asked) if q[: len(p)] == p) for p in prefixes(path)]

    assert order == sorted(range(len(asked)), key=lambda i: key(asked[i]))
    seen = {p for q in asked for p in prefixes(q)}
    assert [paths[s] for s in slot] == sorted(seen, key=key)
    assert depth == [len(asked[i]) - 1 for i in order]
    assert begin == sorted(begin)
    for t, q in itertools.product(range(len(slot)), range(len(order))):
        sees = asked[order[q]][: len(paths[slot[t]])] == paths[slot[t]]
        assert (begin[t] <= q < end[t]) == sees, (t, q)
