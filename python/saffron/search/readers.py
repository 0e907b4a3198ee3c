"""How the two models follow the live beams of many searches: as token ids, or through text."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saffron.errors import PromptTooLongError
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.models.trie_model import Index, TrieModel
from saffron.models.vocabulary import EMPTY, Mapped, TextMapper
from saffron.search.handle import Handle
from saffron.search.prefix_scorer import PrefixScorer, Tokens
from saffron.search.tree import Node

_NONE: Index = np.empty(0, dtype=np.int32)


class Row(NamedTuple):
    """A beam and the search it belongs to."""

    search: Handle
    node: Node


@dataclass(slots=True)
class Prompt:
    """What a model reads before a response, and how far it has come.

    Attributes:
        tokens: all of it.
        leaf: the node of the last token that was run, held (none before the first pass, or without a cache).
        done: tokens that were run.
        output: `[1, ...]` after the last token.
    """

    tokens: Tokens
    leaf: Index
    done: int = 0
    output: Tensor | None = None


class Reader:
    """A model, the prompts that it is reading in chunks, and the rows it has run: one per live beam.

    Args:
        side: 0 for the policy, 1 for the MRM: which part of a request it reads.
    """

    def __init__(self, model: TrieModel, side: int) -> None:
        self.model, self.side = model, side
        self.prompts: dict[Handle, Prompt] = {}
        self.rows = model.new_rows()

    def add(self, search: Handle) -> None:
        """Begins to read the prompt of a search."""
        request = search.request
        self.prompts[search] = Prompt(request.reward if self.side else request.policy, _NONE)

    def next_chunk(self, tokens: int | None) -> dict[Handle, int]:
        """Which prompts the next pass goes on with, the oldest first, and up to which token each."""
        chunk: dict[Handle, int] = {}
        for search, prompt in self.prompts.items():
            missing = len(prompt.tokens) - prompt.done
            if missing and (tokens is None or tokens > 0):
                whole = tokens is None or not self.model.share_prefixes
                chunk[search] = prompt.done + (missing if whole else min(missing, tokens or 0))
                tokens = None if tokens is None else tokens - missing
        return chunk

    def prefill(self, chunk: dict[Handle, int]) -> None:
        """One forward pass over the next tokens of some prompts."""
        prompts = [self.prompts[search] for search in chunk]
        leaves, outputs = self.model.read([p.tokens[:upto] for p, upto in zip(prompts, chunk.values(), strict=True)])
        self.model.forget(np.concatenate([p.leaf for p in prompts]))  # the new leaves hold what is above them
        for i, (prompt, upto) in enumerate(zip(prompts, chunk.values(), strict=True)):
            prompt.leaf, prompt.done = leaves[i : i + 1], upto
            if upto == len(prompt.tokens):
                prompt.output = outputs[i : i + 1]

    def join(self, searches: Sequence[Handle]) -> Tensor:
        """Searches whose prompts have been read get a row each, behind the others; returns the outputs there."""
        prompts = [self.prompts.pop(search) for search in searches]
        self._join(searches, prompts)
        return torch.cat([prompt.output for prompt in prompts if prompt.output is not None])

    def leave(self, searches: Collection[Handle], keep: Sequence[int] | None) -> None:
        """Gives back what the searches hold: their prompts, and all rows but `keep` (None: all stay)."""
        gone = [self.prompts.pop(search).leaf for search in searches if search in self.prompts]
        if gone:
            self.model.forget(np.concatenate(gone))
        if keep is not None:
            self.model.regroup(self.rows, keep)

    def outgrown(self, rows: Sequence[Row]) -> dict[Handle, PromptTooLongError]:
        """Which searches cannot go on as the next rows exceed the context: none, as that was checked before."""
        return {}

    def step(self, parents: Sequence[int], rows: Sequence[Row]) -> Tensor:
        """Row `j` becomes `rows[j]`, a child of old row `parents[j]`; returns the outputs `[rows, ...]`."""
        return self.model.step(self.rows, parents, [row.node.token for row in rows])

    def _join(self, searches: Sequence[Handle], prompts: Sequence[Prompt]) -> None:
        held = len(self.rows.beam_of_row) if self.rows.beams is not None else len(self.rows.sequences)
        leaves = np.concatenate([prompt.leaf for prompt in prompts])
        self.model.regroup(self.rows, range(held), [prompt.tokens for prompt in prompts], leaves)


class TextReader(Reader):
    """The MRM reads the text of a response, as its own tokenizer encodes it (`TextMapper`).

    Tokens whose encoding did not change are found in the MRM's trie; only the rest is run. A text that takes more
    tokens here than in the policy may outgrow the MRM's context: `PromptTooLongError`.
    """

    def __init__(self, policy: Policy, mrm: MultifurcationRewardModel) -> None:
        super().__init__(mrm, 1)
        self.mapper = TextMapper(policy, mrm)
        self.scorer = PrefixScorer(mrm, {}, head_rows=0)
        self._mapped: list[Mapped] = []  # of each row
        self._next: list[Mapped] = []

    def _join(self, searches: Sequence[Handle], prompts: Sequence[Prompt]) -> None:
        for search, prompt in zip(searches, prompts, strict=True):
            self.scorer.add(search, prompt.tokens, search.tree.tallies[1], prompt.leaf)
            self._mapped.append(EMPTY)

    def leave(self, searches: Collection[Handle], keep: Sequence[int] | None) -> None:
        super().leave(searches, None)
        if keep is not None:
            self._mapped = [self._mapped[row] for row in keep]
        for search in searches:
            self.scorer.remove(search)

    def outgrown(self, rows: Sequence[Row]) -> dict[Handle, PromptTooLongError]:
        """Encodes the responses of the next rows; which searches cannot go on, as their text exceeds the context."""
        parents = [self._mapped[row.node.parent.row if row.node.parent else -1] for row in rows]
        self._next = self.mapper.extend(parents, [row.node.tokens() for row in rows])
        failed = {}
        for row, mapped in zip(rows, self._next, strict=True):
            try:
                self.model.check_length("response", len(row.search.request.reward) + len(mapped.ids))
            except PromptTooLongError as error:
                failed[row.search] = error
        return failed

    def step(self, parents: Sequence[int], rows: Sequence[Row]) -> Tensor:
        searches, self._mapped = [row.search for row in rows], self._next
        responses = [mapped.ids for mapped in self._mapped]
        hidden = self.scorer.read(searches, responses)  # before the old rows go, so that what they share is found
        current = set(zip(searches, responses, strict=True))
        self.scorer.retain(lambda search, response: (search, response) in current)
        return hidden
