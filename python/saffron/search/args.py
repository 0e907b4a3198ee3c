"""ARGS: each token is chosen by its log-probability and the reward of the response with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from saffron.models.policy import Policy
from saffron.search.config import check_number, check_whole
from saffron.search.decoding import DrawingConfig
from saffron.search.method import Candidate, Decoder, SearchBatch, Steps
from saffron.search.prefix_scorer import Tokens
from saffron.search.proposals import Proposer
from saffron.search.rewards import RewardModel, RewardScorer, SearchPrefix


@dataclass(frozen=True, slots=True, kw_only=True)
class ARGSConfig(DrawingConfig):
    """Hyperparameters of `ARGS`.

    Attributes:
        children: candidates for the next token, the most probable of the nucleus; k in the paper.
        reward_weight: what a unit of reward is worth in units of log-probability; w in the paper.
        choice_temperature: 0: the candidate of the highest score is taken (ARGS-greedy). Above, one is drawn from the
            softmax of the scores at this temperature (ARGS-stochastic).
    """

    children: int = 10
    reward_weight: float = 1.0
    choice_temperature: float = 0.0

    def __post_init__(self) -> None:
        DrawingConfig.__post_init__(self)
        check_whole(self, children=1)
        check_number(self, reward_weight=False, choice_temperature=False)


class ARGS(Decoder[ARGSConfig]):
    """Alignment as reward-guided search (Khanov et al., 2024, arXiv 2402.01694, section 2).

    The score of a candidate `v` after `x` is `LM(v | x) + reward_weight * r([x, v])`; the reward model is asked about
    every candidate of every step.

    Choices: `LM` is the log-probability under the policy, without temperature and nucleus (the published code takes the
    logit, which differs by the same number for all candidates). Candidates come from the nucleus, as in the other
    methods here; `top_p=1` is the paper's top-k. Defaults are those of the example in the published code.

    The answer's score is its reward.
    """

    config_type = ARGSConfig

    def __init__(self, policy: Policy, reward_model: RewardModel, config: ARGSConfig | None = None) -> None:
        super().__init__(policy, RewardScorer(policy, reward_model), ARGSConfig() if config is None else config)

    def _decode(self, batch: SearchBatch) -> Steps[list[Candidate]]:
        config = self.config
        proposer = Proposer(batch, config.children)
        answers = [Candidate((), 0.0) for _ in range(batch.size)]
        for step in range(config.max_new_tokens):
            live = [g for g, answer in enumerate(answers) if batch.goes_on(answer.tokens)]
            if not live:
                break
            proposals = proposer.propose([(g, answers[g].tokens) for g in live])
            children: list[SearchPrefix] = []
            for g, proposal in zip(live, proposals, strict=True):
                children += [(g, (*answers[g].tokens, token)) for token in proposal.tokens]
            rewards = batch.score(children)
            first = 0
            for g, proposal in zip(live, proposals, strict=True):
                mine = rewards[first : first + len(proposal.tokens)]
                pairs = zip(proposal.log_probabilities, mine, strict=True)
                chosen = self._choose(
                    [value + config.reward_weight * reward for value, reward in pairs], batch.draws[g]
                )
                answers[g] = Candidate(children[first + chosen][1], mine[chosen])
                first += len(mine)
                if batch.on_token is not None:
                    batch.on_token(g, answers[g].tokens[-1])
            _forget(proposer, answers)
            yield step + 1, config.max_new_tokens
        return answers

    def _choose(self, scores: list[float], generator: np.random.Generator) -> int:
        """Of equal scores the first, which is the more probable token."""
        if self.config.choice_temperature == 0:
            return int(np.argmax(scores))
        weights = np.exp((np.array(scores) - max(scores)) / self.config.choice_temperature)
        before = np.cumsum(weights)
        return min(int(np.searchsorted(before, generator.random() * before[-1], side="right")), len(scores) - 1)


def _forget(proposer: Proposer, answers: list[Candidate]) -> None:
    """Drops all but the answers so far, whose last tokens the policy has not read yet."""

    def wanted(search: int, response: Tokens) -> bool:
        return response in (answers[search].tokens, answers[search].tokens[:-1])

    proposer.retain(wanted)
