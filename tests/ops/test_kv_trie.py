"""KVTrie with real K and V: after every step attention over the trie is that of every sequence alone, in fp64."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kv_model import (
    Path,
    advance,
    attend,
    forward,
    insert,
    ints,
    new_trie,
    poison_free_slots,
    prefixes,
    rows,
    start,
    state_of,
)

from saffron_kernels import Beams, CacheFullError, KVTrie, gather_kv
from saffron_kernels import backend as use_backend

OP = "tree_attention"


class Searches(RuleBasedStateMachine):
    """Prefills and searches that come and go on one trie, in any order; two may share prefixes."""

    grow = True

    @initialize(capacity=st.integers(1, 24))
    def begin(self, capacity: int) -> None:
        self.trie = new_trie(capacity=capacity, grow=self.grow)
        self.waiting: list[tuple[int, Path]] = []  # held leaves that no search has taken yet
        self.searches: list[tuple[Beams, list[Path]]] = []
        poison_free_slots(self.trie)

    def live(self) -> list[Path]:
        return [path for _, path in self.waiting] + [path for _, paths in self.searches for path in paths]

    def attempt(self, change):
        """Runs a change; a full cache must leave everything as it was."""
        before = state_of(self.trie)
        try:
            return change()
        except CacheFullError:
            assert not self.grow
            assert state_of(self.trie) == before
            return None

    tokens = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)

    @rule(data=st.data(), sequences=st.lists(tokens, min_size=0, max_size=3))
    def prefill(self, data: st.DataObject, sequences: list[Path]) -> None:
        if self.live() and data.draw(st.booleans()):  # a continuation of something live
            sequences = [*sequences, data.draw(st.sampled_from(self.live())) + data.draw(self.tokens)]
        leaves = self.attempt(lambda: insert(self.trie, sequences))
        if leaves is not None:
            self.waiting += zip(leaves.tolist(), sequences, strict=True)

    @precondition(lambda self: self.waiting and len(self.searches) < 3)
    @rule()
    def search(self) -> None:
        leaves, sequences = zip(*self.waiting, strict=True)
        self.searches.append(start(self.trie, ints(leaves), sequences))
        self.waiting = []

    @precondition(lambda self: self.searches)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        which = data.draw(st.integers(0, len(self.searches) - 1))
        beams, paths = self.searches[which]
        few = st.lists(st.integers(0, 3), max_size=3)
        children = [(p, t) for p in range(len(paths)) for t in data.draw(few)] if len(paths) < 9 else [(0, 1), (3, 0)]
        grown = self.attempt(lambda: advance(self.trie, beams, paths, children))
        if grown is not None:
            self.searches[which] = grown

    @precondition(lambda self: self.searches)
    @rule(data=st.data(), discard=st.booleans())
    def end(self, data: st.DataObject, discard: bool) -> None:
        beams, _ = self.searches.pop(data.draw(st.integers(0, len(self.searches) - 1)))
        self.trie.release(beams.nodes, discard=discard)

    @precondition(lambda self: self.waiting)
    @rule(discard=st.booleans())
    def give_up(self, discard: bool) -> None:
        node, _ = self.waiting.pop()
        self.trie.release(ints([node]), discard=discard)
        poison_free_slots(self.trie)

    @invariant()
    def holds_the_live_prefixes(self) -> None:
        assert self.trie.index.num_held == len(prefixes(self.live()))
        assert self.trie.num_nodes <= self.trie.capacity == self.trie.k.shape[1] == self.trie.v.shape[1]

    @invariant()
    def every_cached_row_is_its_own(self) -> None:
        for node in self.trie.index.snapshot()["node"].tolist():
            k, v, _ = rows(tuple(self.trie.index.path(node).tolist()))
            assert torch.equal(self.trie.k[:, node], k) and torch.equal(self.trie.v[:, node], v)

    @invariant()
    def every_search_still_sees_its_own(self) -> None:
        for beams, paths in self.searches:
            attend(self.trie, beams, paths)


class SearchesInFixedMemory(Searches):
    grow = False


Searches.TestCase.settings = settings(max_examples=25, stateful_step_count=15)
SearchesInFixedMemory.TestCase.settings = settings(max_examples=25, stateful_step_count=15)
TestSearches = Searches.TestCase
TestSearchesInFixedMemory = SearchesInFixedMemory.TestCase


# --- a search as it is run -------------------------------------------------------------------------------------------


def random_children(rng: random.Random, beams: int, width: int) -> list[tuple[int, int]]:
    return sorted({(rng.randrange(beams), rng.randrange(40)) for _ in range(width)})


@pytest.mark.parametrize("width", [1, 5, 8])
def test_search(width, backend, limit, dtype, device) -> None:
    """A batch of prompts, searched on each backend and in each dtype."""
    rng = random.Random(width)
    prompts = [(1, 2, 3, 4, 5), (1, 2, 9), (7, 8, 9, 10, 11, 12)]
    trie = new_trie(dtype, device, capacity=4)
    beams, paths = start(trie, insert(trie, prompts), prompts)
    for _ in range(1 if limit < 1 << 30 else 5):
        beams, paths = advance(trie, beams, paths, random_children(rng, len(paths), 3 * width))


def shared(a: Path, b: Path) -> int:
    """Length of the longest common prefix."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def saved(order: Sequence[Path]) -> int:
    """Tokens that neighbours share, summed."""
    return sum(shared(a, b) for a, b in itertools.pairwise(order))


@pytest.mark.parametrize("width", [1, 4, 32])
def test_proposition_2(width) -> None:
    """A search holds sum |s| - max over orders of sum LCP(neighbours): one row for each distinct live prefix.

    The maximum is that of the lexicographic order. A cache of exactly the largest such number is enough for the search.
    """
    rng = random.Random(width)
    prompts = [(1, 2, 3, 4, 5, 6), (1, 2, 3, 9)]
    recorded, held = [], []
    trie = new_trie(capacity=8)
    beams, _ = trie.beams(trie.insert(prompts).leaves)
    paths = sorted(prompts)
    for _ in range(24):
        children = random_children(rng, len(paths), width)
        beams, _ = trie.advance(beams, ints([p for p, _ in children]), ints([t for _, t in children]))
        paths = [(*paths[p], t) for p, t in children]
        bound = sum(map(len, paths)) - saved(sorted(paths))
        assert trie.num_nodes == trie.index.num_held == len(prefixes(paths)) == bound
        assert all(saved(rng.sample(paths, len(paths))) <= saved(sorted(paths)) for _ in range(5))
        recorded.append(children)
        held.append(bound)
    assert max(held) < sum(map(len, paths)) or width == 1

    fixed = new_trie(capacity=max(*held, len(prefixes(prompts))), grow=False)
    beams, _ = fixed.beams(fixed.insert(prompts).leaves)
    for children in recorded:
        beams, _ = fixed.advance(beams, ints([p for p, _ in children]), ints([t for _, t in children]))

    short = new_trie(capacity=max(held) - 1, grow=False)
    with pytest.raises(CacheFullError):
        beams, _ = short.beams(short.insert(prompts).leaves)
        for children in recorded:
            beams, _ = short.advance(beams, ints([p for p, _ in children]), ints([t for _, t in children]))


def test_advance_plans_as_the_host_does() -> None:
    """In an ordinary search the two plans are the same three arrays, up to the order of tokens."""
    rng = random.Random(5)
    trie = new_trie()
    prompts = [(1, 2, 3), (1, 2, 4, 5), (6,)]
    beams, number = trie.beams(trie.insert(prompts).leaves)
    for _ in range(12):
        children = random_children(rng, len(beams.nodes), 9)
        beams, _ = trie.advance(beams, ints([p for p, _ in children]), ints([t for _, t in children]))
        order, *host, depth = trie.index.plan(beams.nodes)
        assert order.tolist() == list(range(len(beams.nodes))) and depth.tolist() == beams.positions.tolist()
        ours = [x.tolist() for x in (beams.slot, beams.begin, beams.end)]
        assert sorted(zip(*ours, strict=True)) == sorted(zip(*(x.tolist() for x in host), strict=True))


# --- single behaviours -----------------------------------------------------------------------------------------------


def test_insert_of_what_is_cached_runs_the_last_token_only() -> None:
    trie = new_trie()
    insert(trie, [(1, 2, 3, 4)])
    again = trie.insert([(1, 2, 3, 4), (1, 2)])
    assert again.cached.tolist() == [4, 2] and sorted(again.tokens.tolist()) == [2, 4]
    assert again.step.write_slots.tolist() == [-1, -1] and trie.num_nodes == 4


def test_outputs_of_several_last_tokens() -> None:
    """They are queries although they are cached, and see what they saw when they were not."""
    trie = new_trie()
    insert(trie, [(1, 2, 3, 4)])
    texts = [(1, 2, 3, 4, 5), (1, 2), (1, 7, 8, 9)]
    filled = trie.insert([np.array(text) for text in texts], outputs=3)
    paths = [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 4, 5), (1, 7), (1, 7, 8), (1, 7, 8, 9)]
    found = [[-1 if q < 0 else int(filled.tokens[q]) for q in row] for row in filled.outputs]
    assert found == [[3, 4, 5], [-1, 1, 2], [7, 8, 9]] and filled.last.tolist() == filled.outputs[:, -1].tolist()
    assert (filled.step.write_slots >= 0).sum() == 4  # 5, and 7 8 9
    forward(trie, filled.step, paths)  # depth first, as they are listed


def test_insert_of_nothing() -> None:
    for outputs in (1, 3):
        filled = new_trie().insert([], outputs)
        assert filled.tokens.numel() == 0 and filled.step.length == 0 and filled.outputs.shape == (0, outputs)


def test_equal_sequences_are_one_beam() -> None:
    trie = new_trie()
    leaves = insert(trie, [(1, 2), (3,), (1, 2)])
    beams, number = trie.beams(leaves)
    assert len(beams.nodes) == 2 and number[0] == number[2] != number[1]
    trie.release(beams.nodes, discard=True)
    assert trie.num_nodes == 0  # no hold is left over


def test_failed_pass_can_be_discarded() -> None:
    trie = new_trie()
    kept = insert(trie, [(1, 2, 3)])
    filled = trie.insert([(1, 2, 5, 6), (7,)])
    trie.release(filled.leaves, discard=True)
    assert trie.num_nodes == 3 and trie.index.num_held == 3
    trie.release(kept)
    assert trie.num_nodes == 3 and trie.index.num_held == 0  # cached until its slots are needed


def test_an_unfinished_pass_is_discarded_by_the_next_change() -> None:
    trie = new_trie()
    beams, paths = start(trie, insert(trie, [(1, 2, 3)]), [(1, 2, 3)])
    trie.unfinished = trie.insert([(1, 2, 5, 6)]).leaves
    assert trie.insert([(1, 2, 5, 7)]).cached.tolist() == [2]  # 5 has no K and V
    trie.unfinished = trie.insert([(8, 9)]).leaves
    advance(trie, beams, paths, [(0, 4)])
    assert len(trie.index.match(ints([8, 9]))) == 0 and trie.unfinished is None
    trie.abandon()  # nothing is unfinished


def test_caches_that_grew_in_inference_mode_can_be_written_outside_of_it() -> None:
    trie = new_trie(capacity=1)
    with torch.inference_mode():
        trie.insert([(1, 2, 3)])
    insert(trie, [(4, 5)])
    assert not trie.k.is_inference() and not trie.v.is_inference()


def test_growth_keeps_every_row() -> None:
    trie = new_trie(capacity=2)
    leaves = insert(trie, [(1, 2)])
    before = trie.k[:, :2].clone()
    insert(trie, [tuple(range(50, 90))])
    assert trie.capacity >= 42 and torch.equal(trie.k[:, :2], before) and trie.k.shape[1] == trie.capacity
    start(trie, leaves, [(1, 2)])


def test_full_cache_changes_nothing() -> None:
    trie = new_trie(capacity=4, grow=False)
    beams, paths = start(trie, insert(trie, [(1, 2, 3)]), [(1, 2, 3)])
    before = state_of(trie)
    with pytest.raises(CacheFullError):
        trie.insert([(1, 2), (5, 6)])
    with pytest.raises(CacheFullError):
        trie.advance(beams, ints([0, 0]), ints([1, 2]))
    assert state_of(trie) == before
    advance(trie, beams, paths, [(0, 9)])  # and the search goes on where there is room


def test_gather_of_a_beam_is_its_contiguous_cache() -> None:
    trie = new_trie()
    path = (4, 5, 6)
    leaves = insert(trie, [path, (4, 5, 9)])
    slots = torch.from_numpy(trie.index.plan(leaves[:1])[1])[None]
    with use_backend("reference"):
        k, v = gather_kv(trie.k[1], trie.v[1], slots)
    for n in range(3):
        expected_k, expected_v, _ = rows(path[: n + 1])
        assert torch.equal(k[0, :, n], expected_k[1]) and torch.equal(v[0, :, n], expected_v[1])


def test_bytes_per_token() -> None:
    trie = KVTrie(3, 2, 5, capacity=7, dtype=torch.bfloat16)
    assert trie.bytes_per_token == 3 * 2 * 5 * 2 * 2 and 7 * trie.bytes_per_token == trie.k.nbytes + trie.v.nbytes


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda trie, beams: trie.insert([(1,), ()]), r"sequences\[1\]"),
        (lambda trie, beams: trie.insert([(1,)], outputs=0), "outputs: got 0"),
        (lambda trie, beams: trie.insert([(1, -4)]), "sequences"),
        (lambda trie, beams: trie.insert([(1, 2**31)]), "sequences"),
        (lambda trie, beams: trie.advance(beams, ints([1, 0]), ints([5, 6])), "parents"),
        (lambda trie, beams: trie.advance(beams, ints([2]), ints([5])), "parents"),
        (lambda trie, beams: trie.advance(beams, ints([-1]), ints([5])), "parents"),
        (lambda trie, beams: trie.advance(beams, ints([0]), ints([-5])), "tokens"),
        (lambda trie, beams: trie.advance(beams, ints([0, 1]), ints([5])), "tokens|parents"),
        (lambda trie, beams: trie.release(ints([99])), "nodes"),
    ],
)
def test_errors_change_nothing(call, message) -> None:
    trie = new_trie(capacity=16)
    beams, _ = trie.beams(insert(trie, [(1, 2), (3,)]))
    before = state_of(trie)
    with pytest.raises(ValueError, match=message):
        call(trie, beams)
    assert state_of(trie) == before


@pytest.mark.parametrize("name", ["layers", "kv_heads", "head_dim", "capacity"])
def test_sizes_below_one(name) -> None:
    sizes = {"layers": 1, "kv_heads": 1, "head_dim": 1, "capacity": 1} | {name: 0}
    with pytest.raises(ValueError, match=f"{name}: got 0, expected at least 1"):
        KVTrie(sizes["layers"], sizes["kv_heads"], sizes["head_dim"], capacity=sizes["capacity"])
