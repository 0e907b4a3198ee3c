"""The rows of a batch on a trie: which prefix each row is, and the forward pass that makes them longer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saffron.errors import ConfigError, UnsupportedModelError
from saffron.models.trie_model import TrieModel
from saffron_kernels import Beams, KVTrie, TreeStep

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Pass:
    """A planned forward pass over every distinct new prefix once.

    Attributes:
        tokens: `[queries]` int64, on the device of the cache.
        step: the plan.
        outputs: `[rows, wanted columns]` the query whose output stands there; 0 for padding.
        decode: one new token per row, and nothing else.
        finish: to be called when the pass has run; until then the rows stay where they were, or, while they decode,
            nowhere.
    """

    tokens: Tensor
    step: TreeStep
    outputs: Ints
    decode: bool
    finish: Callable[[], None]


class Rows:
    """Rows of `[rows, columns]` token ids, each on the trie node of its last token.

    Columns that hold padding are in no row's prefix. Moving rows about moves indices alone; nodes that no row stands on
    any more go with the next pass.

    Attributes:
        trie: whose cache they stand in.
        columns: columns so far, padding included.
    """

    def __init__(self, trie: TrieModel) -> None:
        self.trie = trie
        trie.dependents.add(self)
        self._clear()

    @property
    def kv(self) -> KVTrie:
        return self.trie.kv

    def _clear(self) -> None:
        self.columns = 0
        self._beams: Beams | None = None
        self._texts: list[NDArray[np.int32]] | None = None  # of the beams, where they are not cached any more
        self._beam_of_row: Ints | None = None  # -1: padding so far
        self._real: Bools | None = None  # [rows, columns], None: no padding
        self._counted: bool | None = None  # of padded rows, whether their positions were given

    def __len__(self) -> int:
        return 0 if self._beam_of_row is None else len(self._beam_of_row)

    def plan(self, ids: Ints, mask: Bools | None, positions: Ints | None, wanted: Ints) -> Pass:
        """Makes room for new columns.

        Args:
            ids: `[rows, new]` tokens. mask: `[rows, columns + new]` what is no padding, None: all.
            positions: `[rows or 1, new]` what the caller takes the positions to be, None: the columns.
            wanted: ascending indices of the new columns whose outputs are wanted.

        Raises:
            ConfigError: other rows or another mask than before, rows that end in padding, positions that are not those
            of the text.
            UnsupportedModelError: a text of other rotary embeddings than its prefixes. CacheFullError: no room.
        """
        if self._beam_of_row is not None and len(ids) != len(self):
            raise ConfigError(
                f"input_ids: got {len(ids)} rows, expected the {len(self)} rows of the TrieCache; another batch needs "
                "a cache of its own, which finds common prefixes where both are made by TrieCache.from_trie"
            )
        whole = self._whole_mask(mask, ids.shape)
        real = None if whole is None or whole[:, self.columns :].all() else whole[:, self.columns :]
        lengths = self._lengths(len(ids))
        depth = lengths[:, None] + (np.arange(1, ids.shape[1] + 1) if real is None else real.cumsum(1)) - 1
        _check_padding(depth, real)
        _check_positions(depth, real, positions)
        if whole is not None:
            self._check_holes(whole, positions is not None)
        self.trie.geometry.check_length(int(depth.max()) + 1)
        if self._beams is not None and ids.shape[1] == 1 and real is None and lengths.all():
            return self._decode(ids[:, 0])
        return self._extend(ids, real, wanted)

    def _whole_mask(self, mask: Bools | None, shape: tuple[int, ...]) -> Bools | None:
        """The mask over all columns, None: no padding. It must say of earlier columns what it said before."""
        before = self._real
        if mask is None:
            if before is not None:
                raise ConfigError("attention_mask: got None, expected a mask: earlier columns hold padding")
            return None
        rows, new = shape
        if mask.shape != (rows, self.columns + new):
            raise ConfigError(
                f"attention_mask: got shape {list(mask.shape)}, expected [{rows}, {self.columns + new}]: the "
                f"{self.columns} columns that stand in the TrieCache and {new} new ones"
            )
        changed = mask[:, : self.columns] != (True if before is None else before)
        if changed.any():
            row, column = (int(i[0]) for i in np.nonzero(changed))
            raise ConfigError(
                f"attention_mask: got {int(mask[row, column])} in row {row}, column {column}, where an earlier call "
                f"said {int(not mask[row, column])}; a TrieCache cannot change what its rows have read"
            )
        return None if mask.all() else mask

    def _check_holes(self, real: Bools, counted: bool) -> None:
        """Refuses padding that the model would read otherwise with a cache of rows."""
        first = real.argmax(1)
        hole = real.any(1) & (first + real.sum(1) < real.shape[1])
        geometry = self.trie.geometry
        if not counted and (hole.any() or not geometry.relative):
            row = int((hole if hole.any() else ~real.all(1)).argmax())
            raise ConfigError(
                f"position_ids: got None, and row {row} holds padding: without position_ids a model counts padding "
                "as positions, which a trie does not; pass attention_mask.cumsum(1) - 1 of the new columns"
            )
        if self._counted not in (None, counted):
            raise ConfigError("position_ids: pass them in every call of rows that hold padding, or in none")
        window = min((w for w in geometry.windows if w is not None), default=None)
        if window is not None and hole.any() and real.shape[1] > window:
            raise UnsupportedModelError(
                f"attention_mask: row {int(hole.argmax())} holds padding between its tokens, and the model has sliding "
                f"windows of {window} columns, in which padding would count; not served by a TrieCache"
            )
        self._counted = counted

    def _lengths(self, rows: int) -> Ints:
        """Tokens of each row, without padding."""
        if self._beam_of_row is None:
            return np.zeros(rows, dtype=np.int64)
        if self._texts is not None:
            return np.array([*map(len, self._texts), 0])[self._beam_of_row]
        positions: list[int] = [] if self._beams is None else self._beams.positions.tolist()
        return np.array([*positions, -1])[self._beam_of_row] + 1

    def _decode(self, tokens: Ints) -> Pass:
        assert self._beams is not None and self._beam_of_row is not None
        # Rows with one prefix and one token are one query; sorted, children stand in the order of their parents.
        children, query = np.unique(self._beam_of_row << 32 | tokens, return_inverse=True)
        ids = children & 0xFFFFFFFF
        beams, step = self.kv.advance(self._beams, (children >> 32).astype(np.int32), ids.astype(np.int32))
        self.kv.unfinished = beams.nodes
        columns, real, counted = self.columns, self._real, self._counted
        self._clear()  # the old nodes have given up their holds

        def finish() -> None:
            self.kv.unfinished = None
            self._beams, self._beam_of_row, self.columns, self._real = beams, query, columns, real
            self._counted = counted
            self._add_columns(1, None)

        return Pass(torch.from_numpy(ids).to(self.kv.k.device), step, query[:, None], True, finish)

    def _extend(self, ids: Ints, real: Bools | None, wanted: Ints) -> Pass:
        texts, text_of_row = self._longer(ids, real)
        mask = np.ones(ids.shape, dtype=bool) if real is None else real
        from_end = (mask.sum(1)[:, None] - mask.cumsum(1))[:, wanted]  # tokens of the row after each column
        seen = mask[:, wanted]
        fill = self.kv.insert(texts, outputs=1 + int(from_end.max(initial=0, where=seen)))
        self.kv.unfinished = fill.leaves
        place = np.where(seen, -1 - from_end, -1)
        outputs = np.where(seen, fill.outputs[text_of_row[:, None], place], 0)

        def finish() -> None:
            self.kv.unfinished = None
            old = self._beams
            self._beams, number = self.kv.beams(fill.leaves)
            self._texts = None
            self._beam_of_row = np.append(number, -1)[text_of_row].astype(np.int64)
            self._add_columns(ids.shape[1], real)
            if old is not None:
                self.kv.release(old.nodes, discard=True)  # what the new leaves continue stays

        return Pass(fill.tokens, fill.step, outputs.astype(np.int64), False, finish)

    def _longer(self, ids: Ints, real: Bools | None) -> tuple[list[NDArray[np.int32]], Ints]:
        """The distinct texts of all rows after these columns, and the text of each row, -1 for none."""
        texts: dict[tuple[int, bytes], int] = {}
        longer: list[NDArray[np.int32]] = []
        beam_of_row = np.full(len(ids), -1) if self._beam_of_row is None else self._beam_of_row
        text_of_row = np.full(len(ids), -1, dtype=np.int64)
        for row, beam in enumerate(beam_of_row.tolist()):
            new = ids[row] if real is None else ids[row, real[row]]
            if beam < 0 and not len(new):
                continue
            text_of_row[row] = texts.setdefault((beam, new.tobytes()), len(texts))
            if len(longer) < len(texts):
                longer.append(np.concatenate([self._path(beam), new]))
        return longer, text_of_row

    def _path(self, beam: int) -> NDArray[np.int32]:
        if self._texts is not None and beam >= 0:
            return self._texts[beam]
        if beam < 0 or self._beams is None:
            return np.empty(0, dtype=np.int32)
        return self.kv.index.path(int(self._beams.nodes[beam]))

    def _add_columns(self, new: int, real: Bools | None) -> None:
        if self._real is not None or real is not None:
            before = np.ones((len(self), self.columns), dtype=bool) if self._real is None else self._real
            after = np.ones((len(self), new), dtype=bool) if real is None else real
            self._real = np.concatenate([before, after], 1)
        self.columns += new

    def select(self, rows: NDArray[np.integer] | Bools) -> None:
        """Keeps the rows that `rows` names, in that order and as often."""
        if self._beam_of_row is not None:
            self._beam_of_row = self._beam_of_row[rows]
            self._real = None if self._real is None else self._real[rows]

    def crop(self, columns: int) -> None:
        """Takes the last columns away."""
        if self._beam_of_row is None or columns == 0:
            return
        if columns >= self.columns:
            self.release()
            return
        gone = self._real[:, -columns:].sum(1) if self._real is not None else np.full(len(self), columns)
        lengths = self._lengths(len(self)) - gone
        self._shorten(lengths.tolist())
        self._real = None if self._real is None else self._real[:, :-columns]
        self.columns -= columns

    def _shorten(self, lengths: list[int]) -> None:
        """Keeps so many tokens of each row."""
        assert self._beam_of_row is not None
        if self._beams is None:
            texts = [self._path(beam)[: max(n, 0)] for beam, n in zip(self._beam_of_row.tolist(), lengths, strict=True)]
            self._texts = texts
            self._beam_of_row = np.array([i if len(text) else -1 for i, text in enumerate(texts)], dtype=np.int64)
            return
        nodes: dict[tuple[int, int], int] = {}
        leaf_of_row = np.full(len(self), -1, dtype=np.int64)
        leaves: list[int] = []
        for row, (beam, length) in enumerate(zip(self._beam_of_row.tolist(), lengths, strict=True)):
            if beam >= 0 and length > 0:
                leaf_of_row[row] = nodes.setdefault((beam, length), len(nodes))
                if len(leaves) < len(nodes):
                    leaves.append(int(self.kv.index.match(self._path(beam)[:length])[-1]))
        held = np.array(leaves, dtype=np.int32)
        self.kv.index.hold(held)
        self.kv.release(self._beams.nodes, discard=True)
        self._beams, number = self.kv.beams(held)
        self._beam_of_row = np.append(number, -1)[leaf_of_row].astype(np.int64)

    def detach(self) -> None:
        """Gives the nodes up, whose K and V are of other weights: the next pass runs the texts of the rows again."""
        if self._beams is not None:
            self._texts = [self.kv.index.path(int(node)) for node in self._beams.nodes]
            self.kv.release(self._beams.nodes, discard=True)
            self._beams = None

    def release(self) -> None:
        """Ends all rows. Their tokens stay cached until their slots are needed."""
        beams = self._beams
        self._clear()
        if beams is not None:
            self.kv.release(beams.nodes)

    def fork(self) -> Rows:
        """The same rows once more, with holds of their own."""
        other = Rows(self.trie)
        other.columns, other._beams, other._texts, other._beam_of_row, other._real, other._counted = (
            self.columns, self._beams, self._texts, self._beam_of_row, self._real, self._counted,
        )  # fmt: skip
        if self._beams is not None:
            self.kv.index.hold(self._beams.nodes)
        return other


def _check_padding(depth: Ints, real: Bools | None) -> None:
    if real is None:
        return
    ended = ~real[:, -1] & (depth[:, -1] >= 0)
    if ended.any():
        raise ConfigError(
            f"attention_mask: row {int(ended.argmax())} ends in padding, expected the last column to be text; pad on "
            'the left (padding_side="left")'
        )
    if (depth[:, -1] < 0).all():
        raise ConfigError("attention_mask: got padding only, expected a token in some row")


def _check_positions(depth: Ints, real: Bools | None, positions: Ints | None) -> None:
    if positions is None:
        return
    wrong = positions != depth
    if real is not None:
        wrong &= real
    if wrong.any():
        row, column = (int(i[0]) for i in np.nonzero(wrong))
        given = int(np.broadcast_to(positions, depth.shape)[row, column])
        raise ConfigError(
            f"position_ids: got {given} in row {row}, column {column}, expected {int(depth[row, column])}: a trie "
            "counts positions from the first token that is not padding"
        )
