"""The interface of a step: what the host hands over, and what it gets back. Implementations: eager and captured."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from saffron.errors import SaffronError
from saffron.models.checks import not_finite
from saffron.search.handle import Handle
from saffron.search.readers import Row


@dataclass(slots=True)
class Batch:
    """The searches that are running.

    Attributes:
        rows: live beams, by search in the order of joining, then by parent.
        finished: nodes that have ended and are in their search's beam, in the order of their ending.
    """

    rows: list[Row] = field(default_factory=list)
    finished: list[Row] = field(default_factory=list)


class Child(NamedTuple):
    """A chosen child.

    Attributes:
        row: of the batch, its parent's.
        token, score, reward, log_probability: as `Node` has them.
    """

    row: int
    token: int
    score: float
    reward: float
    log_probability: float


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one step chose.

    Attributes:
        children: the chosen, by row; siblings in the order of choice.
        kept: which of the batch's finished nodes stay in their beam. Nodes that did not compete are not among them.
        nucleus_sizes: of each row.
        all_unseen: for each search, whether the MRM knew no candidate.
        failures: searches that cannot go on, and why.
        outputs: logits and hidden states of the rows, where the step has them on the host's side.
    """

    children: list[Child]
    kept: list[int]
    nucleus_sizes: list[int]
    all_unseen: dict[Handle, bool]
    failures: dict[Handle, SaffronError]
    outputs: tuple[Tensor, Tensor] | None = None

    def by_search(self, rows: Sequence[Row]) -> dict[Handle, list[Child]]:
        """The children of every search. One that chose an infinite reward fails: a head may change after loading."""
        found: dict[Handle, list[Child]] = {row.search: [] for row in rows}
        for child in self.children:
            search = rows[child.row].search
            found[search].append(child)
            if not math.isfinite(child.score):
                self.failures.setdefault(search, not_finite("mrm", "reward"))
        return found


class Step(Protocol):
    """Runs both models for all searches of a forest, and selects their next beams."""

    @property
    def room(self) -> int:
        """How many more searches it can take on."""

    def check(self, search: Handle) -> None:
        """Raises `ConfigError` for a search that it cannot run."""

    def add(self, search: Handle) -> None:
        """Takes a search on: `prefill` then reads its prompts."""

    def prefill(self, tokens: int | None) -> dict[Handle, Exception]:
        """Reads so many tokens of prompts with each model (None: all); returns the searches for which that failed."""

    def step(self, batch: Batch) -> list[StepRecord]:
        """Lets searches whose prompts have been read join (their roots become rows, behind the others) and runs the
        step, or some steps; `batch` is then what the first of the records is about. Between two records of one call
        the host drops nothing: each counts the rows that the one before has made."""

    def leave(self, searches: Collection[Handle]) -> None:
        """Gives back what the searches hold, wherever they are."""

    def close(self) -> None:
        """Gives everything back."""
