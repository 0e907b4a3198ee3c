"""Answers that are on their way: clients that go away, and streams of server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from starlette.types import Receive, Scope, Send

from saffron.serving.errors import ApiError, Gone, api_error
from saffron.serving.middleware import log_error
from saffron.serving.running import Running


@asynccontextmanager
async def watched(receive: Receive, leave: Callable[[], None]) -> AsyncIterator[None]:
    """Calls `leave` if the client goes away meanwhile. The body has been read before."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        leave()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class EventStream:
    """A response of server-sent events, `data: ...` each, and a comment where there was none for a while.

    Args:
        running: the request; it is ended with the response.
        events: what to send, as JSON.
        keep_alive: seconds of silence before a comment.
    """

    def __init__(self, running: Running, events: AsyncIterator[dict[str, Any]], keep_alive: float) -> None:
        self._running, self._events, self._keep_alive = running, events, keep_alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def put(text: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": more})

        with self._running:
            async with watched(receive, self._running.leave):
                await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                try:
                    async for event in self._or_nothing():
                        await put(": keep-alive\n\n" if event is None else f"data: {json.dumps(event)}\n\n")
                    await put("data: [DONE]\n\n", more=False)
                except Gone:
                    raise
                except Exception as error:
                    await put(f"data: {json.dumps(self._error(error, scope))}\n\n", more=False)

    async def _or_nothing(self) -> AsyncIterator[dict[str, Any] | None]:
        """The events, and None after every silence."""
        while True:
            task = asyncio.ensure_future(anext(self._events, None))
            try:
                while not (await asyncio.wait([task], timeout=self._keep_alive))[0]:
                    yield None
                event = task.result()
            finally:
                task.cancel()
            if event is None:
                return
            yield event

    def _error(self, error: Exception, scope: Scope) -> dict[str, Any]:
        request_id = scope["state"]["request_id"]
        answer: ApiError = api_error(error, request_id)
        scope["state"]["log"]["error"] = answer.code
        if answer.status == 500:
            log_error(error, request_id)
        self._running.service.metrics.errors.labels(answer.code or str(answer.status)).inc()
        return answer.body()


HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
           (b"x-accel-buffering", b"no")]  # fmt: skip
