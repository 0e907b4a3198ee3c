"""A whole step of a search."""

from __future__ import annotations

import torch
from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.cuda import native
from saffron_kernels.backends.cuda.arguments import Finished, Groups, Inherited, RewardHead
from saffron_kernels.backends.cuda.beams import check_sizes, contiguous, new_beam, scratch
from saffron_kernels.backends.cuda.nucleus import limits
from saffron_kernels.checks import expect


def multifurcate(
    logits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    unseen: Tensor | None,
    unseen_reward: float,
    groups: Tensor,
    num_groups: int,
    width: int,
    top_p: float | Tensor,
    banned: Tensor | None,
    scores: Tensor | None,
    end_tokens: Tensor | None,
    finished_scores: Tensor | None,
    finished_groups: Tensor | None,
    widths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op, in two launches. Its workspace is 16 bytes per logit.

    A row of bad logits stays recorded until `raise_faults` on a GPU; its nucleus size is 0, which no other row of a
    group has.
    """
    (rows, vocab), device = logits.shape, logits.device
    launchers = native.module(logits)
    check_sizes(logits, "logits", rows, num_groups, width)
    expect(vocab <= launchers.MAX_VOCAB, "logits", f"a vocabulary of {vocab}", f"at most {launchers.MAX_VOCAB}")
    expect(rows * vocab < 1 << 31, "logits", f"{rows} rows of {vocab}", f"less than {1 << 31} numbers")
    faults.check_index("groups", groups, num_groups + 1)
    faults.check_ascending("groups", groups)
    faults.check_index("finished_groups", finished_groups, num_groups + 1)
    faults.check_index("widths", widths, width + 1, lowest=1)
    faults.check_parameters(vocab, top_p, banned, groups, num_groups)
    beam = new_beam(num_groups * width, torch.float32, device)
    counts = torch.empty(rows, dtype=torch.int32, device=device)
    all_unseen = torch.empty(num_groups, dtype=torch.bool, device=device)
    finished = Finished(finished_scores, contiguous(finished_groups))
    num_finished = 0 if finished_scores is None else finished_scores.shape[0]
    with torch.cuda.device_of(logits):
        needed = launchers.multifurcate_workspace(rows, vocab, num_groups, width, num_finished)
    native.launch(
        "multifurcate", logits, logits, RewardHead(hidden, weight, bias, unseen, unseen_reward),
        Groups(groups.contiguous(), num_groups, width, contiguous(widths)), limits(top_p, banned, rows),
        Inherited(scores, native.of_each_row(end_tokens, rows)), finished,
        beam, counts, all_unseen, scratch(needed, logits),
    )  # fmt: skip
    faults.raise_if_eager(logits)
    return *beam, counts, all_unseen
