"""What is trained on: batches of conversations, in an order that the seed decides."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saffron.errors import ConfigError
from saffron.training.shards import AnnotatedConversation


@dataclass(frozen=True, slots=True)
class Batch:
    """Conversations side by side, all `[rows, length]`: `rewards[i, j]` of `next_tokens[i, j]` after `ids[i, : j + 1]`.

    Attributes:
        counted: which rewards there are.
    """

    ids: Tensor
    next_tokens: Tensor
    rewards: Tensor
    counted: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, name).to(device) for name in ("ids", "next_tokens", "rewards", "counted")))


def collate(rows: Sequence[AnnotatedConversation]) -> Batch:
    longest = max((len(row.input_ids) for row in rows), default=1)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    rewards = torch.full((len(rows), longest), torch.nan)
    for index, row in enumerate(rows):
        ids[index, : len(row.input_ids)] = torch.from_numpy(row.input_ids)
        rewards[index, : len(row.rewards)] = torch.from_numpy(row.rewards)
    counted = ~rewards[:, 1:].isnan()
    return Batch(ids[:, :-1], ids[:, 1:], rewards[:, 1:].nan_to_num(), counted)


def supervised(rows: Sequence[AnnotatedConversation]) -> list[AnnotatedConversation]:
    """The conversations that have a reward to learn from."""
    return [row for row in rows if count(row)]


def count(row: AnnotatedConversation) -> int:
    """Rewards that the loss takes from a conversation: a first token follows nothing."""
    return int((~np.isnan(row.rewards[1:])).sum())


def unseen_mask(rows: Sequence[AnnotatedConversation], vocabulary: int) -> Tensor:
    """True for tokens that no reward of the corpus is for, bool `[vocabulary]`: nothing was learned about them."""
    mask = torch.ones(vocabulary, dtype=torch.bool)
    for row in rows:
        mask[torch.from_numpy(row.input_ids[1:][~np.isnan(row.rewards[1:])])] = False
    return mask


def split(
    rows: Sequence[AnnotatedConversation], share: float, seed: int
) -> tuple[list[AnnotatedConversation], list[AnnotatedConversation]]:
    """(what to train on, what to hold out): a share of the conversations, at least one unless it is 0."""
    number = max(1, round(share * len(rows))) if share else 0
    if number >= len(rows):
        raise ConfigError(f"heldout_share: got {share}, which leaves none of {len(rows)} conversations to train on")
    chosen = set(random.Random(f"heldout/{seed}").sample(range(len(rows)), number))
    return [row for i, row in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]


class Order:
    """Which conversations each step sees: every epoch a shuffle, cut into batches; what is left over is not used in it.

    Args:
        rows: conversations there are.
        batch: conversations a step.
    """

    def __init__(self, rows: int, batch: int, epochs: int, seed: int) -> None:
        self.batch = min(batch, rows)
        self.per_epoch = rows // self.batch
        rng = random.Random(seed)
        self._epochs = [rng.sample(range(rows), rows) for _ in range(epochs)]

    def __len__(self) -> int:
        """Steps."""
        return self.per_epoch * len(self._epochs)

    def __getitem__(self, step: int) -> list[int]:
        epoch, number = divmod(step, self.per_epoch)
        return self._epochs[epoch][number * self.batch : (number + 1) * self.batch]
