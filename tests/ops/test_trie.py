"""The host trie against a dictionary of prefixes, and its plans against brute force."""

from __future__ import annotations

import time
from random import Random

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from trie_dictionary import Full, Model, Prefix, check_plan, dump, flat, ints, paths_of, prefixes, some_sequences

from saffron_kernels._native import CacheFullError, Trie

RANDOM = st.randoms(use_true_random=True)  # one draw a step: hypothesis chooses the steps, this fills them in


class TrieMachine(RuleBasedStateMachine):
    """Drives a small cache, which is full most of the time, and the model side by side."""

    @initialize(capacity=st.integers(0, 12))
    def start(self, capacity: int) -> None:
        self.trie, self.model = Trie(capacity), Model(capacity)

    def slots(self) -> dict[Prefix, int]:
        return {path: node for node, path in paths_of(self.trie).items()}

    def pick(self, random: Random, only_held: bool = False, most: int = 5) -> list[Prefix]:
        """Some cached prefixes, in any order; with `only_held` none more often than it is held."""
        pool = [n for n in sorted(self.model.holds) for _ in range(self.model.holds[n] if only_held else 2)]
        return random.sample(pool, random.randint(min(len(pool), 1), min(len(pool), most)))

    def both(self, on_trie, on_model):
        """Results of the two, or None if both say that the cache is full; then nothing may have changed."""
        before = dump(self.trie)
        try:
            expected = on_model()
        except Full:
            with pytest.raises(CacheFullError, match=f"capacity {self.trie.capacity}"):
                on_trie()
            assert dump(self.trie) == before
            return None
        return on_trie(), expected

    @rule(random=RANDOM)
    @precondition(lambda self: self.model.holds)
    def match(self, random: Random) -> None:
        slots = self.slots()
        for tokens in some_sequences(random, 3, 5):
            expected = [slots[p] for p in prefixes(tokens)[: self.model.match(tokens)]]
            assert self.trie.match(ints(tokens)).tolist() == expected

    @rule(random=RANDOM, keep=st.booleans())
    def insert(self, random: Random, keep: bool) -> None:
        sequences = some_sequences(random, 3, 5)
        outcome = self.both(lambda: self.trie.insert(*flat(sequences)), lambda: self.model.insert(sequences))
        if outcome is None:
            return
        (leaves, matched, created), (expected_matched, new) = outcome
        slots = {(): -1, **self.slots()}
        assert matched.tolist() == expected_matched
        assert leaves.tolist() == [slots[s] for s in sequences]
        assert len(created) == len(new) and {slots[p] for p in new} == set(created.tolist())
        paths = paths_of(self.trie)
        rank = {paths[node]: i for i, node in enumerate(created.tolist())}
        assert all(rank[p[:-1]] < rank[p] for p in rank if p[:-1] in rank)
        if not keep:  # so that there is something to evict
            self.trie.release(leaves[leaves >= 0])
            self.model.release([s for s in sequences if s], discard=False)

    @rule(random=RANDOM, roots=st.integers(0, 2))
    def extend(self, random: Random, roots: int) -> None:
        parents = [*self.pick(random), *[()] * roots]
        ends = [(*parent, random.randrange(3)) for parent in parents]
        slots = {(): -1, **self.slots()}
        arguments = ints(slots[p] for p in parents), ints(end[-1] for end in ends)
        outcome = self.both(lambda: self.trie.extend(*arguments), lambda: self.model.extend(ends))
        if outcome is not None:
            after = self.slots()
            assert outcome[0].tolist() == [after[end] for end in ends]

    @rule(random=RANDOM)
    @precondition(lambda self: any(self.model.holds.values()))
    def advance(self, random: Random) -> None:
        nodes = self.pick(random, only_held=True)
        parents = sorted(random.choices(range(len(nodes)), k=random.randint(0, 5))) if nodes else []
        tokens = [random.randrange(3) for _ in parents]
        slots = self.slots()
        arguments = ints(slots[n] for n in nodes), ints(parents), ints(tokens)
        outcome = self.both(lambda: self.trie.advance(*arguments), lambda: self.model.advance(nodes, parents, tokens))
        if outcome is not None:
            after = self.slots()
            assert outcome[0].tolist() == [after[end] for end in outcome[1]]

    @rule(random=RANDOM)
    @precondition(lambda self: self.model.holds)
    def hold(self, random: Random) -> None:
        nodes, slots = self.pick(random, most=2), self.slots()
        self.trie.hold(ints(slots[n] for n in nodes))
        for node in nodes:
            self.model.holds[node] += 1
            self.model.use(node)

    @rule(random=RANDOM, discard=st.booleans())
    @precondition(lambda self: any(self.model.holds.values()))
    def release(self, random: Random, discard: bool) -> None:
        nodes, slots = self.pick(random, only_held=True), self.slots()
        self.trie.release(ints(slots[n] for n in nodes), discard=discard)
        self.model.release(nodes, discard)

    @rule(random=RANDOM)
    @precondition(lambda self: self.model.holds)
    def release_too_often(self, random: Random) -> None:
        """The last entry is one too many, so the holds of those before it have to come back."""
        nodes, slots, before = self.pick(random, only_held=True), self.slots(), dump(self.trie)
        spent = [n for n in self.model.holds if self.model.holds[n] == nodes.count(n)]
        if spent:
            with pytest.raises(ValueError, match=r"nodes\[\d+\] = \d+: is not held"):
                self.trie.release(ints(slots[n] for n in [*nodes, spent[0]]))
            assert dump(self.trie) == before

    @rule(count=st.sampled_from([0, 1, 1, 2, 3, None]))
    @precondition(lambda self: self.model.holds)
    def evict(self, count: int | None) -> None:
        if count is None:
            assert self.trie.clear() == self.model.evict(len(self.model.holds))
            assert self.trie.num_nodes == self.trie.num_held
        else:
            assert self.trie.evict(count) == self.model.evict(count)

    @rule(more=st.integers(0, 2))
    def grow(self, more: int) -> None:
        self.model.capacity += more
        self.trie.grow(self.model.capacity)

    @rule(random=RANDOM)
    @precondition(lambda self: self.model.holds)
    def plan(self, random: Random) -> None:
        slots = self.slots()
        queries = list(dict.fromkeys(slots[n] for n in self.pick(random, most=10)))
        before = dump(self.trie)
        check_plan(self.trie, queries)
        assert dump(self.trie) == before

    @invariant()
    def same_state(self) -> None:
        if not hasattr(self, "trie"):
            return
        trie, model = self.trie, self.model
        snapshot, paths = trie.snapshot(), paths_of(trie)
        nodes = snapshot["node"].tolist()
        assert len(set(paths.values())) == len(nodes)  # no prefix twice
        assert nodes == sorted(set(nodes)) and all(0 <= n < trie.capacity for n in nodes)
        assert dict(zip((paths[n] for n in nodes), snapshot["holds"].tolist(), strict=True)) == model.holds
        assert trie.capacity == model.capacity and trie.num_nodes == len(model.holds)
        assert trie.num_free == model.free
        assert trie.num_held == sum(map(model.held, model.holds))
        # A node's own time counts for its whole path.
        own = dict(zip((paths[n] for n in nodes), snapshot["used"].tolist(), strict=True))
        used = {p: max(t for q, t in own.items() if q[: len(p)] == p) for p in own}
        assert used == model.used


TestTrieAgainstDictionary = TrieMachine.TestCase
TestTrieAgainstDictionary.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


def test_beam_search_holds_the_distinct_live_prefixes_and_no_more() -> None:
    """Proposition 2's space bound: a cache of exactly that size never overflows, at any step."""
    random = np.random.default_rng(0)
    prompt, width = tuple(range(20)), 8
    beams: list[Prefix] = [prompt]
    trie, reference = Trie(20), Trie(10_000)
    nodes, _, _ = trie.insert(*flat([prompt]))
    same, _, _ = reference.insert(*flat([prompt]))
    for _ in range(60):
        parents = np.sort(random.integers(0, len(beams), width))
        chosen = sorted({(int(p), int(t)) for p, t in zip(parents, random.integers(0, 50, width), strict=True)})
        beams = [(*beams[p], t) for p, t in chosen]
        live = {prefix for beam in beams for prefix in prefixes(beam)}
        trie.grow(max(trie.capacity, len(live)))
        step = ints(p for p, _ in chosen), ints(t for _, t in chosen)
        nodes, same = trie.advance(nodes, *step), reference.advance(same, *step)
        assert trie.num_nodes == trie.num_held == reference.num_nodes == len(live)
        assert [tuple(trie.path(int(n)).tolist()) for n in nodes] == beams
    trie.release(nodes, discard=True)
    assert trie.num_nodes == 0


def test_advance_reuses_the_slots_of_dead_beams_when_the_cache_is_full() -> None:
    trie = Trie(3)
    (root,) = trie.extend(ints([-1]), ints([0]))
    beams = trie.extend(ints([root, root]), ints([1, 2]))
    trie.release(ints([root]))
    before = dump(trie)
    with pytest.raises(CacheFullError, match="2 slots needed, 0 free, 1 can be evicted, capacity 3"):
        trie.advance(beams, ints([0, 0]), ints([5, 6]))
    assert dump(trie) == before
    (child,) = trie.advance(beams, ints([0]), ints([5]))
    assert trie.path(child).tolist() == [0, 1, 5] and trie.num_nodes == 3


def test_eviction_takes_the_least_recently_used_leaf_first() -> None:
    trie = Trie(6)
    leaves, _, _ = trie.insert(*flat([(0, 1), (0, 2), (3, 4)]))
    trie.release(leaves)
    assert trie.match(ints([0, 1])).size == 2  # now (0, 2) is the oldest, then (3, 4)
    gone = []
    for _ in range(5):
        before = set(paths_of(trie).values())
        assert trie.evict(1) == 1
        gone += before - set(paths_of(trie).values())
    assert gone == [(0, 2), (3, 4), (3,), (0, 1), (0,)]


def test_insert_never_evicts_its_own_paths() -> None:
    trie = Trie(4)
    leaves, _, _ = trie.insert(*flat([(1, 2), (3, 4)]))
    trie.release(leaves)
    # (1, 2) is the oldest, but it is the beginning of what comes now.
    _, matched, _ = trie.insert(*flat([(1, 2, 5)]))
    assert matched.tolist() == [2] and set(paths_of(trie).values()) == {(1,), (1, 2), (1, 2, 5), (3,)}


def test_extend_never_evicts_the_parents() -> None:
    trie = Trie(2)
    nodes = trie.extend(ints([-1, -1]), ints([1, 2]))
    trie.release(nodes)
    (child,) = trie.extend(nodes[:1], ints([3]))  # the oldest leaf is the parent
    assert trie.path(child).tolist() == [1, 3] and trie.num_nodes == 2


def test_equal_entries_of_extend_are_one_node_held_twice() -> None:
    trie = Trie(4)
    first, second = trie.extend(ints([-1, -1]), ints([3, 3]))
    assert first == second and trie.num_nodes == 1
    trie.release(ints([first]), discard=True)
    assert trie.num_nodes == 1
    trie.release(ints([first]), discard=True)
    assert trie.num_nodes == 0


@pytest.mark.parametrize("unused", [0, 1, 3])
@pytest.mark.parametrize(("small", "large"), [(4, 4), (4, 5000), (63, 64), (64, 65), (100, 5000), (4096, 4097)])
def test_grow_keeps_every_slot(small: int, large: int, unused: int) -> None:
    """Sizes on both sides of those where the set of free slots gets one more level."""
    trie = Trie(small)
    (leaf,), _, _ = trie.insert(*flat([range(small - unused)]))
    before = trie.snapshot()
    trie.grow(large)
    assert all((trie.snapshot()[key] == before[key]).all() for key in before)
    assert trie.num_free == large - small + unused
    _, _, created = trie.insert(*flat([range(1, trie.num_free + 1)]))
    assert sorted([*before["node"], *created]) == list(range(large)) and trie.num_free == 0
    assert trie.path(leaf).tolist() == list(range(small - unused))


def test_ten_thousand_children_of_one_node_are_found_fast() -> None:
    count = 10_000
    trie = Trie(count + 1)
    (root,) = trie.extend(ints([-1]), ints([0]))
    started = time.perf_counter()
    children = trie.extend(np.full(count, root, np.int32), np.arange(count, dtype=np.int32))
    found = [trie.match(ints([0, t]))[1] for t in range(count)]
    trie.release(children, discard=True)
    # About 30 ms; a walk through the siblings would take minutes' worth of comparisons, 10**8 and more.
    assert time.perf_counter() - started < 3
    assert found == children.tolist() and trie.num_nodes == 1


def test_a_million_tokens() -> None:
    count = 1_000_000
    tokens = np.random.default_rng(0).integers(0, 128_256, count, dtype=np.int32)
    trie = Trie(count)
    leaves, matched, created = trie.insert(tokens, np.array([0, count]))
    assert matched.tolist() == [0] and len(created) == trie.num_held == count
    assert (trie.tokens(created) == tokens).all() and (trie.parents(created)[1:] == created[:-1]).all()
    assert (trie.match(tokens) == created).all()
    order, slot, begin, end, depth = trie.plan(created)
    steps = np.arange(count)
    assert (order == steps).all() and (depth == steps).all() and (slot == created).all()
    assert (begin == steps).all() and (end == count).all()
    trie.release(leaves)
    half = count // 2
    fork, matched, created = trie.insert(np.append(tokens[:half], ints([-1 & 0x7FFFFFFF])), np.array([0, half + 1]))
    assert matched.tolist() == [half] and trie.num_nodes == count and trie.evict(count) == count - half - 1
    trie.release(fork, discard=True)
    assert trie.num_nodes == 0 and trie.num_free == count


def some_trie() -> Trie:
    trie = Trie(8)
    trie.insert(*flat([(1, 2), (1, 3)]))  # nodes 0, 1 and 0, 2
    return trie


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t.match(ints([1, -2])), r"tokens\[1\] = -2: has to be >= 0"),
        (lambda t: t.insert(ints([1, -1]), np.array([0, 2])), r"tokens\[1\] = -1"),
        (lambda t: t.insert(ints([1, 2]), np.array([0, 1])), r"offsets: has to run from 0 to len\(tokens\) = 2"),
        (lambda t: t.insert(ints([1, 2]), np.array([1, 2])), "offsets: has to run from 0"),
        (lambda t: t.insert(ints([1, 2]), np.array([0, 2, 1, 2])), r"offsets\[2\] = 1: has to be >="),
        (lambda t: t.insert(ints([]), np.array([], dtype=np.int64)), "offsets: needs at least one entry"),
        (lambda t: t.extend(ints([0]), ints([1, 2])), "parents and tokens have to be equally long, got 1 and 2"),
        (lambda t: t.extend(ints([-2]), ints([1])), r"parents\[0\] = -2: is no cached node"),
        (lambda t: t.extend(ints([0, 3]), ints([1, 1])), r"parents\[1\] = 3: is no cached node"),
        (lambda t: t.extend(ints([0]), ints([-1])), r"tokens\[0\] = -1"),
        (lambda t: t.advance(ints([1, 8]), ints([0]), ints([1])), r"nodes\[1\] = 8: is no cached node"),
        (lambda t: t.advance(ints([1, 2]), ints([2]), ints([1])), r"parents\[0\] = 2: has to be an index into nodes"),
        (lambda t: t.advance(ints([1, 2]), ints([1, 0]), ints([1, 1])), r"parents\[1\] = 0: has to be >="),
        (lambda t: t.advance(ints([1, 2]), ints([0]), ints([-1])), r"tokens\[0\] = -1"),
        (lambda t: t.advance(ints([1, 0]), ints([0]), ints([1])), r"nodes\[1\] = 0: is not held"),
        (lambda t: t.hold(ints([1, 5])), r"nodes\[1\] = 5: is no cached node"),
        (lambda t: t.release(ints([1, -1])), r"nodes\[1\] = -1: is no cached node"),
        (lambda t: t.release(ints([1, 1])), r"nodes\[1\] = 1: is not held as often as it is named"),
        (lambda t: t.evict(-1), "count = -1: has to be >= 0"),
        (lambda t: t.plan(ints([1, 2, 1])), r"queries\[2\] = 1: is there twice"),
        (lambda t: t.plan(ints([1, 7])), r"queries\[1\] = 7: is no cached node"),
        (lambda t: t.path(-1), r"node\[0\] = -1: is no cached node"),
        (lambda t: t.tokens(ints([6])), r"nodes\[0\] = 6: is no cached node"),
        (lambda t: t.parents(ints([6])), r"nodes\[0\] = 6: is no cached node"),
        (lambda t: t.grow(7), "capacity = 7: has to be between 8 and 2147483647"),
        (lambda t: t.grow(2**31), "capacity = 2147483648"),
        (lambda t: Trie(-1), "capacity = -1: has to be between 0"),
    ],
)
def test_a_wrong_value_is_named_and_changes_nothing(call, message: str) -> None:
    trie = some_trie()
    before = dump(trie)
    with pytest.raises(ValueError, match=message):
        call(trie)
    assert dump(trie) == before
    check_plan(trie, [2, 0, 1])  # the scratch of a plan that was refused is clean


@pytest.mark.parametrize("wrong", [[1, 2], np.zeros(2), np.zeros((1, 2), np.int32), np.zeros(2, np.int64), None])
def test_arrays_are_never_converted_in_silence(wrong) -> None:
    with pytest.raises(TypeError, match="tokens has to be a 1-D numpy array of int32, got"):
        some_trie().match(wrong)


def test_strided_arrays_are_read_as_they_look() -> None:
    assert some_trie().match(ints([1, 9, 3, 9])[::2]).tolist() == [0, 2]


def test_cache_full_is_a_runtime_error_with_all_the_numbers() -> None:
    trie = some_trie()
    trie.release(ints([2]))
    message = "the cache is full: 9 slots needed, 5 free, 1 can be evicted, capacity 8"
    with pytest.raises(RuntimeError, match=message):
        trie.insert(*flat([range(10, 19)]))
    assert issubclass(CacheFullError, RuntimeError) and CacheFullError.__module__ == "saffron_kernels"
