"""Buffers of fixed size for a forest of searches, and a step on them that a CUDA graph can hold.

Nothing in a step waits for the host or depends on what it does: rows, finished nodes and cached tokens have as many
places as there can ever be, and the device says which are used. The host launches a few steps, looks at what they
recorded, and follows then. Searches join and leave between looks: what is live is then laid out again.

The K and V of prompts are copied out of the trie into caches of the step's own, so that their addresses stay. A row of
a search that joins is the last token of its prompt; so all steps are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from saffron.errors import ConfigError, reason
from saffron.models.attention import TrieStep
from saffron.models.cuda_graph import Replay, run_before_capture, side_stream
from saffron.models.trie_model import Index, TrieModel
from saffron.search.config import SearchConfig
from saffron.search.handle import Handle
from saffron.search.model_pair import ModelPair
from saffron.search.readers import Row
from saffron.search.selection import Beams, Finished, Rules, Selection, propose_fixed, select
from saffron.search.tree import Node
from saffron_kernels import KVTrie, TreeStep, advance_tree, multifurcate
from saffron_kernels.checks import FP8

_FINISHED, _ENDED, _EMPTY = 1, 2, 3  # kinds of chosen nodes; 0: a live child
EVERY = 8  # steps between looks
MAX_END_TOKENS = 8  # ids that end a response, of one search
MAX_TOP_K = 1024  # candidates per beam, where they are not selected by `multifurcate`
_NEVER = 1 << 30  # steps


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens to be laid out: which slots of whose caches, and the interval of new rows that sees each."""

    caches: KVTrie
    slot: Index
    begin: Index
    end: Index


def intervals(begin: Index, end: Index, query: Index, own: Index) -> tuple[Index, Index, Index]:
    """A plan for rows in another order: row `r` is old query `query[r]`, and does not see token `own[r]` any more.

    That order need not be depth first: a token whose rows are not contiguous stands there several times.

    Returns:
        which token of the old plan stands at each place, and the interval of rows that sees it.
    """
    seen = (begin[:, None] <= query) & (query < end[:, None])  # [tokens, rows]
    seen[own, np.arange(len(query))] = False
    edges = np.diff(np.pad(seen, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    token, first = np.nonzero(edges == 1)
    _, last = np.nonzero(edges == -1)
    return token.astype(np.int32), first.astype(np.int32), last.astype(np.int32)


class _Side:
    """One model's part of the step: its cache, its plan, and where its rows stand.

    Args:
        counts: `[1]` int32, places of the plan that are taken.
        write_slots: `[rows]` int32, where the rows' K and V go. positions: `[rows]` int64.
        lengths: `[groups + 1]` int64, tokens of each search's prompt before its last one; 0 for rows of no search.
    """

    def __init__(
        self, model: TrieModel, capacity: int, count: Tensor, write_slots: Tensor, positions: Tensor, lengths: Tensor
    ) -> None:
        self.model, self.capacity = model, capacity
        self.count, self.write_slots, self.positions, self.lengths = count, write_slots, positions, lengths
        self.cache = model.scratch(capacity)
        self.slot, self.begin, self.end = torch.zeros(3, capacity, dtype=torch.int32, device=model.device)

    def plan(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.slot, self.begin, self.end

    def kept(self, rows: Index) -> Part:
        """What rows that go on see, but for their own tokens, which have not been run."""
        count = int(self.count)
        slot, begin, end = (x[:count].cpu().numpy() for x in self.plan())
        write = self.write_slots.cpu().numpy()[rows]
        place = np.empty(self.capacity, dtype=np.int32)
        place[slot] = np.arange(count, dtype=np.int32)
        token, first, last = intervals(begin, end, rows, place[write])
        return Part(self.cache, slot[token], first, last)

    def load(self, parts: Sequence[Part], lengths: list[int]) -> None:
        """Lays the parts out one after the other: the token at place `i` has slot `i`."""
        gathered = []
        for part in parts:
            slots = torch.from_numpy(part.slot).long().to(self.slot.device)
            gathered.append([_indexable(x)[:, slots] for x in (part.caches.k, part.caches.v)])
        at = 0
        for k, v in gathered:
            for mine, rows in ((self.cache.k, k), (self.cache.v, v)):
                _indexable(mine)[:, at : at + rows.shape[1]] = rows
            at += k.shape[1]
        plan = (np.arange(at), np.concatenate([p.begin for p in parts]), np.concatenate([p.end for p in parts]))
        for buffer, values in zip(self.plan(), plan, strict=True):
            buffer.zero_()
            buffer[:at] = torch.from_numpy(values.astype(np.int32))
        self.count.fill_(at)
        self.lengths.zero_()
        self.lengths[: len(lengths)] = torch.tensor(lengths)

    def step(self, length: int) -> TrieStep:
        """A forward pass over all rows, used or not; `length` is the longest that a text can get."""
        plan = TreeStep(self.positions, self.write_slots, *self.plan(), length=length, count=self.count)
        return TrieStep(self.cache, plan, True)


class StaticForest:
    """The buffers of a forest of searches, and the step that works on them.

    Args:
        models: policy and MRM.
        config: what is the same for all searches: `eos_score`, `unseen_reward`, `lm_head_bias`, `is_published`; and the
            largest `width` and `top_k`.
        groups: places for searches.
        tokens: places for cached tokens of policy and MRM.
        capture: makes a replay of a step; None: every step is run as it is.
    """

    def __init__(
        self, models: ModelPair, config: SearchConfig, groups: int, tokens: tuple[int, int],
        capture: Callable[[Replay], Replay] | None,
    ) -> None:  # fmt: skip
        self._models = models
        self.config, self.groups, self.head = config, groups, models.head(config.lm_head_bias)
        self.rows = rows = groups * config.width
        self._capture, self._warm = capture, False
        self._replay: Replay | None = None
        device = models.policy.device
        self._side = side_stream(device)

        def zeros(*size: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        # Of both models together, so that few small kernels do the work of a step.
        self._counts, self._write_slots, self._tokens = zeros(2, 1), zeros(2, rows), zeros(2, rows)
        self._positions, self._lengths = zeros(2, rows, dtype=torch.int64), zeros(2, groups + 1, dtype=torch.int64)
        both = (models.policy, models.mrm), tokens, self._counts, self._write_slots, self._positions, self._lengths
        self.policy, self.mrm = (_Side(*parts) for parts in zip(*both, strict=True))
        # Nodes: the rows, as many finished ones, and one that is none. Parent, token, group, score (its bits) of each.
        self._nodes = zeros(4, 2 * rows + 1)
        self._nothing = torch.tensor([[rows], [0], [groups], [0]], dtype=torch.int32, device=device).expand(
            self._nodes.shape
        )
        self._groups, self._scores = self._nodes[2], self._nodes[3].view(torch.float32)
        self._place = torch.arange(rows, dtype=torch.int32, device=device)
        # Live children come before finished nodes, these before children that have ended, and empty places are last.
        self._kind = zeros(2 * rows + 1)
        self._kind[rows:], self._kind[2 * rows :] = _FINISHED, _EMPTY
        # Per search: response tokens of its rows, least and most of them; nucleus mass, width, end tokens (-1 pads).
        self._depth, self._least, self._most = zeros(3, groups + 1, dtype=torch.int64)
        self._top_p, self._widths = zeros(groups + 1, dtype=torch.float64), zeros(groups)
        self._commit = torch.full((groups,), _NEVER, dtype=torch.int64, device=device)  # steps between commitments
        self._ends = zeros(groups + 1, MAX_END_TOKENS)
        # Group, parent, token, reward (its bits), nucleus size, largest logit and largest |hidden| (their bits) of each
        # row; for each search whether the MRM knew no candidate.
        self._step = zeros(1, dtype=torch.int64)
        self._records = zeros(EVERY, 7 * rows + groups)
        # Where the order is not the published one: score, reward, log-probability (these follow in the records) and its
        # mean per token of each node; parameters of each search.
        self._values: Tensor | None = None
        if not config.is_published:
            self._values = zeros(4, 2 * rows + 1, dtype=torch.float64)
            self._rules = zeros(len(Rules._fields), groups + 1, dtype=torch.float64)
            self._records = zeros(EVERY, 13 * rows + groups)

    def lay_out(
        self, rows: list[Row], finished: list[Row], searches: list[Handle], parts: Sequence[list[Part]]
    ) -> None:
        """Makes these the rows and finished nodes; search `i` is group `i`.

        Args:
            parts: for each model what the rows see, but for their own tokens.
        """
        number = {search: i for i, search in enumerate(searches)}
        for side, mine, tokens in zip(
            (self.policy, self.mrm), parts, zip(*((s.request.policy, s.request.reward) for s in searches), strict=True),
            strict=True,
        ):  # fmt: skip
            side.load(mine, [len(t) - 1 for t in tokens])
        self._nodes.copy_(self._nothing)
        # A root stands for the last token of the prompt, which is another one for each model.
        values = [
            [*range(len(rows))],
            [node.token if node.parent else search.request.policy[-1] for search, node in rows],
            [number[search] for search, _ in rows],
        ]
        scores = torch.tensor([node.score for _, node in rows])
        self._nodes[:3, : len(rows)] = torch.tensor(values, dtype=torch.int32).reshape(3, -1)
        self._scores[: len(rows)] = scores
        at = slice(self.rows, self.rows + len(finished))
        self._groups[at] = torch.tensor([number[search] for search, _ in finished], dtype=torch.int32)
        self._scores[at] = torch.tensor([node.score for _, node in finished])
        self._ends.fill_(-1)
        self._commit.fill_(_NEVER)
        if self._values is not None:
            self._lay_out_values([node for _, node in rows], [node for _, node in finished], searches)
        for i, search in enumerate(searches):
            config = search.config
            self._commit[i] = config.commit_every or _NEVER
            self._depth[i] = len(search.tree.steps)
            self._least[i], self._most[i], self._top_p[i] = config.min_new_tokens, config.max_new_tokens, config.top_p
            self._ends[i, : len(search.eos_token_id)] = torch.tensor(sorted(search.eos_token_id), dtype=torch.int32)
        self._top_p[len(searches) :] = 1.0
        self._widths.fill_(1)
        self._advance()
        for i, (search, node) in enumerate(rows):
            if node.parent is None:
                self._tokens[1, i] = search.request.reward[-1]

    def _lay_out_values(self, rows: list[Node], finished: list[Node], searches: list[Handle]) -> None:
        assert self._values is not None
        self._values.zero_()
        for at, nodes in ((0, rows), (self.rows, finished)):
            values = [(*node.rank, node.reward, node.log_probability) for node in nodes]
            columns = torch.tensor(values, dtype=torch.float64).reshape(-1, 4).T[[0, 2, 3, 1]]
            self._values[:, at : at + len(nodes)] = columns
        self._rules[:] = torch.stack(Rules.of([self.config]))
        self._rules[:, : len(searches)] = torch.stack(Rules.of([search.config for search in searches]))

    def run(self, steps: int, widths: list[int], length: int) -> Tensor:
        """Runs some steps and returns what they recorded, on the host: the one synchronisation.

        Args:
            widths: of each search. length: the longest that a text can get.
        """
        self._widths[: len(widths)] = torch.tensor(widths, dtype=torch.int32)
        self._step.zero_()

        def body() -> None:
            tokens, steps = self._tokens.long(), (self.policy.step(length), self.mrm.step(length))
            self._choose(*self._models.outputs(tokens, *steps, self._side))

        for _ in range(steps):
            if self._replay is not None:
                self._replay()
            elif self._capture is None or not self._warm:
                run_before_capture(body, self._tokens.device)
                self._warm = True
            else:
                try:
                    self._replay = replay = self._capture(body)
                except RuntimeError as error:
                    why = f"a step of these models cannot be captured ({reason(error)})"
                    raise ConfigError(f"capture: {why}") from error
                replay()
        return self._records[:steps].cpu()

    def _choose(self, logits: Tensor, hidden: Tensor) -> None:
        """Selects, and makes the next rows, finished nodes and plans of what was chosen."""
        rows, groups = self.rows, self._groups[: self.rows]
        ends = self._ends.index_select(0, groups)
        early = (self._depth < self._least).index_select(0, groups)
        banned = torch.where(early[:, None], ends, -1)
        widths = torch.where((self._depth[:-1] + 1) % self._commit == 0, 1, self._widths)
        # The norm of NaN is NaN, as is the maximum: the host sees in them whether an output was finite.
        largest, norm = logits.amax(1), torch.linalg.vector_norm(hidden, torch.inf, 1)
        values = None
        if self._values is None:
            parent, token, reward, counts, all_unseen = self._published(logits, hidden, ends, banned, widths)
        else:
            selection, counts, bad = self._ordered(logits, hidden, ends, banned, widths)
            parent, token, reward, all_unseen = selection.parent, selection.token, selection.score, selection.all_unseen
            values = torch.stack(selection[2:6])
            norm = norm.masked_fill(bad, torch.nan)
        record = [groups, parent, token, _bits(reward), counts, _bits(largest), _bits(norm), all_unseen.int()]
        if values is not None:
            record.append(values[:3].view(torch.int32).flatten())
        self._records.index_copy_(0, self._step, torch.cat(record)[None])

        group = self._groups.index_select(0, parent)
        chosen = torch.stack([parent, token, group, _bits(reward)])
        self._depth.add_(1)
        ended = (token[:, None] == self._ends.index_select(0, group)).any(1)
        ended |= (self._depth >= self._most).index_select(0, group)
        kind = torch.add(self._kind.index_select(0, parent), ended & (parent < rows), alpha=_ENDED)
        key, order = torch.add(self._place, kind, alpha=rows).sort()  # by kind; among equals as they are
        is_row = key < rows
        place = torch.where(is_row, self._place, self._place + is_row.sum().neg() + rows)
        self._nodes.copy_(self._nothing)
        self._nodes.scatter_(1, place.long().expand(4, -1), chosen[:, order])
        if self._values is not None and values is not None:
            self._values.zero_()
            self._values.scatter_(1, place.long().expand(4, -1), values[:, order])
        self._step.add_(1)
        self._advance()

    def _published(
        self, logits: Tensor, hidden: Tensor, ends: Tensor, banned: Tensor, widths: Tensor
    ) -> tuple[Tensor, ...]:
        config, rows, inherits = self.config, self.rows, self.config.eos_score == "parent"
        groups = self._groups[:rows]
        return multifurcate(
            logits, hidden, self.head.weight, self.head.bias, self.head.unseen, config.unseen_reward,
            groups, self.groups, config.width, self._top_p.index_select(0, groups), banned=banned,
            scores=self._scores[:rows] if inherits else None,
            end_tokens=ends if inherits else None,
            finished_scores=self._scores[rows:-1], finished_groups=self._groups[rows:-1], widths=widths,
        )  # fmt: skip

    def _ordered(
        self, logits: Tensor, hidden: Tensor, ends: Tensor, banned: Tensor, widths: Tensor
    ) -> tuple[Selection, Tensor, Tensor]:
        """The selection, the nucleus sizes, and which rows have rewards that are NaN."""
        assert self._values is not None
        config, rows, values = self.config, self.rows, self._values
        groups = self._groups[:rows]
        rules = Rules(*self._rules)
        candidates = propose_fixed(logits, rules.at(groups.long()), banned, config.top_k)
        rewards = candidates.rewards(hidden, self.head, config.unseen_reward)
        assert candidates.used is not None
        bad = (rewards.isnan() & candidates.used).view(rows, -1).any(1)
        selection = select(
            candidates, rewards.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf),
            Beams(groups, self._depth.index_select(0, groups), values[1, :rows], values[2, :rows]),
            Finished(self._groups[rows:-1], values[0, rows:-1], values[3, rows:-1]),
            Rules(*self._rules[:, :-1]), widths, config.width,
            unseen=self.head.unseen, end_tokens=ends if config.eos_score == "parent" else None,
        )  # fmt: skip
        return selection, torch.where(groups < self.groups, candidates.counts, 0), bad

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
        self._positions.copy_((self._lengths + self._depth).index_select(1, groups))
        self._tokens.copy_(self._nodes[1, :rows].expand(2, -1))


def _indexable(cache: Tensor) -> Tensor:
    """The same memory in a dtype that PyTorch indexes on every device, which fp8 is not."""
    return cache.view(torch.uint8) if cache.dtype == FP8 else cache


def _bits(values: Tensor) -> Tensor:
    return values.float().view(torch.int32)
