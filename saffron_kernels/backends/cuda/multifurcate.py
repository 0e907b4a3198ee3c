"""A search step, and its parts: the rewards of candidates, the best of every group."""

from __future__ import annotations

import torch
from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.cuda import native
from saffron_kernels.backends.cuda.counters import counters
from saffron_kernels.backends.cuda.native import CODE, view
from saffron_kernels.backends.cuda.nucleus import limits
from saffron_kernels.checks import expect


def multifurcation_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    unseen: Tensor | None,
    unseen_reward: float,
    tokens: Tensor,
    offsets: Tensor,
) -> Tensor:
    (rows, size), vocab, candidates = hidden.shape, weight.shape[0], tokens.shape[0]
    faults.check_index("tokens", tokens, vocab)
    faults.check_ascending("offsets", offsets, 0, candidates)
    rewards = torch.empty(candidates, dtype=torch.float32, device=hidden.device)
    tokens, offsets = tokens.contiguous(), offsets.contiguous()
    with torch.cuda.device_of(hidden):
        native.module(hidden).multifurcation_head(
            *map(view, (hidden, weight, bias)), _code(bias), view(unseen), unseen_reward,
            *map(view, (tokens, offsets, rewards)), rows, vocab, size, candidates, CODE[hidden.dtype],
            view(faults.word(hidden.device)), native.stream(hidden),
        )  # fmt: skip
    return rewards


def select_beam(
    rewards: Tensor,
    tokens: Tensor,
    offsets: Tensor,
    groups: Tensor,
    num_groups: int,
    width: int,
    widths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, candidates, device = groups.shape[0], rewards.shape[0], rewards.device
    launchers = native.module(rewards)
    _check_sizes(rewards, "groups", rows, num_groups, width)
    faults.check_rewards(rewards, offsets, groups, num_groups)
    faults.check_ascending("groups", groups)
    faults.check_index("widths", widths, width + 1, lowest=1)
    tokens, offsets, groups = tokens.contiguous(), offsets.contiguous(), groups.contiguous()
    widths = _contiguous(widths)
    beam = _beam(num_groups * width, rewards.dtype, device)
    with torch.cuda.device_of(rewards):
        needed = launchers.select_beam_workspace(candidates, num_groups, width)
        workspace = torch.empty(needed, dtype=torch.uint8, device=device)
        launchers.select_beam(
            *map(view, (rewards, tokens, offsets, groups, widths, *beam, workspace, counters(rewards))),
            rows, candidates, num_groups, width, CODE[rewards.dtype], view(faults.word(device)), native.stream(rewards),
        )  # fmt: skip
    return beam


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
    carried_scores: Tensor | None,
    carried_groups: Tensor | None,
    widths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op, in two launches. Its workspace is 16 bytes per logit.

    A row of bad logits stays recorded until `raise_faults` on a GPU; its nucleus size is 0, which no other row of a
    group has.
    """
    (rows, vocab), device = logits.shape, logits.device
    launchers = native.module(logits)
    _check_sizes(logits, "logits", rows, num_groups, width)
    expect(vocab <= launchers.MAX_VOCAB, "logits", f"a vocabulary of {vocab}", f"at most {launchers.MAX_VOCAB}")
    expect(rows * vocab < 1 << 31, "logits", f"{rows} rows of {vocab}", f"less than {1 << 31} numbers")
    faults.check_index("groups", groups, num_groups + 1)
    faults.check_ascending("groups", groups)
    faults.check_index("carried_groups", carried_groups, num_groups + 1)
    faults.check_index("widths", widths, width + 1, lowest=1)
    faults.check_parameters(vocab, top_p, banned, groups, num_groups)
    groups, widths, carried_groups = groups.contiguous(), _contiguous(widths), _contiguous(carried_groups)
    end_tokens = native.of_each_row(end_tokens, rows)
    beam = _beam(num_groups * width, torch.float32, device)
    counts = torch.empty(rows, dtype=torch.int32, device=device)
    all_unseen = torch.empty(num_groups, dtype=torch.bool, device=device)
    carried = 0 if carried_scores is None else carried_scores.shape[0]
    with torch.cuda.device_of(logits):
        needed = launchers.multifurcate_workspace(rows, vocab, num_groups, width, carried)
        workspace = torch.empty(needed, dtype=torch.uint8, device=device)
        launchers.multifurcate(
            view(logits), CODE[logits.dtype], view(hidden), view(weight), CODE[hidden.dtype], view(bias), _code(bias),
            view(unseen), unseen_reward, view(groups), view(widths), limits(top_p, banned, rows),
            view(scores), _code(scores), view(end_tokens), view(carried_scores), _code(carried_scores),
            *map(view, (carried_groups, *beam, counts, all_unseen, workspace, counters(logits))),
            rows, vocab, hidden.shape[1], num_groups, width, 0 if end_tokens is None else end_tokens.shape[1], carried,
            view(faults.word(device)), native.stream(logits),
        )  # fmt: skip
    faults.settle(logits)
    return *beam, counts, all_unseen


def _beam(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Room for parent, token and reward."""
    parent = torch.empty(size, dtype=torch.int32, device=device)
    return parent, torch.empty_like(parent), torch.empty(size, dtype=dtype, device=device)


def _check_sizes(tensor: Tensor, name: str, rows: int, num_groups: int, width: int) -> None:
    """What the shared memory of a block and the counters have room for, on the device of `tensor`."""
    launchers = native.module(tensor)
    expect(rows <= launchers.MAX_ROWS, name, f"{rows} rows", f"at most {launchers.MAX_ROWS}")
    expect(num_groups <= launchers.MAX_GROUPS, "num_groups", num_groups, f"at most {launchers.MAX_GROUPS}")
    expect(width <= launchers.MAX_WIDTH, "width", width, f"at most {launchers.MAX_WIDTH}")
    with torch.cuda.device_of(tensor):
        fits = launchers.beam_fits(rows, width)
    expect(fits, "width", f"{width} of {rows} rows", "fewer: both have to fit the shared memory of a block of this GPU")


def _code(tensor: Tensor | None) -> int:
    return 0 if tensor is None else CODE[tensor.dtype]


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
