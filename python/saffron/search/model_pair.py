"""The policy and the MRM of a search."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saffron.models.attention import TrieStep
from saffron.models.checks import expect
from saffron.models.cuda_graph import at_once
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.models.shared_trunk import JointStep, SharedTrunk
from saffron.models.vocabulary import Head, head_for, same_tokens
from saffron.search.config import Request


class ModelPair:
    """A policy and an MRM that fit each other.

    Attributes:
        same: they share a tokenizer; otherwise responses reach the MRM as text.
        vocab_size: of the policy.

    Raises:
        ConfigError: they do not fit.
    """

    def __init__(self, policy: Policy, mrm: MultifurcationRewardModel) -> None:
        expect("policy", policy, Policy)
        expect("mrm", mrm, MultifurcationRewardModel)
        self.policy, self.mrm = policy, mrm
        self.same, self.vocab_size = same_tokens(policy, mrm), policy.vocab_size
        self.head(True)

    @property
    def trunk(self) -> SharedTrunk | None:
        """What runs both as rows of one forward pass, where the MRM shares the policy's modules."""
        shared = self.mrm.shared
        return shared if shared is not None and shared.trunk is self.policy.model else None

    def run(self, policy_step: Callable[[], Any], mrm_step: Callable[[], Any]) -> list[Any]:
        """What a step, a prefill or the like of each model returns; one forward pass where they share a trunk."""
        if self.trunk is None:
            return [policy_step(), mrm_step()]
        return self.trunk.together(self.policy, self.mrm, policy_step, mrm_step)

    def outputs(
        self, tokens: Tensor, policy_step: TrieStep, mrm_step: TrieStep, side: torch.cuda.Stream | None
    ) -> list[Tensor]:
        """What both models say of all rows of their steps, at once; `tokens [2, rows]`: the policy's, the MRM's."""
        keep, steps = torch.arange(tokens.shape[1], device=tokens.device), (policy_step, mrm_step)
        if self.trunk is not None:
            return self.trunk.outputs(self.mrm.model, [*tokens], JointStep(steps), [keep, keep])
        policy, mrm = (partial(model.output, t[None], step, keep)
                       for model, t, step in zip((self.policy, self.mrm), tokens, steps, strict=True))  # fmt: skip
        return at_once(side, policy, mrm)

    def head(self, trained_bias: bool) -> Head:
        """The MRM's head by the policy's token ids, with the weights that it has now."""
        return head_for(self.policy, self.mrm, trained_bias)

    def slots(self, request: Request, width: int, new_tokens: int) -> tuple[int, int]:
        """What a search needs at most in the caches of policy and MRM: one slot per live prefix (Proposition 2).

        A response that reaches the MRM as text may take more tokens there, and two steps of it meet in the cache.
        """
        new = width * (new_tokens - 1)  # the last token is not run
        needs = len(request.policy) + new, len(request.reward) + (new if self.same else 4 * new)
        return needs[0] * self.policy.share_prefixes, needs[1] * self.mrm.share_prefixes
