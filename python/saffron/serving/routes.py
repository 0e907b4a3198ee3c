"""The endpoints of chat and of the server itself."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import asdict, replace
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from saffron import __version__
from saffron.search.page import page_of
from saffron.serving.ask import Ask
from saffron.serving.body import read_json
from saffron.serving.chat import ChatRequest, read_chat
from saffron.serving.errors import ApiError
from saffron.serving.events import EventStream, watched
from saffron.serving.likelihood import chat_logprobs
from saffron.serving.running import Answer, Choice, Running
from saffron.serving.service import Service


async def chat(request: Request) -> Response | EventStream:
    """POST /v1/chat/completions"""
    service: Service = request.app.state.service
    service.ready()
    asked = read_chat(await read_json(request, service.settings.max_body), service.settings)
    ask = await service.work(service.read, asked)
    running = Running(service, ask)
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": ask.variant.id,
            "system_fingerprint": f"saffron-{__version__}"}  # fmt: skip
    if asked.stream:
        return EventStream(running, _stream(running, asked, head, request), service.settings.keep_alive)
    with running:
        async with watched(request.receive, running.leave):
            answer = await running.answer()
            choices, answer = await describe(running, asked, answer)
    return JSONResponse({
        **head, "object": "chat.completion", "choices": choices, "usage": finish(running, answer, request)
    })  # fmt: skip


async def _stream(
    running: Running, asked: ChatRequest, head: dict[str, Any], request: Request
) -> AsyncIterator[dict[str, Any]]:
    head = {**head, "object": "chat.completion.chunk"}

    def chunk(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        usage = {"usage": None} if asked.include_usage else {}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return {**head, "choices": [choice], **usage}

    for index in range(asked.n):
        yield chunk(index, {"role": "assistant", "content": asked.conversation.prefill if asked.echo else ""})
    # With several answers it is open which beam becomes which of them until the search has ended.
    if asked.n == 1:
        async for piece in running.pieces():
            yield chunk(0, {"content": piece})
    answer = await running.answer()
    choices, answer = await describe(running, asked, answer)
    for choice in choices:
        text = choice["message"]["content"] if asked.n > 1 else ""
        own = {name: choice[name] for name in ("finish_reason", "logprobs", "saffron")}
        yield chunk(choice["index"], {"content": text} if text else {}, **own)
    usage = finish(running, answer, request)
    if asked.include_usage:
        yield {**head, "choices": [], "usage": usage}


async def describe(running: Running, asked: ChatRequest, answer: Answer) -> tuple[list[dict[str, Any]], Answer]:
    """The choices of a chat completion, and the answer with the cost of what was asked of the guard for its widths."""
    service, ask = running.service, running.ask
    assert ask.conversation is not None
    verdicts = await service.work(service.verdicts, ask.conversation, [choice.text for choice in answer.choices])
    described = []
    for index, (choice, verdict) in enumerate(zip(answer.choices, verdicts, strict=True)):
        own = own_part(choice, verdict)
        if index == 0 and ask.control is not None:
            result = answer.result
            own["widths"], cost = await service.work(
                service.learn, ask, choice.text, choice.score, verdict, result.cost
            )
            answer = replace(answer, result=replace(result, cost=cost))
        if index == 0 and ask.trace:
            own |= await service.work(traced, ask, answer)
        logprobs = None
        if ask.logprobs is not None:
            logprobs = await service.work(chat_logprobs, service, ask, choice)
        text = (asked.conversation.prefill if asked.echo else "") + choice.text
        described.append({
            "index": index, "message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": logprobs,
            "finish_reason": choice.finish_reason, "saffron": own,
        })  # fmt: skip
    return described, answer


def traced(ask: Ask, answer: Answer) -> dict[str, Any]:
    """The whole search: its records, or drawn as a page."""
    result, conversation = answer.result, ask.conversation
    if ask.trace != "page":
        return {"trace": result.trace}
    if conversation is not None:
        result = replace(result, prompt=conversation.turns[-1], prefill=conversation.prefill)
    return {"page": page_of(result)}


def own_part(choice: Choice, verdict: float | None) -> dict[str, Any]:
    """`choices[i].saffron`."""
    own: dict[str, Any] = {"score": choice.score, "stop": choice.stop}
    if verdict is not None:
        own["guard"] = {"score": verdict, "verdict": "safe" if verdict >= 0 else "unsafe"}
    return own


def finish(running: Running, answer: Answer, request: Request) -> dict[str, Any]:
    """`usage`; also counts the request."""
    ask: Ask = running.ask
    prompt, tokens = len(ask.request.policy), sum(len(choice.tokens) for choice in answer.choices)
    seconds, name = time.monotonic() - running.started, ask.variant.id
    metrics = running.service.metrics
    metrics.first.labels(name).observe(seconds if running.first is None else running.first)
    metrics.answered(name, prompt, tokens, answer.choices[0].finish_reason, answer.result.cost, seconds)
    request.state.log.update(model=name, prompt_tokens=prompt, tokens=tokens)
    return {
        "prompt_tokens": prompt, "completion_tokens": tokens, "total_tokens": prompt + tokens,
        "saffron": asdict(answer.result.cost),
    }  # fmt: skip


async def models(request: Request) -> JSONResponse:
    """GET /v1/models"""
    service: Service = request.app.state.service
    service.ready()
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in service.variants]})


async def model(request: Request) -> JSONResponse:
    """GET /v1/models/{id}"""
    service: Service = request.app.state.service
    service.ready()
    name = request.path_params["id"]
    if name not in service.variants:
        raise ApiError(404, "model: there is none of this name", param="model", code="model_not_found")
    return JSONResponse(_model(service, name))


def _model(service: Service, name: str) -> dict[str, Any]:
    pair, _ = service.ready()
    first = next(iter(service.variants))
    return {
        "id": name, "object": "model", "created": service.created, "owned_by": "saffron", "root": first,
        "parent": None if name == first else first, "max_model_len": pair.policy.context,
        "saffron": {"method": service.variants[name].method, "defaults": asdict(service.variants[name].defaults)},
    }  # fmt: skip


async def health(request: Request) -> Response:
    """GET /health: 200 once requests are taken, 503 before and while the server drains."""
    request.app.state.service.ready()
    return Response()


async def version(request: Request) -> JSONResponse:
    """GET /version"""
    return JSONResponse({"version": __version__})


async def metrics(request: Request) -> Response:
    """GET /metrics"""
    return Response(request.app.state.service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")
