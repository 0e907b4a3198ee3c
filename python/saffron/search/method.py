"""What all methods have in common: prompts in, results out, one forest of tries, and a fair account of the cost."""

from __future__ import annotations

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from saffron.errors import ConfigError
from saffron.models.chat import Prompt, as_conversations
from saffron.models.checks import expect, expect_list, kind, not_finite
from saffron.models.policy import Policy
from saffron.search.config import Request
from saffron.search.decoding import DecodingConfig, DrawingConfig
from saffron.search.prefix_scorer import PrefixScorer, Tokens
from saffron.search.result import Cost, SearchResult, Tally
from saffron.search.rewards import Reward, RewardScorer, SearchPrefix

Progress = Callable[[int, int], None]
T = TypeVar("T")
Steps = Generator[tuple[int, int] | None, None, T]  # work that yields between its forward passes, at times its progress


class Lengths(Protocol):
    """What the configuration of every method says."""

    @property
    def max_new_tokens(self) -> int: ...
    @property
    def min_new_tokens(self) -> int: ...


ConfigT = TypeVar("ConfigT", bound=Lengths)


class Method(Protocol):
    """A way to decode."""

    def generate(
        self, prompts: Prompt | Sequence[Prompt], prefill: str | Sequence[str] = "", *, progress: Progress | None = None
    ) -> list[SearchResult]:
        """Answers prompts, all in one forest of tries.

        Args:
            prompts: one text, one conversation (messages with "role" and "content", see `Conversation.of`), or a list
                of texts and conversations.
            prefill: how the answers are forced to begin: one text for all prompts, or one each. Reward models are not
                shown it: what was forced on the policy is left out of the safety evaluation. A conversation that ends
                with an assistant message brings its own.
            progress: called with (steps done, steps at most) along the way.

        Raises:
            ConfigError, PromptTooLongError: before anything is run. NumericalError: a model returned NaN.
        """


@dataclass(frozen=True, slots=True)
class Candidate:
    """The response a method chose, its end token included, and what it ranked it by."""

    tokens: Tokens
    score: float


class SearchBatch:
    """The models at work on one batch of searches.

    Attributes:
        draws: random numbers for each search, from the seed and its request alone.
        on_token: see `Decoder.run`; None: nobody asks.
    """

    def __init__(
        self, policy: Policy, scorer: RewardScorer | None, config: Any, eos_token_id: frozenset[int],
        requests: Sequence[Request], on_token: Callable[[int, int], object] | None = None,
    ) -> None:  # fmt: skip
        self.config, self.eos_token_id, self.on_token = config, eos_token_id, on_token
        self.size = len(requests)
        seed = config.seed if isinstance(config, DrawingConfig) else 0
        self.seeds = [seed_of(seed, request) for request in requests]
        self.draws = [np.random.default_rng(seed) for seed in self.seeds]
        self.policy = PrefixScorer(policy, {i: r.policy for i, r in enumerate(requests)}, policy.vocab_size)
        self.reward: Reward | None = None
        if scorer is not None:
            self.reward = scorer.open([r.reward for r in requests], eos_token_id)
        self._ends = torch.tensor(sorted(eos_token_id), device=policy.device)

    def stream(self, search: int, i: int) -> np.random.Generator:
        """The `i`-th of any number of independent generators of a search."""
        return np.random.default_rng([*self.seeds[search], i])

    def logits(self, responses: Sequence[SearchPrefix]) -> Tensor:
        """The policy's next-token logits `[responses, vocab]`, as `proposable` makes them."""
        logits = self.policy.read([g for g, _ in responses], [r for _, r in responses])
        return self.proposable(logits.float(), [len(r) for _, r in responses])

    def proposable(self, logits: Tensor, lengths: Sequence[int]) -> Tensor:
        """Logits `[rows, vocab]` in which end tokens are banned, in place, behind responses too short to end.

        Raises:
            NumericalError: they are not finite.
        """
        if not bool(logits.amax(1).isfinite().all()):  # single entries may be -inf
            raise not_finite("policy", model=self.policy.model.model)
        early = [row for row, length in enumerate(lengths) if length < self.config.min_new_tokens]
        if early:
            logits[torch.tensor(early, device=logits.device)[:, None], self._ends] = -torch.inf
        return logits

    def score(self, responses: Sequence[SearchPrefix]) -> list[float]:
        """Their rewards."""
        assert self.reward is not None, "this method was made without a reward model"
        return self.reward.score([g for g, _ in responses], [r for _, r in responses])

    def goes_on(self, response: Tokens) -> bool:
        """Whether it has neither ended nor reached its greatest length."""
        return len(response) < self.config.max_new_tokens and not self.ended(response)

    def ended(self, response: Tokens) -> bool:
        return bool(response) and response[-1] in self.eos_token_id

    def retain(self, wanted: Callable[[int, Tokens], bool]) -> None:
        """Keeps in the caches of both models only the responses that are wanted."""
        self.policy.retain(wanted)
        if self.reward is not None:
            self.reward.retain(wanted)

    def retain_leaves(self, leaves: Iterable[SearchPrefix]) -> None:
        """Keeps in the caches only what leads to these responses; the policy has not read their last tokens yet."""
        kept = {leaf for leaf in leaves if self.goes_on(leaf[1])}
        kept |= {(search, response[:-1]) for search, response in kept}
        self.retain(lambda search, response: (search, response) in kept)

    def close(self) -> None:
        """Gives the caches back."""
        try:
            self.policy.close()
        finally:
            if self.reward is not None:
                self.reward.close()

    def cost(self, search: int, seconds: float) -> Cost:
        reward = Tally() if self.reward is None else self.reward.tallies[search]
        return Cost.of(self.policy.tallies[search], reward, seconds)


class Decoder(ABC, Generic[ConfigT]):
    """A method over one policy, with or without a reward model.

    Args:
        policy: the model that is defended.
        scorer: the reward model and how it is asked, or None.
        config: hyperparameters.
    """

    config_type: ClassVar[type] = DecodingConfig

    def __init__(self, policy: Policy, scorer: RewardScorer | None, config: ConfigT) -> None:
        expect("policy", policy, Policy)
        if scorer is not None and not isinstance(scorer, RewardScorer):
            raise ConfigError(f"reward_model: got {kind(scorer)}, expected None: this method has no reward model")
        expect("config", config, self.config_type)
        self.policy, self.scorer, self.config = policy, scorer, config
        self.eos_token_id = frozenset(policy.eos_token_id)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config})"

    def generate(
        self, prompts: Prompt | Sequence[Prompt], prefill: str | Sequence[str] = "", *, progress: Progress | None = None
    ) -> list[SearchResult]:
        """Answers prompts, all in one forest of tries; see `Method.generate`."""
        conversations = as_conversations(prompts, prefill)
        requests = [
            Request(
                tuple(self.policy.chat(conversation)),
                tuple(self.scorer.model.context_tokens(conversation)) if self.scorer is not None else (),
                self.policy.opening(conversation),
            )
            for conversation in conversations
        ]
        results = self.search(requests, progress=progress)
        return [replace(r, prompt=c.prompt, prefill=c.prefill) for r, c in zip(results, conversations, strict=True)]

    @torch.inference_mode()
    def search(self, requests: Sequence[Request], *, progress: Progress | None = None) -> list[SearchResult]:
        """`generate` for token ids. Equal requests are searched once."""
        steps = self.run(requests)
        try:
            while True:
                done = next(steps)
                if progress is not None and done is not None:
                    progress(*done)
        except StopIteration as end:
            return list(end.value)
        finally:
            steps.close()

    def run(
        self, requests: Sequence[Request], on_token: Callable[[int, int], object] | None = None
    ) -> Steps[list[SearchResult]]:
        """`search` in steps: whoever runs it may do other things between them, or close it to give the caches back.

        Args:
            on_token: called with the number of a search (equal requests are one) and the next token of its answer, by
                methods that know a token before the end.
        """
        self.check(requests)
        if not requests:
            return []
        started = time.perf_counter()
        distinct = list(dict.fromkeys(requests))
        batch = SearchBatch(self.policy, self.scorer, self.config, self.eos_token_id, distinct, on_token)
        try:
            answers = yield from self._decode(batch)
        finally:
            batch.close()
        seconds = (time.perf_counter() - started) / len(requests)
        found = {
            request: self._result(request, answer, batch.cost(i, seconds))
            for i, (request, answer) in enumerate(zip(distinct, answers, strict=True))
        }
        return [found[request] for request in requests]

    @abstractmethod
    def _decode(self, batch: SearchBatch) -> Steps[list[Candidate]]:
        """The method itself: returns an answer for each search, and yields between its forward passes."""

    def check(self, requests: Sequence[Request]) -> None:
        expect_list("requests", requests, "Request")
        for i, request in enumerate(requests):
            expect(f"requests[{i}]", request, Request)
            self.policy.check_tokens(f"requests[{i}]", request.policy)
            self.policy.check_length(f"prompt {i}", len(request.policy), self.config.max_new_tokens)
            if self.scorer is not None:
                read = len(request.reward) + self.scorer.longest_suffix
                self.scorer.model.check_tokens(f"requests[{i}]", request.reward)
                self.scorer.model.check_length(f"prompt {i}", read, self.config.max_new_tokens)

    def _result(self, request: Request, answer: Candidate, cost: Cost) -> SearchResult:
        text = "" if self.policy.tokenizer is None else self.policy.decode(answer.tokens, request.opening)
        ended = answer.tokens[-1] in self.eos_token_id
        return SearchResult(text, list(answer.tokens), answer.score, "eos" if ended else "length", cost)


def seed_of(seed: int, request: Request) -> list[int]:
    """What the random numbers of a search come from: the seed, the prompt and the prefill, nothing else."""
    ids = np.array([seed, *request.policy], dtype="<i8")
    return np.frombuffer(hashlib.sha256(ids.tobytes()).digest(), dtype="<u4").tolist()
