"""One search in an engine, as its caller sees it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from saffron.errors import CancelledError, ConfigError, EngineError, SaffronError, reason
from saffron.search.config import Request, SearchConfig
from saffron.search.result import Cost, SearchResult
from saffron.search.tree import Node, Tree, common_prefix

if TYPE_CHECKING:
    from saffron.models.policy import Policy
    from saffron.search.engine import Engine


class Pending:
    """An answer that is to come. May be used from any thread.

    Attributes:
        request: as it was submitted.
        error: why it ended without an answer.
        cancelled: it was asked to end.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self.request = request
        self.error: SaffronError | None = None
        self.cancelled = False
        self._engine = weakref.ref(engine)  # an engine that only its handles know is dropped
        self._result: SearchResult | None = None
        self._changed = threading.Condition()
        self._listener: Callable[[], object] | None = None
        self._said = ""

    @property
    def tokens(self) -> list[int]:
        """The beginning of the answer that nothing can change any more; after the end the answer."""
        return [] if self._result is None else self._result.token_ids

    @property
    def text(self) -> str:
        """`tokens` as text, as far as it is settled (`Policy.settled_text`): every later one begins with it."""
        if self._result is not None:
            return self._result.text
        engine = self._engine()
        text = self._said if engine is None else engine.policy.settled_text(self.tokens, self.request.opening)
        if text.startswith(self._said):
            self._said = text
        return self._said

    @property
    def done(self) -> bool:
        return self._result is not None or self.error is not None

    def wait(self, timeout: float | None = None) -> bool:
        """Waits for the end; False if it has not come within `timeout` seconds.

        Raises:
            EngineError: a callback of the engine's own step calls it.
        """
        self._check_outside()
        with self._changed:
            return self._changed.wait_for(lambda: self.done, timeout)

    def result(self, timeout: float | None = None) -> SearchResult:
        """Waits for the answer.

        Raises:
            TimeoutError: it has not come within `timeout` seconds; the search goes on. CancelledError: it was
            cancelled. SaffronError: what ended it without an answer.
        """
        if not self.wait(timeout):
            raise TimeoutError(f"the search has not ended within {timeout} seconds")
        if self._result is None:
            assert self.error is not None
            raise self.error
        return self._result

    def _check_outside(self) -> None:
        engine = self._engine()
        if engine is not None and not self.done:
            engine.check_outside("wait")

    def cancel(self) -> None:
        """Ends the search without an answer; its slots come back at once, or after the step that is running."""
        self.cancelled = True
        if (engine := self._engine()) is not None:
            engine.reap()

    def fail(self, error: BaseException | None) -> None:
        """Ends it with a typed error; None: it was cancelled."""
        if self.done:
            return
        if error is None:
            self.error = CancelledError("the search was cancelled")
        elif isinstance(error, SaffronError):
            self.error = error
        else:
            self.error = EngineError(f"the search was stopped by an error ({type(error).__name__}: {reason(error)})")
            self.error.__cause__ = error
        self.notify()

    def listen(self, listener: Callable[[], object]) -> None:
        """Calls `listener` after every step and at the end, from the thread where that happens; it must not block."""
        self._listener = listener
        if self.done:
            listener()

    def notify(self) -> None:
        with self._changed:
            self._changed.notify_all()
        if self._listener is not None:
            self._listener()


class Handle(Pending):
    """One search in an `Engine`.

    Attributes:
        config: as it was submitted.
        eos_token_id: ids that end its response.
        max_width: the largest width it may be set to.
        tree: the search; the stepping thread writes it. `tree.beam` is replaced, never changed.
        slots: of the caches of policy and MRM that it may need; mrm_slots: the latter, where that cache has a limit.
        step_width: the width of the step that is running.
    """

    def __init__(
        self,
        engine: Engine,
        request: Request,
        config: SearchConfig,
        eos_token_id: frozenset[int],
        *,
        trace: bool = False,
        max_width: int | None = None,
        on_step: Callable[[Handle], None] | None = None,
    ) -> None:
        super().__init__(engine, request)
        self.config, self.eos_token_id = config, eos_token_id
        self.max_width = config.width if max_width is None else max_width
        self.tree = Tree(trace=[] if trace else None)
        self.on_step, self.seconds = on_step, 0.0
        self.slots = 0, 0
        self.mrm_slots: int | None = None
        self._width = self.step_width = config.width

    def __repr__(self) -> str:
        state = "done" if self._result else repr(self.error) if self.error else f"{len(self.tree.steps)} steps"
        return f"<Handle: {len(self.request.policy)} prompt tokens, width {self.width}, {state}>"

    @property
    def width(self) -> int:
        """Beams kept in the next step. It may be set at any time, to `max_width` at most; captured steps read it
        when they look at what the device did."""
        return self._width

    @width.setter
    def width(self, width: int) -> None:
        if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= self.max_width:
            raise ConfigError(f"width: got {width!r}, expected a whole number from 1 to {self.max_width} (max_width)")
        self._width = width

    @property
    def next_width(self) -> int:
        """Of the next step: 1 where it commits to the best beam (`SearchConfig.commit_every`)."""
        every = self.config.commit_every
        return 1 if every and (len(self.tree.steps) + 1) % every == 0 else self.width

    @property
    def answer(self) -> Node:
        """The response that would be the answer if the search ended now."""
        return self.tree.answer if self.config.ranking == "paper" else self.tree.beam[0]

    @property
    def tokens(self) -> list[int]:
        """The beginning of the answer that no live beam can change any more; after the search the answer."""
        beam = self.tree.beam
        return (self.answer if self._result is not None else common_prefix(beam)).tokens()

    def pieces(self, wait: Callable[[], object] | None = None) -> Iterator[str]:
        """Yields the answer as it becomes final. `wait` is called between looks; None: waits for the next step.

        Raises:
            SaffronError: the search ended without an answer.
        """
        said = ""
        while True:
            if wait is None:
                self._check_outside()
            ended, steps = self.done, len(self.tree.steps)
            text = self.result().text if ended else self.text
            if text[len(said) :]:
                yield text[len(said) :]
                said = text
            if ended:
                return
            if wait is not None:
                wait()
                continue
            with self._changed:
                self._changed.wait_for(lambda before=steps: self.done or len(self.tree.steps) > before)  # type: ignore[misc]

    # What follows is for the engine.

    def finish(self, policy: Policy) -> None:
        answer = self.answer
        tokens = answer.tokens()
        self._result = SearchResult(
            policy.decode(tokens, self.request.opening) if policy.tokenizer is not None else "",
            tokens,
            answer.score,
            "eos" if answer.finished else "length",
            Cost.of(*self.tree.tallies, self.seconds),
            self.tree.steps,
            trace=self.tree.trace,
        )
        self.notify()
