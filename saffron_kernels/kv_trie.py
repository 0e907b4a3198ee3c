"""KVTrie: a forest of cached tokens (host index) and the K and V rows they own, for one model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saffron_kernels import checks, ops
from saffron_kernels._native import CacheFullError, Trie
from saffron_kernels.checks import FP8

Index = NDArray[np.int32]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class TreeStep:
    """What attention needs to know about one forward pass, the same for all layers.

    Attributes:
        positions: `[queries]` int64, the position of each query in its sequence (RoPE).
        write_slots: `[queries]` int32, where the K and V of each query go; -1: they are cached already.
        slot, begin, end: `[tokens]` int32, the flattened trie (see `ops.tree_attention`).
        length: tokens in the longest sequence.
        count: `[1]` int32, how many of the tokens there are; None: all of them.
    """

    positions: Tensor
    write_slots: Tensor
    slot: Tensor
    begin: Tensor
    end: Tensor
    length: int
    count: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Prefill:
    """A forward pass over all tokens of some sequences that are not cached yet, each distinct prefix once.

    Attributes:
        leaves: `[sequences]` the node (= slot) of each sequence's last token, held once for each sequence.
        outputs: `[sequences, outputs]` which queries are the last tokens of each sequence, the last one last; -1 before
            its first token.
        tokens: `[queries]` int64, the queries' token ids, depth first.
        cached: `[sequences]` tokens that were found in the trie.
        step: the forward pass.
    """

    leaves: Index
    outputs: Index
    tokens: Tensor
    cached: NDArray[np.int64]
    step: TreeStep

    @property
    def last(self) -> Index:
        """`[sequences]` which query is the last token of each sequence."""
        return self.outputs[:, -1]


@dataclass(frozen=True, slots=True)
class Beams:
    """Sequences that grow one token per step. One query each, numbered depth first.

    Attributes:
        nodes: `[beams]` the node of each beam's last token, held.
        positions: `[beams]` its position.
        slot, begin, end: `[tokens]` int32, the flattened trie of all beams.
    """

    nodes: Index
    positions: NDArray[np.int64]
    slot: Tensor
    begin: Tensor
    end: Tensor


class CacheLock:
    """A reentrant lock that its owner may be copied or pickled with: the copy gets a lock of its own."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[Any, ...]:
        return CacheLock, ()


class KVTrie:
    """The K/V cache of one model as a trie: sequences with a common prefix share its rows.

    A node is one token after one prefix; its id is the row of the caches that holds its K and V. What nobody holds
    stays cached until its slots are needed, least recently used first.

    Every method takes `lock`, so that threads may share a trie. Whoever plans a forward pass and runs it holds the lock
    for both: growth in between would move the caches away from under the pass.

    Args:
        layers, kv_heads, head_dim: geometry of the model.
        v_dim: head size of V, where it is not that of K (MLA models). None: `head_dim`.
        capacity: slots to begin with.
        grow: double the capacity when held tokens fill it; otherwise raise `CacheFullError`, nothing changed.
        dtype, device: of the caches. `torch.float8_e4m3fn` halves what bf16 takes; queries, K and V are then bf16, fp16
            or fp32, and a number is stored as `x / scale`, rounded to 4 significant bits and at most 448 in size. The
            backends "cuda" and "reference" serve fp8; on a GPU ask for "cuda" by name, or the slow reference runs.
        k_scale, v_scale: `[layers, kv_heads]`, finite and above 0, for fp8 caches only: such that the largest K (V) of
            a head divided by its scale is 448 or less. None: 1, which serves wherever K and V stay below 448.

    Attributes:
        k, v: `[layers, slots, kv_heads, head_dim]`, `[layers, slots, kv_heads, v_dim]`.
        k_scale, v_scale: `[layers, kv_heads]` fp32 of fp8 caches, else None. What is cached was stored with them: write
            into them only while the trie is empty.
        index: the host trie (`saffron_kernels._native.Trie`).
        lock: reentrant; see above.
        reserved: slots set aside by `reserve`.
        unfinished: held nodes whose K and V a forward pass is writing, where its caller cannot be sure to see it fail
            (an interrupt passes by a module's hooks). Unless the caller sets None again, the next `insert` or `advance`
            discards them.

    Raises:
        ValueError, TypeError: a size that is no whole number of at least 1, a dtype that K and V are not stored in, or
        scales that do not fit.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        v_dim: int | None = None,
        capacity: int = 256,
        grow: bool = True,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
    ) -> None:
        v_dim = head_dim if v_dim is None else v_dim
        sizes = {"layers": layers, "kv_heads": kv_heads, "head_dim": head_dim, "v_dim": v_dim, "capacity": capacity}
        for name, size in sizes.items():
            checks.whole(name, size, 1)
            checks.expect(size < 1 << 31, name, size, "less than 2**31")
        stored = dtype == FP8 or (dtype.is_floating_point and dtype.itemsize > 1)
        checks.expect(stored, "dtype", dtype, f"a floating-point dtype of 16 bits or more, or {FP8}")
        self.k_scale, self.v_scale = (
            _scales(name, scale, dtype, layers, kv_heads, device)
            for name, scale in (("k_scale", k_scale), ("v_scale", v_scale))
        )
        self.grow, self.lock, self.reserved = grow, CacheLock(), 0
        self.unfinished: Index | None = None
        self.index = Trie(capacity)
        self.k = torch.zeros(layers, capacity, kv_heads, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros(layers, capacity, kv_heads, v_dim, dtype=dtype, device=device)

    @property
    def capacity(self) -> int:
        """Slots there are."""
        return self.index.capacity

    @property
    def num_nodes(self) -> int:
        """Slots in use: distinct cached prefixes."""
        return self.index.num_nodes

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers."""
        layers, _, kv_heads, head_dim = self.k.shape
        return layers * kv_heads * (head_dim + self.v.shape[3]) * self.k.element_size()

    def insert(self, sequences: Sequence[Sequence[int] | NDArray[np.integer]], outputs: int = 1) -> Prefill:
        """Makes room for the sequences and plans the one forward pass that fills it.

        The last `outputs` tokens of every sequence are among the queries, cached or not, so that their outputs can be
        had. If the forward pass fails, call `release(leaves, discard=True)`: the new nodes have no K and V yet.

        Raises:
            ValueError: an empty sequence, or a token that is negative or beyond int32. TypeError: tokens that are not
            whole numbers: nothing is rounded or parsed.
            CacheFullError: no room, and the trie does not grow.
        """
        if isinstance(sequences, str | bytes) or not isinstance(sequences, Iterable):
            raise TypeError(f"sequences: got a {type(sequences).__name__}, expected a list of token sequences")
        ids = [checks.token_ids(f"sequences[{i}]", sequence) for i, sequence in enumerate(sequences)]
        checks.whole("outputs", outputs, 1)
        with self.lock:
            return self._insert(ids, outputs)

    def _insert(self, sequences: list[NDArray[np.int64]], outputs: int) -> Prefill:
        self.abandon()
        offsets = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
        tokens = np.concatenate([np.empty(0, np.int64), *sequences]).astype(np.int32)
        leaves, cached, new = self._with_room(lambda: self.index.insert(tokens, offsets))
        try:
            return self._prefill(tokens, offsets, outputs, leaves, cached, new)
        except BaseException:
            self.release(leaves, discard=True)
            raise

    def _prefill(
        self,
        tokens: Index,
        offsets: NDArray[np.int64],
        outputs: int,
        leaves: Index,
        cached: NDArray[np.int64],
        new: Index,
    ) -> Prefill:
        ends = np.full((len(leaves), outputs), -1, dtype=np.int32)
        ends[:, -1] = leaves
        if outputs > 1:
            for row, (start, stop) in zip(ends, pairwise(offsets), strict=True):
                nodes = self.index.match(tokens[start:stop])[-outputs:]
                row[-len(nodes) :] = nodes
        queries = np.union1d(new, ends[ends >= 0])
        # Slots ascend along a fresh chain, but reused ones need not: number the queries depth first.
        order, slot, begin, end, depth = self.index.plan(queries)
        queries = queries[order]
        writes = np.where(np.isin(queries, new), queries, -1)
        number = np.empty(self.capacity, dtype=np.int32)
        number[queries] = np.arange(len(queries), dtype=np.int32)
        step = self._step(depth.astype(np.int64), writes, *map(self._to_device, (slot, begin, end)))
        number_of_end = np.where(ends >= 0, number[ends], -1)
        return Prefill(leaves, number_of_end, self._to_device(self.index.tokens(queries)).long(), cached, step)

    def beams(self, leaves: Index) -> tuple[Beams, Index]:
        """Beams that start at held leaves: the beams, and which beam each entry of `leaves` became.

        Equal leaves become one beam and give up the holds they no longer need.
        """
        nodes, first = np.unique(leaves, return_index=True)
        nodes = nodes[np.argsort(first)]  # in the order given, as far as depth-first order allows
        with self.lock:
            self.index.release(np.delete(leaves, first))
            order, slot, begin, end, depth = self.index.plan(nodes)
        nodes = nodes[order]
        number = np.empty(self.capacity, dtype=np.int32)
        number[nodes] = np.arange(len(nodes), dtype=np.int32)
        return Beams(nodes, depth.astype(np.int64), *map(self._to_device, (slot, begin, end))), number[leaves]

    def advance(self, beams: Beams, parents: Index, tokens: Index) -> tuple[Beams, TreeStep]:
        """One search step: beam `parents[j]` continues with `tokens[j]`; beams without children end here.

        The slots of dead prefixes are free at once. `parents` ascends: new beam `j` is numbered by its parent.

        Raises:
            ValueError: parents that descend or do not exist.
            CacheFullError: no room, and the trie does not grow, or memory ends. After both the beams are as they were;
                after any other error they have ended.
        """
        with self.lock:
            self.abandon()
            nodes = self._with_room(lambda: self.index.advance(beams.nodes, parents, tokens))
            try:
                return self._advanced(beams, parents, nodes)
            except BaseException:  # memory ended: the old beams have gone, and nobody will know the new ones
                self.release(nodes, discard=True)
                raise

    def _advanced(self, beams: Beams, parents: Index, nodes: Index) -> tuple[Beams, TreeStep]:
        slot, begin, end = ops.advance_tree(
            beams.slot, beams.begin, beams.end, self._to_device(parents), self._to_device(nodes), len(beams.nodes)
        )
        alive = begin < end
        slot, begin, end = slot[alive], begin[alive], end[alive]
        positions = beams.positions[parents] + 1
        # Two beams may be the same prefix (searches of the same text): it is written once.
        writes = np.full_like(nodes, -1)
        first = np.unique(nodes, return_index=True)[1]
        writes[first] = nodes[first]
        return Beams(nodes, positions, slot, begin, end), self._step(positions, writes, slot, begin, end)

    def reserve(self, slots: int, limit: int | None = None) -> bool:
        """Sets slots aside for what will be cached later, or gives them back (a negative number).

        Whoever reserves what it needs at most, before it begins, never meets a full cache: everybody else on this trie
        has to reserve as well. Returns False, and does nothing, where the slots set aside would exceed the capacity of
        a trie that does not grow, or `limit`. Raises `ValueError` where more is given back than was set aside.
        """
        checks.whole("slots", slots)
        with self.lock:
            limits = [x for x in (limit, None if self.grow else self.capacity) if x is not None]
            if slots > 0 and limits and self.reserved + slots > min(limits):
                return False
            checks.expect(self.reserved + slots >= 0, "slots", slots, f"at least {-self.reserved}")
            self.reserved += slots
            return True

    def release(self, nodes: Index, *, discard: bool = False) -> None:
        """Gives up one hold on each node. `discard` frees what nobody else holds or continues, at once."""
        with self.lock:
            self.index.release(nodes, discard)

    def abandon(self) -> None:
        """Discards the nodes of an unfinished forward pass, if there are any: they have no K and V."""
        nodes, self.unfinished = self.unfinished, None
        if nodes is not None:
            self.release(nodes, discard=True)

    def _step(self, positions: NDArray[np.int64], writes: Index, slot: Tensor, begin: Tensor, end: Tensor) -> TreeStep:
        length = int(positions.max(initial=-1)) + 1
        return TreeStep(self._to_device(positions), self._to_device(writes), slot, begin, end, length)

    def _to_device(self, array: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self.k.device)

    def _with_room(self, change: Callable[[], _T]) -> _T:
        """Runs an all-or-nothing change of the index; doubles the capacity until it fits, where that is allowed."""
        while True:
            try:
                return change()
            except CacheFullError:
                if not self.grow:
                    raise
            try:
                with torch.inference_mode(False):  # caches made in inference mode could not be written outside of it
                    k, v = (torch.cat([x, torch.zeros_like(x)], 1) for x in (self.k, self.v))
                self.index.grow(2 * self.capacity)
            except (MemoryError, RuntimeError) as error:  # a device's memory ends in the latter
                reason = str(error).split("\n")[0]
                raise CacheFullError(
                    f"the cache is full, and {self.capacity} more slots cannot be had: {reason}"
                ) from error
            self.k, self.v = k, v  # last: where memory ends before, nothing has changed


def _scales(
    name: str, given: Tensor | None, dtype: torch.dtype, layers: int, kv_heads: int, device: torch.device | str
) -> Tensor | None:
    """`[layers, kv_heads]` fp32, a copy of those that were given; None for caches that have no scales."""
    if dtype != FP8:
        checks.expect(given is None, name, f"scales for caches in {dtype}", f"none, or dtype={FP8}")
        return None
    if given is None:
        return torch.ones(layers, kv_heads, device=device)
    checks.floating(name, given)
    checks.shape(name, given, [layers, kv_heads])
    scales = given.to(device, torch.float32, copy=True)
    checks.expect(bool(((scales > 0) & scales.isfinite()).all()), name, given.tolist(), "finite numbers above 0")
    return scales
