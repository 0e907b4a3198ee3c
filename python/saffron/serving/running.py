"""One request in the engine, as the event loop waits for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass

from saffron.search.handle import Handle
from saffron.search.result import Cost, SearchResult
from saffron.search.tree import Node
from saffron.serving.ask import Ask
from saffron.serving.errors import ApiError, Gone
from saffron.serving.service import Service


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer: its text, cut before a stop text; all of its tokens; why it ended."""

    text: str
    tokens: list[int]
    score: float
    stop: str  # "eos", "length" or "stop_string"

    @property
    def finish_reason(self) -> str:
        return "length" if self.stop == "length" else "stop"


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a request: its `choices`, the best first, and what the search says of the first."""

    choices: list[Choice]
    result: SearchResult


class Running:
    """A request that was submitted. Use it in a `with` block: at its end the engine has nothing of it any more.

    Raises:
        SaffronError: the request cannot be run, or too many wait.
    """

    def __init__(self, service: Service, ask: Ask) -> None:
        self.service, self.ask, self.started = service, ask, time.monotonic()
        self.first: float | None = None  # seconds to the first text
        self._loop, self._event, self._ended_by = asyncio.get_running_loop(), asyncio.Event(), ""
        self._stopped: Answer | None = None
        self.pending = service.submit(ask, self._look if ask.stop and ask.n == 1 else None)
        self.pending.listen(self._wake)
        self._timer = self._loop.call_later(service.settings.timeout, self._end, "deadline")

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        self.service.done(self.pending)

    def leave(self) -> None:
        """The client went away."""
        self._end("gone")

    async def pieces(self) -> AsyncIterator[str]:
        """The first answer in pieces: text that no beam can change any more, cut before a stop text.

        Raises:
            Gone, ApiError, SaffronError: as `answer`.
        """
        said = 0
        while True:
            self._event.clear()
            over = self.pending.done or bool(self._ended_by)
            text = (await self.answer()).choices[0].text if over else settled(self.pending.text, self.ask.stop)
            if len(text) > said:
                if self.first is None:
                    self.first = time.monotonic() - self.started
                yield text[said:]
                said = len(text)
            if over:
                return
            await self._event.wait()

    async def answer(self) -> Answer:
        """Waits for the answer. Where its text is certain to contain a stop text, the search has ended there.

        Raises:
            Gone: the client went away. ApiError: the deadline has passed. SaffronError: what ended the search.
        """
        while not self.pending.done and not self._ended_by:
            self._event.clear()
            if not self.pending.done:
                await self._event.wait()
        if self._ended_by == "gone":
            raise Gone
        if self._ended_by == "deadline":
            raise ApiError(
                504, f"there was no answer within {self.service.settings.timeout:g} seconds",
                code="deadline_exceeded", x_should_retry="false",
            )  # fmt: skip
        if self._stopped is not None:
            return self._stopped
        result, n = self.pending.result(0), self.ask.n
        if not isinstance(self.pending, Handle):
            choice = _choice(result.text, result.token_ids, result.score, result.finish_reason, self.ask.stop)
            return Answer([choice], result)
        best = self.pending.answer
        others = [node for node in self.pending.tree.beam if node is not best]
        return Answer([self._node(node) for node in [best, *others][:n]], result)

    def _end(self, why: str) -> None:
        if not self._ended_by and not self.pending.done:
            self._ended_by = why
            self.pending.cancel()
        self._event.set()

    def _wake(self) -> None:
        with suppress(RuntimeError):  # a loop that is closed has nobody who waits
            self._loop.call_soon_threadsafe(self._event.set)

    def _look(self, handle: Handle) -> None:
        """After a step: ends a search whose answer is certain to be cut, whatever follows."""
        if cut(handle.text, self.ask.stop)[1]:
            cost = Cost.of(*handle.tree.tallies, handle.seconds)
            choice, tree = self._node(handle.answer), handle.tree
            result = SearchResult(
                choice.text, choice.tokens, choice.score, "length", cost, list(tree.steps), trace=tree.trace
            )
            self._stopped = Answer([choice], result)
            handle.cancelled = True

    def _node(self, node: Node) -> Choice:
        tokens = node.tokens()
        return _choice(
            self.service.policy.decode(tokens, self.ask.request.opening),
            tokens,
            node.score,
            "eos" if node.finished else "length",
            self.ask.stop,
        )


def _choice(text: str, tokens: list[int], score: float, reason: str, stop: tuple[str, ...]) -> Choice:
    text, stopped = cut(text, stop)
    return Choice(text, tokens, score, "stop_string" if stopped else reason)


def cut(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the first stop text in it, and whether there is one."""
    places = [place for place in (text.find(one) for one in stop) if place >= 0]
    return (text[: min(places)], True) if places else (text, False)


def settled(text: str, stop: tuple[str, ...]) -> str:
    """The beginning that stays however the text goes on: a longer stop text may begin before one that is there."""
    return cut(text, stop)[0][: len(text) - held_back(text, stop)]


def held_back(text: str, stop: tuple[str, ...]) -> int:
    """Characters at the end of a text that may be the beginning of a stop text."""
    longest = 0
    for one in stop:
        for size in range(min(len(one) - 1, len(text)), longest, -1):
            if text.endswith(one[:size]):
                longest = size
                break
    return longest
