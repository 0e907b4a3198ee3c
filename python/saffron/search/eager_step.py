"""A step in which the host says what happens next: the models run on the rows there are, and ops select."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from torch import Tensor

from saffron.errors import NumericalError, SaffronError
from saffron.models.checks import not_finite
from saffron.search.handle import Handle
from saffron.search.model_pair import ModelPair
from saffron.search.readers import Reader, Row, TextReader
from saffron.search.selection import Beams, Finished, Rules, propose, select
from saffron.search.step import Batch, Child, StepRecord
from saffron_kernels import multifurcate


class EagerStep:
    """See `Step`."""

    def __init__(self, models: ModelPair) -> None:
        self.models = models
        self.policy = Reader(models.policy, 0)
        self.mrm = Reader(models.mrm, 1) if models.same else TextReader(models.policy, models.mrm)
        self._rows: list[Row] = []  # of the models
        self._ends: dict[frozenset[int], Tensor] = {}

    @property
    def room(self) -> int:
        return 1 << 30

    def check(self, search: Handle) -> None:
        """Every search can run."""

    def add(self, search: Handle) -> None:
        for reader in (self.policy, self.mrm):
            reader.add(search)

    def prefill(self, tokens: int | None) -> dict[Handle, Exception]:
        failures: dict[Handle, Exception] = {}
        chunks = [(reader, reader.next_chunk(tokens)) for reader in (self.policy, self.mrm)]
        passes: list[tuple[list[Handle], Callable[[], object]]] = [
            ([*chunk], partial(reader.prefill, chunk)) for reader, chunk in chunks if chunk
        ]
        if self.models.trunk is not None and len(passes) == 2:
            (ours, policy), (theirs, mrm) = passes
            passes = [(ours + theirs, partial(self.models.run, policy, mrm))]
        for searches, run in passes:
            try:
                run()
            except Exception as error:
                failures |= dict.fromkeys(searches, error)
        return failures

    def step(self, batch: Batch) -> list[StepRecord]:
        failures: dict[Handle, SaffronError] = {}
        while batch.rows and (failed := self.mrm.outgrown(batch.rows)):
            failures |= failed
            batch.rows = [row for row in batch.rows if row.search not in failed]
            batch.finished = [row for row in batch.finished if row.search not in failed]
            self.leave(failed)
        outputs = []
        if batch.rows:
            parents = [node.parent.row for _, node in batch.rows if node.parent is not None]
            outputs.append(self.models.run(*(partial(r.step, parents, batch.rows) for r in (self.policy, self.mrm))))
        joining = self._read()
        if joining:
            batch.rows = [*batch.rows, *(Row(search, search.tree.beam[0]) for search in joining)]
            outputs.append([reader.join(joining) for reader in (self.policy, self.mrm)])
        self._number(batch.rows)
        if not batch.rows:
            return [StepRecord([], [], [], {}, failures)] if failures else []
        logits, hidden = (x[0] if len(x) == 1 else torch.cat(x) for x in zip(*outputs, strict=True))
        return [self._select(batch, logits, hidden, failures)]

    def leave(self, searches: Collection[Handle]) -> None:
        keep = None
        if any(row.search in searches for row in self._rows):
            keep = [i for i, row in enumerate(self._rows) if row.search not in searches]
        for reader in (self.policy, self.mrm):
            reader.leave(searches, keep)
        if keep is not None:
            self._number([self._rows[i] for i in keep])

    def close(self) -> None:
        for reader in (self.policy, self.mrm):
            reader.close()
        self._rows = []

    def _read(self) -> list[Handle]:
        """Searches whose prompts have been read."""
        theirs = self.mrm.prompts
        return [
            search
            for search, prompt in self.policy.prompts.items()
            if prompt.output is not None and theirs[search].output is not None
        ]

    def _number(self, rows: list[Row]) -> None:
        self._rows = rows
        for i, (_, node) in enumerate(rows):
            node.row = i

    def _select(self, batch: Batch, logits: Tensor, hidden: Tensor, failures: dict[Handle, SaffronError]) -> StepRecord:
        """Calls `multifurcate` once for all searches, or where what it takes one value of differs, once for each."""
        record = StepRecord([], [], [0] * len(batch.rows), {}, failures, (logits, hidden))
        failures |= self._not_finite(batch.rows, logits, hidden)
        alike: dict[tuple[object, ...], list[Handle]] = {}
        for search in dict.fromkeys(row.search for row in batch.rows):
            if search not in failures:
                alike.setdefault(_settings(search), []).append(search)
        for searches in alike.values():
            try:
                self._multifurcate(batch, searches, record)
            except ValueError as error:  # a row that no choice can be made in
                self._one_by_one(batch, searches, record, error)
        record.children.sort(key=lambda child: child[0])  # by row; siblings stay as they are
        record.kept.sort()
        return record

    def _one_by_one(self, batch: Batch, searches: list[Handle], record: StepRecord, error: ValueError) -> None:
        """Finds the searches that stop the others, and stops them."""
        if len(searches) == 1:
            record.failures[searches[0]] = NumericalError(f"no next token can be chosen: {error}")
            return
        for search in searches:
            try:
                self._multifurcate(batch, [search], record)
            except ValueError as own:
                self._one_by_one(batch, [search], record, own)

    def _multifurcate(self, batch: Batch, searches: list[Handle], record: StepRecord) -> None:
        """The searches' part of the record; brings it to the host: the one synchronisation of a step."""
        number = {search: i for i, search in enumerate(searches)}
        rows = [i for i, row in enumerate(batch.rows) if row.search in number]
        mine = [batch.rows[i] for i in rows]
        competing = [i for i, (search, _) in enumerate(batch.finished) if search in number and competes(search)]
        finished = [batch.finished[i] for i in competing]
        assert record.outputs is not None
        logits, hidden = (x if len(rows) == len(x) else x[rows] for x in record.outputs)
        choose = self._published if searches[0].config.is_published else self._ordered
        parents, *chosen, counts, all_unseen = choose(number, mine, finished, logits, hidden)
        for parent, *child in zip(parents.tolist(), *(values.tolist() for values in chosen), strict=True):
            if parent < len(rows):
                record.children.append(Child(rows[parent], *child))
            elif parent < len(rows) + len(competing):
                record.kept.append(competing[parent - len(rows)])
        for i, count in zip(rows, counts.tolist(), strict=True):
            record.nucleus_sizes[i] = count
        record.all_unseen.update(zip(searches, all_unseen.tolist(), strict=True))

    def _published(
        self, number: dict[Handle, int], rows: list[Row], finished: list[Row], logits: Tensor, hidden: Tensor
    ) -> tuple[Tensor, ...]:
        """By the fused op: parents, then the values of each child, nucleus sizes, and which searches are all unseen."""
        device, config = logits.device, next(iter(number)).config
        head, inherits = self.models.head(config.lm_head_bias), config.eos_score == "parent"
        widths = [search.step_width for search in number]
        top_p: set[float] = {search.config.top_p for search in number}
        parent, token, reward, counts, all_unseen = multifurcate(
            logits, hidden, head.weight, head.bias, head.unseen, config.unseen_reward,
            _int32([number[row.search] for row in rows], device), len(number), max(widths),
            # A tensor where they differ: fp64, as numbers of Python are.
            top_p.pop() if len(top_p) == 1 else _float64([row.search.config.top_p for row in rows], device),
            banned=self._banned(rows, device),
            scores=_float32([row.node.score for row in rows], device) if inherits else None,
            end_tokens=self._tokens([row.search.eos_token_id for row in rows], device) if inherits else None,
            finished_scores=_float32([row.node.score for row in finished], device),
            finished_groups=_int32([number[row.search] for row in finished], device),
            widths=_int32(widths, device) if len(set(widths)) > 1 else None,
        )  # fmt: skip
        return parent, token, reward, reward, torch.zeros_like(reward), counts, all_unseen

    def _ordered(
        self, number: dict[Handle, int], rows: list[Row], finished: list[Row], logits: Tensor, hidden: Tensor
    ) -> tuple[Tensor, ...]:
        """The same by `selection`."""
        device, config = logits.device, next(iter(number)).config
        head = self.models.head(config.lm_head_bias)
        groups = _int32([number[row.search] for row in rows], device)
        rules = Rules.of([search.config for search in number], device)
        candidates = propose(logits, rules.at(groups.long()), self._banned(rows, device))
        rewards = candidates.rewards(hidden, head, config.unseen_reward)
        if bool(rewards.isnan().any()):
            raise ValueError("rewards: NaN; rewards must be numbers")
        ends = None
        if config.eos_score == "parent":
            ends = self._tokens([row.search.eos_token_id for row in rows], device)
            ends = ends.expand(len(rows), -1)
        nodes, ended = [row.node for row in rows], [row.node.rank for row in finished]
        widths = [search.step_width for search in number]
        selection = select(
            candidates, rewards,
            Beams(groups, _int32([n.depth for n in nodes], device), _float64([n.reward for n in nodes], device),
                  _float64([n.log_probability for n in nodes], device)),
            Finished(_int32([number[row.search] for row in finished], device),
                     _float64([rank[0] for rank in ended], device), _float64([rank[1] for rank in ended], device)),
            rules, _int32(widths, device), max(widths), unseen=head.unseen, end_tokens=ends,
        )  # fmt: skip
        return *selection[:5], candidates.counts, selection.all_unseen

    def _not_finite(self, rows: Sequence[Row], logits: Tensor, hidden: Tensor) -> dict[Handle, SaffronError]:
        """The searches in whose rows a model returned NaN or infinity; single logits may be -inf."""
        failures: dict[Handle, SaffronError] = {}
        for model, values in ((self.models.policy, logits.amax(1, keepdim=True)), (self.models.mrm, hidden)):
            finite = values.isfinite()
            if not bool(finite.all()):
                error = not_finite(model.owner, model=model.model)
                for row, good in zip(rows, finite.all(1).tolist(), strict=True):
                    if not good:
                        failures.setdefault(row.search, error)
        return failures

    def _banned(self, rows: list[Row], device: torch.device) -> Tensor | None:
        """End tokens of rows whose response may not end yet."""
        banned = [row.search.eos_token_id if may_not_end(row.search) else frozenset[int]() for row in rows]
        return self._tokens(banned, device) if any(banned) else None

    def _tokens(self, rows: list[frozenset[int]], device: torch.device) -> Tensor:
        """Token ids: one list for all rows where they agree, else one for each, padded with -1."""
        if len(set(rows)) > 1:
            longest = max(map(len, rows))
            return _int32([sorted(row) + [-1] * (longest - len(row)) for row in rows], device)
        if rows[0] not in self._ends:
            self._ends[rows[0]] = _int32(sorted(rows[0]), device)
        return self._ends[rows[0]]


def competes(search: Handle) -> bool:
    """Whether finished responses compete with new candidates for places in the beam."""
    return search.config.ranking == "paper"


def may_not_end(search: Handle) -> bool:
    """Whether its next token may not end the response."""
    return len(search.tree.steps) < search.config.min_new_tokens


def _settings(search: Handle) -> tuple[object, ...]:
    """What `multifurcate` takes one value of."""
    config = search.config
    return config.unseen_reward, config.lm_head_bias, config.eos_score, config.is_published


def _int32(values: Sequence[object], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _float64(values: list[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device)


def _float32(values: list[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)
