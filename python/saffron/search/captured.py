"""A step of Saffron search with buffers of fixed size: captured once in a CUDA graph, then replayed.

Nothing in a step waits for the host or depends on what it does: rows, finished nodes and cached tokens have as many
places as there can ever be, and the device says which are used. The host launches step after step, looks once every
few steps at what they recorded, and follows then.

The K and V of the contexts are copied out of the trie into a cache of the step's own, so that its addresses stay. In it
the token at place `i` of the plan has slot `i`; what dies keeps its slot until the search ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saffron.errors import ConfigError, NumericalError
from saffron.models.attention import TrieStep
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.models.trie_model import Rows, TrieModel
from saffron.search.config import SearchConfig
from saffron.search.hand_over import Head, same_tokens
from saffron_kernels import KVTrie, TreeStep, advance_tree, multifurcate
from saffron_kernels.checks import FP8

_ENDED, _CARRIED, _EMPTY = 2, 1, 3  # kinds of chosen nodes; 0: a live child
EVERY = 8  # steps between looks: a search that ends early has run at most so many in vain

Replay = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Record:
    """What one step chose, as `multifurcate` returns it, and how many rows go on."""

    parent: list[int]
    token: list[int]
    reward: list[float]
    counts: list[int]
    blind: list[bool]
    live: int


@dataclass(frozen=True, slots=True)
class _Cache:
    """K and V `[layers, slots, kv_heads, head_dim]` at addresses that stay, with the scales of fp8."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None

    @classmethod
    def like(cls, trie: KVTrie, slots: int) -> _Cache:
        shape = (trie.k.shape[0], slots, *trie.k.shape[2:])
        k, v = (torch.zeros(shape, dtype=trie.k.dtype, device=trie.k.device) for _ in range(2))
        return cls(k, v, trie.k_scale, trie.v_scale)

    def load(self, trie: KVTrie, slot: Tensor) -> None:
        """Copies the rows `slot` of the trie into the first slots."""
        for mine, theirs in ((self.k, trie.k), (self.v, trie.v)):
            for to, rows in zip(_indexable(mine), _indexable(theirs), strict=True):
                to[: len(slot)] = rows[slot]


def capture_on_gpu(body: Replay) -> Replay:
    """Captures `body`, which has run before, in a CUDA graph; returns what replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph.replay


class _Side:
    """One model's part of the step: its cache, its plan, and where its rows stand.

    Args:
        counts: `[1]` int32, places of the plan that are taken.
        write_slots: `[rows]` int32, where the rows' K and V go. positions: `[rows]` int64.
        lengths: `[groups + 1]` int64, tokens of each search's context; 0 for rows of no search.
    """

    def __init__(
        self, model: TrieModel, capacity: int, count: Tensor, write_slots: Tensor, positions: Tensor, lengths: Tensor
    ) -> None:
        self.model, self.capacity = model, capacity
        self.count, self.write_slots, self.positions, self.lengths = count, write_slots, positions, lengths
        self.cache = _Cache.like(model.kv, capacity)
        self.slot, self.begin, self.end = torch.zeros(3, capacity, dtype=torch.int32, device=model.device)

    def load(self, rows: Rows) -> None:
        """Takes over the contexts of a prefill: search `g` is row `g`."""
        token, begin, end, lengths = context_plan(rows)
        held = len(token)
        assert rows.beams is not None
        slot = rows.beams.slot[torch.from_numpy(token).to(self.count.device)]
        self.cache.load(self.model.kv, slot)
        for buffer, values in zip(self.plan(), (np.arange(held, dtype=np.int32), begin, end), strict=True):
            buffer.zero_()
            buffer[:held] = torch.from_numpy(values)
        self.count.fill_(held)
        self.lengths[:-1] = torch.from_numpy(lengths)

    def plan(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.slot, self.begin, self.end

    def output(self, tokens: Tensor, length: int) -> Tensor:
        """The model's output for all rows, used or not; `length` is the longest that a text can get."""
        keep = torch.arange(len(tokens), device=tokens.device)
        plan = TreeStep(self.positions, self.write_slots, *self.plan(), length=length, count=self.count)
        return self.model._output(tokens[None], self.positions[None], TrieStep(self.cache, plan, True), keep)


def context_plan(rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The plan of a prefill's beams, for its rows in the caller's order.

    That order need not be depth first in this trie: a token whose rows are not contiguous stands there several times.

    Returns:
        which token of the beams' plan stands at each place, the interval of rows that sees it, and each row's length.
    """
    assert rows.beams is not None, "nothing is cached without shared prefixes"
    begin, end = (x.cpu().numpy()[:, None] for x in (rows.beams.begin, rows.beams.end))
    seen = (begin <= rows.beam_of_row) & (rows.beam_of_row < end)  # [tokens, rows]
    edges = np.diff(np.pad(seen, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    token, first = np.nonzero(edges == 1)
    _, last = np.nonzero(edges == -1)
    lengths = rows.beams.positions[rows.beam_of_row] + 1
    return token, first.astype(np.int32), last.astype(np.int32), lengths


class StaticStep:
    """The buffers of a forest of searches, and the step that works on them.

    Args:
        policy, mrm, head, end_tokens: of the search; `end_tokens` as a tensor.
        config: its hyperparameters; `ranking="paper"`.
        groups: searches in the forest.
        policy_tokens, mrm_tokens: places for cached tokens: all contexts, and `rows * max_new_tokens` more.
        capture: makes a replay of a step; None: every step is run as it is.
    """

    def __init__(
        self,
        policy: Policy,
        mrm: MultifurcationRewardModel,
        head: Head,
        end_tokens: Tensor,
        config: SearchConfig,
        groups: int,
        policy_tokens: int,
        mrm_tokens: int,
        capture: Callable[[Replay], Replay] | None = capture_on_gpu,
    ) -> None:
        self.head, self.ends, self.config, self.groups = head, end_tokens, config, groups
        self.rows = rows = groups * config.width
        self._capture, self._replays = capture, dict[bool, Replay]()
        device = policy.device

        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        # Of both models together, so that few small kernels do the work of a step.
        self._counts, self._write_slots = zeros(2, 1), zeros(2, rows)
        self._positions, self._lengths = zeros(2, rows, dtype=torch.int64), zeros(2, groups + 1, dtype=torch.int64)
        models = (policy, mrm), (policy_tokens, mrm_tokens)
        mine = zip(*models, self._counts, self._write_slots, self._positions, self._lengths, strict=True)
        self.policy, self.mrm = (_Side(*parts) for parts in mine)
        # Nodes: the rows, as many carried ones, and one that is none. Parent, token, group, score (its bits) of each.
        self._nodes = zeros(4, 2 * rows + 1)
        self._nothing = torch.tensor([[rows], [0], [groups], [0]], dtype=torch.int32, device=device).expand(
            self._nodes.shape
        )
        self._groups, self._scores = self._nodes[2], self._nodes[3].view(torch.float32)
        self._place = torch.arange(rows, dtype=torch.int32, device=device)
        # Live children come before carried nodes, these before children that have ended, and empty places are last.
        self._kind = zeros(2 * rows + 1)
        self._kind[rows:], self._kind[2 * rows :] = _CARRIED, _EMPTY
        self._step = zeros(1, dtype=torch.int64)
        # Parent, token, reward (its bits), nucleus size, largest logit and largest |hidden| (their bits) of every row;
        # blindness of every group.
        self._records = zeros(config.max_new_tokens, 6 * rows + groups)

    def fits(self, groups: int, policy_tokens: int, mrm_tokens: int) -> bool:
        """Whether a forest can use these buffers."""
        room = policy_tokens <= self.policy.capacity and mrm_tokens <= self.mrm.capacity
        return room and groups == self.groups

    def search(self, policy: Rows, mrm: Rows, logits: Tensor, hidden: Tensor, length: int) -> Iterator[Record]:
        """Yields what every step chose, from the outputs `[groups, ...]` of the prefills on.

        Raises:
            NumericalError: an output was not finite. ConfigError: the step cannot be captured.
        """
        self._load(policy, mrm)
        config = self.config
        first = [torch.cat([x, x.new_zeros(self.rows - self.groups, x.shape[1])]) for x in (logits, hidden)]
        self._choose(first[0], first[1], config.min_new_tokens > 0)
        seen, self._live = 0, self.groups
        for step in range(1, config.max_new_tokens + 1):
            if step == config.max_new_tokens or step % EVERY == 0:
                for record in self._look(seen, step):
                    yield record
                    if not record.live:
                        return
                seen = step
            if step < config.max_new_tokens:
                self._run(step, step < config.min_new_tokens, length)

    def _load(self, policy: Rows, mrm: Rows) -> None:
        for side, rows in ((self.policy, policy), (self.mrm, mrm)):
            side.load(rows)
        self._nodes.copy_(self._nothing)
        self._groups[: self.groups] = torch.arange(self.groups, dtype=torch.int32)
        self._step.zero_()

    def _run(self, step: int, banned: bool, length: int) -> None:
        """One whole step: both models read the rows, and the next ones are chosen."""

        def body() -> None:
            tokens = self._nodes[1, : self.rows].long()
            logits, hidden = (side.output(tokens, length) for side in (self.policy, self.mrm))
            self._choose(logits, hidden, banned)

        if self._capture is None:
            body()
        elif banned in self._replays:
            self._replays[banned]()
        elif step == 1 and not self._replays:
            body()  # once as it is: what is made at a first call must not be made within a capture
        else:
            try:
                self._replays[banned] = self._capture(body)
            except RuntimeError as error:
                reason = str(error).strip().split("\n")[0]
                raise ConfigError(f"capture: a step of these models cannot be captured ({reason})") from error
            self._replays[banned]()

    def _choose(self, logits: Tensor, hidden: Tensor, banned: bool) -> None:
        """`multifurcate`, and from its answer the next rows, carried nodes and plans."""
        config, rows, inherits = self.config, self.rows, self.config.eos_score == "parent"
        parent, token, reward, counts, blind = multifurcate(
            logits, hidden, self.head.weight, self.head.bias, self.head.unseen, config.unseen_reward,
            self._groups[:rows], self.groups, config.width, config.top_p,
            banned=self.ends if banned else None,
            scores=self._scores[:rows] if inherits else None,
            end_tokens=self.ends if inherits else None,
            carried_scores=self._scores[rows:-1], carried_groups=self._groups[rows:-1],
        )  # fmt: skip
        # The norm of NaN is NaN, as is the maximum: the host sees in them whether an output was finite.
        finite = logits.amax(1), torch.linalg.vector_norm(hidden, torch.inf, 1)
        record = [parent, token, _bits(reward), counts, *map(_bits, finite), blind.int()]
        self._records.index_copy_(0, self._step, torch.cat(record)[None])

        chosen = torch.stack([parent, token, self._groups.index_select(0, parent), _bits(reward)])
        ended = (token[:, None] == self.ends).any(1)
        kind = torch.add(self._kind.index_select(0, parent), ended, alpha=_ENDED)
        key, order = torch.add(self._place, kind, alpha=rows).sort()  # by kind; among equals as they are
        is_row = key < rows
        place = torch.where(is_row, self._place, self._place + is_row.sum().neg() + rows)
        self._nodes.copy_(self._nothing)
        self._nodes.scatter_(1, place.long().expand(4, -1), chosen[:, order])
        self._advance()

    def _advance(self) -> None:
        """The plans of the new rows; those that are used write their K and V at the end of it."""
        rows = self.rows
        parents, groups = self._nodes[0, :rows], self._groups[:rows]
        new_slots = self._counts + self._place
        plans: list[Tensor] = []
        for side, slots in zip((self.policy, self.mrm), new_slots, strict=True):
            plans += advance_tree(side.slot, side.begin, side.end, parents, slots, rows, count=side.count)
        torch._foreach_copy_([*self.policy.plan(), *self.mrm.plan()], plans)
        self._write_slots.copy_(torch.where(groups < self.groups, new_slots, -1))
        self._counts.add_(rows)
        self._positions.copy_(self._lengths.index_select(1, groups) + self._step)
        self._step.add_(1)

    def _look(self, first: int, last: int) -> Iterator[Record]:
        """What the steps `first .. last` recorded: the one synchronisation."""
        rows, ends = self.rows, set(self.ends.tolist())
        for record in self._records[first:last].cpu():
            parent, token, reward, counts, logit, hidden, blind = record.split([*[rows] * 6, self.groups])
            for model, largest in (("policy", logit), ("mrm", hidden)):
                if not bool(largest[: self._live].view(torch.float32).isfinite().all()):
                    raise NumericalError(f"{model}: its output is not finite (NaN or infinity); the search was stopped")
            chosen = parent.tolist(), token.tolist()
            self._live = sum(p < rows and t not in ends for p, t in zip(*chosen, strict=True))
            rewards = reward.view(torch.float32).tolist()
            yield Record(*chosen, rewards, counts.tolist(), blind.bool().tolist(), self._live)


def why_not_captured(policy: Policy, mrm: MultifurcationRewardModel, config: SearchConfig) -> str | None:
    """Why a search cannot run in captured steps; None if it can."""
    if policy.device.type != "cuda":
        return f"a CUDA graph needs a GPU, and the policy is on {policy.device}"
    if mrm.device != policy.device:
        return f"one graph runs on one device, and the models are on {policy.device} and {mrm.device}"
    if config.ranking != "paper":
        return f'ranking="{config.ranking}" is decided on the host; expected "paper"'
    if not same_tokens(policy, mrm):
        return "policy and MRM have different tokenizers, so every response passes through text on the host"
    if not (policy.share_prefixes and mrm.share_prefixes):
        return "share_prefixes is off: there is no cache whose addresses could stay"
    return None


def _indexable(cache: Tensor) -> Tensor:
    """The same memory in a dtype that PyTorch indexes on every device, which fp8 is not."""
    return cache.view(torch.uint8) if cache.dtype == FP8 else cache


def _bits(values: Tensor) -> Tensor:
    return values.float().view(torch.int32)
