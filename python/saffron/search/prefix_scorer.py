"""One model scoring the prefixes of many searches: what stays cached, and what each search would cost alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from saffron.models.trie_model import Index, TrieModel
from saffron.search.result import Tally
from saffron_kernels._native import CacheFullError, Trie

Tokens = tuple[int, ...]
Search = Hashable


class PrefixScorer:
    """Reads responses behind their search's context; every prefix is run once and remembered while it is wanted.

    The cost of a search is counted on a host trie of its own, which sees what the cache would see were it alone.

    Args:
        model: with `share_prefixes` off nothing is remembered, and every read runs all of its sequences.
        contexts: what stands before the responses, for each search; a search is anything that can be hashed.
        head_rows: entries of the unembedding that each read of a sequence needs.

    Attributes:
        tallies: cost, for each search.
    """

    def __init__(self, model: TrieModel, contexts: Mapping[Search, Sequence[int]], head_rows: int) -> None:
        self.model, self.head_rows = model, head_rows
        self.contexts: dict[Search, Tokens] = {}
        self.tallies: dict[Search, Tally] = {}
        self._alone: dict[Search, Trie] = {}
        # Response prefixes that stay cached, by search: their nodes in the model's trie and in the search's own.
        self._held: dict[Search, dict[Tokens, tuple[int, int]]] = {}
        for search, context in contexts.items():
            self.add(search, context, Tally())

    def add(self, search: Search, context: Sequence[int], tally: Tally, leaf: Index | None = None) -> None:
        """A search joins. `leaf`: the held node of its context, where that has been read already."""
        self.contexts[search], self.tallies[search] = tuple(context), tally
        self._alone[search], self._held[search] = Trie(256), {}
        if leaf is not None:
            (own,) = self._count([search], [list(context)], 1)
            if len(leaf):
                self._held[search][()] = int(leaf[0]), own

    def remove(self, search: Search) -> None:
        """A search leaves, and gives its part of the cache back; its tally stays as it is."""
        if self.contexts.pop(search, None) is not None:
            self.model.forget(_int32([node for node, _ in self._held.pop(search).values()]))
            del self._alone[search], self.tallies[search]

    def read(self, owners: Sequence[Search], responses: Sequence[Tokens], suffix: Sequence[int] = ()) -> Tensor:
        """The output `[responses, ...]` at the end of each `context + response + suffix`.

        What was read, without the suffix, stays cached until `retain` drops it.

        Args:
            owners: the search of each response.
        """
        full = [[*self.contexts[g], *r, *suffix] for g, r in zip(owners, responses, strict=True)]
        longest = max(range(len(full)), key=lambda i: len(full[i]))
        self.model.check_length(f"response {longest}", len(full[longest]))
        if not self.model.share_prefixes:
            _, output = self.model.read(full)
            for g, sequence in zip(owners, full, strict=True):
                self._charge(g, len(sequence), self.model.flops.prompt(len(sequence)), 1)
            return output
        # A suffix is read behind its response alone: the responses are held, the ends of the suffixes are not.
        wanted = [*full, *(s[: len(s) - len(suffix)] for s in full)] if suffix else full
        leaves, output = self.model.read(wanted)
        keep = len(leaves) - len(full)
        self._hold(owners, responses, leaves[keep:], self._count(owners, wanted, len(full)))
        if suffix:
            self.model.forget(leaves[:keep])
        return output[: len(full)]

    def charge_head(self, owner: Search, rows: int) -> None:
        """Counts entries of the unembedding that were read besides `head_rows`."""
        self.tallies[owner].flops += rows * self.model.flops.per_head_row

    def retain(self, wanted: Callable[[Any, Tokens], bool]) -> None:
        """Drops every response that is not wanted, given its search and its tokens, from the cache."""
        dropped: list[int] = []
        for g, held in self._held.items():
            gone = [response for response in held if not wanted(g, response)]
            nodes = [held.pop(response) for response in gone]
            dropped += [node for node, _ in nodes]
            self._alone[g].release(_int32([own for _, own in nodes]), True)
        self.model.forget(_int32(dropped))

    def close(self) -> None:
        """Gives the cache back."""
        self.retain(lambda owner, response: False)

    def _hold(self, owners: Sequence[Search], responses: Sequence[Tokens], leaves: Index, alone: list[int]) -> None:
        """One hold for each response; those that were held already give up the second one."""
        for g, response, leaf, own in zip(owners, responses, leaves.tolist(), alone, strict=True):
            if response in self._held[g]:
                self.model.forget(_int32([leaf]))
                self._alone[g].release(_int32([own]), True)
            else:
                self._held[g][response] = leaf, own

    def _count(self, owners: Sequence[Search], sequences: list[list[int]], calls: int) -> list[int]:
        """Charges each search for the tokens that its own trie lacks.

        Args:
            sequences: those whose output is wanted, `calls` of them, and then, where they had a suffix, the same
                number without it.

        Returns:
            the nodes of the last `calls` sequences in their search's trie, held once for each.
        """
        kept = [0] * calls
        rows_of: dict[Search, list[int]] = {}
        for i, owner in enumerate(owners):
            rows_of.setdefault(owner, []).append(i)
        for g, rows in rows_of.items():
            mine = [sequences[i + first] for first in range(0, len(sequences), calls) for i in rows]
            leaves, run, depth = _insert(self._alone[g], mine)
            flops = self.model.flops
            run_flops = flops.per_token * run + flops.per_pair * (depth + run)
            asked, last = leaves[: len(rows)], leaves[len(leaves) - len(rows) :]
            self._charge(g, run, run_flops, len(set(asked.tolist())))
            if len(leaves) > len(rows):
                self._alone[g].release(asked, True)
            for i, node in zip(rows, last.tolist(), strict=True):
                kept[i] = node
        return kept

    def _charge(self, owner: Search, tokens: int, flops: int, calls: int) -> None:
        flops += calls * self.head_rows * self.model.flops.per_head_row
        self.tallies[owner].add(flops, tokens, calls)


def _insert(trie: Trie, sequences: list[list[int]]) -> tuple[Index, int, int]:
    """Inserts as `KVTrie.insert` does: leaves, how many tokens have to be run, and the sum of their positions."""
    tokens = _int32([t for sequence in sequences for t in sequence])
    offsets = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
    try:
        leaves, _, new = trie.insert(tokens, offsets)
    except CacheFullError:
        trie.grow(max(2 * trie.capacity, trie.num_nodes + len(tokens)))
        leaves, _, new = trie.insert(tokens, offsets)
    run = np.union1d(new, leaves)
    depth = trie.plan(run)[-1]
    return leaves, len(run), int(depth.sum(dtype=np.int64))


def _int32(values: list[int]) -> Index:
    return np.array(values, dtype=np.int32)
