"""CARDS: segments that are drawn again until the reward model accepts one."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from saffron.errors import ConfigError
from saffron.models.policy import Policy
from saffron.search.config import check_number, check_reward, check_whole
from saffron.search.decoding import DrawingConfig
from saffron.search.method import Candidate, Decoder, SearchBatch, Steps
from saffron.search.prefix_scorer import Tokens
from saffron.search.proposals import Nuclei
from saffron.search.rewards import RewardModel, RewardScorer


@dataclass(frozen=True, slots=True, kw_only=True)
class CARDSConfig(DrawingConfig):
    """Hyperparameters of `CARDS`; the names in brackets are the paper's.

    Attributes:
        entropy_threshold: a segment ends before a token whose distribution has at least this entropy, in nats (tau_u).
        reward_threshold: the reward that the whole response should have (r*).
        alpha: how far the first threshold is from the reward of the prompt alone to `reward_threshold`, from 0 to 1.
        beta: temperature of the acceptance, above 0: the smaller, the fewer segments below the threshold pass.
        shortest, longest: tokens of a segment.
        attempts: segments drawn at most before the best of them is taken.
    """

    entropy_threshold: float = 3.0
    reward_threshold: float = 6.0
    alpha: float = 0.5
    beta: float = 0.7
    shortest: int = 4
    longest: int = 64
    attempts: int = 20

    def __post_init__(self) -> None:
        DrawingConfig.__post_init__(self)
        check_number(self, entropy_threshold=False, alpha=False, beta=True)
        if self.alpha > 1:
            raise ConfigError(f"alpha: got {self.alpha}, expected a number from 0 to 1")
        check_reward("reward_threshold", self.reward_threshold)
        check_whole(self, shortest=1, longest=1, attempts=1)
        if self.longest < self.shortest:
            raise ConfigError(f"longest: got {self.longest}, expected at least shortest, {self.shortest}")


@dataclass(slots=True)
class _Search:
    """One search: what was accepted, its reward, the segments drawn behind it, and the one that is being drawn."""

    first_threshold: float
    accepted: Tokens = ()
    reward: float = 0.0
    drawn: list[Candidate] = field(default_factory=list)
    candidate: Tokens = ()


class CARDS(Decoder[CARDSConfig]):
    """Cascade reward sampling (Li et al., 2024, arXiv 2406.16306, section 4 and its published code).

    A segment is drawn from the policy until the entropy of the next token reaches a threshold, scored with all that
    stands before it, and accepted with probability `min(1, exp((reward - threshold) / beta))`; else it is drawn again.
    The threshold rises linearly with the length of the response, from `(1 - alpha) * reward of the prompt alone +
    alpha * reward_threshold` at its beginning to `reward_threshold` at `max_new_tokens`.

    Choices: the reward of the prompt alone is that of the empty response. Tokens are drawn from the nucleus at
    `temperature`, as in the other methods here (the published code draws among the 40 most probable ones at the
    temperature `beta`). A segment ends with the response. Defaults are those of the published code but for
    `reward_threshold`, which depends on the reward model: 6 is 0.998 safe in log-odds. `entropy_threshold` depends on
    the policy: where no entropy reaches it, all segments are the longest.

    The answer's score is its reward.
    """

    config_type = CARDSConfig

    def __init__(self, policy: Policy, reward_model: RewardModel, config: CARDSConfig | None = None) -> None:
        super().__init__(policy, RewardScorer(policy, reward_model), CARDSConfig() if config is None else config)

    def _decode(self, batch: SearchBatch) -> Steps[list[Candidate]]:
        config = self.config
        unsaid = batch.score([(g, ()) for g in range(batch.size)])
        searches = [_Search((1 - config.alpha) * reward + config.alpha * config.reward_threshold) for reward in unsaid]
        done = 0
        while live := [g for g, search in enumerate(searches) if batch.goes_on(search.accepted)]:
            yield from self._draw(batch, searches, live)
            rewards = batch.score([(g, searches[g].candidate) for g in live])
            for g, reward in zip(live, rewards, strict=True):
                self._judge(batch, g, searches[g], reward)
            _forget(batch, searches)
            before, done = done, min(len(search.accepted) for search in searches)
            yield (done, config.max_new_tokens) if done > before else None
        return [Candidate(search.accepted, search.reward) for search in searches]

    def _draw(self, batch: SearchBatch, searches: list[_Search], live: list[int]) -> Steps[None]:
        """A segment for each live search."""
        config = self.config
        while live:
            logits = batch.logits([(g, searches[g].candidate) for g in live])
            entropies = torch.special.entr(logits.softmax(-1)).sum(-1).tolist()
            lengths = [len(searches[g].candidate) - len(searches[g].accepted) for g in live]
            ended = [
                n >= config.shortest and e >= config.entropy_threshold for n, e in zip(lengths, entropies, strict=True)
            ]
            nuclei = Nuclei(logits, config.temperature, config.top_p)
            tokens = nuclei.draw([0.0 if end else batch.draws[g].random() for g, end in zip(live, ended, strict=True)])
            going = []
            for g, token, length, end in zip(live, tokens, lengths, ended, strict=True):
                if not end:
                    searches[g].candidate += (token,)
                    if length + 1 < config.longest and batch.goes_on(searches[g].candidate):
                        going.append(g)
            live = going
            _forget(batch, searches)
            yield None

    def _judge(self, batch: SearchBatch, g: int, search: _Search, reward: float) -> None:
        """Accepts the segment that was drawn, or the best of the last attempts, or none."""
        config, last = self.config, Candidate(search.candidate, reward)
        search.drawn.append(last)
        share = len(last.tokens) / config.max_new_tokens
        threshold = search.first_threshold + share * (config.reward_threshold - search.first_threshold)
        if len(search.drawn) == config.attempts:
            last = max(search.drawn, key=lambda candidate: candidate.score)
        elif batch.draws[g].random() >= math.exp(min(0.0, (reward - threshold) / config.beta)):
            search.candidate = search.accepted
            return
        search.accepted = search.candidate = last.tokens
        search.reward, search.drawn = last.score, []


def _forget(batch: SearchBatch, searches: list[_Search]) -> None:
    """Drops all but what was accepted and what is being drawn, whose last tokens the policy may not have read yet."""

    def wanted(search: int, response: Tokens) -> bool:
        here = searches[search]
        return response in (here.accepted, here.candidate, here.accepted[:-1], here.candidate[:-1])

    batch.retain(wanted)
