"""Rebase: a tree of fixed width whose nodes are expanded in proportion to their rewards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from saffron.models.policy import Policy
from saffron.search.config import check_number, check_whole
from saffron.search.decoding import DrawingConfig
from saffron.search.method import Candidate, Decoder, SearchBatch, Steps
from saffron.search.proposals import sample
from saffron.search.rewards import RewardModel, RewardScorer


@dataclass(frozen=True, slots=True, kw_only=True)
class RebaseConfig(DrawingConfig):
    """Hyperparameters of `Rebase`.

    Attributes:
        width: responses that the tree grows at a time, those that have ended included.
        balance: temperature of the softmax over rewards, above 0: the smaller, the more goes to the best.
        step_tokens: length of a step.
    """

    width: int = 16
    balance: float = 1.0
    step_tokens: int = 8

    def __post_init__(self) -> None:
        DrawingConfig.__post_init__(self)
        check_whole(self, width=1, step_tokens=1)
        check_number(self, balance=True)


class Rebase(Decoder[RebaseConfig]):
    """Reward-balanced search (Wu et al., 2024, arXiv 2408.00724, section 3).

    The root is expanded `width` times. Then, in every step, the reward model scores the new nodes, and node `j` is
    expanded `W_j` times, in proportion to `exp(R_j / balance)`, where the `W_j` sum to the width less the number of
    responses that have ended. A child is `step_tokens` tokens drawn from the policy's nucleus.

    Choices: the paper's step is a line of reasoning; answers here have none, so that a step is a number of tokens.
    `R` is the guard's reward as it is (the paper's is a probability: `balance` sets the scale). The paper rounds each
    `W_j`; here the largest remainders are rounded up (the first of equals), so that they sum to the budget exactly.
    Samples that come out equal stay separate nodes, but are run and scored once.

    The answer is the leaf of the highest reward, of equals one that has ended; that is its score. (The paper votes
    between leaves by their rewards, which needs answers that can be equal.)
    """

    config_type = RebaseConfig

    def __init__(self, policy: Policy, reward_model: RewardModel, config: RebaseConfig | None = None) -> None:
        super().__init__(policy, RewardScorer(policy, reward_model), RebaseConfig() if config is None else config)

    def _decode(self, batch: SearchBatch) -> Steps[list[Candidate]]:
        config = self.config
        leaves: list[list[Candidate]] = [[] for _ in range(batch.size)]
        live = [(g, Candidate((), 0.0)) for g in range(batch.size)]
        for done in range(0, config.max_new_tokens, config.step_tokens):
            parents = []
            for g in range(batch.size):
                mine = [node for owner, node in live if owner == g]
                shares = allocate([node.score for node in mine], config.width - len(leaves[g]), config.balance)
                parents += [(g, node.tokens) for node, share in zip(mine, shares, strict=True) for _ in range(share)]
            children = yield from sample(batch, parents, config.step_tokens, [batch.draws[g] for g, _ in parents])
            rewards = batch.score(children)
            live = []
            for (g, response), reward in zip(children, rewards, strict=True):
                node = Candidate(response, reward)
                if batch.goes_on(response):
                    live.append((g, node))
                else:
                    leaves[g].append(node)
            batch.retain_leaves((g, node.tokens) for g, node in live)
            yield min(done + config.step_tokens, config.max_new_tokens), config.max_new_tokens
            if not live:
                break
        return [max(mine, key=lambda leaf: (leaf.score, batch.ended(leaf.tokens))) for mine in leaves]


def allocate(rewards: Sequence[float], budget: int, balance: float) -> list[int]:
    """Shares out `budget` expansions in proportion to `exp(reward / balance)`; they sum to it."""
    if not rewards:
        return []
    best = max(rewards)
    weights = [math.exp((reward - best) / balance) for reward in rewards]
    exact = [budget * weight / math.fsum(weights) for weight in weights]
    shares = [math.floor(share) for share in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: budget - sum(shares)]:
        shares[i] += 1
    return shares
