"""Beam search with a reward model: keep the responses of the highest reward."""

from __future__ import annotations

from dataclasses import dataclass

from saffron.models.policy import Policy
from saffron.search.config import check_whole
from saffron.search.decoding import DrawingConfig
from saffron.search.method import Candidate, Decoder, SearchBatch, Steps
from saffron.search.proposals import Nuclei, sample
from saffron.search.rewards import RewardModel, RewardScorer, SearchPrefix


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamConfig(DrawingConfig):
    """Hyperparameters of `BeamSearch`.

    Attributes:
        width: beams kept.
        children: continuations that each beam proposes in a step, as far as its nucleus has different tokens.
        step_tokens: length of a continuation.
    """

    width: int = 4
    children: int = 4
    step_tokens: int = 1

    def __post_init__(self) -> None:
        DrawingConfig.__post_init__(self)
        check_whole(self, width=1, children=1, step_tokens=1)


class BeamSearch(Decoder[BeamConfig]):
    """Beam search guided by a process reward model (SAFFRON-1, section 3, "beam search" with `children`).

    Each step every beam proposes `children` continuations, the reward model scores each, and the `width` of the
    highest reward over all beams and the responses that have ended are kept. The paper's children are single tokens,
    each of which costs a PRM call: `step_tokens=1`, the default. Longer ones (Snell et al., 2024, arXiv 2408.03314,
    where a step is a line) cost a call for each `step_tokens` tokens.

    Choices: the first tokens of a beam's continuations are drawn from its nucleus without replacement, since two equal
    children would waste a call; later tokens are drawn freely. Equal rewards stand in the order of their parents, then
    of the draws. A child that ends the response scores what it would have scored without the end token.

    The answer is the beam of the highest reward at the end, of equals one that has ended; that is its score.
    """

    config_type = BeamConfig

    def __init__(self, policy: Policy, reward_model: RewardModel, config: BeamConfig | None = None) -> None:
        super().__init__(policy, RewardScorer(policy, reward_model), BeamConfig() if config is None else config)

    def _decode(self, batch: SearchBatch) -> Steps[list[Candidate]]:
        config = self.config
        beams = [[Candidate((), 0.0)] for _ in range(batch.size)]
        for done in range(0, config.max_new_tokens, config.step_tokens):
            live = [(g, beam.tokens) for g, mine in enumerate(beams) for beam in mine if batch.goes_on(beam.tokens)]
            if not live:
                break
            children = yield from self._children(batch, live)
            rewards = batch.score(children)
            pools = [[beam for beam in mine if not batch.goes_on(beam.tokens)] for mine in beams]
            for (g, response), reward in dict(zip(children, rewards, strict=True)).items():
                pools[g].append(Candidate(response, reward))
            beams = [sorted(pool, key=lambda beam: -beam.score)[: config.width] for pool in pools]
            batch.retain_leaves((g, beam.tokens) for g, mine in enumerate(beams) for beam in mine)
            yield min(done + config.step_tokens, config.max_new_tokens), config.max_new_tokens
        return [max(mine, key=lambda beam: (beam.score, batch.ended(beam.tokens))) for mine in beams]

    def _children(self, batch: SearchBatch, live: list[SearchPrefix]) -> Steps[list[SearchPrefix]]:
        """All continuations of the live beams; the policy's cache then holds what leads to them."""
        config = self.config
        logits = batch.logits(live)
        reading = set(live)
        batch.policy.retain(lambda g, r: (g, r) in reading)
        nuclei = Nuclei(logits, config.temperature, config.top_p)
        children = [
            (g, (*response, token))
            for i, (g, response) in enumerate(live)
            for token in nuclei.draw_distinct(i, config.children, batch.draws[g])
        ]
        return (yield from sample(batch, children, config.step_tokens - 1, [batch.draws[g] for g, _ in children]))
