"""The policy: the language model that is defended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saffron.errors import ConfigError
from saffron.models.chat import Conversation, ConversationEncoder, Prompt, check_template_options, with_prefill
from saffron.models.loading import check_weights
from saffron.models.trie_model import TrieModel

# What Llama-3-Instruct was trained on, for checkpoints that come without their chat template.
LLAMA3_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


class Policy(TrieModel):
    """A chat model. Its output is next-token logits `[sequences, vocab]`.

    Args:
        model, tokenizer: the checkpoint; the tokenizer's chat template lays conversations out.
        chat_template_kwargs: options of the chat template, for every conversation (`{"enable_thinking": False}`, ...).
        split_special_tokens: names of control tokens that users wrote (`</s>`, `<|eot_id|>`) are plain text. Off, they
            are control tokens, with which a user can end a turn or speak for the assistant.
        check_weights: refuse weights that are NaN or infinite; costs one reading of the weights.
        options: as for `TrieModel`.

    Raises:
        CheckpointError: weights that are not finite. UnsupportedModelError, ConfigError: as for `TrieModel`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        split_special_tokens: bool = True,
        check_weights: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        self.chat_template_kwargs = check_template_options(chat_template_kwargs)
        self.split_special_tokens = split_special_tokens
        self._encoder: ConversationEncoder | None = None
        if check_weights:
            _check_weights(model, "policy")

    @property
    def eos_token_id(self) -> tuple[int, ...]:
        """The token ids that end a response (`eos_token_id` of the generation configuration)."""
        config, generation = self.model.config.get_text_config(), self.model.generation_config
        ids = getattr(generation, "eos_token_id", None)
        if ids is None:
            ids = getattr(config, "eos_token_id", None)
        if ids is None and self.tokenizer is not None:
            ids = self.tokenizer.eos_token_id
        if ids is None:
            raise ConfigError("policy: its configuration names no eos_token_id, so no response could end")
        found = tuple(ids) if isinstance(ids, list | tuple) else (ids,)
        for token in found:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise ConfigError(f"policy: got eos_token_id {token!r}, expected ids from 0 to {self.vocab_size - 1}")
        if not found:
            raise ConfigError("policy: its eos_token_id is an empty list, so no response could end")
        return found

    @property
    def encoder(self) -> ConversationEncoder:
        """How text becomes token ids of this model."""
        tokenizer = self.require_tokenizer()
        if self._encoder is None or self._encoder.tokenizer is not tokenizer:
            self._encoder = ConversationEncoder(tokenizer, "policy", self.split_special_tokens)
        return self._encoder

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
            conversation = with_prefill(conversation, prefill)
            ids: list[int] = self.encoder.text(conversation.prefill) if conversation.prefill else []
        elif conversation.prefill and len(prefill):
            raise ConfigError("prefill: got token ids, and the conversation ends with an assistant message already")
        else:
            ids = list(prefill) or (self.encoder.text(conversation.prefill) if conversation.prefill else [])
        options = {**self.chat_template_kwargs, **check_template_options(chat_template_kwargs)}
        return self.encoder.chat(conversation.messages(), self._template(), **options) + ids

    def _template(self) -> str | None:
        """The chat template to use where the tokenizer holds none."""
        tokenizer = self.require_tokenizer()
        if tokenizer.chat_template is not None:
            return None
        if "<|start_header_id|>" not in tokenizer.get_added_vocab():
            raise ConfigError("policy: its tokenizer holds no chat template; set tokenizer.chat_template")
        return LLAMA3_CHAT_TEMPLATE


_check_weights = check_weights


def end_tokens(policy: Policy, given: Iterable[int] | None) -> frozenset[int]:
    """The token ids that end a response: those given, or the policy's own.

    Raises:
        ConfigError: something else than ids of the policy's vocabulary.
    """
    ids = policy.eos_token_id if given is None else given
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise ConfigError(f"eos_token_id: got {ids!r}, expected token ids")
    found = list(ids)
    for one in found:
        if not isinstance(one, int) or isinstance(one, bool) or not 0 <= one < policy.vocab_size:
            raise ConfigError(f"eos_token_id: got {one!r}, expected ids from 0 to {policy.vocab_size - 1}")
    return frozenset(found)
