"""The best candidates of every group of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.cuda import native
from saffron_kernels.backends.cuda.arguments import Candidates, Groups
from saffron_kernels.backends.cuda.beams import check_sizes, contiguous, new_beam, scratch


def select_beam(
    rewards: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    groups: Tensor,
    num_groups: int,
    width: int,
    widths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_sizes(rewards, "groups", groups.shape[0], num_groups, width)
    faults.check_rewards(rewards, offsets, groups, num_groups)
    faults.check_ascending("groups", groups)
    faults.check_index("widths", widths, width + 1, lowest=1)
    beam = new_beam(num_groups * width, rewards.dtype, rewards.device)
    with torch.cuda.device_of(rewards):
        needed = native.module(rewards).select_beam_workspace(rewards.shape[0], num_groups, width)
    native.launch(
        "select_beam", rewards, rewards, Candidates(tokens.contiguous(), offsets.contiguous()),
        Groups(groups.contiguous(), num_groups, width, contiguous(widths)), beam, scratch(needed, rewards),
    )  # fmt: skip
    return beam
