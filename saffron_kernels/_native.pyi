"""Native parts of saffron_kernels (csrc/bindings.cpp).

Arrays are 1-D numpy arrays of exactly the dtype that is named; any other argument is a `TypeError`. Every call does all
of its work or raises and changes nothing.
"""

from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

_Int32 = NDArray[np.int32]
_Int64 = NDArray[np.int64]

cpu: Any  # the ops in C++, as saffron_kernels/backends/cpu.py calls them

class CacheFullError(RuntimeError):
    """More slots are needed than are free or can be evicted; the message has all the numbers."""

class TrieSnapshot(TypedDict):
    node: _Int32
    parent: _Int32
    token: _Int32
    holds: _Int32
    used: _Int64

class Trie:
    """Index of cached tokens: a forest in which one node is one token and the node's id is the token's KV slot.

    A node is *held* while somebody holds it or a node below it; what is held is never evicted. A node is *used* when a
    call names it or a sequence that runs through it (`match`, `insert`, `extend`, `advance`, `hold`, `release`; within
    a call a later entry counts as used later). When slots run out, leaves that are not held are evicted, the least
    recently used first. New nodes take the lowest free slots.

    `ValueError` names the argument: ids that are no cached node, negative tokens, lengths or offsets that do not fit.
    `CacheFullError` leaves nodes, holds and the order of eviction as they were. Not thread-safe without the GIL.
    """

    def __init__(self, capacity: int) -> None:
        """A forest of at most `capacity` nodes (0 to 2**31 - 1).

        36 bytes are reserved for each; `plan` keeps 24 more for each node that there was.
        """

    @property
    def capacity(self) -> int: ...
    @property
    def num_nodes(self) -> int:
        """Cached tokens = different prefixes."""

    @property
    def num_free(self) -> int:
        """`capacity - num_nodes`."""

    @property
    def num_held(self) -> int:
        """Nodes that are held, themselves or for a node below: different live prefixes. The others can be evicted."""

    def grow(self, capacity: int) -> None:
        """Raises the number of slots; every node keeps its own."""

    def match(self, tokens: _Int32) -> _Int32:
        """Slots of the longest cached prefix of `tokens` [n], in order: [m], m <= n. Holds nothing."""

    def insert(self, tokens: _Int32, offsets: _Int64) -> tuple[_Int32, _Int64, _Int32]:
        """Caches n sequences at once; sequence i is `tokens[offsets[i]:offsets[i + 1]]`. Each leaf gets one hold.

        Nothing on the path of one of the sequences is evicted to make room for another.

        Returns:
            leaves: int32 [n], the node of each sequence's last token; -1 (without a hold) for an empty sequence.
            matched: int64 [n], how many tokens of each sequence were cached before the call.
            new: int32 [k], the nodes that were created, parents before children.
        """

    def extend(self, parents: _Int32, tokens: _Int32) -> _Int32:
        """The child of `parents[i]` (-1: the root) by `tokens[i]`, found or created, for every entry: int32 [m].

        Each entry adds one hold to its child. Several entries with one parent fork it; equal entries return one node
        that is then held twice.
        """

    def advance(self, nodes: _Int32, parents: _Int32, tokens: _Int32) -> _Int32:
        """One step of a beam search: child j extends `nodes[parents[j]]` by `tokens[j]`, and the old holds go.

        Nodes without a child in this step are released with `discard` first, so that their slots serve the children at
        once; then the children are made as by `extend`; then the other old nodes lose their hold. At no time are there
        more nodes than different live prefixes. A child that is cached already is kept, even if `nodes` names it.

        Args:
            nodes: int32 [N], the old beams, each held once for every time it is named.
            parents: int32 [M], indices into `nodes`, ascending.
            tokens: int32 [M].

        Returns:
            int32 [M], the new beams, held.
        """

    def hold(self, nodes: _Int32) -> None:
        """Adds one hold for every entry."""

    def release(self, nodes: _Int32, discard: bool = False) -> None:
        """Takes one hold for every entry; `ValueError` if a node has fewer.

        Without `discard` the nodes stay cached until they are evicted. With it, nodes that nobody holds and that have
        no children go at once, and their ancestors for as long as the same is true of them.
        """

    def evict(self, count: int) -> int:
        """Evicts up to `count` nodes; returns how many it were."""

    def clear(self) -> int:
        """Evicts all that is not held; returns how many nodes it were."""

    def plan(self, queries: _Int32) -> tuple[_Int32, _Int32, _Int32, _Int32, _Int32]:
        """Numbers `queries` [n] (different nodes) in preorder and lists what each sees: itself and its ancestors.

        Siblings stand in the order of the first query of the input that lies at or below them: an input that is in
        depth-first order already keeps its order. O(T) time.

        Returns:
            order: int32 [n], the index into `queries` of each query number.
            slot: int32 [T], every node at or above a query, once, in preorder.
            begin, end: int32 [T], query q sees token t if and only if `begin[t] <= q < end[t]`; begin is ascending.
            depth: int32 [n], the number of ancestors of each query number: its position in the text.
        """

    def path(self, node: int) -> _Int32:
        """Tokens from the root to `node`."""

    def tokens(self, nodes: _Int32) -> _Int32:
        """Token of each node."""

    def parents(self, nodes: _Int32) -> _Int32:
        """Parent of each node, -1 for a root."""

    def snapshot(self) -> TrieSnapshot:
        """All nodes, ascending, with parent, token, holds and the time they were last named (0: only a path's part)."""
