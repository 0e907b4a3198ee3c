"""The models and the engine behind the HTTP layer: loading, taking requests on, draining."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal, TypeVar

from saffron.adaptive import WidthControl
from saffron.errors import ConfigError, SaffronError
from saffron.models.bundled import Models
from saffron.models.chat import Conversation
from saffron.models.policy import Policy
from saffron.models.text_rewards import TextReward
from saffron.models.trie_model import TrieModel
from saffron.search.adaptive import AdaptiveSearch
from saffron.search.config import Request, SearchConfig
from saffron.search.engine import Engine
from saffron.search.handle import Handle, Pending
from saffron.search.model_pair import ModelPair
from saffron.search.result import Cost
from saffron.serving.ask import Ask, Trace, Variant, choose, configure, room, variants
from saffron.serving.chat import ChatRequest
from saffron.serving.errors import bad, unavailable
from saffron.serving.metrics import Metrics
from saffron.serving.settings import Settings

State = Literal["loading", "ready", "draining"]
SAVE_EVERY = 60.0  # seconds between two savings of what adaptive widths have learnt
log = logging.getLogger("saffron.serving")
T = TypeVar("T")


class Service:
    """One policy behind one engine.

    Args:
        load: returns the models; called in a thread of its own by `start`. Without a guard its answers have no verdict.
        settings: of the server.

    Attributes:
        state: "ready" between the end of `start` and the beginning of `drain`.
    """

    def __init__(self, load: Callable[[], Models], settings: Settings) -> None:
        self.settings, self._load = settings, load
        self.state: State = "loading"
        self.metrics = Metrics(self)
        self.engine: Engine | None = None
        self.models: Models | None = None
        self.variants: dict[str, Variant] = {}
        # Tokenizers, and what is asked of the models outside of the searches: off the event loop, one at a time.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="saffron-worker")
        self._unfinished: set[Pending] = set()
        self.created, self._saved = 0, time.monotonic()
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], object] | None = None

    def start(self) -> None:
        """Loads the models and starts the engine; blocks until that is done."""
        models = self._load()
        settings = self.settings
        self.variants = variants(models, settings)
        engine = Engine(
            ModelPair(models.policy, models.mrm), settings.config, queue=settings.queue,
            max_searches=settings.max_batch, cache_tokens=settings.cache_tokens, prefill_tokens=settings.prefill_tokens,
        )  # fmt: skip
        models.policy.require_tokenizer()
        self.models, self.engine = models, engine.start()
        self.created = int(time.time())
        if self.state == "loading":
            self.state = "ready"

    def loaded(self, start: asyncio.Future[None]) -> None:
        """`start` has ended in its thread; its error, if there was one, is kept for whoever runs the server."""
        self.failure = None if start.cancelled() else start.exception()
        if self.failure is not None and self.on_failure is not None:
            self.on_failure()

    def drain(self) -> None:
        """Takes no more requests; those that run are answered."""
        self.state = "draining"

    def abandon(self) -> None:
        """Ends what runs: it gets 503."""
        for pending in list(self._unfinished):
            pending.cancel()

    async def stop(self) -> None:
        """Ends what still runs without an answer, and the threads."""
        self.state = "draining"
        if self.engine is not None:
            await asyncio.to_thread(self.engine.close, drain=False)
        self._worker.shutdown()
        await asyncio.to_thread(self.save)

    @property
    def unfinished(self) -> int:
        """Requests in the engine."""
        return len(self._unfinished)

    def ready(self) -> tuple[Models, Engine]:
        """The models and the engine.

        Raises:
            ApiError: they are not there yet, or not for new requests.
        """
        if self.state == "draining":
            raise unavailable("the server is shutting down", "draining")
        if self.models is None or self.engine is None or self.state != "ready":
            raise unavailable("the models are being loaded", "loading")
        return self.models, self.engine

    @property
    def policy(self) -> Policy:
        """Of the models, which have been loaded."""
        return self._models().policy

    def _models(self) -> Models:
        assert self.models is not None
        return self.models

    async def work(self, function: Callable[..., T], *arguments: Any) -> T:
        """Calls a function in the worker's thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, functools.partial(function, *arguments))

    def read(self, chat: ChatRequest) -> Ask:
        """What a chat request asks of the models; encodes it, so not for the event loop."""
        models, _ = self.ready()
        variant = choose(self.variants, chat.model, chat.own)
        configure(variant, chat.own, self.settings, chat.max_tokens, 1)  # before anything is encoded
        prompt = tuple(models.policy.chat(chat.conversation, **chat.options))
        seen: tuple[int, ...] = ()
        if variant.reward is not None:
            if len(chat.conversation.turns) % 2 == 0 and variant.reward is models.guard:
                raise bad("messages", "the guard needs a last message of the user")
            seen = tuple(variant.reward.context_tokens(chat.conversation))
        request = Request(prompt, seen, models.policy.opening(chat.conversation))
        ask = self.ask(
            variant, request, chat.own, max_tokens=chat.max_tokens, n=chat.n, stop=chat.stop,
            trace=chat.trace, logprobs=chat.logprobs,
        )  # fmt: skip
        ask = replace(ask, conversation=chat.conversation)
        return ask if variant.adaptive is None else replace(ask, control=self._control(variant.adaptive, ask))

    def _control(self, adaptive: AdaptiveSearch, ask: Ask) -> WidthControl:
        """The widths of a request, by the guard's rating of its prompt and prefill."""
        conversation, guard = ask.conversation, adaptive.guard
        assert conversation is not None
        if len(conversation.turns) % 2 == 0:
            raise bad("messages", "the guard needs a last message of the user")
        read = len(guard.sequence(conversation, conversation.prefill))
        guard.check_length("the prompt, for the guard,", read, ask.config.max_new_tokens)
        return adaptive.begin(conversation)

    def learn(self, ask: Ask, text: str, score: float, verdict: float | None, cost: Cost) -> tuple[list[int], Cost]:
        """Counts the guard's verdict of an answer, None is unsafe. For the worker.

        Returns:
            the widths of its phases, and `cost` with what the guard read for it.
        """
        control, adaptive, conversation = ask.control, ask.variant.adaptive, ask.conversation
        assert control is not None and adaptive is not None and conversation is not None
        logged = control.finish(verdict is not None and verdict >= 0, score)
        if time.monotonic() - self._saved > SAVE_EVERY:
            self.save()
        return list(logged.widths), adaptive.with_guard(cost, conversation, None if verdict is None else text)

    def save(self) -> None:
        """Writes what adaptive widths have learnt."""
        self._saved = time.monotonic()
        for variant in self.variants.values():
            if variant.adaptive is not None and self.settings.adaptive is not None:
                try:
                    variant.adaptive.adaptive.save(self.settings.adaptive)
                except SaffronError as error:  # the server goes on, and tries again
                    log.error("%s", error)

    def ask(
        self, variant: Variant, request: Request, own: dict[str, Any] | Any, *, max_tokens: int | None, n: int,
        stop: tuple[str, ...], trace: Trace, logprobs: int | None,
    ) -> Ask:  # fmt: skip
        """The request with its configuration, within what the server allows."""
        models, _ = self.ready()
        read: list[tuple[TrieModel, int]] = [(models.policy, len(request.policy))]
        if isinstance(variant.reward, TrieModel):
            read.append((variant.reward, len(request.reward)))
        config = configure(variant, own, self.settings, max_tokens, room(read))
        search = isinstance(config, SearchConfig)
        if n > (config.width if isinstance(config, SearchConfig) else 1):
            most = (
                f"the width of {config.width}" if isinstance(config, SearchConfig) else "1: the method has one answer"
            )
            raise bad("n", f"got {n}, expected at most {most}")
        if trace and not search:
            raise bad("saffron.trace", f"{variant.method} is no search of which there is a trace")
        return Ask(variant=variant, config=config, request=request, n=n, stop=stop, trace=trace, logprobs=logprobs)

    def submit(self, ask: Ask, on_step: Callable[[Handle], None] | None = None) -> Pending:
        """Queues a request.

        Args:
            on_step: called after each step of a search, by the engine's thread.

        Raises:
            SaffronError: it cannot be run, or too many wait.
        """
        _, engine = self.ready()
        if ask.variant.decoder is None:
            config, control = ask.config, ask.control
            if control is not None:
                config, on_step = replace(config, width=control.width(0)), _both(control, on_step)
            pending: Pending = engine.submit(
                ask.request, config, max_width=ask.config.width, trace=bool(ask.trace), on_step=on_step
            )
        else:
            pending = engine.submit_job(ask.variant.decoder(ask.config), ask.request)
        self._unfinished.add(pending)
        return pending

    def done(self, pending: Pending) -> None:
        """A request that needs nothing of the engine any more."""
        pending.cancel()
        self._unfinished.discard(pending)

    def verdicts(self, conversation: Conversation, answers: list[str]) -> list[float | None]:
        """The guard's reward of answers, below 0 is unsafe; None where there is no guard, or it cannot judge."""
        guard = self._models().guard
        if guard is None:
            return [None] * len(answers)
        if isinstance(guard, TextReward):
            return guard.score([(conversation, answer) for answer in answers]).tolist()
        try:
            sequences = [guard.sequence(conversation, answer) for answer in answers]
            for sequence in sequences:
                guard.check_length("the answer", len(sequence))
        except (ConfigError, ValueError):  # too long for it, or in a form that its template does not show
            return [None] * len(answers)
        return guard.score_tokens(sequences).tolist()


def _both(control: WidthControl, then: Callable[[Handle], None] | None) -> Callable[[Handle], None]:
    """After each step: the width of the next, and what else is to be done."""

    def step(handle: Handle) -> None:
        control.on_step(handle)
        if then is not None:
            then(handle)

    return step
