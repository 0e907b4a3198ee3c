"""A step captured once in a CUDA graph, then replayed: the searches of an engine on buffers of fixed size."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import torch
from torch import Tensor

from saffron.errors import ConfigError, SaffronError
from saffron.models.checks import not_finite
from saffron.models.cuda_graph import Replay, capture_on_gpu
from saffron.search.config import SearchConfig
from saffron.search.eager_step import EagerStep
from saffron.search.handle import Handle
from saffron.search.model_pair import ModelPair
from saffron.search.readers import Reader, Row
from saffron.search.static_forest import (
    EVERY,
    MAX_END_TOKENS,
    MAX_TOP_K,
    Index,
    Part,
    StaticForest,
    intervals,
)
from saffron.search.step import Batch, Child, StepRecord
from saffron_kernels import backends
from saffron_kernels.checks import FP8

_SHARED = ("eos_score", "unseen_reward", "lm_head_bias", "ranking", "is_published")  # by all searches of a forest


class CapturedStep(EagerStep):
    """See `Step`. Prompts are read as in `EagerStep`.

    Args:
        models, config, groups, capture: as for `StaticForest`.
    """

    def __init__(
        self,
        models: ModelPair,
        config: SearchConfig,
        groups: int,
        capture: Callable[[Replay], Replay] | None = capture_on_gpu,
    ) -> None:
        super().__init__(models)
        self.config, self.groups, self._capture = config, groups, capture
        self.forest: StaticForest | None = None
        self._searches: list[Handle] = []  # by group
        self._gone: set[Handle] = set()  # of them: those that have left since
        self._weights: object = None  # their fingerprints

    def check(self, search: Handle) -> None:
        """Raises `ConfigError` for a search that cannot run in this forest."""
        config, ours = search.config, self.config
        for name in _SHARED:
            if getattr(config, name) != getattr(ours, name):
                raise ConfigError(f"{name}: got {getattr(config, name)!r}; captured steps were made for "
                                  f"{getattr(ours, name)!r}")  # fmt: skip
        if search.max_width > ours.width:
            raise ConfigError(f"width: got {search.max_width}; captured steps were made for {ours.width} at most")
        if not config.is_published and not 0 < config.top_k <= ours.top_k:
            raise ConfigError(f"top_k: got {config.top_k}; captured steps were made for 1 to {ours.top_k}")
        if len(search.eos_token_id) > MAX_END_TOKENS:
            raise ConfigError(
                f"eos_token_id: got {len(search.eos_token_id)}; captured steps take {MAX_END_TOKENS} at most"
            )
        if search.tree.trace is not None:
            raise ConfigError("trace: captured steps keep no candidates; leave it out")

    def serves(self, config: SearchConfig, groups: int) -> bool:
        """Whether the buffers are of the right size for a forest of such searches."""
        ours = self.config
        same = (getattr(config, name) == getattr(ours, name) for name in (*_SHARED, "width", "top_k"))
        return self.groups == groups and all(same)

    @property
    def room(self) -> int:
        """Places for further searches."""
        return self.groups - len({*self._searches, *self.policy.prompts} - self._gone)

    def step(self, batch: Batch) -> list[StepRecord]:
        joining = self._read()
        batch.rows = [*batch.rows, *(Row(search, search.tree.beam[0]) for search in joining)]
        if not batch.rows:
            self._searches, self._gone = [], set()
            return []
        searches = list(dict.fromkeys(row.search for row in batch.rows))
        left = max(search.config.max_new_tokens - len(search.tree.steps) for search in searches)
        steps = min(left, 1 if self.policy.prompts.keys() - set(joining) else EVERY)
        if joining or self._gone or not self._fits(steps):
            self._rebuild(batch, searches, joining, left)
        assert self.forest is not None
        models = self.models.policy, self.models.mrm
        length = max(model.context or 0 for model in models)
        widths = [search.width for search in self._searches]
        records = []
        for record in self.forest.run(steps, widths, length):
            records.append(self._record(record))
            if len(records[-1].nucleus_sizes) == 0:
                records.pop()
                break
        return records

    def leave(self, searches: Collection[Handle]) -> None:
        for reader in (self.policy, self.mrm):
            reader.leave(searches, None)
        self._gone |= {search for search in self._searches if search in searches}

    def close(self) -> None:
        super().close()
        self._searches, self._gone = [], set()

    def _fits(self, steps: int) -> bool:
        forest = self.forest
        return forest is not None and all(
            int(side.count) + steps * forest.rows <= side.capacity for side in (forest.policy, forest.mrm)
        )

    def _rebuild(self, batch: Batch, searches: list[Handle], joining: list[Handle], left: int) -> None:
        """Lays out what goes on and what joins; in new buffers, where the old ones are too small."""
        going_on = np.array([i for i, row in enumerate(batch.rows) if row.search not in joining], dtype=np.int32)
        parts: list[list[Part]] = [[], []]
        if len(going_on):
            assert self.forest is not None
            device_rows = self._device_rows(batch.rows, going_on)
            for mine, side in zip(parts, (self.forest.policy, self.forest.mrm), strict=True):
                mine.append(side.kept(device_rows))
        if joining:
            for mine, reader in zip(parts, (self.policy, self.mrm), strict=True):
                mine.append(_prompts(reader, joining, len(going_on)))
        rows = self.groups * self.config.width
        wanted = [sum(len(part.slot) for part in mine) + (left + 1) * rows for mine in parts]
        forest, weights = self.forest, (self.policy.model.fingerprint(), self.mrm.model.fingerprint())
        if weights != self._weights:
            if len(going_on):
                raise ConfigError("weights: they changed while searches run in captured steps; end the searches first")
            forest, self._weights = None, weights  # a graph holds the weights that it was captured with
        if forest is None or wanted[0] > forest.policy.capacity or wanted[1] > forest.mrm.capacity:
            room = [1 << (n - 1).bit_length() for n in wanted]
            forest = StaticForest(self.models, self.config, self.groups, (room[0], room[1]), self._capture)
        forest.lay_out(batch.rows, batch.finished, searches, parts)
        self.forest, self._searches, self._gone = forest, searches, set()
        for reader in (self.policy, self.mrm):
            reader.leave(joining, None)  # their prompts are in the buffers

    def _device_rows(self, rows: list[Row], going_on: Index) -> Index:
        """Where the device has the rows that go on: those of the searches that left are still among its own."""
        assert self.forest is not None
        groups = self.forest._groups[: self.forest.rows].cpu().numpy()
        own = {search: np.flatnonzero(groups == g).astype(np.int32) for g, search in enumerate(self._searches)}
        return np.concatenate([own[s] for s in dict.fromkeys(rows[i].search for i in going_on)])

    def _record(self, record: Tensor) -> StepRecord:
        assert self.forest is not None
        rows = self.forest.rows
        record, values = record.split([7 * rows + self.groups, len(record) - 7 * rows - self.groups])
        group, parent, token, reward, counts, logit, hidden, unseen = record.split([*[rows] * 7, self.groups])
        live = int((group < self.groups).sum())
        failures: dict[Handle, SaffronError] = {}
        for model, largest in ((self.models.policy, logit), (self.models.mrm, hidden)):
            good = largest[:live].view(torch.float32).isfinite().tolist()
            for g, fine in zip(group[:live].tolist(), good, strict=True):
                if not fine:
                    failures.setdefault(self._searches[g], not_finite(model.owner, model=model.model))
        parents, score = parent.tolist(), reward.view(torch.float32).tolist()
        more = [score, score, [0.0] * rows]
        if len(values):
            more = values.view(3, -1).contiguous().view(torch.float64).tolist()
        chosen = zip(parents, token.tolist(), *more, strict=True)
        return StepRecord(
            children=[Child(*node) for node in chosen if node[0] < rows],
            kept=[p - rows for p in parents if rows <= p < 2 * rows],
            nucleus_sizes=counts[:live].tolist(),
            all_unseen=dict(zip(self._searches, unseen.bool().tolist(), strict=False)),
            failures=failures,
        )


def _prompts(reader: Reader, searches: list[Handle], first: int) -> Part:
    """What the rows of searches that join see: their prompts but for the last tokens; they stand from `first` on."""
    kv = reader.model.kv
    leaves = np.concatenate([reader.prompts[search].leaf for search in searches])
    nodes, query = np.unique(leaves, return_inverse=True)
    order, slot, begin, end, _ = kv.index.plan(nodes)
    number = np.empty(len(nodes), dtype=np.int32)
    number[order] = np.arange(len(nodes), dtype=np.int32)
    place = np.empty(kv.capacity, dtype=np.int32)
    place[slot] = np.arange(len(slot), dtype=np.int32)
    token, begin, end = intervals(begin, end, number[query], place[leaves])
    return Part(kv, slot[token], begin + first, end + first)


def why_not_captured(models: ModelPair, config: SearchConfig) -> str | None:
    """Why a search cannot run in captured steps; None if it can."""
    policy, mrm = models.policy, models.mrm
    if policy.device.type != "cuda":
        return f"a CUDA graph needs a GPU, and the policy is on {policy.device}"
    if mrm.device != policy.device:
        return f"one graph runs on one device, and the models are on {policy.device} and {mrm.device}"
    if config.ranking != "paper":
        return f'ranking="{config.ranking}" is decided on the host; expected "paper"'
    if not config.is_published and not 0 < config.top_k <= MAX_TOP_K:
        return f"places for candidates are fixed in a graph: top_k is {config.top_k}, expected 1 to {MAX_TOP_K}"
    if not models.same:
        return "policy and MRM have different tokenizers, so every response passes through text on the host"
    if not (policy.share_prefixes and mrm.share_prefixes):
        return "share_prefixes is off: there is no cache whose addresses could stay"
    for name, model in (("policy", policy), ("MRM", mrm)):
        if model.geometry.longest is not None:
            return f"the {name}'s RoPE depends on the text's length, so that a step compares positions on the host"
    is_fp8 = FP8 in (policy.kv.k.dtype, mrm.kv.k.dtype)
    if is_fp8 and backends.chosen("tree_attention", policy.device, FP8) == "reference":
        return "no kernel here reads fp8 caches, and the reference reads from the device within a step"
    return None
