"""The rewards of candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.cuda import native
from saffron_kernels.backends.cuda.arguments import Candidates, RewardHead


def multifurcation_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    unseen: Tensor | None,
    unseen_reward: float,
    tokens: Tensor,
    offsets: Tensor,
) -> Tensor:
    faults.check_index("tokens", tokens, weight.shape[0])
    faults.check_ascending("offsets", offsets, 0, tokens.shape[0])
    rewards = torch.empty(tokens.shape, dtype=torch.float32, device=hidden.device)
    candidates = Candidates(tokens.contiguous(), offsets.contiguous())
    head = RewardHead(hidden, weight, bias, unseen, unseen_reward)
    native.launch("multifurcation_head", hidden, head, candidates, rewards)
    return rewards
