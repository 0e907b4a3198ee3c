"""What `SearchConfig` can change about candidates and their order, for `reference`: dense, one sequence at a time."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from saffron.search.config import SearchConfig


class Response(NamedTuple):
    tokens: tuple[int, ...] = ()
    score: float = 0.0
    finished: bool = False
    reward: float = 0.0
    log_probability: float = 0.0

    @property
    def rank(self) -> tuple[float, float]:
        return self.score, self.log_probability / max(len(self.tokens), 1)


def nucleus(logits: Tensor, config: SearchConfig) -> list[tuple[int, float]]:
    """The policy's candidates, the most probable first, with their log-probabilities."""
    logits = logits / config.temperature
    probability, order = logits.softmax(-1).sort(descending=True, stable=True)
    before = probability.cumsum(0) - probability
    keep = (before < config.top_p) & (probability > 0) & (probability >= config.min_p * probability[0])
    tokens = order[keep][: config.top_k or None]
    return list(zip(tokens.tolist(), logits.log_softmax(-1)[tokens].tolist(), strict=True))


def child(
    parent: Response, token: int, reward: float, log_probability: float, ends: bool, config: SearchConfig
) -> Response:
    """The parent with one more token, of this reward and log-probability. In the paper its score is its reward."""
    length = len(parent.tokens) + 1
    reward = min(reward, math.inf if config.reward_cap is None else config.reward_cap)
    if length > 1 and config.path_score == "minimum":
        reward = min(reward, parent.reward)
    elif length > 1 and config.path_score != "last":
        share = 1 / length if config.path_score == "mean" else 1 - config.discount
        reward = parent.reward + share * (reward - parent.reward) if share < 1 else reward
    path = parent.log_probability + log_probability if config.asks_policy else 0.0
    said = log_probability if config.policy_score == "token" else path / length
    step = config.reward_tolerance
    score = math.floor(reward / step) * step if step else reward
    return Response((*parent.tokens, token), score + config.policy_weight * said, ends, reward, path)
