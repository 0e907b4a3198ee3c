"""Steps of a search: arguments of `multifurcate`, and the check of one call."""

from __future__ import annotations

from typing import Any

import oracle
import torch
from cases import NONSENSE, i32, randn
from torch import Tensor

from saffron_kernels import multifurcate, multifurcation_head, nucleus
from saffron_kernels.checks import compute_dtype


def step(
    groups: list[int], num_groups: int, width: int, vocab: int, dtype, device, seed: int = 1, **more: Any
) -> dict[str, Any]:
    """Arguments of one step; `more` replaces or adds. What belongs to rows of no group is NaN or nonsense."""
    rows, dev = len(groups), device
    arguments: dict[str, Any] = {
        "logits": 2 * randn(seed, rows, vocab, dtype=dtype, device=dev),
        "hidden": randn(seed + 1, rows, 6, dtype=dtype, device=dev),
        "weight": randn(seed + 2, vocab, 6, dtype=dtype, device=dev),
        "bias": None,
        "unseen": None,
        "unseen_reward": -torch.inf,
        "groups": i32(groups, dev),
        "num_groups": num_groups,
        "width": width,
        "top_p": 0.8,
    }
    arguments |= more
    used = sum(group < num_groups for group in groups)
    for name in ("logits", "hidden", "scores", "top_p", "banned", "end_tokens"):
        given = arguments.get(name)
        if isinstance(given, Tensor) and (given.is_floating_point() or given.dim() == 2):
            given[used:] = torch.nan if given.is_floating_point() else NONSENSE
    return arguments


def as_list(tensor: Tensor | None) -> list:
    return [] if tensor is None else tensor.tolist()


def check(arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    """The nucleus and its rewards come from their own ops on the same backend, which their own tests hold to fp64."""
    result = multifurcate(**arguments)
    of_none = int((arguments["groups"] == arguments["num_groups"]).sum())  # the last rows
    rows = arguments["groups"].shape[0]
    used = rows - of_none
    head = [arguments[name] for name in ("weight", "bias", "unseen", "unseen_reward")]
    top_p, banned = arguments["top_p"], arguments.get("banned")
    top_p = top_p[:used] if isinstance(top_p, Tensor) else top_p
    banned = banned[:used] if banned is not None and banned.dim() == 2 else banned
    tokens, _, offsets = nucleus(arguments["logits"][:used], top_p, banned)
    rewards = multifurcation_head(arguments["hidden"][:used], *head, tokens, offsets)
    scores, finished = arguments.get("scores"), arguments.get("finished_scores")
    parent, token, reward, all_unseen = oracle.multifurcate(
        tokens.tolist(),
        rewards.tolist(),
        oracle.rows_of(offsets),
        None if arguments["unseen"] is None else arguments["unseen"].tolist(),
        arguments["groups"].tolist(),
        arguments["num_groups"],
        arguments["width"],
        None if scores is None else scores.to(rewards.dtype).tolist(),
        oracle.ids_of_rows(arguments.get("end_tokens"), rows),
        [] if finished is None else finished.to(rewards.dtype).tolist(),
        as_list(arguments.get("finished_groups")),
        None if arguments.get("widths") is None else arguments["widths"].tolist(),
    )
    dtypes = [torch.int32, torch.int32, compute_dtype(arguments["hidden"].dtype), torch.int32, torch.bool]
    assert [x.dtype for x in result] == dtypes
    assert result[0].tolist() == parent and result[1].tolist() == token
    assert torch.allclose(result[2], torch.tensor(reward, dtype=result[2].dtype, device=result[2].device), 1e-5, 1e-6)
    assert result[3].tolist() == offsets.diff().tolist() + [0] * of_none and result[4].tolist() == all_unseen
    return result
