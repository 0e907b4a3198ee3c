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

from saffron.attention import TrieStep
from saffron.config import SearchConfig
from saffron.errors import ConfigError, NumericalError
from saffron.hand_over import Head, same_tokens
from saffron.policy import Policy
from saffron.reward_models import MultifurcationRewardModel
from saffron.trie_model import Rows, TrieModel
from saffron_kernels import KVTrie, TreeStep, advance_tree, multifurcate

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
    """K and V `[layers, slots, kv_heads, head_dim]` at addresses that stay."""

    k: Tensor
    v: Tensor

    @classmethod
    def like(cls, trie: KVTrie, slots: int) -> _Cache:
        shape = (trie.k.shape[0], slots, *trie.k.shape[2:])
        return cls(*(torch.zeros(shape, dtype=trie.k.dtype, device=trie.k.device) for _ in range(2)))

    def load(self, trie: KVTrie, slot: Tensor) -> None:
        """Copies the rows `slot` of the trie into the first slots."""
        for mine, theirs in ((self.k, trie.k), (self.v, trie.v)):
            for to, rows in zip(mine, theirs, strict=True):
                to[: len(slot)] = rows[slot]


def capture_on_gpu(body: Replay) -> Replay:
    """Captures `body`, which has run before, in a CUDA graph; returns what replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph.replay


class _Side:
    """One model's part of the step: its cache, its plan, and where its rows stand.

    Attributes:
        lengths: `[groups + 1]` tokens of each search's context; 0 for rows of no search.
    """

    def __init__(self, model: TrieModel, groups: int, rows: int, capacity: int) -> None:
        device = model.device
        self.model, self.capacity = model, capacity
        self.cache = _Cache.like(model.kv, capacity)
        self.slot, self.begin, self.end, self.count, self.write_slots = (
            torch.zeros(size, dtype=torch.int32, device=device) for size in (capacity, capacity, capacity, 1, rows)
        )
        self.lengths = torch.zeros(groups + 1, dtype=torch.int64, device=device)
        self.positions = torch.zeros(rows, dtype=torch.int64, device=device)
        self.place = torch.arange(rows, dtype=torch.int32, device=device)

    def load(self, rows: Rows) -> None:
        """Takes over the contexts of a prefill: search `g` is row `g`."""
        token, begin, end, lengths = context_plan(rows)
        held = len(token)
        assert rows.beams is not None
        slot = rows.beams.slot[torch.from_numpy(token).to(self.slot.device)]
        self.cache.load(self.model.kv, slot)
        for buffer, values in ((self.begin, begin), (self.end, end)):
            buffer.zero_()
            buffer[:held] = torch.from_numpy(values)
        self.slot.fill_(-1)
        self.slot[:held] = torch.arange(held, dtype=torch.int32)
        self.count.fill_(held)
        self.lengths[:-1] = torch.from_numpy(lengths)

    def advance(self, parents: Tensor, groups: Tensor, used: Tensor, step: Tensor) -> None:
        """The plan of the new rows; those that are used write their K and V at its end."""
        queries = len(self.place)
        new_slots = self.count + self.place
        plan = advance_tree(self.slot, self.begin, self.end, parents, new_slots, queries, count=self.count)
        for buffer, values in zip((self.slot, self.begin, self.end), plan, strict=True):
            buffer.copy_(values)
        self.write_slots.copy_(torch.where(used, new_slots, -1))
        self.count.add_(queries)
        self.positions.copy_(self.lengths[groups] + step)

    def output(self, tokens: Tensor, length: int) -> Tensor:
        """The model's output for all rows, used or not; `length` is the longest that a text can get."""
        plan = TreeStep(self.positions, self.write_slots, self.slot, self.begin, self.end, length, self.count)
        return self.model._output(tokens[None], self.positions[None], TrieStep(self.cache, plan, True), self.place)


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
        self.rows = groups * config.width
        self.policy = _Side(policy, groups, self.rows, policy_tokens)
        self.mrm = _Side(mrm, groups, self.rows, mrm_tokens)
        self._capture, self._replays = capture, dict[bool, Replay]()
        device = policy.device
        self._tokens = torch.zeros(self.rows, dtype=torch.int64, device=device)
        self._row_groups, self._carried_groups = (
            torch.zeros(self.rows, dtype=torch.int32, device=device) for _ in range(2)
        )
        self._scores, self._carried_scores = (torch.zeros(self.rows, device=device) for _ in range(2))
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        # Parent, token, reward (its bits), nucleus size of every row; blindness of every group; live rows; bad outputs.
        self._records = torch.zeros(config.max_new_tokens, 4 * self.rows + groups + 2, dtype=torch.int32, device=device)

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
        seen = 0
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
        self._row_groups.fill_(self.groups)
        self._row_groups[: self.groups] = torch.arange(self.groups, dtype=torch.int32)
        self._scores.zero_()
        self._carried_groups.fill_(self.groups)
        self._step.zero_()

    def _run(self, step: int, banned: bool, length: int) -> None:
        """One whole step: both models read the rows, and the next ones are chosen."""

        def body() -> None:
            logits, hidden = (side.output(self._tokens, length) for side in (self.policy, self.mrm))
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
        config, inherits = self.config, self.config.eos_score == "parent"
        parent, token, reward, counts, blind = multifurcate(
            logits, hidden, self.head.weight, self.head.bias, self.head.unseen, config.unseen_reward,
            self._row_groups, self.groups, config.width, config.top_p,
            banned=self.ends if banned else None,
            scores=self._scores if inherits else None,
            end_tokens=self.ends if inherits else None,
            carried_scores=self._carried_scores, carried_groups=self._carried_groups,
        )  # fmt: skip
        used = self._row_groups < self.groups
        bad = _any_bad(logits.amax(1, keepdim=True), used) + 2 * _any_bad(hidden, used)
        rows = self.rows
        child, ends = parent < rows, (token[:, None] == self.ends).any(1)
        live, done, kept = child & ~ends, child & ends, (parent >= rows) & (parent < 2 * rows)
        group = torch.cat([self._row_groups, self._carried_groups, self._row_groups.new_full((1,), self.groups)])[
            parent
        ]

        to = _places(live, rows)
        parents = _spread(parent, to, rows)
        self._tokens.copy_(_spread(token, to, 0))
        self._row_groups.copy_(_spread(group, to, self.groups))
        self._scores.copy_(_spread(reward, to, 0))
        # Between equal scores the earlier node wins: those that were there come first.
        to = torch.where(kept, _places(kept, rows), _places(done, rows, kept.sum()))
        self._carried_groups.copy_(_spread(group, to, self.groups))
        self._carried_scores.copy_(_spread(reward, to, -torch.inf))

        going = self._row_groups < self.groups
        for side in (self.policy, self.mrm):
            side.advance(parents, self._row_groups, going, self._step)
        bits = reward.float().view(torch.int32)
        record = torch.cat([parent, token, bits, counts, blind.int(), live.sum().int()[None], bad[None]])
        self._records.index_copy_(0, self._step, record[None])
        self._step.add_(1)

    def _look(self, first: int, last: int) -> Iterator[Record]:
        """What the steps `first .. last` recorded: the one synchronisation."""
        rows = self.rows
        for record in self._records[first:last].cpu():
            parent, token, bits, counts, blind, (live, bad) = record.split([*[rows] * 4, self.groups, 2])
            if int(bad):
                model = "policy" if int(bad) & 1 else "mrm"
                raise NumericalError(f"{model}: its output is not finite (NaN or infinity); the search was stopped")
            rewards = bits.view(torch.float32).tolist()
            yield Record(parent.tolist(), token.tolist(), rewards, counts.tolist(), blind.bool().tolist(), int(live))


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


def _any_bad(output: Tensor, used: Tensor) -> Tensor:
    """1 where a row that is used has an output that is not finite, else 0."""
    return (~output.isfinite().all(1) & used).any().int()


def _places(chosen: Tensor, rows: int, before: Tensor | int = 0) -> Tensor:
    """Where each chosen entry goes when they close up, `before` places being taken; `rows` for the others."""
    return torch.where(chosen, chosen.cumsum(0) - 1 + before, rows)


def _spread(values: Tensor, to: Tensor, empty: float) -> Tensor:
    """`values[i]` at place `to[i]`; `empty` where nothing went. What goes one past the end is dropped."""
    return values.new_full((len(values) + 1,), empty).scatter_(0, to, values)[:-1]
