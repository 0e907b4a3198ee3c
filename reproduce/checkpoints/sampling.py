"""Responses of the policy itself, for the MRM's corpus: what a search will meet."""

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

LENGTH, TOP_P = 32, 0.8


@torch.no_grad()
def sample(
    policy: LlamaForCausalLM, prompts: list[list[int]], explore: Tensor, generator: torch.Generator
) -> list[list[int]]:
    """One response of up to 32 tokens for every prompt.

    explore: bool [prompts]. A row that explores draws evenly from its nucleus, for a search takes what is improbable
    as readily as what is not; the others draw as the policy would. Responses keep the end token they stopped at.
    """
    ids, seen = _left_padded(prompts, policy.config.pad_token_id)
    cache, positions = DynamicCache(), (seen.cumsum(-1) - 1).clamp(min=0)
    tokens = torch.empty(len(prompts), 0, dtype=torch.long)
    for _ in range(LENGTH):
        logits = policy(
            input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache, logits_to_keep=1
        ).logits[:, -1]
        ids = torch.multinomial(_weights(logits, explore), 1, generator=generator)
        tokens = torch.cat([tokens, ids], dim=1)
        seen = torch.cat([seen, torch.ones_like(ids)], dim=1)
        positions = positions[:, -1:] + 1
    return [_until_end(row, policy.config.eos_token_id) for row in tokens.tolist()]


def _weights(logits: Tensor, explore: Tensor) -> Tensor:
    """Weights to draw the next token by, [rows, vocabulary]."""
    probability, token = logits.softmax(-1).sort(-1, descending=True)
    kept = probability.cumsum(-1) - probability < TOP_P
    even = torch.zeros_like(logits).scatter_(1, token, kept.float())
    return torch.where(explore[:, None], even, logits.softmax(-1))


def _left_padded(rows: list[list[int]], value: int) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[value] * (longest - len(row)) + row for row in rows])
    seen = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return ids, seen


def _until_end(row: list[int], end: int) -> list[int]:
    return row[: row.index(end) + 1] if end in row else row
