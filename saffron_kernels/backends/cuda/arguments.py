"""Arguments that belong together, as the structs of `csrc/cuda/ops.h`, which says what their tensors hold."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class KVCaches(NamedTuple):
    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None


class Rotary(NamedTuple):
    cos: Tensor | None
    sin: Tensor | None


class TriePlan(NamedTuple):
    slot: Tensor
    begin: Tensor
    end: Tensor
    count: Tensor | None = None  # type: ignore[assignment]  # hides a method of tuples


class BlockTable(NamedTuple):
    blocks: Tensor
    lens: Tensor
    start: Tensor
    block_size: int


class Scoring(NamedTuple):
    scale: float
    softcap: float  # 0: scores are not bounded
    sinks: Tensor | None


class Attended(NamedTuple):
    out: Tensor
    lse: Tensor


class Limits(NamedTuple):
    top_p: float  # of all rows, where `top_ps` is None
    top_ps: Tensor | None
    banned: Tensor | None


class Groups(NamedTuple):
    of_row: Tensor
    number: int
    width: int
    widths: Tensor | None


class Nuclei(NamedTuple):
    tokens: Tensor
    logits: Tensor
    counts: Tensor
    stats: Tensor


class Candidates(NamedTuple):
    tokens: Tensor
    offsets: Tensor


class RewardHead(NamedTuple):
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    unseen: Tensor | None
    unseen_reward: float


class Beam(NamedTuple):
    parent: Tensor
    token: Tensor
    reward: Tensor


class Inherited(NamedTuple):
    scores: Tensor | None
    end_tokens: Tensor | None


class Finished(NamedTuple):
    scores: Tensor | None
    groups: Tensor | None


class Scratch(NamedTuple):
    workspace: Tensor
    counters: Tensor
