"""Decoding without a defence: what an attack meets where there is no search."""

from __future__ import annotations

from dataclasses import dataclass

from saffron.models.policy import Policy
from saffron.search.config import check_whole
from saffron.search.decoding import DrawingConfig
from saffron.search.method import Candidate, Decoder, SearchBatch, Steps
from saffron.search.proposals import log_probability, sample


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig(DrawingConfig):
    """Hyperparameters of `Sampling`: those of all methods, but a response may end whenever the policy likes."""

    min_new_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GreedyConfig:
    """Hyperparameters of `GreedyDecoding`.

    Attributes:
        max_new_tokens: longest response, without the prefill.
        min_new_tokens: tokens before it may end.
    """

    max_new_tokens: int = 32
    min_new_tokens: int = 0

    def __post_init__(self) -> None:
        check_whole(self, max_new_tokens=1, min_new_tokens=0)


class GreedyDecoding(Decoder[GreedyConfig]):
    """The most probable next token, again and again. The score is the log-probability of the tokens.

    Args:
        policy: the model.
        reward_model: None: it has none.
        config: hyperparameters.
    """

    config_type = GreedyConfig

    def __init__(self, policy: Policy, reward_model: None = None, config: GreedyConfig | None = None) -> None:
        super().__init__(policy, reward_model, GreedyConfig() if config is None else config)

    def _decode(self, batch: SearchBatch) -> Steps[list[Candidate]]:
        policy, tallies = self.policy, batch.policy.tallies
        flops, head = policy.flops, policy.vocab_size * policy.flops.per_head_row
        contexts = list(batch.policy.contexts.values())
        responses: list[list[int]] = [[] for _ in contexts]
        scores, live = [0.0] * batch.size, list(range(batch.size))
        # By single steps: with one response per prompt there is nothing to find again.
        rows, logits = policy.prefill(contexts)
        try:
            for search, context in enumerate(contexts):
                tallies[search].add(flops.prompt(len(context)), len(context))
            for step in range(self.config.max_new_tokens):
                logits = batch.proposable(logits.float(), [step] * len(live))
                tokens = logits.argmax(-1).tolist()
                for search, token, value in zip(live, tokens, log_probability(logits, tokens), strict=True):
                    tallies[search].flops += head
                    scores[search] += value
                    responses[search].append(token)
                    if batch.on_token is not None:
                        batch.on_token(search, token)
                yield step + 1, self.config.max_new_tokens
                going = [row for row, search in enumerate(live) if batch.goes_on(tuple(responses[search]))]
                if not going:
                    break
                live = [live[row] for row in going]
                logits = policy.step(rows, going, [responses[search][-1] for search in live])
                for search in live:
                    length = len(contexts[search]) + step + 1
                    if policy.share_prefixes:
                        tallies[search].add(flops.token(length - 1), 1)
                    else:
                        tallies[search].add(flops.prompt(length), length)
        finally:
            policy.release(rows)
        return [Candidate(tuple(response), score) for response, score in zip(responses, scores, strict=True)]


class Sampling(Decoder[SamplingConfig]):
    """The next token drawn from the policy's nucleus, again and again. The score is the log-probability of the tokens.

    (Top-p sampling: Holtzman et al., 2020, arXiv 1904.09751.)
    """

    config_type = SamplingConfig

    def __init__(self, policy: Policy, reward_model: None = None, config: SamplingConfig | None = None) -> None:
        super().__init__(policy, reward_model, SamplingConfig() if config is None else config)

    def _decode(self, batch: SearchBatch) -> Steps[list[Candidate]]:
        steps, scores = self.config.max_new_tokens, [0.0] * batch.size
        grown = yield from sample(
            batch,
            [(search, ()) for search in range(batch.size)],
            steps,
            [batch.stream(search, 0) for search in range(batch.size)],
            report=True,
            log_probabilities=scores,
        )
        return [Candidate(response, score) for (_, response), score in zip(grown, scores, strict=True)]
