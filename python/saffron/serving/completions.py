"""`/v1/completions`, with the log-probabilities of a prompt: what log-likelihood tasks are made of."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from saffron import __version__
from saffron.errors import shown
from saffron.models.likelihood import TokenLikelihood, likelihoods
from saffron.models.policy import OPENING
from saffron.search import config as search_config
from saffron.search.result import Cost
from saffron.serving.ask import Ask, Variant, choose
from saffron.serving.body import Fields, check_text, read_json
from saffron.serving.chat import MOST_LOGPROBS, REFUSED, WITHOUT_EFFECT, Wanted, read_wanted
from saffron.serving.errors import bad
from saffron.serving.events import EventStream, watched
from saffron.serving.likelihood import token_text
from saffron.serving.routes import finish, own_part, traced
from saffron.serving.running import Answer, Choice, Running
from saffron.serving.service import Service
from saffron.serving.settings import Settings

READ = frozenset((
    "model", "prompt", "max_tokens", "stop", "n", "stream", "stream_options", "saffron", "echo", "logprobs", "suffix",
    "add_special_tokens",
))  # fmt: skip
MOST_PROMPTS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest(Wanted):
    """The body of a request.

    Attributes:
        prompts: texts, or token ids.
        special: texts stand behind the begin token, where the tokenizer adds one.
    """

    prompts: list[str | list[int]]
    special: bool


def read_completion(body: Mapping[str, Any], settings: Settings) -> CompletionRequest:
    """Raises `ApiError` for what is wrong."""
    fields = Fields(body, READ | WITHOUT_EFFECT, REFUSED)
    fields.without_effect()
    if fields.get("suffix") not in (None, ""):
        raise bad("suffix", "only the end of a prompt is completed", "unsupported_parameter")
    prompts = read_prompts(fields.get("prompt"), min(MOST_PROMPTS, settings.queue))
    wanted = read_wanted(fields, settings)
    if wanted["stream"] and len(prompts) > 1:
        raise bad("stream", "serves one prompt")
    logprobs, least = fields.get("logprobs"), 0 if wanted["echo"] else 1
    return CompletionRequest(
        **wanted,
        prompts=prompts,
        max_tokens=fields.whole("max_tokens", min(16, settings.max_tokens), least, settings.max_tokens),
        special=fields.flag("add_special_tokens", True),
        logprobs=None if logprobs is None or logprobs is False else fields.whole("logprobs", 0, 0, MOST_LOGPROBS),
    )


def read_prompts(given: object, most: int) -> list[str | list[int]]:
    """One prompt or up to `most`, as texts or token ids."""
    several = isinstance(given, list) and bool(given) and not all(_is_id(x) for x in given)
    prompts = given if several else [given]
    assert isinstance(prompts, list)
    if len(prompts) > most:
        raise bad("prompt", f"got {len(prompts)} prompts, expected at most {most}")
    for prompt in prompts:
        if isinstance(prompt, str) and prompt:
            check_text("prompt", prompt)
        elif not isinstance(prompt, list) or not prompt or not all(_is_id(x) for x in prompt):
            raise bad("prompt", f"got {shown(prompt)}, expected a text or token ids, or a list of these; not empty")
    return prompts


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


async def completions(request: Request) -> Response | EventStream:
    """POST /v1/completions"""
    service: Service = request.app.state.service
    service.ready()
    asked = read_completion(await read_json(request, service.settings.max_body), service.settings)
    variant = choose(service.variants, asked.model, asked.own)
    asks = await service.work(_encode, service, asked, variant)
    head = {"id": f"cmpl-{uuid.uuid4().hex}", "object": "text_completion", "created": int(time.time()),
            "model": variant.id, "system_fingerprint": f"saffron-{__version__}"}  # fmt: skip
    if asked.max_tokens == 0:
        choices = [await _choice(service, asked, ask, i, None) for i, ask in enumerate(asks)]
        prompt = sum(len(ask.request.policy) for ask in asks)
        usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": 0, "total_tokens": prompt}
        return JSONResponse({**head, "choices": choices, "usage": usage})
    if asked.stream:
        running = Running(service, asks[0])
        return EventStream(running, _stream(running, asked, head, request), service.settings.keep_alive)
    with ExitStack() as stack:
        runs = [stack.enter_context(Running(service, ask)) for ask in asks]

        def leave() -> None:
            for running in runs:
                running.leave()

        async with watched(request.receive, leave):
            choices, usages = await _all(runs, asked, request)
    return JSONResponse({**head, "choices": choices, "usage": _total(usages)})


async def _all(
    runs: list[Running], asked: CompletionRequest, request: Request
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The choices of all prompts in their order, and what each prompt took."""
    choices, usages = list[dict[str, Any]](), list[dict[str, Any]]()
    for running in runs:
        answer = await running.answer()
        for i, choice in enumerate(answer.choices):
            first = answer if i == 0 else None
            choices.append(await _choice(running.service, asked, running.ask, len(choices), choice, first))
        usages.append(finish(running, answer, request))
    return choices, usages


async def _stream(
    running: Running, asked: CompletionRequest, head: dict[str, Any], request: Request
) -> AsyncIterator[dict[str, Any]]:
    def chunk(index: int, text: str, **more: Any) -> dict[str, Any]:
        usage = {"usage": None} if asked.include_usage else {}
        choice = {"index": index, "text": text, "logprobs": None, "finish_reason": None, **more}
        return {**head, "choices": [choice], **usage}

    service, ask = running.service, running.ask
    if asked.n == 1:
        if asked.echo:
            yield chunk(0, service.policy.decode(ask.request.policy))
        async for piece in running.pieces():
            yield chunk(0, piece)
    answer = await running.answer()
    for index, one in enumerate(answer.choices):
        choice = await _choice(service, asked, ask, index, one, answer if index == 0 else None)
        yield chunk(**{**choice, "text": choice["text"] if asked.n > 1 else ""})
    usage = finish(running, answer, request)
    if asked.include_usage:
        yield {**head, "choices": [], "usage": usage}


def _encode(service: Service, asked: CompletionRequest, variant: Variant) -> list[Ask]:
    """The prompts as the models read them; the reward model reads one as a turn of the user. Not for the event loop."""
    models, _ = service.ready()
    if variant.adaptive is not None:
        raise bad("model", "serves conversations only: the guard rates them", "unsupported_parameter")
    asks = []
    for prompt in asked.prompts:
        if isinstance(prompt, list):
            ids = prompt
        else:
            ids = with_begin(service, prompt) if asked.special else models.policy.encoder.text(prompt)
        models.policy.check_tokens("prompt", ids)
        text = prompt if isinstance(prompt, str) else models.policy.decode(prompt)
        reward = tuple(variant.reward.context_tokens(text or " ")) if variant.reward is not None else ()
        request = search_config.Request(tuple(ids), reward, tuple(ids[-OPENING:]))
        ask = service.ask(
            variant, request, asked.own, max_tokens=asked.max_tokens or 1, n=asked.n,
            stop=asked.stop, trace=asked.trace, logprobs=asked.logprobs,
        )  # fmt: skip
        models.policy.check_length("prompt", len(ids), asked.max_tokens or 0)
        asks.append(ask)
    return asks


def with_begin(service: Service, text: str) -> list[int]:
    """Token ids of a plain prompt, behind the begin token where the tokenizer adds one by itself."""
    policy = service.policy
    tokenizer, ids = policy.require_tokenizer(), policy.encoder.text(text)
    begin = tokenizer.bos_token_id
    adds = begin is not None and tokenizer.encode("a")[:1] == [begin]
    return [begin, *ids] if adds else ids


async def _choice(
    service: Service, asked: CompletionRequest, ask: Ask, index: int, choice: Choice | None,
    answer: Answer | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One choice of a completion; without an answer the prompt alone, which `echo` wants."""
    prompt = list(ask.request.policy)
    text = service.policy.decode(prompt) if asked.echo else ""
    logprobs = None
    if asked.logprobs is not None:
        tokens = [] if choice is None else choice.tokens
        logprobs = await service.work(_logprobs, service, prompt, tokens, asked.echo, asked.logprobs)
    described = {"index": index, "text": text + (choice.text if choice else ""), "logprobs": logprobs,
                 "finish_reason": choice.finish_reason if choice else "length"}  # fmt: skip
    if choice is not None:
        own = own_part(choice, None)
        described["saffron"] = own | (await service.work(traced, ask, answer) if ask.trace and answer else {})
    return described


def _logprobs(service: Service, prompt: list[int], tokens: list[int], echo: bool, top: int) -> dict[str, Any]:
    """`choices[i].logprobs` of a completion. Nothing stands before a prompt's first token: null."""
    policy = service.policy
    first = 1 if echo else len(prompt)
    found: list[TokenLikelihood | None] = list(likelihoods(policy, prompt + tokens, first, top))
    shown_tokens = (prompt if echo else []) + tokens
    found = [None, *found] if echo else found
    texts = [token_text(policy, token) for token in shown_tokens]
    offsets, at = [], 0
    for text in texts:
        offsets.append(at)
        at += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [None if one is None else max(one.logprob, -9999.0) for one in found],
        "top_logprobs": [None if one is None else _top(service, one) for one in found],
        "text_offset": offsets,
    }


def _top(service: Service, one: TokenLikelihood) -> dict[str, float]:
    """The most probable tokens by their text; of equal texts the more probable counts."""
    found: dict[str, float] = {}
    for token, value in one.top:
        found.setdefault(token_text(service.policy, token), max(value, -9999.0))
    return found


def _total(usages: list[dict[str, Any]]) -> dict[str, Any]:
    total = {name: sum(usage[name] for usage in usages) for name in usages[0] if name != "saffron"}
    names = Cost.__dataclass_fields__
    return total | {"saffron": {name: sum(usage["saffron"][name] for usage in usages) for name in names}}
