"""Log-probabilities of given tokens under a policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saffron.models.policy import Policy

CHUNK = 64  # positions whose logits are held at once


@dataclass(frozen=True, slots=True)
class TokenLikelihood:
    """A token, its log-probability after those before it, and the most probable tokens there."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@torch.inference_mode()
def likelihoods(policy: Policy, tokens: list[int], first: int, top: int) -> list[TokenLikelihood]:
    """`tokens[first:]` under the policy.

    Args:
        first: at least 1: nothing stands before the first token.
        top: alternatives per token.
    """
    found, held = [], []
    try:
        for start in range(first, len(tokens), CHUNK):
            places = range(start, min(start + CHUNK, len(tokens)))
            leaves, logits = policy.read([tokens[:place] for place in places])
            held.append(leaves)
            log_probabilities = logits.float().log_softmax(-1)
            best = log_probabilities.topk(min(top, log_probabilities.shape[1])) if top else None
            for row, place in enumerate(places):
                alike = [] if best is None else list(
                    zip(best.indices[row].tolist(), best.values[row].tolist(), strict=True)
                )  # fmt: skip
                found.append(TokenLikelihood(tokens[place], float(log_probabilities[row, tokens[place]]), alike))
    finally:
        for leaves in held:
            policy.forget(leaves)
    return found
