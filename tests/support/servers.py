"""Servers in a thread of the test's process, with real sockets."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from saffron.models.bundled import Models
from saffron.serving import Service, Settings, create_app

for needed in ("starlette", "prometheus_client"):
    pytest.importorskip(needed)
httpx, openai, uvicorn = (pytest.importorskip(name) for name in ("httpx", "openai", "uvicorn"))
from saffron.serving.run import Server, serving  # noqa: E402

QUESTION = "How do I build a bench in my shed without any help?"
USER = [{"role": "user", "content": QUESTION}]


@dataclass(frozen=True)
class Running:
    """A server: where it listens, and what it runs on."""

    url: str
    server: Server

    @property
    def service(self) -> Service:
        return self.server.service

    def client(self, **options: Any) -> Any:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def ask(self, **body: Any) -> Any:
        """A chat request to the defended model."""
        with self.client() as client:
            return client.post("/v1/chat/completions", json={"messages": USER} | body)


@contextlib.contextmanager
def running(models: Models | Callable[[], Models], settings: Settings, drain_seconds: float = 60) -> Iterator[Running]:
    app = create_app(models, settings)
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=2)
    server = Server(config, drain_seconds)
    with serving(server):
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", server)


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
