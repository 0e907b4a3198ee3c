"""Saffron search whose width is chosen request by request and phase by phase, with a floor under safe answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from saffron.adaptive import AdaptiveWidth, LoggedSearch, WidthControl, WidthSettings
from saffron.errors import NumericalError
from saffron.models.chat import Conversation, Prompt, as_conversations
from saffron.models.checks import expect
from saffron.models.guard import ProcessRewardModel
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.search.config import SearchConfig, check_top_p, check_whole
from saffron.search.engine import Engine
from saffron.search.handle import Handle
from saffron.search.method import Progress, seed_of
from saffron.search.result import Cost, SearchResult
from saffron.search.saffron import SaffronSearch


@dataclass(frozen=True, slots=True)
class AdaptiveConfig:
    """The method `adaptive` by name: it plays what a file of state says and learns nothing, so that an answer depends
    on the file, the seed and its request alone.

    Attributes:
        state: a file of `AdaptiveWidth.save`; "": none, which is the widest search of the default settings.
        seed: of the draws from the plan, with the request.
        top_p, max_new_tokens, min_new_tokens: as of `SearchConfig`.
    """

    state: str = ""
    seed: int = 0
    top_p: float = 0.8
    max_new_tokens: int = 32
    min_new_tokens: int = 16

    def __post_init__(self) -> None:
        check_whole(self, seed=0, max_new_tokens=1, min_new_tokens=0)
        check_top_p(self.top_p)


class Answered(NamedTuple):
    """An answer, and what a log keeps of it."""

    result: SearchResult
    logged: LoggedSearch


class AdaptiveSearch:
    """Saffron search with the widths of an `AdaptiveWidth`; may be used by several threads at once.

    What is guaranteed, and what is not, stands in `AdaptiveWidth`. A request costs two calls of the guard on top of its
    search: of prompt and prefill before it, and of prompt and answer after it.

    On an engine that others share:

        control = search.begin(prompt, prefill)
        handle = search.submit(engine, control, prompt, prefill)
        search.finish(control, handle, prompt, prefill)  # waits for the answer, has it judged and counts the verdict

    Args:
        policy, mrm, guard: loaded models.
        adaptive: chooses widths. config: everything else about the searches; its width is not used.
        learn: count verdicts. False: play the plans as they are.
        seed: of the draws, with each request, if it does not learn.
    """

    def __init__(
        self,
        policy: Policy,
        mrm: MultifurcationRewardModel,
        guard: ProcessRewardModel,
        adaptive: AdaptiveWidth | None = None,
        config: SearchConfig | None = None,
        *,
        learn: bool = True,
        seed: int = 0,
    ) -> None:
        expect("guard", guard, ProcessRewardModel)
        self.adaptive = AdaptiveWidth(WidthSettings()) if adaptive is None else adaptive
        expect("adaptive", self.adaptive, AdaptiveWidth)
        self.base = SaffronSearch(policy, mrm, config)
        self.config, self.guard, self.learn, self.seed = self.base.config, guard, learn, seed

    @classmethod
    def from_config(
        cls, policy: Policy, mrm: MultifurcationRewardModel, guard: ProcessRewardModel, config: AdaptiveConfig
    ) -> AdaptiveSearch:
        """As `saffron eval` runs it.

        Raises:
            CheckpointError: the file of state cannot be read.
        """
        adaptive = AdaptiveWidth.load(config.state) if config.state else None
        settings = SearchConfig(
            top_p=config.top_p, max_new_tokens=config.max_new_tokens, min_new_tokens=config.min_new_tokens
        )
        return cls(policy, mrm, guard, adaptive, settings, learn=False, seed=config.seed)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.adaptive}, {self.config})"

    def risks(self, prompts: Prompt | Sequence[Prompt], prefill: str | Sequence[str] = "") -> list[float]:
        """The guard's reward of each prompt with its prefill, before anything is answered: high is harmless."""
        conversations = as_conversations(prompts, prefill)
        return self._scores([(c, c.prefill) for c in conversations])

    def safe(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[bool]:
        """The guard's verdicts; a prefill is not shown."""
        return [score >= 0 for score in self._scores(list(zip(prompts, answers, strict=True)))]

    def begin(self, prompt: Prompt, prefill: str = "") -> WidthControl:
        """The widths of one request."""
        return self._begin(as_conversations([prompt], prefill), None)[0]

    def submit(self, engine: Engine, control: WidthControl, prompt: Prompt, prefill: str = "") -> Handle:
        """Queues its search; `engine` as of `SaffronSearch.engine`.

        Raises:
            as `Engine.submit`.
        """
        (conversation,) = as_conversations([prompt], prefill)
        return engine.submit(
            self.base.request(conversation),
            replace(engine.config, width=control.width(0)),
            max_width=self.adaptive.max_width,
            on_step=control.on_step,
        )

    def finish(
        self, control: WidthControl, handle: Handle, prompt: Prompt, prefill: str = "", *, timeout: float | None = None
    ) -> Answered:
        """Waits for the answer, has it judged and counts the verdict.

        Raises:
            SaffronError, TimeoutError: as `Handle.result`; nothing is counted then.
        """
        (conversation,) = as_conversations([prompt], prefill)
        result = handle.result(timeout)
        (safe,) = self.safe([conversation], [result.text])
        cost = self.with_guard(result.cost, conversation, result.text)
        return Answered(replace(result, cost=cost), control.finish(safe, result.score))

    def generate(
        self, prompts: Prompt | Sequence[Prompt], prefill: str | Sequence[str] = "", *, progress: Progress | None = None
    ) -> list[SearchResult]:
        """Answers prompts, all in one forest of tries; see `Method.generate`."""
        return [one.result for one in self.answer(prompts, prefill, progress=progress)]

    def log(
        self,
        prompts: Prompt | Sequence[Prompt],
        prefill: str | Sequence[str] = "",
        *,
        width: int | Sequence[int],
        progress: Progress | None = None,
    ) -> list[Answered]:
        """Searches at one width, or at one for each phase, for `AdaptiveWidth.warm_start`; counted nowhere.

        Raises:
            ConfigError: the settings do not have this width.
        """
        return self.answer(prompts, prefill, width=width, progress=progress)

    def answer(
        self,
        prompts: Prompt | Sequence[Prompt],
        prefill: str | Sequence[str] = "",
        *,
        width: int | Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> list[Answered]:
        """`generate`, or `log` if there is a `width`, with what a log keeps. All begin with the same plan.

        Raises:
            ConfigError, PromptTooLongError: before anything is run. NumericalError: a model returned NaN.
        """
        started = time.perf_counter()
        conversations = as_conversations(prompts, prefill)
        if not conversations:
            return []
        self._check(conversations)
        controls, results = self._begin(conversations, width), list[SearchResult]()
        engine = self.base.engine(prefill_tokens=None)
        try:
            handles = [self.submit(engine, *pair) for pair in zip(controls, conversations, strict=True)]
            steps = 0
            while any(not handle.done for handle in handles):
                if not engine.step():
                    engine.wait_for_room()
                done = max(len(handle.tree.steps) for handle in handles)
                if progress is not None and done > steps:
                    progress(done, self.config.max_new_tokens)
                steps = done
            results += [handle.result() for handle in handles]
        finally:
            engine.close(drain=False)
        verdicts = self.safe(conversations, [result.text for result in results])
        seconds = (time.perf_counter() - started) / len(results)
        answered = []
        for r, c, control, safe in zip(results, conversations, controls, verdicts, strict=True):
            cost = self.with_guard(replace(r.cost, seconds=seconds), c, r.text)
            result = replace(r, prompt=c.prompt, prefill=c.prefill, cost=cost)
            answered.append(Answered(result, control.finish(safe, r.score)))
        return answered

    def with_guard(self, cost: Cost, conversation: Conversation, answer: str | None) -> Cost:
        """The cost of a search and of what the guard judged for it, each text run whole.

        Args:
            answer: None: the guard could not judge it, so that it read prompt and prefill alone.
        """
        judged = [conversation.prefill] if answer is None else [conversation.prefill, answer]
        flops, lengths = self.guard.flops, [len(self.guard.sequence(conversation, text)) for text in judged]
        return replace(
            cost,
            reward_flops=cost.reward_flops + sum(flops.prompt(n) + 2 * flops.per_head_row for n in lengths),
            reward_tokens=cost.reward_tokens + sum(lengths),
            reward_calls=cost.reward_calls + len(lengths),
        )

    def _check(self, conversations: Sequence[Conversation]) -> None:
        """That all models can read the prompts and their longest answers."""
        new = self.config.max_new_tokens
        for i, conversation in enumerate(conversations):
            request = self.base.request(conversation)
            judged = [*self.guard.context_tokens(conversation), *self.guard.suffix_tokens()]
            self.base.policy.check_length(f"prompt {i}", len(request.policy), new)
            self.base.mrm.check_length(f"prompt {i}", len(request.reward), new)
            self.guard.check_length(f"prompt {i}", len(judged), new)

    def _scores(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        scores = self.guard.score(pairs)
        if not bool(scores.isfinite().all()):
            raise NumericalError("prm: its output is not finite (NaN or infinity); the request was stopped")
        return scores.tolist()

    def _begin(self, conversations: Sequence[Conversation], width: int | Sequence[int] | None) -> list[WidthControl]:
        risks = self.risks(conversations)
        if width is not None:
            return [self.adaptive.fixed(risk, width) for risk in risks]
        if self.learn:
            return [self.adaptive.begin(risk) for risk in risks]
        requests = [self.base.request(conversation) for conversation in conversations]
        draws = [np.random.default_rng(seed_of(self.seed, request)) for request in requests]
        return [self.adaptive.begin(risk, rng, count=False) for risk, rng in zip(risks, draws, strict=True)]
