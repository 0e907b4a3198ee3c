"""How a response gets from the policy's tokens to the MRM: as ids where they share a tokenizer, else through text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.models.trie_model import Rows, TrieModel
from saffron.models.vocabulary import EMPTY, Head, Mapped, TextMapper, head_for, same_tokens
from saffron.search.reading import Reading
from saffron.search.result import Tally

if TYPE_CHECKING:
    from saffron.search.tree import Node

__all__ = ["Head", "ReadText", "ReadTokens", "Reader", "head_for", "same_tokens"]


class Reader(Protocol):
    """Keeps a model in step with the beams of many searches. Outputs come in the caller's row order.

    Attributes:
        tallies: what each search has cost the model, as if it were alone; the unembedding is for the caller to add.
    """

    tallies: list[Tally]

    def start(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        """Reads everything before the responses, a row for each search; outputs `[rows, ...]`."""

    def step(self, parents: Sequence[int], groups: Sequence[int], nodes: Sequence[Node]) -> Tensor:
        """Row `j` becomes `nodes[j]` of search `groups[j]`, child of old row `parents[j]`; outputs `[rows, ...]`."""

    def release(self) -> None:
        """Gives the cache back."""


class ReadTokens:
    """The model reads the policy's token ids as they are, one token a step."""

    def __init__(self, model: TrieModel) -> None:
        self.model = model
        self.rows: Rows | None = None
        self.tallies: list[Tally] = []
        self._lengths: list[int] = []  # of the contexts

    def start(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        self._lengths = [len(context) for context in contexts]
        self.tallies = [Tally(self.model.flops.prompt(length), length, 1) for length in self._lengths]
        self.rows, output = self.model.prefill(contexts)
        return output

    def step(self, parents: Sequence[int], groups: Sequence[int], nodes: Sequence[Node]) -> Tensor:
        assert self.rows is not None, "start comes first"
        self.tally(groups, nodes)
        return self.model.step(self.rows, parents, [node.token for node in nodes])

    def tally(self, groups: Sequence[int], nodes: Sequence[Node]) -> None:
        """Counts what a step costs, without running it."""
        flops, shared = self.model.flops, self.model.share_prefixes
        for group, node in zip(groups, nodes, strict=True):
            length = self._lengths[group] + node.depth
            tally = self.tallies[group]
            tally.flops += flops.token(length - 1) if shared else flops.prompt(length)
            tally.tokens += 1 if shared else length
            tally.calls += 1

    def release(self) -> None:
        if self.rows is not None:
            self.model.release(self.rows)
            self.rows = None


class ReadText:
    """The MRM reads the text of a response, as its own tokenizer encodes it (`TextMapper`).

    Tokens whose encoding did not change are found in the MRM's trie; only the rest is run. A text that takes more
    tokens here than in the policy may outgrow the MRM's context: `PromptTooLongError`.
    """

    def __init__(self, policy: Policy, mrm: MultifurcationRewardModel) -> None:
        self.mapper, self.mrm = TextMapper(policy, mrm), mrm
        self.reading: Reading | None = None
        self.tallies: list[Tally] = []
        self._rows: list[Mapped] = []

    def start(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        self.reading = Reading(self.mrm, contexts, head_rows=0)
        self.tallies = self.reading.tallies
        self._rows = [EMPTY] * len(contexts)
        return self.reading.read(range(len(contexts)), [()] * len(contexts))

    def step(self, parents: Sequence[int], groups: Sequence[int], nodes: Sequence[Node]) -> Tensor:
        assert self.reading is not None, "start comes first"
        rows = self.mapper.extend([self._rows[parent] for parent in parents], [node.tokens() for node in nodes])
        responses = [row.ids for row in rows]
        hidden = self.reading.read(groups, responses)  # before the old rows go, so that what they share is found
        self._rows, current = rows, set(zip(groups, responses, strict=True))
        self.reading.retain(lambda group, response: (group, response) in current)
        return hidden

    def release(self) -> None:
        if self.reading is not None:
            self.reading.close()
            self.reading = None
