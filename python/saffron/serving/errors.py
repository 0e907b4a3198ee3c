"""Errors as clients of this API know them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import re
from typing import Any

from saffron.errors import (
    CancelledError,
    CapacityError,
    ConfigError,
    EngineClosedError,
    PromptTooLongError,
    QueueFullError,
    SaffronError,
)

TYPES = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "service_unavailable"}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: for the user.
        param: which key of the request is wrong.
        code: for programs.
        headers: of the response.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class Gone(Exception):
    """The client went away; nobody waits for an answer."""


def bad(param: str | None, message: str, code: str | None = None) -> ApiError:
    """A request that is wrong."""
    return ApiError(400, message if param is None else f"{param}: {message}", param=param, code=code)


def unavailable(message: str, code: str) -> ApiError:
    return ApiError(503, message, code=code, retry_after="1")


def api_error(error: BaseException, request_id: str) -> ApiError:
    """What a client is told of an error; of those that are not the client's nothing but an id."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptTooLongError):
        return ApiError(400, str(error), param="messages", code="context_length_exceeded")
    if isinstance(error, CapacityError):
        return ApiError(400, str(error), code="capacity_exceeded")
    if isinstance(error, QueueFullError):
        return ApiError(429, "too many requests are waiting, try again later", code="queue_full", retry_after="1")
    if isinstance(error, EngineClosedError):
        return unavailable("the server is shutting down", "draining")
    if isinstance(error, CancelledError):
        return ApiError(503, "the request was cancelled", code="cancelled")
    if isinstance(error, ConfigError) and isinstance(error, SaffronError):
        name = re.match(r"[\w.\[\]]+(?=:)", str(error))
        return ApiError(400, str(error), param=name[0] if name else None)
    return ApiError(500, f"the request failed; the server's log has more under {request_id}", code="internal_error")
