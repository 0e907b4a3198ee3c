"""Saffron search: beam search by the rewards of all children at once. (SAFFRON-1, section 4, Algorithm 1.)

`search.reference` is the algorithm on one screen; this is the way in to the engine that runs it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from saffron.errors import ConfigError
from saffron.models.chat import Prompt, as_conversations
from saffron.models.checks import expect, expect_list
from saffron.models.policy import Policy, end_tokens
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.search.captured_step import CapturedStep, why_not_captured
from saffron.search.config import Request, SearchConfig
from saffron.search.engine import Engine
from saffron.search.handle import Handle
from saffron.search.method import Progress
from saffron.search.model_pair import ModelPair
from saffron.search.result import SearchResult


class SaffronSearch:
    """Searches for the response that the MRM finds safest among those the policy finds likely.

    May be used by several threads at once. Each call is a forest of its own: what it answers does not depend on the
    others. `engine` makes one that many callers share.

    Args:
        policy, mrm: loaded models. With different tokenizers the response reaches the MRM through text.
        config: hyperparameters; a call may bring its own.
        eos_token_id: ids that end a response; None: the policy's own.
        capture: run the steps as one CUDA graph that is replayed, with buffers of fixed size (`search.captured_step`):
            the same answers for less work of the host. Not for traced searches, which run step by step.

    Raises:
        ConfigError: models that do not fit each other, or a search that cannot be captured.
    """

    def __init__(
        self,
        policy: Policy,
        mrm: MultifurcationRewardModel,
        config: SearchConfig | None = None,
        *,
        eos_token_id: Sequence[int] | None = None,
        capture: bool = False,
    ) -> None:
        expect("policy", policy, Policy)
        expect("mrm", mrm, MultifurcationRewardModel)
        self.policy, self.mrm = policy, mrm
        self.config = SearchConfig() if config is None else config
        expect("config", self.config, SearchConfig)
        self.eos_token_id = end_tokens(policy, eos_token_id)
        self.models = ModelPair(policy, mrm)
        self.capture = capture
        self._captured: CapturedStep | None = None  # the buffers of the last call, for the next one of its size
        self._lock = threading.Lock()
        reason = why_not_captured(self.models, self.config) if capture else None
        if reason is not None:
            raise ConfigError(f"capture: {reason}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config})"

    def __reduce__(self) -> Any:  # copies share no buffers of captured steps
        options: dict[str, Any] = {"eos_token_id": sorted(self.eos_token_id), "capture": self.capture}
        return partial(type(self), **options), (self.policy, self.mrm, self.config)

    def engine(self, **limits: Any) -> Engine:
        """An engine with this search's models and defaults; `limits` as for `Engine`."""
        return Engine(self.models, self.config, eos_token_id=self.eos_token_id, **limits)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        prefill: str | Sequence[str] = "",
        *,
        config: SearchConfig | None = None,
        trace: bool = False,
        progress: Progress | None = None,
    ) -> list[SearchResult]:
        """Answers prompts, all in one forest of tries.

        Args:
            prompts: one text, one conversation (messages with "role" and "content", see `Conversation.of`), or a list
                of texts and conversations.
            prefill: how the answers are forced to begin: one text for all prompts, or one each. A conversation that
                ends with an assistant message brings its own.
            config: of this call.
            trace: record every candidate of every step.
            progress: called with (steps done, steps at most) after each step.

        Raises:
            ConfigError, PromptTooLongError: before anything is run. NumericalError: a model returned NaN.
        """
        conversations = as_conversations(prompts, prefill)
        requests = [self.request(conversation) for conversation in conversations]
        results = self.search(requests, config=config, trace=trace, progress=progress)
        return [replace(r, prompt=c.prompt, prefill=c.prefill) for r, c in zip(results, conversations, strict=True)]

    def search(
        self,
        requests: Sequence[Request],
        *,
        config: SearchConfig | None = None,
        trace: bool = False,
        progress: Progress | None = None,
    ) -> list[SearchResult]:
        """`generate` for token ids. Equal requests are searched once."""
        started = time.perf_counter()
        handles: list[Handle] = []
        for handles in self.run(requests, config=config, trace=trace):
            if progress is not None:
                progress(max(len(handle.tree.steps) for handle in handles), handles[0].config.max_new_tokens)
        results = [handle.result() for handle in handles]
        seconds = (time.perf_counter() - started) / max(len(requests), 1)  # of one prompt of the batch
        return [replace(r, cost=replace(r.cost, seconds=seconds)) for r in results]

    def stream(self, prompt: Prompt, prefill: str = "", *, config: SearchConfig | None = None) -> Iterator[str]:
        """Yields the answer in pieces, each as soon as no live beam can change it any more."""
        running = self.run([self.request(prompt, prefill)], config=config)
        try:
            (handle,) = next(running)
            yield from handle.pieces(lambda: next(running, None))
        finally:
            running.close()

    def run(
        self, requests: Sequence[Request], *, config: SearchConfig | None = None, trace: bool = False
    ) -> Generator[list[Handle]]:
        """The search itself: yields the handles, one per request, after every step until all have ended. Equal requests
        share one. Closing the generator, or an error in a step, gives the cache back.

        Raises:
            SaffronError: that of the first search that ends without an answer; the others end with it.
        """
        expect_list("requests", requests, "Request")
        step = self._captured_step(config or self.config, len(set(requests))) if self.capture and not trace else None
        engine = self.engine(prefill_tokens=None, step=step)
        handles: dict[Request, Handle] = {}
        try:
            for i, request in enumerate(requests):
                if request not in handles:
                    handles[request] = engine.submit(request, config, trace=trace, index=i)
            while any(not handle.done for handle in handles.values()):
                before = sum(len(handle.tree.steps) for handle in handles.values())
                if not engine.step(linger=True):
                    engine.wait_for_room()
                for handle in handles.values():
                    if handle.error is not None:
                        raise handle.error
                if sum(len(handle.tree.steps) for handle in handles.values()) > before:
                    yield [handles[request] for request in requests]
        finally:
            engine.close(drain=False)
            if step is not None:
                self._captured = step

    def _captured_step(self, config: SearchConfig, groups: int) -> CapturedStep:
        """Buffers for a forest: those of the call before if they do, else new ones."""
        with self._lock:  # two threads must not get the same ones
            step, self._captured = self._captured, None
        if step is None or not step.serves(config, groups):
            step = CapturedStep(self.models, config, groups)
        return step

    def request(self, prompt: Prompt, prefill: str = "") -> Request:
        """What the models read before the response."""
        seen = tuple(self.mrm.context_tokens(prompt))
        return Request(tuple(self.policy.chat(prompt, prefill)), seen, self.policy.opening(prompt, prefill))
