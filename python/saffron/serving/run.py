"""The process: uvicorn around the application, and what signals do."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from saffron.serving.service import Service


class Server(uvicorn.Server):
    """Drains at SIGTERM and SIGINT: new requests get 503, those that run are answered. A second signal ends all.

    Args:
        config: of uvicorn; its app is made by `create_app`.
        drain_seconds: after so long what still runs gets 503.
    """

    def __init__(self, config: uvicorn.Config, drain_seconds: float) -> None:
        super().__init__(config)
        assert isinstance(config.app, Starlette)
        self.service: Service = config.app.state.service
        self.service.on_failure = self._stop
        self._drain_seconds, self._hurry = drain_seconds, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._hurry = self.service.state == "draining"
        self.service.drain()

    async def main_loop(self) -> None:
        await asyncio.gather(super().main_loop(), self._drained())

    async def _drained(self) -> None:
        left = self._drain_seconds
        while not self.should_exit:
            await asyncio.sleep(0.05)
            if self.service.state == "draining":
                left -= 0.05
                if left <= 0 or self._hurry:
                    self.service.abandon()
                if not self.service.unfinished:
                    self._stop()

    def _stop(self) -> None:
        self.should_exit = True


@contextlib.contextmanager
def serving(server: Server) -> Iterator[None]:
    """Runs a server in a thread, until the end of the block; for tests and notebooks.

    Raises:
        RuntimeError: it did not start.
    """
    import threading
    import time

    thread = threading.Thread(target=server.run, name="saffron-server", daemon=True)
    thread.start()
    try:
        while not server.started or server.service.state == "loading":
            if not thread.is_alive() or server.service.failure is not None:
                raise RuntimeError("the server did not start") from server.service.failure
            time.sleep(0.01)
        yield
    finally:
        server.handle_exit(0, None)
        thread.join()
