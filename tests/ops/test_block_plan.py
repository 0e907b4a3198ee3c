"""The plan of a paged KV cache: every query sees its own request up to itself, wherever blocks are shared."""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest
import torch
from cases import LAYOUTS, i32
from hypothesis import given
from hypothesis import strategies as st

from saffron_kernels import backends, block_plan

OP = "block_plan"
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def dtype() -> torch.dtype:
    """Indices only."""
    return torch.int32


Batch = tuple[list[list[int]], list[int], list[int], int]  # table, tokens and queries of each request, block size


def batch(seed: int, most: int = 7) -> Batch:
    """Requests that fork from one another at random, as prefix caching leaves them: full blocks may be shared."""
    rng = random.Random(seed)
    size = rng.choice([1, 2, 3, 4, 16])
    fresh = iter(rng.sample(range(4000), 2000))
    tables: list[list[int]] = []
    lengths: list[int] = []
    queries: list[int] = []
    for _ in range(rng.randint(0, most)):
        count = rng.choice([0, 1, 1, 1, 2, 5])
        context = rng.randint(0, 6 * size)
        row: list[int] = []
        if tables and rng.random() < 0.7:
            other = rng.randrange(len(tables))
            cached = (lengths[other] - queries[other]) // size
            row = tables[other][: min(rng.randint(0, cached + 1), cached, context // size)]
        used = -(-(context + count) // size)
        tables.append(row + [next(fresh) for _ in range(used - len(row))])
        lengths.append(context + count)
        queries.append(count)
    return tables, lengths, queries, size


def plan_of(
    made: Batch, device, room: int | None = 0, layout=lambda x: x, padding: int = 0
) -> tuple[torch.Tensor, ...]:
    """`room` tokens more than could be needed, `padding` queries of no request."""
    tables, lengths, queries, size = made
    width = max(map(len, tables), default=0) + 1
    table = i32([row + [-7] * (width - len(row)) for row in tables], device).view(len(tables), width)  # never read
    starts = [0]
    for n in queries:
        starts.append(starts[-1] + n)
    tensors = layout(table), layout(i32(lengths, device)), layout(i32(starts, device))
    return block_plan(*tensors, size, starts[-1] + padding, None if room is None else sum(lengths) + room)


def check(made: Batch, device, room: int = 0, layout=lambda x: x) -> int:
    """Returns how many tokens the plan has."""
    tables, lengths, queries, size = made
    order, slot, begin, end, count = plan_of(made, device, room, layout)
    assert all(x.dtype == torch.int32 for x in (order, slot, begin, end, count))
    used = int(count)
    if not room and layout is LAYOUTS["contiguous"]:
        exact = plan_of(made, device, None)
        assert all(torch.equal(x[:used], y) for x, y in zip((slot, begin, end), exact[1:4], strict=True))
    assert sorted(order.tolist()) == list(range(sum(queries)))
    plan = list(zip(slot.tolist(), begin.tolist(), end.tolist(), strict=True))
    assert plan[used:] == [(-1, 0, 0)] * (len(plan) - used) and all(b < e for _, b, e in plan[:used])
    owner = [(r, i) for r, n in enumerate(queries) for i in range(n)]
    for place, query in enumerate(order.tolist()):
        r, i = owner[query]
        seen = [s for s, b, e in plan[:used] if b <= place < e]
        reach = lengths[r] - queries[r] + i + 1
        assert seen == [tables[r][p // size] * size + p % size for p in range(reach)]  # in their order, each once
    return used


@pytest.mark.parametrize("layout", ["contiguous", "gaps", "shifted"])
def test_by_hand(layout, backend, device, dtype) -> None:
    """Two of three requests share two blocks; what is not full before this step belongs to its own request."""
    made = [[4, 2, 9], [8, 1], [4, 2, 7]], [5, 3, 6], [1, 2, 1], 2
    order, slot, begin, end, count = plan_of(made, device, 2, LAYOUTS[layout])
    assert order.tolist() == [1, 2, 0, 3] and int(count) == 3 + 4 + 1 + 2
    plan = list(zip(slot.tolist(), begin.tolist(), end.tolist(), strict=True))
    assert plan == [
        *[(16, 0, 2), (17, 0, 2), (2, 1, 2)],
        *[(8, 2, 4), (9, 2, 4), (4, 2, 4), (5, 2, 4), (18, 2, 3), (14, 3, 4), (15, 3, 4)],
        *[(-1, 0, 0)] * 6,
    ]


@pytest.mark.parametrize(
    "made",
    [
        ([], [], [], 4),
        ([[3]], [1], [1], 1),
        ([[3], [3]], [2, 2], [0, 0], 2),  # padding alone
        ([[5, 6]] * 3, [5, 5, 6], [1, 1, 2], 4),  # the last block is not full: each has its own tokens there
        ([[5, 6]] * 3, [9, 9, 9], [1, 9, 1], 8),  # one computes what the others already count as cached
        ([[1, 2], [1, 3], [2, 2], [1, 2]], [4, 4, 4, 4], [1, 1, 1, 1], 2),
    ],
)
def test_special(made, backend, device, dtype) -> None:
    check(made, device)


def test_random_tables(backend, examples, device, dtype) -> None:
    @examples
    @given(seed=st.integers(0, 2**32), room=st.sampled_from([0, 1, 70]), layout=st.sampled_from(["contiguous", "gaps"]))
    def run(seed: int, room: int, layout: str) -> None:
        check(batch(seed), device, room, LAYOUTS[layout])

    run()


def agree(seeds: Iterable[int], device: torch.device) -> None:
    """The plan is unique, so it is compared with the specification's to the bit. Every hundredth has many requests.

    100,000 tables: `python -c "from test_block_plan import *; agree(range(100_000), torch.device('cpu'))"`.
    """
    for seed in seeds:
        made, padding = batch(seed, most=40 if seed % 100 == 0 else 7), seed % 3
        ours = plan_of(made, device, seed % 5 or None, padding=padding)
        with backends.backend("reference"):
            theirs = plan_of(made, device, seed % 5 or None, padding=padding)
        for x, y in zip(ours, theirs, strict=True):
            assert torch.equal(x, y), (seed, made, x, y)


def test_backends_agree_to_the_bit(backend, device, dtype, limit) -> None:
    agree(range(400 if limit > 1 << 30 else 20), device)


def fork(rows: int, seed: int, unlike: int = 2) -> Batch:
    """Every request forks from any other, anywhere: trees as deep as they can be, blocks that come again elsewhere."""
    rng = random.Random(seed)
    tables = [[rng.randrange(unlike) for _ in range(rng.randint(1, 12))]]
    while len(tables) < rows:
        kept = rng.choice(tables)[: rng.randint(0, 12)]
        tables.append(kept + [rng.randrange(unlike) for _ in range(rng.randint(1, 3))])
    return tables, [len(row) for row in tables], [rng.choice([1, 1, 1, 0]) for _ in tables], 1


def comb(rows: int) -> Batch:
    """Request `r` leaves the first one after `r` blocks: what a pivot can tell apart least of."""
    tables = [[*range(r), 1000 + r, 2000] for r in range(rows)]
    return tables, [len(row) for row in tables], [1] * rows, 1


@pytest.mark.parametrize("rows", [2, 3, 20, 65, 513])
def test_deep_trees(rows, backend, device, dtype, limit) -> None:
    if rows > 20 and limit < 1 << 30:
        pytest.skip("interpreted: as many programs as requests")
    for made in [fork(rows, rows), comb(rows), fork(rows, rows + 1, unlike=9)][: 1 if rows > 65 else None]:
        ours = plan_of(made, device, 3)
        with backends.backend("reference"):
            theirs = plan_of(made, device, 3)
        assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("where", [0, 1, 63, 64, 255, 1023, 1024, 2047, 2499, None])
def test_long_rows(where, backend, device, dtype) -> None:
    """Two requests that part at one block of many, or nowhere: at the edges of what is compared at once."""
    tables = [list(range(2500)), list(range(2500))]
    if where is not None:
        tables[0][where] = 5000
    order, _, begin, end, count = plan_of((tables, [2500] * 2, [1] * 2, 1), device)
    shared = 2499 if where is None else min(where, 2499)
    assert int(count) == 2 * 2500 - shared and order.tolist() == ([0, 1] if shared == 2499 else [1, 0])
    assert int((end - begin == 2).sum()) == shared


def test_queries_of_no_request(backend, device, dtype) -> None:
    """Padding stands behind all others, where it was, and sees nothing."""
    made = [[4, 2], [3], [4, 2]], [2, 1, 2], [1, 1, 1], 1
    plain, padded = plan_of(made, device), plan_of(made, device, padding=2)
    assert plain[0].tolist() == [1, 0, 2] and padded[0].tolist() == [1, 0, 2, 3, 4]
    assert all(torch.equal(x, y) for x, y in zip(plain[1:], padded[1:], strict=True)) and int(padded[3].max()) <= 3


def test_a_shared_prefix_is_planned_once(backend, device, dtype) -> None:
    made = [[*range(64), 100 + r] for r in range(32)], [64 * 16 + 3] * 32, [1] * 32, 16
    assert check(made, device) == 64 * 16 + 32 * 3


@pytest.mark.parametrize(
    "table, lengths, starts, size, queries, room, message",
    [
        ([[1]], [3], [0, 1], 2, 1, 9, "seq_lens"),
        ([[1]], [1], [0, 2], 2, 2, 9, "seq_lens"),
        ([[1]], [2], [0, 2], 2, 1, 9, "query_start"),
        ([[1]], [1], [1, 2], 2, 2, 9, "query_start"),
        ([[1], [1]], [2, 1], [0, 2, 1], 2, 1, 9, "query_start"),
        ([[-1]], [1], [0, 1], 2, 1, 9, "block_table"),
        ([[2**30]], [1], [0, 1], 2, 1, 9, "block_table"),  # slots above int32
        ([[1, 2**31 - 1]], [3], [0, 1], 2, 1, 9, "block_table"),
        ([[1]], [2], [0, 1], 2, 1, 1, "size"),
        ([[1]], [2], [0, 1], 0, 1, 1, "block_size"),
        ([[1]], [2], [0, 1], 1, -1, 1, "queries"),
    ],
)
def test_errors(table, lengths, starts, size, queries, room, message, backend, device, dtype) -> None:
    with pytest.raises(ValueError, match=message):
        block_plan(*(i32(x, device) for x in (table, lengths, starts)), size, queries, room)


def test_large_blocks(backend, device, dtype) -> None:
    """The last slot of int32; blocks that no request uses may be anything."""
    table = i32([[2**30 - 1, 2**31 - 1], [1, 2**31 - 1]], device)
    _, slot, *_ = block_plan(table, i32([2, 1], device), i32([0, 1, 2], device), 2, 2, 3)
    assert sorted(slot.tolist()) == [2, 2**31 - 2, 2**31 - 1]


@pytest.mark.parametrize("argument", range(3))
def test_dtypes_and_shapes(argument, device) -> None:
    good = [i32([[1]], device), i32([2], device), i32([0, 1], device)]
    bad = [x.long() if i == argument else x for i, x in enumerate(good)]
    with pytest.raises(TypeError, match=("block_table", "seq_lens", "query_start")[argument]):
        block_plan(*bad, 2, 1, 2)
    bad = [x[None] if i == argument else x for i, x in enumerate(good)]
    with pytest.raises(ValueError, match=("block_table", "seq_lens", "query_start")[argument]):
        block_plan(*bad, 2, 1, 2)
