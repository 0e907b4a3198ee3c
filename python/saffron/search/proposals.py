"""What the policy proposes: draws from its nucleus, with and without replacement, and its most probable tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saffron.search.prefix_scorer import Tokens
from saffron_kernels import nucleus

if TYPE_CHECKING:
    from saffron.search.method import SearchBatch, Steps
    from saffron.search.rewards import SearchPrefix


class Nuclei:
    """The nucleus of every row of logits, after the temperature, on the host.

    Args:
        logits: `[rows, vocab]`.
        temperature, top_p: see `DecodingConfig`.
    """

    def __init__(self, logits: Tensor, temperature: float, top_p: float) -> None:
        tokens, probabilities, offsets = nucleus(logits / temperature, top_p)
        self._tokens, self._probabilities = tokens.cpu().numpy(), probabilities.double().cpu().numpy()
        self._offsets = offsets.cpu().numpy()

    def row(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """Tokens and probabilities of row `i`, the most probable first."""
        own = slice(self._offsets[i], self._offsets[i + 1])
        return self._tokens[own], self._probabilities[own]

    def draw(self, uniforms: Sequence[float], even: Sequence[bool] | None = None) -> list[int]:
        """One token of each row, by the inverse of the cumulative distribution at a number in [0, 1).

        Args:
            even: rows whose tokens are all equally probable to be drawn; None: no row's.
        """
        before = np.concatenate([[0.0], np.cumsum(self._probabilities)])
        first, last = before[self._offsets[:-1]], before[self._offsets[1:]]
        # In one search over all rows: a row's share of the running total begins where the rows before it end.
        found = np.searchsorted(before, first + np.asarray(uniforms) * (last - first), side="right") - 1
        if even is not None:
            sizes = np.diff(self._offsets)
            found = np.where(even, self._offsets[:-1] + (np.asarray(uniforms) * sizes).astype(np.int64), found)
        return self._tokens[np.clip(found, self._offsets[:-1], self._offsets[1:] - 1)].tolist()

    def draw_distinct(self, i: int, count: int, generator: np.random.Generator) -> list[int]:
        """Up to `count` different tokens of row `i`, drawn one after the other without replacement.

        By the largest of `log p + Gumbel noise` (Kool et al., 2019, arXiv 1903.06059), which is the same.
        """
        tokens, probabilities = self.row(i)
        keys = np.log(probabilities) + generator.gumbel(size=len(tokens))
        return tokens[np.argsort(-keys, kind="stable")[:count]].tolist()


def sample(
    batch: SearchBatch,
    responses: Sequence[SearchPrefix],
    steps: int,
    generators: Sequence[np.random.Generator],
    *,
    report: bool = False,
    log_probabilities: list[float] | None = None,
    even: Sequence[bool] | None = None,
) -> Steps[list[SearchPrefix]]:
    """Every response goes on by up to `steps` tokens drawn from the nucleus, until it ends.

    Meanwhile the policy's cache holds these responses alone.

    Args:
        generators: of the draws, one per response; responses that share one draw in the order given.
        report: yield how many tokens have been drawn, and how many it will be at most.
        log_probabilities: one per response; that of what was drawn is added.
        even: responses whose tokens are drawn evenly from the nucleus; None: none.
    """
    grown: list[SearchPrefix] = list(responses)
    live = [i for i, (_, response) in enumerate(grown) if batch.goes_on(response)]
    for step in range(steps):
        if not live:
            break
        at = [grown[i] for i in live]
        logits = batch.logits(at)
        reading = set(at)
        batch.policy.retain(lambda g, r, kept=reading: (g, r) in kept)  # type: ignore[misc]
        nuclei = Nuclei(logits, batch.config.temperature, batch.config.top_p)
        rows = None if even is None else [even[i] for i in live]
        drawn = nuclei.draw([generators[i].random() for i in live], rows)
        if log_probabilities is not None:
            for i, value in zip(live, log_probability(logits, drawn), strict=True):
                log_probabilities[i] += value
        for i, token in zip(live, drawn, strict=True):
            search, response = grown[i]
            grown[i] = search, (*response, token)
        live = [i for i in live if batch.goes_on(grown[i][1])]
        yield (step + 1, steps) if report else None
    return grown


def log_probability(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """Of one token per row, without temperature and nucleus."""
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    return logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()


@dataclass(frozen=True, slots=True)
class Proposal:
    """The most probable tokens after a response, best first, and their log-probabilities under the policy."""

    tokens: list[int]
    log_probabilities: list[float]


class Proposer:
    """Asks the policy once for each response, and remembers what it proposed.

    Args:
        batch: the searches.
        count: tokens remembered for each response, from its nucleus.
    """

    def __init__(self, batch: SearchBatch, count: int) -> None:
        self.batch, self.count = batch, count
        self._known: dict[SearchPrefix, Proposal] = {}

    def propose(self, responses: Sequence[SearchPrefix]) -> list[Proposal]:
        """What may come after each response; those not asked before share one forward pass."""
        fresh = list(dict.fromkeys(response for response in responses if response not in self._known))
        if fresh:
            logits = self.batch.logits(fresh)
            nuclei = Nuclei(logits, self.batch.config.temperature, self.batch.config.top_p)
            log_probabilities = logits.log_softmax(-1)
            for i, response in enumerate(fresh):
                tokens = nuclei.row(i)[0][: self.count].tolist()
                self._known[response] = Proposal(tokens, log_probabilities[i, tokens].tolist())
        return [self._known[response] for response in responses]

    def look_ahead(self, responses: Sequence[SearchPrefix], steps: int) -> list[SearchPrefix]:
        """Every response goes on greedily by up to `steps` tokens, until it ends."""
        grown = list(responses)
        for _ in range(steps):
            live = [i for i, (_, response) in enumerate(grown) if self.batch.goes_on(response)]
            if not live:
                break
            for i, proposal in zip(live, self.propose([grown[i] for i in live]), strict=True):
                search, response = grown[i]
                grown[i] = search, (*response, proposal.tokens[0])
        return grown

    def retain(self, wanted: Callable[[int, Tokens], bool]) -> None:
        """Forgets, also in the caches of the models, responses that are not wanted."""
        self._known = {key: proposal for key, proposal in self._known.items() if wanted(*key)}
        self.batch.retain(wanted)
