"""Decoding without a defence: what an attack meets where there is no search."""

from __future__ import annotations

from dataclasses import dataclass

from saffron.models.policy import Policy
from saffron.search.config import DecodingConfig, DrawingConfig, chosen
from saffron.search.method import Candidate, Decoder, SearchBatch, Steps
from saffron.search.proposals import log_probability, sample


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig(DrawingConfig):
    """Hyperparameters of `Sampling`: those of all methods, but a response may end whenever the policy likes."""

    min_new_tokens: int = 0


class GreedyDecoding(Decoder[DecodingConfig]):
    """The most probable next token, again and again. The score is the log-probability of the tokens.

    Args:
        policy: the model.
        max_new_tokens: longest response, without the prefill.
        min_new_tokens: tokens before it may end.
    """

    def __init__(self, policy: Policy, max_new_tokens: int = 32, min_new_tokens: int = 0) -> None:
        config = DecodingConfig(max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens)
        super().__init__(policy, None, config)

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
                for search, token, chance in zip(live, tokens, log_probability(logits, tokens), strict=True):
                    tallies[search].flops += head
                    scores[search] += chance
                    responses[search].append(token)
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

    def __init__(self, policy: Policy, config: SamplingConfig | None = None) -> None:
        super().__init__(policy, None, chosen(config, SamplingConfig))

    def _decode(self, batch: SearchBatch) -> Steps[list[Candidate]]:
        steps, scores = self.config.max_new_tokens, [0.0] * batch.size
        grown = yield from sample(
            batch,
            [(search, ()) for search in range(batch.size)],
            steps,
            [batch.stream(search, 0) for search in range(batch.size)],
            report=True,
            chances=scores,
        )
        return [Candidate(response, score) for (_, response), score in zip(grown, scores, strict=True)]
