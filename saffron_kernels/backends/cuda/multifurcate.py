"""A search step, and its parts: the rewards of candidates, the best of every group."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.cuda import native
from saffron_kernels.backends.cuda.counters import counters
from saffron_kernels.backends.cuda.native import CODE, view
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
    widths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if widths is not None:
        raise NotImplementedError("widths: not on this backend yet")
    rows, candidates, device = groups.shape[0], rewards.shape[0], rewards.device
    launchers = native.module(rewards)
    _check_sizes(launchers, "groups", rows, num_groups, width)
    faults.check_rewards(rewards, offsets, groups, num_groups)
    faults.check_ascending("groups", groups)
    tokens, offsets, groups = tokens.contiguous(), offsets.contiguous(), groups.contiguous()
    beam = _beam(num_groups * width, rewards.dtype, device)
    with torch.cuda.device_of(rewards):
        needed = launchers.select_beam_workspace(candidates, num_groups, width)
        workspace = torch.empty(needed, dtype=torch.uint8, device=device)
        launchers.select_beam(
            *map(view, (rewards, tokens, offsets, groups, *beam, workspace, counters(rewards))),
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
    widths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op, in two launches. Its workspace is 16 bytes a logit.

    A row of bad logits stays recorded until `raise_faults` on a GPU; its nucleus size is 0, which no other row of a
    group has.
    """
    if widths is not None:
        raise NotImplementedError("widths: not on this backend yet")
    (rows, vocab), device = logits.shape, logits.device
    launchers = native.module(logits)
    _check_sizes(launchers, "logits", rows, num_groups, width)
    expect(vocab <= launchers.MAX_VOCAB, "logits", f"a vocabulary of {vocab}", f"at most {launchers.MAX_VOCAB}")
    expect(rows * vocab < 1 << 31, "logits", f"{rows} rows of {vocab}", f"less than {1 << 31} numbers")
    faults.check_index("groups", groups, num_groups + 1)
    faults.check_ascending("groups", groups)
    faults.check_index("carried_groups", carried_groups, num_groups + 1)
    faults.check_index("banned", banned, vocab)
    groups = groups.contiguous()
    end_tokens, carried_groups = (x if x is None else x.contiguous() for x in (end_tokens, carried_groups))
    beam = _beam(num_groups * width, torch.float32, device)
    counts = torch.empty(rows, dtype=torch.int32, device=device)
    blind = torch.empty(num_groups, dtype=torch.bool, device=device)
    carried = _length(carried_scores)
    with torch.cuda.device_of(logits):
        needed = launchers.multifurcate_workspace(rows, vocab, num_groups, width, carried)
        workspace = torch.empty(needed, dtype=torch.uint8, device=device)
        launchers.multifurcate(
            view(logits), CODE[logits.dtype], view(hidden), view(weight), CODE[hidden.dtype], view(bias), _code(bias),
            view(unseen), unseen_reward, view(groups), top_p, view(banned), view(scores), _code(scores),
            view(end_tokens), view(carried_scores), _code(carried_scores), view(carried_groups),
            *map(view, (*beam, counts, blind, workspace, counters(logits))),
            rows, vocab, hidden.shape[1], num_groups, width, _length(banned), _length(end_tokens), carried,
            view(faults.word(device)), native.stream(logits),
        )  # fmt: skip
    faults.settle(logits)
    return *beam, counts, blind


def _beam(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Room for parent, token and reward."""
    parent = torch.empty(size, dtype=torch.int32, device=device)
    return parent, torch.empty_like(parent), torch.empty(size, dtype=dtype, device=device)


def _check_sizes(launchers: ModuleType, name: str, rows: int, num_groups: int, width: int) -> None:
    """What the shared memory of a block and the counters have room for."""
    expect(rows <= launchers.MAX_ROWS, name, f"{rows} rows", f"at most {launchers.MAX_ROWS}")
    expect(num_groups <= launchers.MAX_GROUPS, "num_groups", num_groups, f"at most {launchers.MAX_GROUPS}")
    expect(width <= launchers.MAX_WIDTH, "width", width, f"at most {launchers.MAX_WIDTH}")


def _code(tensor: Tensor | None) -> int:
    return 0 if tensor is None else CODE[tensor.dtype]


def _length(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.shape[0]
