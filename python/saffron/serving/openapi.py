"""The OpenAPI document of a server: what its operations take, with its own limits, and what they answer."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from saffron import __version__
from saffron.serving import chat, completions
from saffron.serving.service import Service
from saffron.serving.settings import Settings

TEXT, FLAG = {"type": "string"}, {"type": "boolean"}
ERROR_CODES = {
    "400": "a request that is wrong", "401": "no API key", "404": "no such model", "413": "too large",
    "415": "not application/json", "429": "queue_full", "500": "a model failed", "503": "loading or draining",
    "504": "the deadline has passed",
}  # fmt: skip


async def openapi(request: Request) -> JSONResponse:
    """GET /openapi.json"""
    service: Service = request.app.state.service
    return JSONResponse(document(service.settings))


def document(settings: Settings) -> dict[str, Any]:
    """OpenAPI 3.1."""
    paths: dict[str, Any] = {
        "/v1/chat/completions": _post("Answers a conversation", chat_schema(settings), stream=True),
        "/v1/completions": _post("Goes on with a text", completion_schema(settings), stream=True),
        "/tokenize": _post("Token ids of a text or a conversation", _object({
            "prompt": TEXT, "messages": MESSAGES, "add_special_tokens": FLAG, "return_token_strs": FLAG,
        })),
        "/detokenize": _post("The text of token ids", _object({"tokens": _list(_whole(0))}, "tokens")),
        "/v1/models": _get("The models that are served"),
        "/v1/models/{id}": _get("One model", parameters=[
            {"name": "id", "in": "path", "required": True, "schema": TEXT},
        ]),
        "/tokenizer_info": _get("Control tokens and chat template"),
        "/health": _get("Whether requests are taken", kind=None),
        "/version": _get("The version of the server"),
        "/metrics": _get("Metrics for Prometheus", kind="text/plain"),
    }  # fmt: skip
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "saffron serve", "version": __version__},
        "paths": paths,
    }
    if settings.api_keys:
        found["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        found["security"] = [{"key": []}]
    return found


def chat_schema(settings: Settings) -> dict[str, Any]:
    """The body of a chat request."""
    return _object({
        **_common(settings), "messages": MESSAGES, "max_completion_tokens": _whole(1, settings.max_tokens),
        "continue_final_message": FLAG, "add_generation_prompt": FLAG,
        "chat_template_kwargs": {"type": "object"}, "logprobs": FLAG, "top_logprobs": _whole(0, chat.MOST_LOGPROBS),
    }, "messages")  # fmt: skip


def completion_schema(settings: Settings) -> dict[str, Any]:
    """The body of a completion request."""
    prompt = {"anyOf": [{**TEXT, "minLength": 1}, _list({**TEXT, "minLength": 1}), _list(_whole(0))]}
    top = _whole(0, completions.MOST_LOGPROBS)
    return _object({**_common(settings), "prompt": prompt, "logprobs": top}, "prompt")


def _common(settings: Settings) -> dict[str, Any]:
    own: dict[str, Any] = {field.name: {} for field in fields(settings.config) if field.name != "max_new_tokens"}
    own |= {"width": _whole(1, settings.max_width), "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1}}
    unused = "has no effect: the search is deterministic"

    def ignored(least: float, most: float) -> dict[str, Any]:
        return {"type": "number", "minimum": least, "maximum": most, "description": unused}

    return {
        "model": TEXT, "max_tokens": _whole(1, settings.max_tokens), "n": _whole(1, settings.max_width),
        "stop": {"anyOf": [{**TEXT, "minLength": 1}, _list({**TEXT, "minLength": 1}, 16)]},
        "stream": FLAG, "echo": FLAG,
        "stream_options": _object({"include_usage": FLAG}), "seed": {"type": "integer", "description": unused},
        "temperature": ignored(0, 2), "top_p": ignored(0, 1), "frequency_penalty": ignored(-2, 2),
        "presence_penalty": ignored(-2, 2), "user": TEXT,
        "saffron": _object({**own, "method": TEXT, "trace": FLAG}),
    }  # fmt: skip


def _object(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _list(items: dict[str, Any], most: int | None = None) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1} | ({} if most is None else {"maxItems": most})


def _whole(least: int, most: int | None = None) -> dict[str, Any]:
    return {"type": "integer", "minimum": least} | ({} if most is None else {"maximum": most})


MESSAGES = _list(
    _object({"role": {"enum": ["system", "developer", "user", "assistant"]}, "content": TEXT}, "role", "content")
)


def _post(summary: str, schema: dict[str, Any], stream: bool = False) -> dict[str, Any]:
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"post": {"summary": summary, "requestBody": body, "responses": _responses("application/json", stream)}}


def _get(summary: str, kind: str | None = "application/json", **more: Any) -> dict[str, Any]:
    return {"get": {"summary": summary, "responses": _responses(kind), **more}}


def _responses(kind: str | None, stream: bool = False) -> dict[str, Any]:
    content: dict[str, Any] = {} if kind is None else {kind: {}}
    if stream:
        content["text/event-stream"] = {}
    error = _object({
        "message": TEXT, "type": TEXT, "param": {"type": ["string", "null"]}, "code": {"type": ["string", "null"]},
    }, "message", "type", "param", "code")  # fmt: skip
    schema = {"application/json": {"schema": _object({"error": error}, "error")}}
    errors = {code: {"description": text, "content": schema} for code, text in ERROR_CODES.items()}
    return {"200": {"description": "the answer", **({"content": content} if content else {})}, **errors}
