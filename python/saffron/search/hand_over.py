"""How a response gets from the policy's tokens to the MRM: as ids where they share a tokenizer, else through text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from saffron.errors import ConfigError
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.models.trie_model import Rows, TrieModel
from saffron.search.reading import Reading
from saffron.search.result import Tally

if TYPE_CHECKING:
    from saffron.search.tree import Node


@dataclass(frozen=True, slots=True)
class Head:
    """The MRM's unembedding by the policy's token ids: weight `[vocab, hidden]`, bias and unseen mask `[vocab]`."""

    weight: Tensor
    bias: Tensor | None
    unseen: Tensor | None


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
    """The MRM reads the text of a response, encoded anew from the last point where words can no longer merge.

    Tokens whose encoding did not change are found in the MRM's trie; only the rest is run. A text that takes more
    tokens here than in the policy may outgrow the MRM's context: `PromptTooLongError`.
    """

    def __init__(self, policy: Policy, mrm: MultifurcationRewardModel) -> None:
        self.policy, self.mrm = policy, mrm
        self.reading: Reading | None = None
        self.tallies: list[Tally] = []
        # Of each row: text before so many characters keeps these ids whatever follows.
        self._stable: list[tuple[int, tuple[int, ...]]] = []

    def start(self, contexts: Sequence[Sequence[int]]) -> Tensor:
        self.reading = Reading(self.mrm, contexts, head_rows=0)
        self.tallies = self.reading.tallies
        self._stable = [(0, ())] * len(contexts)
        return self.reading.read(range(len(contexts)), [()] * len(contexts))

    def step(self, parents: Sequence[int], groups: Sequence[int], nodes: Sequence[Node]) -> Tensor:
        assert self.reading is not None, "start comes first"
        stable, responses = [], []
        for parent, node in zip(parents, nodes, strict=True):
            start, ids = self._stable[parent]
            text = self.policy.decode(node.tokens())
            end = max(start, _stable_length(self.mrm.require_tokenizer(), text))
            ids = (*ids, *self.mrm.encode(text[start:end]))
            stable.append((end, ids))
            responses.append((*ids, *self.mrm.encode(text[end:])))
        hidden = self.reading.read(groups, responses)  # before the old rows go, so that what they share is found
        self._stable, current = stable, set(zip(groups, responses, strict=True))
        self.reading.retain(lambda group, response: (group, response) in current)
        return hidden

    def release(self) -> None:
        if self.reading is not None:
            self.reading.close()
            self.reading = None


def _stable_length(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Characters whose tokens are final: all words but the last two (the last may grow, and take a space with it)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.pre_tokenizer is None:
        return 0  # a tokenizer without word boundaries may merge anything: encode all of it
    words = backend.pre_tokenizer.pre_tokenize_str(text)
    return words[-2][1][0] if len(words) > 2 else 0


def same_tokens(policy: Policy, model: TrieModel) -> bool:
    """Whether token ids mean the same to both. Without tokenizers, equal vocabularies are taken to."""
    if policy.tokenizer is None or model.tokenizer is None:
        return True
    return policy.tokenizer.get_vocab() == model.tokenizer.get_vocab()


def head_for(policy: Policy, mrm: MultifurcationRewardModel, trained_bias: bool) -> Head:
    """The MRM's head by the policy's token ids.

    With tokenizers that differ, a policy token is scored as the MRM token its text begins with; a token that has no
    such counterpart counts as unseen.

    Raises:
        ConfigError: ids are handed over and the MRM's vocabulary is smaller than the policy's.
    """
    weight, bias = mrm.head_weight, mrm.full_bias(trained_bias)
    if same_tokens(policy, mrm):
        if mrm.vocab_size < policy.vocab_size:
            raise ConfigError(
                f"mrm: its vocabulary has {mrm.vocab_size} entries and the policy's {policy.vocab_size}; "
                "they must share a tokenizer, or both must bring one"
            )
        return Head(weight, bias, mrm.unseen)
    counterpart = _counterparts(policy, mrm)
    missing, index = counterpart < 0, counterpart.clamp(min=0)
    unseen = missing if mrm.unseen is None else missing | mrm.unseen[index]
    return Head(weight[index], None if bias is None else bias[index], unseen)


def _counterparts(policy: Policy, mrm: MultifurcationRewardModel) -> Tensor:
    """For each policy token the MRM token that its text begins with, -1 for none."""
    ours, theirs = policy.require_tokenizer(), mrm.require_tokenizer()
    special = set(ours.all_special_ids)
    # Decoded behind an anchor: some tokenizers drop a leading space at the beginning of a text.
    anchor = policy.encode("a")[-1]
    skip = len(ours.decode([anchor]))
    texts = ["" if t in special else ours.decode([anchor, t])[skip:] for t in range(policy.vocab_size)]
    encoded = theirs([text or "a" for text in texts], add_special_tokens=False)["input_ids"]
    first = [ids[0] if text and ids else -1 for text, ids in zip(texts, encoded, strict=True)]
    if theirs.eos_token_id is not None:
        for token in policy.end_tokens:
            first[token] = theirs.eos_token_id
    return torch.tensor(first, device=mrm.device)
