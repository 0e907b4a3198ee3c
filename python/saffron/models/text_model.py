"""What all models have in common that read what people wrote."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saffron.models import weights
from saffron.models.chat import ConversationEncoder
from saffron.models.trie_model import TrieModel


class TextModel(TrieModel):
    """A `TrieModel` with checked weights and an encoder of conversations.

    Args:
        model, tokenizer: the checkpoint.
        split_special_tokens: names of control tokens that users wrote (`</s>`, `<|eot_id|>`) are plain text. Off, they
            are control tokens, with which a user can end a turn or speak for the assistant.
        check_weights: refuse weights that are NaN or infinite; costs one reading of the weights.
        options: as for `TrieModel`.

    Raises:
        CheckpointError: weights that are not finite. UnsupportedModelError, ConfigError: as for `TrieModel`.
    """

    owner = "model"  # what it is called in error messages

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        split_special_tokens: bool = True,
        check_weights: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        self.split_special_tokens = split_special_tokens
        self._encoder: ConversationEncoder | None = None
        if check_weights:
            weights.check_weights(model, self.owner)

    @property
    def encoder(self) -> ConversationEncoder:
        """How text becomes token ids of this model."""
        tokenizer = self.require_tokenizer()
        if self._encoder is None or self._encoder.tokenizer is not tokenizer:
            self._encoder = ConversationEncoder(tokenizer, self.owner, self.split_special_tokens)
        return self._encoder
