"""The policy: the language model that is defended."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import dropwhile
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saffron.errors import ConfigError
from saffron.models.chat import Conversation, Prompt, check_template_options, with_prefill
from saffron.models.text_model import TextModel

# What Llama-3-Instruct was trained on, for checkpoints that come without their chat template.
LLAMA3_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

OPENING = 8  # tokens of an opening that a response is decoded behind: a word, or a character of many bytes
BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class Policy(TextModel):
    """A chat model. Its output is next-token logits `[sequences, vocab]`.

    Args:
        model, tokenizer: the checkpoint; the tokenizer's chat template lays conversations out.
        chat_template_kwargs: options of the chat template, for every conversation (`{"enable_thinking": False}`, ...).
        options: `split_special_tokens` and `check_weights` as for `TextModel`, and those of `TrieModel`.

    Raises:
        CheckpointError, UnsupportedModelError, ConfigError: as for `TextModel`.
    """

    owner = "policy"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        self.chat_template_kwargs = check_template_options(chat_template_kwargs)

    @property
    def eos_token_id(self) -> tuple[int, ...]:
        """The token ids that end a response (`eos_token_id` of the generation configuration)."""
        sources = self.model.generation_config, self.model.config.get_text_config(), self.tokenizer
        named = (getattr(source, "eos_token_id", None) for source in sources)
        ids = next((found for found in named if found is not None), None)
        if ids is None:
            raise ConfigError("policy: its configuration names no eos_token_id, so no response could end")
        if ids in ([], ()):
            raise ConfigError("policy: its eos_token_id is an empty list, so no response could end")
        return self._check_ids("policy: eos_token_id", ids if isinstance(ids, list | tuple) else [ids])

    def _check_ids(self, name: str, ids: Iterable[Any]) -> tuple[int, ...]:
        found = tuple(ids)
        for token in found:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise ConfigError(f"{name}: got {token!r}, expected ids from 0 to {self.vocab_size - 1}")
        return found

    def chat(self, prompt: Prompt, prefill: str | Sequence[int] = "", **chat_template_kwargs: Any) -> list[int]:
        """Token ids of a conversation and the opening of the answer, in the model's chat template.

        The opening of the answer and the prefill are encoded one after the other: the prefill gets the tokens that it
        would have as an answer's beginning, wherever the template ends.

        Args:
            prompt: what the user says, or messages; a last assistant message is continued (see `Conversation.of`).
            prefill: how the answer is forced to begin, text or token ids.
            chat_template_kwargs: options of the template for this conversation.

        Raises:
            ConfigError: a prompt that is no conversation, or that the template refuses; a prefill given twice.
        """
        conversation = Conversation.of(prompt)
        if isinstance(prefill, str):
            conversation, prefill = with_prefill(conversation, prefill), []
        elif conversation.prefill and len(prefill):
            raise ConfigError("prefill: got token ids, and the conversation ends with an assistant message already")
        ids = list(prefill) or (self.encoder.text(conversation.prefill) if conversation.prefill else [])
        options = {**self.chat_template_kwargs, **check_template_options(chat_template_kwargs)}
        found = self.encoder.chat(conversation.messages(), self._template(), **options) + ids
        self._check_thought(found)
        return found

    def opening(self, prompt: Prompt, prefill: str = "") -> tuple[int, ...]:
        """The last tokens of a prefill: `Request.opening` of what `chat` gives."""
        conversation = with_prefill(Conversation.of(prompt), prefill)
        found = self.encoder.text(conversation.prefill)[-OPENING:] if conversation.prefill else []
        # Behind a part of a character, the bytes of all others would be decoded to replacement characters.
        token = self.require_tokenizer().convert_ids_to_tokens
        return tuple(dropwhile(lambda i: "<0x80>" <= str(token(i)) <= "<0xBF>", found))

    def decode(self, tokens: Sequence[int], opening: Sequence[int] = ()) -> str:
        """The text of token ids, without special tokens; behind `opening` (`Request`), whose text is not repeated."""
        alone = super().decode(tokens)
        if not opening:
            return alone
        before, whole = super().decode(opening), super().decode([*opening, *tokens])
        return whole[len(before) :] if whole.startswith(before) else alone

    def _check_thought(self, ids: list[int]) -> None:
        """Refuses a prompt that ends within a chain of thought: rewards are of answers."""
        special = self.require_tokenizer().get_added_vocab()
        opened = [i for i in ids if i in (special.get("<think>"), special.get("</think>"))]
        if opened and opened[-1] == special.get("<think>"):
            raise ConfigError(
                "policy: its chat template leaves a chain of thought open (<think>), which rewards would judge as the "
                "answer; expected one that is off or closed (chat_template_kwargs={'enable_thinking': False}, or "
                "another tokenizer.chat_template)"
            )

    def settled_text(self, tokens: Sequence[int], opening: Sequence[int] = ()) -> str:
        """The part of a beginning's text that stays whatever tokens follow: `decode` of all tokens begins with it.

        Not settled are characters that are there in part, and the bytes of SentencePiece at the end (`<0x41>`): a run
        of them that turns out to be no UTF-8 is decoded to replacement characters from its first byte on.
        """
        tokenizer, end = self.require_tokenizer(), len(tokens)
        special = set(tokenizer.all_special_ids)
        while end and (
            tokens[end - 1] in special or BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(tokens[end - 1])))
        ):
            end -= 1
        return self.decode(tokens[:end], opening).rstrip("\ufffd")

    def _template(self) -> str | None:
        """The chat template to use where the tokenizer holds none."""
        tokenizer = self.require_tokenizer()
        if tokenizer.chat_template is not None:
            return None
        if "<|start_header_id|>" not in tokenizer.get_added_vocab():
            raise ConfigError("policy: its tokenizer holds no chat template; set tokenizer.chat_template")
        return LLAMA3_CHAT_TEMPLATE


def end_tokens(policy: Policy, given: Iterable[int] | None) -> frozenset[int]:
    """The token ids that end a response: those given, or the policy's own.

    Raises:
        ConfigError: something else than ids of the policy's vocabulary.
    """
    if given is None:
        return frozenset(policy.eos_token_id)
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise ConfigError(f"eos_token_id: got {given!r}, expected token ids")
    return frozenset(policy._check_ids("eos_token_id", given))
