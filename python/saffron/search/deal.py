"""DeAL: each token is judged by where the policy would take the response after it."""

from __future__ import annotations

from dataclasses import dataclass

from saffron.models.policy import Policy
from saffron.search.config import check_number, check_whole
from saffron.search.decoding import DecodingConfig
from saffron.search.method import Candidate, Decoder, SearchBatch, Steps
from saffron.search.prefix_scorer import Tokens
from saffron.search.proposals import Proposer
from saffron.search.rewards import RewardModel, RewardScorer, SearchPrefix


@dataclass(frozen=True, slots=True, kw_only=True)
class DeALConfig(DecodingConfig):
    """Hyperparameters of `DeAL`.

    Attributes:
        width: responses kept.
        children: candidates for the next token, the most probable of the nucleus.
        lookahead: tokens of the greedy continuation by which a candidate is judged.
        policy_weight: what a unit of log-probability is worth in units of reward.
    """

    width: int = 1
    children: int = 8
    lookahead: int = 4
    policy_weight: float = 0.0

    def __post_init__(self) -> None:
        DecodingConfig.__post_init__(self)
        check_whole(self, width=1, children=1, lookahead=0)
        check_number(self, policy_weight=False)


@dataclass(frozen=True, slots=True)
class _Node:
    """A response, its log-probability, and what it is ranked by."""

    tokens: Tokens
    log_probability: float
    score: float


class DeAL(Decoder[DeALConfig]):
    """Decoding-time alignment (Huang et al., 2024, arXiv 2402.06147, section 3): heuristic-guided search.

    Each step the policy's most probable tokens are candidates. A candidate's heuristic is the reward of the response
    that the policy, decoding greedily, makes of it within `lookahead` tokens; candidates are ranked by
    `policy_weight * log-probability + heuristic` and the best `width` kept. (The paper weighs the heuristic, which is
    the same up to scale; with policy_weight 0 the reward decides alone among what the nucleus allows, as in the other
    methods here.)

    Choices: what the policy proposed and the reward model said is remembered, so that the lookahead of a candidate
    that is kept is not run again in the next step. A candidate that ends the response is scored as it stands.

    The answer is the response ranked best at the end, of equals one that has ended; its score is what ranked it.
    """

    config_type = DeALConfig

    def __init__(self, policy: Policy, reward_model: RewardModel, config: DeALConfig | None = None) -> None:
        super().__init__(policy, RewardScorer(policy, reward_model), DeALConfig() if config is None else config)

    def _decode(self, batch: SearchBatch) -> Steps[list[Candidate]]:
        config = self.config
        proposer = Proposer(batch, config.children)
        beams = [[_Node((), 0.0, 0.0)] for _ in range(batch.size)]
        for step in range(config.max_new_tokens):
            live = [(g, node) for g, mine in enumerate(beams) for node in mine if batch.goes_on(node.tokens)]
            if not live:
                break
            children: list[tuple[SearchPrefix, float]] = []
            for (g, node), proposal in zip(live, proposer.propose([(g, n.tokens) for g, n in live]), strict=True):
                for token, value in zip(proposal.tokens, proposal.log_probabilities, strict=True):
                    children.append(((g, (*node.tokens, token)), node.log_probability + value))
            rewards = batch.score(proposer.look_ahead([child for child, _ in children], config.lookahead))
            beams = [[node for node in mine if not batch.goes_on(node.tokens)] for mine in beams]
            for ((g, response), value), reward in zip(children, rewards, strict=True):
                beams[g].append(_Node(response, value, config.policy_weight * value + reward))
            beams = [sorted(mine, key=lambda node: -node.score)[: config.width] for mine in beams]
            _forget(proposer, step + 1, {(g, node.tokens) for g, mine in enumerate(beams) for node in mine})
            yield step + 1, config.max_new_tokens
        best = [max(mine, key=lambda node: (node.score, batch.ended(node.tokens))) for mine in beams]
        return [Candidate(node.tokens, node.score) for node in best]


def _forget(proposer: Proposer, depth: int, kept: set[SearchPrefix]) -> None:
    """Drops from the caches all but what leads to the kept responses of `depth` tokens, or goes on from them."""
    parents = {(g, response[:-1]) for g, response in kept}
    proposer.retain(lambda g, r: (g, r[:depth]) in kept or (g, r) in parents)
