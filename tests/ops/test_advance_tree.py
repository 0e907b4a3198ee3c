"""The plan after one search step: every new query sees what its parent saw, and its own token."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import LAYOUTS, NONSENSE, Forest, beams, flatten, forests, i32
from hypothesis import given
from hypothesis import strategies as st

from saffron_kernels import advance_tree

OP = "advance_tree"
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def dtype() -> torch.dtype:
    """Indices only."""
    return torch.int32


def check(
    plan: list[list[int]], parents: list[int], new_slots: list[int], queries: int, device, layout=lambda x: x
) -> None:
    tensors = (layout(i32(values, device)) for values in (*plan, parents, new_slots))
    slot, begin, end = advance_tree(*tensors, queries)
    assert all(x.dtype == torch.int32 and x.shape == (len(plan[0]) + len(parents),) for x in (slot, begin, end))
    after = list(zip(slot.tolist(), begin.tolist(), end.tolist(), strict=True))
    for room in (0, 1, 300):
        in_room(plan, parents, new_slots, queries, room, device, layout, [slot, begin, end])
    expected = oracle.advance_tree(*plan, parents, new_slots, queries)
    for i, seen in enumerate(expected):
        assert {s for s, b, e in after if b <= i < e} == seen
    assert all(0 <= b <= e <= len(parents) for _, b, e in after)  # what it plans can be advanced again


def in_room(
    plan: list[list[int]], parents: list[int], new_slots: list[int], queries: int, room: int, device, layout, expected
) -> None:
    """The same in arrays that are longer by the new tokens and by `room`: what they hold there is not looked at."""
    held, more = len(plan[0]), len(parents) + room
    tensors = [layout(i32(x + [y] * more, device)) for x, y in zip(plan, (NONSENSE, -5, NONSENSE), strict=True)]
    rest = (layout(i32(parents, device)), layout(i32(new_slots, device)), queries)
    result = advance_tree(*tensors, *rest, count=i32([held], device))
    for x, y, dead in zip(result, expected, (-1, 0, 0), strict=True):
        assert x.tolist() == y.tolist() + [dead] * room


def lists(forest: Forest) -> list[list[int]]:
    """The plan without dead tokens, whose intervals may be backwards."""
    alive = forest.begin < forest.end
    return [x[alive].tolist() for x in (forest.slot, forest.begin, forest.end)]


@pytest.mark.parametrize("layout", ["contiguous", "gaps", "shifted"])
@pytest.mark.parametrize(
    "parents",
    [[0, 1, 2, 3, 4], [0, 0, 0, 0, 0], [4, 4], [2], [], [0, 1, 1, 3, 3, 3, 4], [1, 2, 5, 5], [5, 5, 9], [0, 2**31 - 1]],
)
def test_against_oracle(parents, layout, backend, device, dtype) -> None:
    forest = flatten(beams(1, 1, 5, 4, 2), seed=1)
    check(lists(forest), parents, list(range(100, 100 + len(parents))), 5, device, LAYOUTS[layout])


def test_nothing_planned(backend, device, dtype) -> None:
    check([[], [], []], [], [], 0, device)
    check([[], [], []], [0, 0], [7, 8], 1, device)
    check([[], [], []], [0, 0], [7, 8], 0, device)  # no old queries: nobody has a parent


def test_dead_tokens_stay_dead(backend, device, dtype) -> None:
    check([[-1, 2**31 - 1, 3], [2, 0, 1], [2, 0, 1]], [0, 1], [5, 6], 2, device)
    backwards = [i32(x, device) for x in ([-1, 7], [2, 1], [0, 0], [0, 1], [5, 6])]
    _, begin, end = advance_tree(*backwards, 2)
    assert bool((begin[:2] >= end[:2]).all())


def test_random_searches(backend, examples, device, dtype) -> None:
    """Step after step on the plan that came out, empty places among the new queries."""

    @examples
    @given(forests(), st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=1, max_size=4))
    def run(forest: Forest, steps: list[list[int]]) -> None:
        plan, queries, fresh = lists(forest), forest.queries, 1000
        for step in steps:
            parents = sorted(step)
            new = list(range(fresh, fresh + len(parents)))
            check(plan, parents, new, queries, device)
            after = advance_tree(*(i32(x, device) for x in (*plan, parents, new)), queries)
            plan, queries, fresh = [x.tolist() for x in after], len(parents), fresh + len(parents)

    run()


def test_random_searches_in_buffers(backend, examples, device, dtype) -> None:
    """Step after step in arrays that do not grow, against the same steps in arrays that do."""

    @examples
    @given(forests(), st.lists(st.lists(st.integers(0, 9), max_size=8), min_size=1, max_size=4), st.integers(0, 9))
    def run(forest: Forest, steps: list[list[int]], room: int) -> None:
        plan = [i32(x, device) for x in lists(forest)]
        count, queries, fresh = i32([len(plan[0])], device), forest.queries, 1000
        capacity = len(plan[0]) + sum(len(step) for step in steps) + room
        buffers = [torch.full((capacity,), NONSENSE, dtype=torch.int32, device=device) for _ in plan]
        for buffer, held in zip(buffers, plan, strict=True):
            buffer[: len(held)] = held
        for step in steps:
            rest = (i32(sorted(step), device), i32(range(fresh, fresh + len(step)), device), queries)
            plan = list(advance_tree(*plan, *rest))
            buffers = list(advance_tree(*buffers, *rest, count=count))
            count, queries, fresh = count + len(step), len(step), fresh + len(step)
            for buffer, expected, dead in zip(buffers, plan, (-1, 0, 0), strict=True):
                used = expected.shape[0]
                assert torch.equal(buffer[:used], expected) and bool((buffer[used:] == dead).all())
                buffer[used:] = -NONSENSE

    run()


@pytest.mark.parametrize("count", [-1, 2, 4, NONSENSE, -NONSENSE])
def test_no_room(count, backend, device, dtype) -> None:
    """Room for one token and two new ones."""
    plan = (i32(x, device) for x in ([3, 4, 5], [0, 0, 0], [1, 1, 1], [0, 0], [6, 7]))
    with pytest.raises(ValueError, match="count"):
        advance_tree(*plan, 1, count=i32([count], device))


def test_no_room_at_all(backend, device, dtype) -> None:
    none, one = i32([], device), i32([0], device)
    with pytest.raises(ValueError, match="count"):
        advance_tree(none, none, none, one, one, 1, count=one)
    assert [x.shape for x in advance_tree(none, none, none, none, none, 1, count=one)] == [(0,)] * 3


def test_same_input_same_bits(backend, device, dtype) -> None:
    forest = flatten(beams(2, 2, 5, 20, 3), seed=2).to(device)
    arguments = (
        forest.slot,
        forest.begin,
        forest.end,
        i32([0, 0, 3, 9], device),
        i32([1, 2, 3, 4], device),
        forest.queries,
    )
    first, again = advance_tree(*arguments), advance_tree(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_parents_that_descend(backend, device, dtype) -> None:
    one = i32([0], device)
    with pytest.raises(ValueError, match="parents"):
        advance_tree(one, one, one + 1, i32([1, 0], device), i32([2, 3], device), 2)


def test_negative_parent(backend, device, dtype) -> None:
    one = i32([0], device)
    with pytest.raises(ValueError, match="parents"):
        advance_tree(one, one, one + 1, i32([-1, 0], device), i32([2, 3], device), 1)


@pytest.mark.parametrize("name, begin, end", [("begin", -1, 1), ("end", 0, 3), ("begin", 3, 3)])
def test_interval_of_queries_that_do_not_exist(name, begin, end, backend, device, dtype) -> None:
    with pytest.raises(ValueError, match=name):
        advance_tree(i32([0], device), i32([begin], device), i32([end], device), i32([0], device), i32([1], device), 2)


def test_negative_number_of_queries(backend, device, dtype) -> None:
    none = i32([], device)
    with pytest.raises(ValueError, match="queries"):
        advance_tree(none, none, none, none, none, -1)
