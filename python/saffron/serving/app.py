"""The ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import Route

from saffron.models.bundled import Models
from saffron.serving import completions, openapi, page, routes, tokens
from saffron.serving.middleware import Surroundings, http_error
from saffron.serving.service import Service
from saffron.serving.settings import Settings


def create_app(models: Models | Callable[[], Models], settings: Settings | None = None) -> Starlette:
    """A server as an ASGI application; `app.state.service` is what it runs on.

    Args:
        models: policy, MRM and guard (None: answers have no verdict), or what loads them when the server starts:
            until that is done requests get 503.
        settings: of the server.
    """
    service = Service(models if callable(models) else lambda: models, settings or Settings())

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        if callable(models):
            loading = asyncio.create_task(asyncio.to_thread(service.start))
            loading.add_done_callback(service.loaded)
        else:
            service.start()
        yield
        await service.stop()

    app = Starlette(
        routes=[
            Route("/", page.page),
            Route("/openapi.json", openapi.openapi),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/completions", completions.completions, methods=["POST"]),
            Route("/v1/models", routes.models),
            Route("/v1/models/{id:path}", routes.model),
            Route("/tokenize", tokens.tokenize, methods=["POST"]),
            Route("/detokenize", tokens.detokenize, methods=["POST"]),
            Route("/tokenizer_info", tokens.tokenizer_info),
            Route("/health", routes.health),
            Route("/version", routes.version),
            Route("/metrics", routes.metrics),
        ],
        middleware=[Middleware(Surroundings, service=service)],
        exception_handlers={HTTPException: http_error},
        lifespan=lifespan,
    )
    app.state.service = service
    return app
