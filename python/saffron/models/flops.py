"""Analytic FLOPs of a decoder: two a multiply-add of its matrix products, norms and activations left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """FLOPs by what is run.

    Attributes:
        per_token: linear layers of the backbone, for one token.
        per_pair: attention, for one query and one token it sees, over all layers: `4 * heads * head_dim * layers`.
        per_head_row: unembedding, for one token and one vocabulary entry.
    """

    per_token: int
    per_pair: int
    per_head_row: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Self:
        config = model.config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        linear = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, nn.Linear))
        pair = 4 * config.num_attention_heads * head_dim * config.num_hidden_layers
        return cls(2 * linear, pair, 2 * config.hidden_size)

    def prompt(self, tokens: int) -> int:
        """A prefill of `tokens` tokens, without the unembedding."""
        return self.per_token * tokens + self.per_pair * tokens * (tokens + 1) // 2

    def token(self, position: int) -> int:
        """One token at `position` (it sees `position + 1` tokens), without the unembedding."""
        return self.per_token + self.per_pair * (position + 1)
