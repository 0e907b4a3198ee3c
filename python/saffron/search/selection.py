"""A step's candidates and their order where those are not the published ones (`SearchConfig.is_published`).

The published order is one fused op, `multifurcate`. Here its parts are joined by PyTorch instead: the candidates of
`nucleus`, their rewards from `multifurcation_head`, and a key of each in fp64. So every backend serves it, with the
same order of the same rewards. All parameters are tensors with one value per search.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saffron.models.vocabulary import Head
from saffron.search.config import SearchConfig
from saffron_kernels import multifurcation_head, nucleus
from saffron_kernels.checks import compute_dtype


class Rules(NamedTuple):
    """Parameters of `SearchConfig`, fp64: `[groups]` of each search, or `[rows]` of the search of each row."""

    top_p: Tensor
    temperature: Tensor
    min_p: Tensor
    most: Tensor  # candidates per beam
    cap: Tensor
    tolerance: Tensor  # 0: none
    of_path: Tensor  # weights of log-probabilities: of the response, per token
    of_token: Tensor
    asks_policy: Tensor  # 0 or 1, as are the next two
    is_mean: Tensor
    is_minimum: Tensor
    share: Tensor  # of the last token's reward, where it is neither

    @classmethod
    def of(cls, configs: Sequence[SearchConfig], device: torch.device | None = None) -> Rules:
        return cls(*torch.tensor([_values(c) for c in configs], dtype=torch.float64, device=device).unbind(1))

    def at(self, index: Tensor) -> Rules:
        """The values that an index names."""
        return Rules(*(parameter[index] for parameter in self))


def _values(config: SearchConfig) -> tuple[float, ...]:
    path, weight = config.path_score, config.policy_weight
    return (
        config.top_p, config.temperature, config.min_p, config.top_k or torch.inf,
        torch.inf if config.reward_cap is None else config.reward_cap, config.reward_tolerance,
        weight * (config.policy_score == "path"), weight * (config.policy_score == "token"),
        config.asks_policy, path == "mean", path == "minimum", 1 - config.discount * (path == "discounted"),
    )  # fmt: skip


class Beams(NamedTuple):
    """Live beams, a row of the models each.

    Attributes:
        groups: `[rows]`, the search of each; the number of searches for rows of none.
        lengths: `[rows]`, tokens of the response.
        rewards, log_probabilities: `[rows]` fp64, as `Node` has them.
    """

    groups: Tensor
    lengths: Tensor
    rewards: Tensor
    log_probabilities: Tensor


class Finished(NamedTuple):
    """Finished nodes that compete: `groups` `[finished]` as of `Beams`; both parts of `Node.rank`, fp64."""

    groups: Tensor
    scores: Tensor
    mean_log_probabilities: Tensor


class Candidates(NamedTuple):
    """Children that a step may choose, row after row, the most probable first.

    Attributes:
        tokens: `[candidates]` int32. rows: `[candidates]`, their parents. probabilities: `[candidates]`.
        offsets: `[rows + 1]` int32, where each row begins.
        counts: `[rows]` int32, how many candidates each row has: its first ones. Those behind are unused places.
        used: `[candidates]` bool, which are no such places; None: all are candidates.
    """

    tokens: Tensor
    rows: Tensor
    probabilities: Tensor
    offsets: Tensor
    counts: Tensor
    used: Tensor | None = None

    def rewards(self, hidden: Tensor, head: Head, unseen_reward: float) -> Tensor:
        """`[candidates]`, by the MRM; `hidden` are its outputs for the rows."""
        return multifurcation_head(
            hidden, head.weight, head.bias, head.unseen, unseen_reward, self.tokens, self.offsets
        )


class Selection(NamedTuple):
    """The chosen, `[searches * width]` each, by parent; siblings in the order of choice.

    Attributes:
        parent, token: as of `multifurcate`.
        score, reward, log_probability, mean_log_probability: fp64, as `Node` has them.
        all_unseen: `[searches]` bool, whether the MRM knew no candidate.
    """

    parent: Tensor
    token: Tensor
    score: Tensor
    reward: Tensor
    log_probability: Tensor
    mean_log_probability: Tensor
    all_unseen: Tensor


def propose(logits: Tensor, rules: Rules, banned: Tensor | None) -> Candidates:
    """The candidates of every row.

    Args:
        logits: `[rows, vocab]` of the policy. rules: of the rows. banned: as for `nucleus`.
    """
    tokens, probabilities, offsets = nucleus(_tempered(logits, rules), rules.top_p, banned)
    first = offsets[:-1].long()
    rows = torch.arange(len(first), device=first.device)
    rows = rows.repeat_interleave(offsets.diff().long(), output_size=len(tokens))
    place = torch.arange(len(tokens), device=first.device) - first[rows]
    keep = _stays(probabilities, probabilities[first[rows]], place, rules.at(rows))
    tokens, rows, probabilities = tokens[keep], rows[keep], probabilities[keep]
    counts = torch.bincount(rows, minlength=len(first))
    offsets = torch.cat([offsets[:1], counts.cumsum(0)]).int()
    return Candidates(tokens, rows, probabilities, offsets, counts.int())


def propose_fixed(logits: Tensor, rules: Rules, banned: Tensor, most: int) -> Candidates:
    """`propose` with `most` places per row, so that a CUDA graph can hold it; no row has more candidates (`top_k`).

    Args:
        banned: `[rows, banned]` int32; -1 pads.
    """
    scaled, vocab = _tempered(logits, rules), logits.shape[1]
    mask = torch.zeros(len(logits), vocab + 1, dtype=torch.bool, device=logits.device)  # padding bans an unused token
    mask = mask.scatter(1, torch.where(banned < 0, vocab, banned).long(), True)[:, :vocab]
    scaled = scaled.masked_fill(mask, -torch.inf)
    # The whole row is sorted: of equal logits the lower token id comes first, which topk does not promise.
    tokens = scaled.argsort(dim=1, descending=True, stable=True)[:, :most]
    probabilities = scaled.softmax(1).gather(1, tokens)
    mass = probabilities.double()
    place = torch.arange(tokens.shape[1], device=logits.device)
    of_row = Rules(*(parameter[:, None] for parameter in rules))
    used = _stays(probabilities, probabilities[:, :1], place, of_row) & (probabilities > 0)
    used &= mass.cumsum(1) - mass < of_row.top_p
    rows, offsets = (torch.arange(n, device=logits.device, dtype=torch.int32) for n in (len(logits), len(logits) + 1))
    return Candidates(
        tokens.flatten().int(), rows.long().repeat_interleave(tokens.shape[1], output_size=tokens.numel()),
        probabilities.flatten(), offsets * tokens.shape[1], used.sum(1).int(), used.flatten(),
    )  # fmt: skip


def _tempered(logits: Tensor, rules: Rules) -> Tensor:
    dtype = compute_dtype(logits.dtype)
    return logits.to(dtype) / rules.temperature.to(dtype)[:, None]


def _stays(probability: Tensor, largest: Tensor, place: Tensor, rules: Rules) -> Tensor:
    """Which of the nucleus are candidates: a row's first ones."""
    return (place < rules.most) & (probability.double() >= rules.min_p * largest.double())


def select(
    candidates: Candidates,
    rewards: Tensor,
    beams: Beams,
    finished: Finished,
    rules: Rules,
    widths: Tensor,
    width: int,
    *,
    unseen: Tensor | None,
    end_tokens: Tensor | None,
) -> Selection:
    """The best `widths[group]` of every search.

    Args:
        rewards: `[candidates]`, not NaN. rules: of the searches.
        widths: `[searches]`, each at most `width`.
        unseen: `[vocab]` bool, tokens that the MRM was never trained on.
        end_tokens: `[rows, end]` int32; children that end by these, and all children of searches of which the MRM
            knows no candidate, inherit the reward of their parent. None: none do.
    """
    tokens, rows = candidates.tokens, candidates.rows
    groups = beams.groups.long()[rows]
    if candidates.used is not None:
        groups = torch.where(candidates.used, groups, len(widths))
    ends = torch.zeros_like(tokens, dtype=torch.bool)
    if end_tokens is not None:
        ends = (tokens[:, None] == end_tokens[rows]).any(1)
    unknown = torch.zeros_like(ends) if unseen is None else unseen[tokens.long()]
    seen = torch.zeros(2, len(widths) + 1, dtype=torch.int32, device=tokens.device)
    seen = seen.index_add(1, groups, torch.stack([unknown & ~ends, ~unknown & ~ends]).int())
    all_unseen = (seen[0] > 0) & (seen[1] == 0)

    rules = Rules(*(torch.cat([parameter, parameter.new_ones(1)]) for parameter in rules)).at(groups)
    of_parent, rewards = beams.rewards[rows], rewards.double()
    if end_tokens is not None:
        rewards = torch.where(ends | all_unseen[groups], of_parent, rewards)
    length = beams.lengths[rows].double() + 1
    reward = _of_path(of_parent, torch.minimum(rewards, rules.cap), length, rules)
    of_token = candidates.probabilities.double().log() * rules.asks_policy
    log_probability = beams.log_probabilities[rows] + of_token
    mean = log_probability / length
    steps = torch.where(rules.tolerance > 0, rules.tolerance, 1)
    binned = torch.where(rules.tolerance > 0, (reward / steps).floor() * steps, reward)
    score = binned + rules.of_path * mean + rules.of_token * of_token

    # Finished nodes are further rows with one candidate each.
    ended = torch.arange(len(finished.scores), device=tokens.device) + len(beams.groups)
    minus = tokens.new_full(ended.shape, -1)
    parent = torch.cat([rows, ended])
    index, chosen = best(
        torch.cat([groups, finished.groups.long()]), torch.cat([score, finished.scores]),
        torch.cat([mean, finished.mean_log_probabilities]), parent, widths, width,
    )  # fmt: skip
    nothing = len(beams.groups) + len(ended)

    def at(values: Tensor, of_finished: Tensor, empty: float) -> Tensor:
        return torch.where(chosen, torch.cat([values, of_finished])[index], empty)

    zero = finished.scores.new_zeros(())
    return Selection(
        torch.where(chosen, parent[index], nothing).int(), at(tokens, minus, -1),
        at(score, finished.scores, -torch.inf), at(reward, finished.scores, -torch.inf),
        at(log_probability, zero.expand(len(ended)), 0), at(mean, finished.mean_log_probabilities, 0),
        all_unseen[:-1],
    )  # fmt: skip


def _of_path(of_parent: Tensor, reward: Tensor, length: Tensor, rules: Rules) -> Tensor:
    """The reward of a response from its parent's and its last token's."""
    share = torch.where(rules.is_mean > 0, 1 / length, rules.share)
    alone = (length == 1) | (rules.is_mean + rules.is_minimum == 0) & (share == 1)
    # In this form two rewards at the cap join to the cap.
    joined = torch.where(
        rules.is_minimum > 0, torch.minimum(of_parent, reward), of_parent + share * (reward - of_parent)
    )
    return torch.where(alone, reward, joined)


def best(
    groups: Tensor, score: Tensor, tie: Tensor, parent: Tensor, widths: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """The first `widths[group]` of each group: greater scores first, of equals greater ties, then in their order.

    Returns:
        index `[groups * width]` of the chosen, ordered by parent, siblings in the order of choice; and which places are
        used. Unused ones are the last.
    """
    order = tie.argsort(descending=True, stable=True)  # stable sorts, the last key first
    order = order[score[order].argsort(descending=True, stable=True)]
    order = order[groups[order].argsort(stable=True)]
    bounds = torch.searchsorted(groups[order], torch.arange(len(widths) + 1, device=groups.device))
    place = torch.arange(width, device=groups.device)
    at = bounds[:-1, None] + place
    chosen = ((place < widths[:, None]) & (at < bounds[1:, None])).flatten()
    index = order[at.flatten().clamp(max=len(order) - 1)]
    by_parent = torch.where(chosen, parent[index], 1 << 62).argsort(stable=True)
    return index[by_parent], chosen[by_parent]
