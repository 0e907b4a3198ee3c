"""Plans of the host trie: the order of the queries, and which cached token each of them sees."""

from __future__ import annotations

from random import Random

import hypothesis.strategies as st
from hypothesis import given, settings
from trie_dictionary import check_plan, flat, ints, some_sequences

from saffron_kernels._native import Trie


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=True))
def test_plan_of_any_queries(random: Random) -> None:
    trie = Trie(128)
    _, _, created = trie.insert(*flat(some_sequences(random, 12, 8)))
    check_plan(trie, random.sample(created.tolist(), random.randint(0, len(created))))


def test_plan_keeps_an_order_that_is_depth_first() -> None:
    trie = Trie(16)
    (root,) = trie.extend(ints([-1]), ints([7]))
    children = trie.extend(ints([root] * 3), ints([5, 3, 4]))
    grandchildren = trie.extend(ints([children[2], children[0], children[0]]), ints([1, 9, 2]))
    queries = [children[2], grandchildren[0], children[0], grandchildren[2], grandchildren[1]]
    order, slot, begin, end, depth = trie.plan(ints(queries))
    assert order.tolist() == [0, 1, 2, 3, 4]
    assert slot.tolist() == [root, *queries]
    assert (begin.tolist(), end.tolist()) == ([0, 0, 1, 2, 3, 4], [5, 2, 2, 5, 4, 5])
    assert depth.tolist() == [1, 2, 1, 2, 2]


def test_plan_without_queries_is_empty() -> None:
    assert [len(column) for column in Trie(4).plan(ints([]))] == [0, 0, 0, 0, 0]
