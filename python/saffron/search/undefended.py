"""Decoding without a defence: what an attack meets where there is no search."""

from __future__ import annotations

from dataclasses import dataclass

from saffron.models.policy import Policy
from saffron.search.config import DrawingConfig, check_whole
from saffron.search.hand_over import ReadTokens
from saffron.search.method import Answer, Decoder, Progress, Run
from saffron.search.proposals import log_probability, sample
from saffron.search.tree import Node, Tree


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


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig(DrawingConfig):
    """Hyperparameters of `Sampling`: those of all methods, but a response may end whenever the policy likes."""

    min_new_tokens: int = 0


class GreedyDecoding(Decoder):
    """The most probable next token, again and again. The score is the log-probability of the tokens.

    Args:
        policy: the model.
        reward_model: None: it has none.
        config: hyperparameters.
    """

    config_type = GreedyConfig

    def __init__(self, policy: Policy, reward_model: None = None, config: GreedyConfig | None = None) -> None:
        super().__init__(policy, reward_model, GreedyConfig() if config is None else config)

    def _decode(self, run: Run, progress: Progress) -> list[Answer]:
        nodes = [Tree().beam[0] for _ in range(run.size)]
        scores, live = [0.0] * run.size, list(range(run.size))
        reader = ReadTokens(self.policy)  # by single steps: with one response a prompt there is nothing to find again
        try:
            logits = reader.start(run.policy.contexts)
            for step in range(self.config.max_new_tokens):
                logits = run.proposable(logits.float(), [step] * len(live))
                for search in live:
                    reader.tallies[search].flops += self.policy.vocab_size * self.policy.flops.per_head_row
                tokens = logits.argmax(-1).tolist()
                for search, token, chance in zip(live, tokens, log_probability(logits, tokens), strict=True):
                    scores[search] += chance
                    nodes[search] = Node(
                        nodes[search], token, scores[search], token in run.end_tokens, step + 1, step + 1
                    )
                progress(step + 1, self.config.max_new_tokens)
                going = [row for row, search in enumerate(live) if not nodes[search].finished]
                if not going or step + 1 == self.config.max_new_tokens:
                    break
                live = [live[row] for row in going]
                logits = reader.step(going, live, [nodes[search] for search in live])
        finally:
            run.policy.tallies = reader.tallies
            reader.release()
        return [Answer(tuple(node.tokens()), score) for node, score in zip(nodes, scores, strict=True)]


class Sampling(Decoder):
    """The next token drawn from the policy's nucleus, again and again. The score is the log-probability of the tokens.

    (Top-p sampling: Holtzman et al., 2020, arXiv 1904.09751.)
    """

    config_type = SamplingConfig

    def __init__(self, policy: Policy, reward_model: None = None, config: SamplingConfig | None = None) -> None:
        super().__init__(policy, reward_model, SamplingConfig() if config is None else config)

    def _decode(self, run: Run, progress: Progress) -> list[Answer]:
        steps, scores = self.config.max_new_tokens, [0.0] * run.size
        grown = sample(
            run,
            [(search, ()) for search in range(run.size)],
            steps,
            [run.stream(search, 0) for search in range(run.size)],
            on_step=lambda done: progress(done, steps),
            chances=scores,
        )
        return [Answer(response, score) for (_, response), score in zip(grown, scores, strict=True)]
