"""What a search returns."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from saffron.errors import ConfigError
from saffron.storage.folders import write_replaceable

TRACE = b'{"answer": {"text": '  # what a file of a traced search holds
FinishReason = Literal["eos", "length"]


@dataclass(slots=True)
class Tally:
    """What one search has cost one model so far (see `Cost`)."""

    flops: int = 0
    tokens: int = 0
    calls: int = 0

    def add(self, flops: int, tokens: int, calls: int = 1) -> None:
        self.flops += flops
        self.tokens += tokens
        self.calls += calls


@dataclass(frozen=True, slots=True)
class Cost:
    """What one answer took. All but `seconds` are as for this search alone on an empty cache, whatever its batch.

    Attributes:
        policy_flops, reward_flops: analytic (see `flops`), of the policy and of the reward model.
        policy_tokens, reward_tokens: tokens that were run through the model, prompt included.
        policy_calls, reward_calls: sequences whose output was asked for; one that is repeated within a forward pass,
            or that the search remembers, counts once.
        seconds: wall time of the batch, shared equally among its prompts. Two costs are equal whatever they took.
    """

    policy_flops: int
    reward_flops: int
    policy_tokens: int
    reward_tokens: int
    policy_calls: int
    reward_calls: int
    seconds: float = field(default=0.0, compare=False)

    @classmethod
    def of(cls, policy: Tally, reward: Tally, seconds: float) -> Self:
        return cls(policy.flops, reward.flops, policy.tokens, reward.tokens, policy.calls, reward.calls, seconds)

    @property
    def flops(self) -> int:
        """Of both models."""
        return self.policy_flops + self.reward_flops


@dataclass(frozen=True, slots=True)
class StepStatistics:
    """One step of one search. FLOPs are analytic, for this search alone on an empty cache (see `flops`).

    Attributes:
        step: 0 is the step that chooses the first new token.
        live, finished: beams after the step that go on, and that have ended.
        nucleus_sizes: tokens in the nucleus of each beam that was extended.
        candidates: their sum.
        trie_nodes: distinct prefixes, prompt included, that the live beams hold in the policy's cache.
        reward_model_calls: sequences the MRM read for this step.
        policy_flops, reward_flops: of the forward passes this step needed.
        all_unseen: no candidate was known to the MRM, so the policy's order decided.
    """

    step: int
    live: int
    finished: int
    nucleus_sizes: list[int]
    candidates: int
    trie_nodes: int
    reward_model_calls: int
    policy_flops: int
    reward_flops: int
    all_unseen: bool


@dataclass(frozen=True, slots=True)
class SearchResult:
    """The answer to one prompt.

    Attributes:
        text: the response, without prefill and special tokens; "" where there is no tokenizer.
        token_ids: its tokens, the end token included.
        score: what the method ranks responses by; without a reward model the log-probability of the tokens.
        finish_reason: "eos" if it ended itself, "length" if `max_new_tokens` ended it.
        cost: FLOPs, tokens, calls and seconds.
        steps: statistics of each step of Saffron search; empty for other methods.
        prompt, prefill: as given, where they were text or messages.
        trace: the whole search, one record per step, if it was asked for; see `write_trace`.
    """

    text: str
    token_ids: list[int]
    score: float
    finish_reason: FinishReason
    cost: Cost
    steps: list[StepStatistics] = field(default_factory=list)
    prompt: str | list[dict[str, str]] | None = None
    prefill: str | None = None
    trace: list[dict[str, Any]] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 60 else self.text[:57] + "..."
        return f"SearchResult({text!r}, {len(self.token_ids)} tokens, score {self.score:.4g}, {self.finish_reason!r})"

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the trace."""
        data = asdict(self)
        del data["trace"]
        return data

    def write_trace(self, file: str | Path) -> None:
        """Writes the search as JSON lines: one record per step, then the answer (`to_json`).

        A step's record holds `step`, `all_unseen`, `expanded`: for each beam its `node` and its `candidates`, each with
        `token`, `text`, `probability`, `reward`, `unseen` and `child` (the node it became, null if it was pruned), and
        `beam`: the nodes after the step, best first, with `node`, `parent`, `token`, `score`, `finished`.

        Raises:
            ConfigError: it was not traced; the file cannot be written, or holds something else than a trace.
        """
        if self.trace is None:
            raise ConfigError("trace: this search was not traced; ask for it with trace=True")
        lines = "".join(json.dumps(record) + "\n" for record in [*self.trace, {"answer": self.to_json()}])
        write_replaceable(Path(file), lines.encode(), TRACE)
