"""Conversations, and how they become token ids: control tokens come from templates, never from what people wrote."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from transformers import PreTrainedTokenizerBase

from saffron.errors import ConfigError, reason
from saffron.models.checks import kind
from saffron.models.plain_text import PlainEncoder, control_tokens

Message = Mapping[str, str]
ROLES = ("system", "user", "assistant")
# Arguments of `apply_chat_template` that are not options of a template.
RESERVED = frozenset((
    "add_generation_prompt", "continue_final_message", "conversation", "max_length", "messages", "padding",
    "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens", "tokenize",
    "tokenizer_kwargs", "truncation",
))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Conversation:
    """What has been said before the answer that is wanted.

    Attributes:
        turns: what a user and the assistant said, in turn; the user has the first and the last word.
        system: instructions of whoever deploys the policy, or None. Only the policy reads them: a guard judges what
            users and agents say (so do the templates of Llama Guard), and so does the MRM that was trained from it.
        prefill: how the answer is forced to begin; "" if it is not. Only the policy reads it: what was forced on the
            policy is left out of the safety evaluation.
    """

    turns: tuple[str, ...]
    system: str | None = None
    prefill: str = ""

    @classmethod
    def of(cls, prompt: Prompt, name: str = "prompt") -> Self:
        """Reads a user turn or a list of messages.

        Args:
            prompt: a text, or messages `{"role": ..., "content": ...}`: a system message if there is one, then user
                and assistant in turn. A last assistant message is continued: it is the prefill.
            name: of the argument, for messages of errors.

        Raises:
            ConfigError: a role, an order or a content that is not allowed; names it.
        """
        if isinstance(prompt, cls):
            return prompt
        if isinstance(prompt, str):
            return cls((_text(name, prompt),))
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise ConfigError(f"{name}: got {kind(prompt)}, expected a text or a list of messages")
        said = [_message(f"{name}[{i}]", message) for i, message in enumerate(prompt)]
        system = said.pop(0)[1] if said and said[0][0] == "system" else None
        first = len(prompt) - len(said)
        for i, (role, _) in enumerate(said):
            expected = ROLES[1 + i % 2]
            if role != expected:
                raise ConfigError(f"{name}[{first + i}]: got role {role!r}, expected {expected!r} there")
        texts = [text for _, text in said]
        prefill = texts.pop() if len(texts) % 2 == 0 and texts else ""
        if not texts:
            raise ConfigError(f"{name}: got no message of a user, expected at least one")
        return cls(tuple(texts), system, prefill)

    @property
    def prompt(self) -> str | list[dict[str, str]]:
        """The conversation without the prefill: a text if it is one user turn, else messages."""
        return self.turns[0] if self.system is None and len(self.turns) == 1 else self.messages()

    def messages(self) -> list[dict[str, str]]:
        """The conversation without the prefill, as a chat template reads it."""
        said = [] if self.system is None else [{"role": "system", "content": self.system}]
        return said + [{"role": ROLES[1 + i % 2], "content": text} for i, text in enumerate(self.turns)]


Prompt = str | Sequence[Message] | Conversation


def as_conversations(prompts: Prompt | Sequence[Prompt], prefill: str | Sequence[str] = "") -> list[Conversation]:
    """What a caller asks for, as conversations.

    Args:
        prompts: one text, one conversation (a list of messages), or a list of texts and conversations.
        prefill: how the answers are forced to begin: one text for all, or one each. A conversation that ends with an
            assistant message brings its own.

    Raises:
        ConfigError: a prompt that is empty or no conversation, or prefills that are too many, too few or given twice.
    """
    if isinstance(prompts, str | Conversation):
        conversations = [Conversation.of(prompts)]
    elif not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise ConfigError(f"prompts: got {kind(prompts)}, expected a text, a conversation or a list of them")
    elif prompts and isinstance(prompts[0], Mapping):
        conversations = [Conversation.of(prompts)]  # type: ignore[arg-type]
    else:
        conversations = [Conversation.of(prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]  # type: ignore[arg-type]
    if not isinstance(prefill, str | Sequence) or isinstance(prefill, bytes):
        raise ConfigError(f"prefill: got {kind(prefill)}, expected a text or one for each prompt")
    prefills = [prefill] * len(conversations) if isinstance(prefill, str) else list(prefill)
    if len(prefills) != len(conversations):
        raise ConfigError(f"prefill: got {len(prefills)} for {len(conversations)} prompts, expected one each")
    return [with_prefill(conversation, text) for conversation, text in zip(conversations, prefills, strict=True)]


def with_prefill(conversation: Conversation, prefill: str) -> Conversation:
    """The conversation with an answer that is forced to begin so; "" changes nothing.

    Raises:
        ConfigError: no text, or the conversation has a prefill.
    """
    if not isinstance(prefill, str):
        raise ConfigError(f"prefill: got {kind(prefill)}, expected a text")
    if not prefill:
        return conversation
    if conversation.prefill:
        raise ConfigError(
            f"prefill: got {prefill!r}, and the conversation ends with an assistant message already, which is continued"
        )
    return replace(conversation, prefill=_text("prefill", prefill))


class ConversationEncoder:
    """Text and conversations as token ids of one tokenizer.

    Args:
        tokenizer: of the model.
        owner: what to call the model in messages of errors.
        split_special_tokens: spell names of control tokens that people wrote as plain text. Off, they are control
            tokens, as everywhere in `transformers`: for text that nobody hostile has touched.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, owner: str, split_special_tokens: bool = True) -> None:
        self.tokenizer, self.owner, self.split_special_tokens = tokenizer, owner, split_special_tokens
        self._plain: PlainEncoder | None = None

    def template_text(self, text: str) -> list[int]:
        """Token ids of what a template says; control tokens count, none are added."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def text(self, text: str) -> list[int]:
        """Token ids of what somebody wrote."""
        return self._encoder().encode(text) if self.split_special_tokens else self.template_text(text)

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """`text` for many."""
        if not texts:
            return []
        if self.split_special_tokens:
            return self._encoder().encode_batch(texts)
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def chat(self, messages: Sequence[Message], chat_template: str | None = None, **options: Any) -> list[int]:
        """Token ids of a conversation and of what opens the answer, in the tokenizer's chat template.

        For messages without names of control tokens these are the ids of `tokenizer.apply_chat_template`.

        Args:
            chat_template: None: the tokenizer's own.
            options: for the template (`enable_thinking=False`, ...).

        Raises:
            ConfigError: the template refuses the conversation, or is broken.
        """
        if not self.split_special_tokens:
            text = self.render(messages, chat_template, **options)
            self._check_shown(text, messages, chat_template, options)
            return self.template_text(text)
        plain = self._encoder(chat_template)
        said = "".join(message["content"] for message in messages)  # as it is: `repr` would escape what we look for
        marks = _unused(said + json.dumps(options, ensure_ascii=False, default=str), 1 + len(plain.names))
        marked = [{**message, "content": plain.marked(message["content"], marks)} for message in messages]
        text = self.render(marked, chat_template, **options)
        self._check_shown(re.sub(f"[{''.join(marks)}]", "", text), messages, chat_template, options)
        return plain.encode_marked(text, marks)

    def _check_shown(
        self, text: str, messages: Sequence[Message], chat_template: str | None, options: Mapping[str, Any]
    ) -> None:
        """Refuses a template that leaves out what the user said last; it may trim or escape it."""
        last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
        if last is None or "".join(messages[last]["content"].split()) in "".join(text.split()):
            return
        probe = "".join(chr(ord("a") + i % 26) for i in range(80))
        asked = [{**message, "content": probe} if i == last else message for i, message in enumerate(messages)]
        if probe not in self.render(asked, chat_template, **options):
            raise ConfigError(f"{self.owner}: its chat template does not show what the user says")

    def render(self, messages: Sequence[Mapping[str, Any]], chat_template: str | None = None, **options: Any) -> str:
        """The text of a conversation and of what opens the answer."""
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=chat_template,
                add_generation_prompt=True,
                tokenize=False,
                **options,
            )
        except Exception as error:  # a template may raise anything
            why = f"its chat template cannot show this conversation ({reason(error)})"
            raise ConfigError(f"{self.owner}: {why}") from error
        return str(text)

    def _encoder(self, chat_template: str | None = None) -> PlainEncoder:
        control = control_tokens(self.tokenizer, chat_template)
        if self._plain is None or not self._plain.serves(self.tokenizer, control):
            self._plain = PlainEncoder(self.tokenizer, control, self.owner)
        return self._plain


def check_template_options(options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Options for a chat template, checked.

    Raises:
        ConfigError: no mapping from names, or the name of an argument that is not the template's.
    """
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(name, str) for name in options):
        raise ConfigError(f"chat_template_kwargs: got {kind(options)}, expected a dict from names to values")
    for name in sorted(RESERVED & options.keys()):
        raise ConfigError(f"chat_template_kwargs: got {name!r}, which is not an option of a template")
    return dict(options)


def _message(name: str, message: object) -> tuple[str, str]:
    """Role and content, checked."""
    if not isinstance(message, Mapping):
        raise ConfigError(f'{name}: got {kind(message)}, expected a message {{"role": ..., "content": ...}}')
    if set(message) != {"role", "content"}:
        raise ConfigError(f"{name}: got the keys {', '.join(map(str, message)) or 'none'}, expected role and content")
    role = message["role"]
    if role not in ROLES:
        raise ConfigError(f"{name}: got role {role!r}, expected one of {', '.join(ROLES)} (system only at the start)")
    return role, _text(f"{name}, content", message["content"])


def _text(name: str, text: object) -> str:
    if not isinstance(text, str):
        raise ConfigError(f"{name}: got {kind(text)}, expected a text")
    if not text:
        raise ConfigError(f"{name}: got '', expected a text that is not empty")
    return check_text(name, text)


def check_text(name: str, text: str) -> str:
    """Raises `ConfigError` for what no tokenizer can encode."""
    surrogate = re.search("[\ud800-\udfff]", text)
    if surrogate:
        raise ConfigError(f"{name}: character {surrogate.start()} is half of a surrogate pair, which is no text")
    return text


def _unused(text: str, count: int) -> list[str]:
    """So many characters for private use that the text lacks."""
    taken = set(text)
    free = (c for c in map(chr, itertools.chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE))) if c not in taken)
    return list(itertools.islice(free, count))
