"""Saffron search in the slots that red-teaming libraries have for defences; none of them is imported.

`JailbreakBenchDefense` answers `query` and `query_with_dicts` as `jailbreakbench.defenses.Defense` does;
`AdversariaLLMTarget` answers `generate` and `loss` as `adversariallm.defenses.TargetSystem` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from saffron.errors import ConfigError
from saffron.models.likelihood import likelihoods
from saffron.search.result import SearchResult
from saffron.search.saffron import SaffronSearch

Messages = Sequence[Mapping[str, str]]


class JailbreakBenchDefense:
    """A defence of JailbreakBench, whose target model is the search's policy.

    Args:
        search: models and configuration.
    """

    def __init__(self, search: SaffronSearch) -> None:
        self.search = search

    def query_with_dicts(self, prompt: Messages) -> tuple[str, int, int]:
        """The answer to messages, the number of tokens of the prompt, and of the answer."""
        (result,) = self.search.generate([prompt])
        return result.text, len(self.search.policy.chat(prompt)), len(result.token_ids)

    def query(self, prompts: Sequence[str]) -> list[tuple[str, int, int]]:
        """`query_with_dicts` for users' messages, all in one forest."""
        results = self.search.generate(list(prompts))
        sizes = [len(self.search.policy.chat(prompt)) for prompt in prompts]
        return [(r.text, size, len(r.token_ids)) for r, size in zip(results, sizes, strict=True)]


@dataclass(slots=True)
class Generated:
    """The fields of AdversariaLLM's `GenerationResult`: answers by conversation, and what is known of each."""

    gen: list[list[str]]
    input_ids: list[list[int]]
    raw_gen: list[list[str]] | None = None
    defense_decisions: list[list[dict[str, Any]]] = field(default_factory=list)


class AdversariaLLMTarget:
    """A target of AdversariaLLM.

    The search is deterministic: `num_return_sequences` are equal answers, and `temperature` and `top_p` have no effect.
    Attacks that descend gradients get those of the undefended policy (`model`, `loss`): the search has none.

    Args:
        search: models and configuration.
    """

    DEFENSE_TYPE = "saffron"

    def __init__(self, search: SaffronSearch) -> None:
        self.search = search
        self.model, self.tokenizer = search.policy.model, search.policy.require_tokenizer()

    def generate(
        self, convs: Sequence[Messages], num_return_sequences: int | None = None, max_new_tokens: int | None = None,
        **without_effect: Any,
    ) -> Generated:  # fmt: skip
        """Answers conversations, all in one forest; a last assistant message is how an answer is forced to begin."""
        asked = [
            list(conv[:-1] if conv[-1]["role"] == "assistant" and not conv[-1]["content"] else conv) for conv in convs
        ]
        config = self.search.config
        if max_new_tokens is not None:
            least = min(config.min_new_tokens, max_new_tokens)
            config = replace(config, max_new_tokens=max_new_tokens, min_new_tokens=least)
        results = self.search.generate(asked, config=config)
        count = num_return_sequences or 1
        return Generated(
            [[result.text] * count for result in results],
            [self.search.policy.chat(conv) for conv in asked],
            defense_decisions=[[_decision(result)] * count for result in results],
        )

    def loss(
        self, full_token_tensors: Sequence[Tensor], prompt_token_tensors: Sequence[Tensor], **without_effect: Any
    ) -> list[float | None]:
        """Mean cross entropy, in nats per token, of what stands behind each prompt, under the undefended policy; None
        where that is nothing.

        Raises:
            ConfigError: not as many prompts as texts.
        """
        if len(full_token_tensors) != len(prompt_token_tensors):
            raise ConfigError(
                f"prompt_token_tensors: got {len(prompt_token_tensors)}, expected {len(full_token_tensors)}"
            )
        losses: list[float | None] = []
        for full, prompt in zip(full_token_tensors, prompt_token_tensors, strict=True):
            found = likelihoods(self.search.policy, full.tolist(), len(prompt), 0)
            losses.append(-sum(one.logprob for one in found) / len(found) if found else None)
        return losses


def _decision(result: SearchResult) -> dict[str, Any]:
    return {"score": result.score, "finish_reason": result.finish_reason, "flops": result.cost.flops}
