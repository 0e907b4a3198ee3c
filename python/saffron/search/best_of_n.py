"""Best-of-N: draw N responses, answer with the one the reward model finds safest."""

from __future__ import annotations

from dataclasses import dataclass

from saffron.models.policy import Policy
from saffron.search.config import check_whole
from saffron.search.decoding import DrawingConfig
from saffron.search.method import Candidate, Decoder, SearchBatch, Steps
from saffron.search.proposals import sample
from saffron.search.rewards import RewardModel, RewardScorer


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOfNConfig(DrawingConfig):
    """Hyperparameters of Best-of-N.

    Attributes:
        n: responses drawn. Those of a smaller n are the first of those of a greater one.
    """

    n: int = 16

    def __post_init__(self) -> None:
        DrawingConfig.__post_init__(self)
        check_whole(self, n=1)


class BestOfN(Decoder[BestOfNConfig]):
    """Best-of-N sampling (Stiennon et al., 2020, arXiv 2009.01325, as SAFFRON-1 compares with it).

    N responses are drawn independently from the policy's nucleus, all N step by step at once; prefixes that samples
    have in common are run once. Finished, they are scored in one forward pass, one call per distinct response, over the
    trie that they share. The answer is the one of the highest reward, of equals the first drawn; that is its score.

    With an MRM one call reads a response but for its last token, and the template's suffix falls away.
    """

    config_type = BestOfNConfig

    def __init__(self, policy: Policy, reward_model: RewardModel, config: BestOfNConfig | None = None) -> None:
        super().__init__(policy, RewardScorer(policy, reward_model), BestOfNConfig() if config is None else config)

    def _decode(self, batch: SearchBatch) -> Steps[list[Candidate]]:
        n, steps = self.config.n, self.config.max_new_tokens
        grown = yield from sample(
            batch,
            [(search, ()) for search in range(batch.size) for _ in range(n)],
            steps,
            [batch.stream(search, i) for search in range(batch.size) for i in range(n)],
            report=True,
        )
        rewards = batch.score(grown)
        best = [max(range(s * n, s * n + n), key=lambda i: (rewards[i], -i)) for s in range(batch.size)]
        return [Candidate(grown[i][1], rewards[i]) for i in best]
