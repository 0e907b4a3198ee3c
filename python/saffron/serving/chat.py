"""Requests to `/v1/chat/completions`: what they may say, and how they become an `Ask`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saffron.errors import shown
from saffron.models.chat import ROLES, Conversation, check_template_options
from saffron.serving.ask import Trace
from saffron.serving.body import Fields, check_text
from saffron.serving.errors import ApiError, bad
from saffron.serving.settings import Settings

# Of OpenAI and vLLM, without effect: the search is deterministic, or it is no business of this server.
WITHOUT_EFFECT = frozenset((
    "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty", "seed",
    "user", "store", "metadata", "service_tier", "parallel_tool_calls", "reasoning_effort", "verbosity",
    "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "skip_special_tokens",
    "spaces_between_special_tokens", "include_stop_str_in_output", "ignore_eos", "best_of", "request_id", "priority",
))  # fmt: skip
READ = frozenset((
    "model", "messages", "max_tokens", "max_completion_tokens", "stop", "n", "stream", "stream_options", "saffron",
    "continue_final_message", "add_generation_prompt", "echo", "chat_template_kwargs", "logprobs", "top_logprobs",
    "modalities",
))  # fmt: skip
REFUSED = {
    "tools": "tools are not served",
    "tool_choice": "tools are not served",
    "functions": "functions are not served",
    "function_call": "functions are not served",
    "response_format": "only text is served: the search cannot be held to a grammar",
    "logit_bias": "the policy's logits cannot be changed",
    "audio": "only text is served",
    "prediction": "predicted outputs are not served",
    "web_search_options": "there is no search of the web",
}
EMPTY_KEYS = ("refusal", "tool_calls", "function_call", "audio", "annotations", "reasoning_content")
STREAM_OPTIONS = ("include_usage", "continuous_usage_stats", "include_obfuscation")
MOST_LOGPROBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What both kinds of completions are asked for, checked by itself: no model has been asked yet.

    Attributes:
        model: None: the defended one. own: the object `saffron`.
        max_tokens: None: what the server gives.
        echo: begin the answer with what it continues: a chat's prefill, or the prompt.
        logprobs: alternatives per token; None: no log-probabilities.
    """

    model: str | None
    own: Mapping[str, Any]
    max_tokens: int | None
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    echo: bool
    trace: Trace
    logprobs: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(Wanted):
    """The body of a request; `options` are those of the chat template."""

    conversation: Conversation
    options: Mapping[str, Any]


def read_wanted(fields: Fields, settings: Settings) -> dict[str, Any]:
    """What stands alike in both bodies: all of `Wanted` but the numbers of tokens and of log-probabilities."""
    stream, options = fields.flag("stream"), fields.object("stream_options")
    if options and not stream:
        raise bad("stream_options", "needs stream: true")
    for name, value in options.items():
        if name not in STREAM_OPTIONS or not isinstance(value, bool):
            raise bad("stream_options", "expected include_usage: true or false", "unknown_parameter")
    own = fields.object("saffron")
    trace = own.get("trace")
    if trace is not None and not isinstance(trace, bool) and trace != "page":
        raise bad("saffron.trace", f'got {shown(trace)}, expected true, false or "page"')
    return {
        "model": fields.text("model") if "model" in fields else None,
        "own": own,
        "n": fields.whole("n", 1, 1, settings.max_width),
        "stop": fields.stop(),
        "stream": stream,
        "include_usage": bool(options.get("include_usage")),
        "echo": fields.flag("echo"),
        "trace": trace or False,
    }


def read_chat(body: Mapping[str, Any], settings: Settings) -> ChatRequest:
    """Raises `ApiError` or `ConfigError` for what is wrong."""
    fields = Fields(body, READ | WITHOUT_EFFECT, REFUSED)
    if fields.get("modalities") not in (None, ["text"], []):
        raise bad("modalities", "only text is served", "unsupported_parameter")
    fields.without_effect()
    conversation = conversation_of(fields, settings)
    top = fields.whole("top_logprobs", 0, 0, MOST_LOGPROBS)
    if top and not fields.flag("logprobs"):
        raise bad("top_logprobs", "needs logprobs: true")
    return ChatRequest(
        **read_wanted(fields, settings),
        conversation=conversation,
        max_tokens=_max_tokens(fields, settings),
        logprobs=top if fields.flag("logprobs") else None,
        options=check_template_options(fields.object("chat_template_kwargs")),
    )


def _max_tokens(fields: Fields, settings: Settings) -> int | None:
    name = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    return fields.whole(name, 1, 1, settings.max_tokens) if name in fields else None


def conversation_of(fields: Fields, settings: Settings) -> Conversation:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad("messages", "expected a list of messages that is not empty")
    said = [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]
    # The deployer may send several messages before the first turn: one system message, by paragraphs.
    first = next((i for i, (role, _) in enumerate(said) if role != "system"), len(said))
    system = "\n\n".join(text for _, text in said[:first] if text) or None
    turns = said[first:]
    for i, (role, text) in enumerate(turns):
        where = f"messages[{first + i}]"
        if role != ROLES[1 + i % 2]:
            raise bad(where, f"got role {role!r}, expected {ROLES[1 + i % 2]!r} there: users and assistant take turns")
        if not text:
            raise bad(where, "the content is empty")
    if not turns:
        raise bad("messages", "expected at least one message of a user")
    texts = tuple(text for _, text in turns)
    if not _continues(fields, settings, turns[-1][0]):
        return Conversation(texts, system)  # a last turn of the assistant is an ordinary turn
    return Conversation(texts[:-1], system, texts[-1])


def _continues(fields: Fields, settings: Settings, last: str) -> bool:
    """Whether the last message is the beginning of the answer."""
    goes_on = fields.flag("continue_final_message")
    opens = fields.flag("add_generation_prompt", not goes_on)
    if goes_on == opens:
        raise bad(
            "continue_final_message",
            "either it or add_generation_prompt is true: the last message goes on, or an answer begins",
        )
    if goes_on and not settings.prefill:
        raise ApiError(
            400, "continue_final_message: this server does not let clients begin the answer",
            param="continue_final_message", code="prefill_disabled",
        )  # fmt: skip
    if goes_on and last != "assistant":
        raise bad("continue_final_message", "needs a last message of the assistant")
    if fields.flag("echo") and not goes_on:
        raise bad("echo", "needs continue_final_message: there is nothing to repeat")
    return goes_on


def _message(where: str, message: object) -> tuple[str, str]:
    """Role and text of one message."""
    if not isinstance(message, dict):
        raise bad(where, f"got {shown(message)}, expected an object with role and content")
    for name, value in message.items():
        if name not in ("role", "content", "name") and not (name in EMPTY_KEYS and value in (None, [], "")):
            raise bad(where, f"got the key {shown(name)}, expected role and content", "unsupported_parameter")
    role = message.get("role")
    role = "system" if role == "developer" else role
    if not isinstance(role, str) or role not in ROLES:
        raise bad(where, f"got role {shown(role)}, expected one of {', '.join(ROLES)}, developer")
    content = message.get("content")
    if isinstance(content, list):
        parts = [_part(where, part) for part in content]
        content = "".join(parts)
    if not isinstance(content, str):
        raise bad(where, f"got content {shown(content)}, expected a text or a list of parts of text")
    return role, check_text(where, content)


def _part(where: str, part: object) -> str:
    kinds = ("text", "input_text")
    text = part.get("text") if isinstance(part, dict) and part.get("type") in kinds else None
    if not isinstance(text, str):
        raise bad(where, f'got the part {shown(part)}, expected {{"type": "text", "text": ...}}: only text is served')
    return text
