"""What surrounds every request, as plain ASGI: id, keys, errors in the API's shape, and a line in the log."""

from __future__ import annotations

import hmac
import logging
import re
import time
import traceback
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from saffron.serving.errors import ApiError, Gone, api_error
from saffron.serving.service import Service

log = logging.getLogger("saffron.serving")
OPEN = {"/", "/health", "/version", "/metrics", "/openapi.json"}  # without a key


class Surroundings:
    """Gives every request an id, lets in who has a key, and turns every error into an answer.

    What is logged of a request: its id, method, path, status and duration, and what a handler puts into
    `scope["state"]["log"]`. Never its text: of an error nobody expected, the type and where it was raised.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._keys = [key.encode() for key in service.settings.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, headers = time.monotonic(), Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else uuid.uuid4().hex
        noted: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=request_id, log=noted)
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            self._let_in(scope["path"], headers)
            await self._app(scope, receive, sending)
        except Gone:
            noted["cancelled"] = True
            self._service.metrics.cancelled.inc()
        except Exception as error:
            answer = api_error(error, request_id)
            if answer.status == 500:
                log_error(error, request_id)
            self._service.metrics.errors.labels(answer.code or str(answer.status)).inc()
            if status:  # an answer has begun
                raise
            await JSONResponse(answer.body(), answer.status, answer.headers)(scope, receive, sending)
        finally:
            more = "".join(f" {name}={value}" for name, value in noted.items())
            seconds = time.monotonic() - started
            log.info("%s %s %r %d %.3fs%s", request_id, scope["method"], scope["path"], status, seconds, more)

    def _let_in(self, path: str, headers: Headers) -> None:
        if not self._keys or path in OPEN:
            return
        kind, _, key = headers.get("authorization", "").partition(" ")
        given = key.strip().encode() if kind.lower() == "bearer" else b""
        fits = [hmac.compare_digest(given, own) for own in self._keys]  # all of them: no time tells which
        if not any(fits):
            raise ApiError(
                401,
                "an API key is needed: Authorization: Bearer KEY",
                code="invalid_api_key",
                www_authenticate="Bearer",
            )


def log_error(error: BaseException, request_id: str) -> None:
    """Type and place of an error and of what it came from; messages may quote a prompt."""
    while error is not None:
        frames = "".join(traceback.format_tb(error.__traceback__))
        log.error("%s failed: %s\n%s", request_id, type(error).__name__, frames)
        error = error.__cause__  # type: ignore[assignment]


async def http_error(_: object, error: Exception) -> JSONResponse:
    """Errors of the routing, in the API's shape."""
    assert isinstance(error, HTTPException)
    message = {404: "no such path", 405: "this path does not serve this method"}.get(error.status_code, error.detail)
    answer = ApiError(
        error.status_code, message, code={404: "not_found", 405: "method_not_allowed"}.get(error.status_code)
    )
    return JSONResponse(answer.body(), error.status_code, dict(error.headers or {}))
