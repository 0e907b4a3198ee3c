"""The OpenAPI document of a server: what its operations take, with its own limits, and what they answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from starlette.requests import Request
from starlette.responses import JSONResponse

from saffron import __version__
from saffron.serving import chat, completions
from saffron.serving import openapi_answers as answers
from saffron.serving.ask import Variant
from saffron.serving.body import NOTHING
from saffron.serving.middleware import OPEN
from saffron.serving.openapi_answers import FLAG, NUMBER, TEXT, Schema, array, or_null, record, whole
from saffron.serving.service import Service
from saffron.serving.settings import Settings

ERROR_CODES = {
    "400": "a request that is wrong", "401": "no API key", "404": "no such model", "405": "no such method",
    "413": "too large", "415": "not application/json", "429": "queue_full", "500": "a model failed",
    "503": "loading or draining", "504": "the deadline has passed",
}  # fmt: skip
NO_EFFECT = {"description": "has no effect: the search is deterministic"}
RANGES = {"temperature": (0, 2), "top_p": (0, 1), "frequency_penalty": (-2, 2), "presence_penalty": (-2, 2)}


async def openapi(request: Request) -> JSONResponse:
    """GET /openapi.json"""
    service: Service = request.app.state.service
    return JSONResponse(document(service.settings, service.variants))


def document(settings: Settings, served: Mapping[str, Variant]) -> Schema:
    """OpenAPI 3.1.

    Args:
        served: empty while the models are being loaded: the document names no models then.
    """
    common = _common(settings, served)
    tokenized = body({
        "model": TEXT, "prompt": TEXT, "messages": MESSAGES, "add_special_tokens": FLAG, "return_token_strs": FLAG,
        "add_generation_prompt": FLAG, "continue_final_message": FLAG,
    })  # fmt: skip
    ids = body({"model": {}, "tokens": array(whole(0), 0)}, "tokens")
    chats, texts = chat_schema(settings, common), completion_schema(settings, common)
    paths: Schema = {
        "/v1/chat/completions": _post("Answers a conversation", chats, answers.CHAT, stream=True),
        "/v1/completions": _post("Goes on with a text", texts, answers.COMPLETION, stream=True),
        "/tokenize": _post("Token ids of a text or a conversation", tokenized, answers.TOKENIZED),
        "/detokenize": _post("The text of token ids", ids, answers.DETOKENIZED),
        "/v1/models": _get("The models that are served", answers.MODELS),
        "/v1/models/{id}": _get("One model", answers.MODEL, parameters=[
            {"name": "id", "in": "path", "required": True, "schema": TEXT},
        ]),
        "/tokenizer_info": _get("Control tokens and chat template", answers.TOKENIZER),
        "/health": _get("Whether requests are taken", None),
        "/version": _get("The version of the server", answers.VERSION),
        "/metrics": _get("Metrics for Prometheus", {}, kind="text/plain"),
    }  # fmt: skip
    found: Schema = {"openapi": "3.1.0", "info": {"title": "saffron serve", "version": __version__}, "paths": paths}
    if settings.api_keys:
        found["components"] = {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}
        found["security"] = [{"key": []}]
        for path in OPEN & paths.keys():
            paths[path]["get"]["security"] = []
    return found


def chat_schema(settings: Settings, common: Schema) -> Schema:
    """The body of a chat request."""
    return body({
        **common, "messages": MESSAGES, "max_completion_tokens": whole(1, settings.max_tokens),
        "continue_final_message": FLAG, "add_generation_prompt": FLAG, "modalities": {"enum": [["text"], []]},
        "chat_template_kwargs": {"type": "object"}, "logprobs": FLAG, "top_logprobs": whole(0, chat.MOST_LOGPROBS),
    }, "messages")  # fmt: skip


def completion_schema(settings: Settings, common: Schema) -> Schema:
    """The body of a completion request."""
    ids, text = array(whole(0)), {**TEXT, "minLength": 1}
    prompts = array({"anyOf": [text, ids]}, 1, min(completions.MOST_PROMPTS, settings.queue))
    top = {"anyOf": [whole(0, completions.MOST_LOGPROBS), {"const": False}]}
    return body({
        **common, "prompt": {"anyOf": [text, ids, prompts]}, "logprobs": top, "suffix": {"const": ""},
        "max_tokens": whole(0, settings.max_tokens), "add_special_tokens": FLAG,
    }, "prompt")  # fmt: skip


def body(properties: Schema, *required: str) -> Schema:
    """An object of these keys; null counts as absent, as clients send it."""
    optional = {name: one if name in required else or_null(one) for name, one in properties.items()}
    return record(optional, *(properties.keys() - set(required)))


def _common(settings: Settings, served: Mapping[str, Variant]) -> Schema:
    """What both kinds of completions take."""
    variants = list(served.values())
    own: Schema = {}
    for config in [settings.config, *(one.defaults for one in variants)]:
        own |= {name: _field(hint) for name, hint in get_type_hints(type(config)).items() if name != "max_new_tokens"}
    own |= {name: whole(1, settings.max_width) for name in ("width", "n") if name in own}
    own |= {"top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1}}
    own |= {"method": _one_of([one.method for one in variants]), "trace": {"anyOf": [FLAG, {"const": "page"}]}}
    unused: Schema = dict.fromkeys(sorted(chat.WITHOUT_EFFECT), NO_EFFECT)
    unused |= {name: {"type": "number", "minimum": a, "maximum": b} | NO_EFFECT for name, (a, b) in RANGES.items()}
    unused |= {"seed": {"type": "integer"} | NO_EFFECT, "user": TEXT | NO_EFFECT}
    refused: Schema = {name: {"enum": list(NOTHING), "description": why} for name, why in chat.REFUSED.items()}
    streams = dict.fromkeys(chat.STREAM_OPTIONS, FLAG)
    return unused | refused | {
        "model": _one_of(list(served)), "max_tokens": whole(1, settings.max_tokens), "n": whole(1, settings.max_width),
        "stop": {"anyOf": [{**TEXT, "minLength": 1}, array({**TEXT, "minLength": 1}, 0, 16)]},
        "stream": FLAG, "echo": FLAG, "stream_options": record(streams, *streams), "saffron": body(own),
    }  # fmt: skip


def _one_of(names: list[str]) -> Schema:
    return {"enum": names} if names else TEXT


def _field(hint: Any) -> Schema:
    """The values of a field of a configuration, by its type."""
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return {"enum": list(inner)}
    if type(None) in inner:
        return _field(inner[0])  # null is allowed wherever a key is
    return {bool: FLAG, int: whole(0), float: NUMBER}.get(hint, {})


_EMPTY: Schema = {"enum": [None, [], ""]}
_PART = {
    "type": "object", "required": ["type", "text"],
    "properties": {"type": {"enum": ["text", "input_text"]}, "text": TEXT},
}  # fmt: skip
_MESSAGE = {
    "role": {"enum": ["system", "developer", "user", "assistant"]}, "content": {"anyOf": [TEXT, array(_PART, 0)]},
    "name": {}, **dict.fromkeys(chat.EMPTY_KEYS, _EMPTY),
}  # fmt: skip
MESSAGES = array(record(_MESSAGE, "name", *chat.EMPTY_KEYS))


def _post(summary: str, schema: Schema, answer: Schema, stream: bool = False) -> Schema:
    taken = {"required": True, "content": {"application/json": {"schema": schema}}}
    responses = _responses(answer, "application/json", stream)
    return {"post": {"summary": summary, "requestBody": taken, "responses": responses}}


def _get(summary: str, answer: Schema | None, kind: str = "application/json", **more: Any) -> Schema:
    return {"get": {"summary": summary, "responses": _responses(answer, kind), **more}}


def _responses(answer: Schema | None, kind: str, stream: bool = False) -> Schema:
    content: Schema = {} if answer is None else {kind: {"schema": answer} if answer else {}}
    if stream:
        content["text/event-stream"] = {}
    error = {"application/json": {"schema": answers.ERROR}}
    errors = {code: {"description": text, "content": error} for code, text in ERROR_CODES.items()}
    return {"200": {"description": "the answer", **({"content": content} if content else {})}, **errors}
