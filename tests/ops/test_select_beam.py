"""The best candidates of every group, with ties in candidate order."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import LAYOUTS, candidates, i32, randn
from hypothesis import given
from hypothesis import strategies as st

from saffron_kernels import select_beam
from saffron_kernels.checks import compute_dtype

OP = "select_beam"
pytestmark = pytest.mark.usefixtures("poisoned")
INF, NAN = torch.inf, torch.nan


def check(
    rewards: list[float],
    counts: list[int],
    groups: list[int],
    num_groups: int,
    width: int,
    dtype,
    device,
    layout=lambda x: x,
    widths: list[int] | None = None,
):
    found = candidates(1, counts, 4 * max([1, *counts]), device)
    # Rewards are fp32 (fp64 for fp64), and the order has to be that of the numbers as stored.
    stored = torch.tensor(rewards, dtype=compute_dtype(dtype), device=device)
    arguments = (layout(stored), layout(found.tokens), layout(found.offsets), layout(i32(groups, device)))
    each = None if widths is None else layout(i32(widths, device))
    parent, token, reward = select_beam(*arguments, num_groups, width, widths=each)
    expected = oracle.select_beam(stored.tolist(), found.tokens.tolist(), found.rows, groups, num_groups, width, widths)
    assert parent.dtype == token.dtype == torch.int32 and reward.dtype == stored.dtype
    assert (parent.tolist(), token.tolist(), reward.tolist()) == expected
    return parent, token, reward


CASES = {
    "one_candidate": ([0.5], [1], [0], 1, 1),
    "fewer_than_width": ([1, 3, 2], [2, 1], [0, 0], 1, 5),
    "ties": ([1.0] * 9, [3, 3, 3], [0, 0, 0], 1, 4),
    "ties_at_the_cut": ([2, 1, 1, 2, 1, 1, 1, 2], [3, 2, 3], [0, 0, 0], 1, 5),
    "signed_zeros": ([0.0, -0.0, 0.0, -0.0], [2, 2], [0, 0], 1, 3),
    "minus_inf_is_a_reward": ([-INF, 1, -INF, -INF], [2, 2], [0, 0], 1, 3),
    "plus_inf": ([1, INF, 2, INF], [2, 2], [0, 0], 1, 2),
    "two_groups": ([5, 4, 3, 2, 1, 9, 8], [2, 1, 4], [0, 1, 1], 2, 2),
    "a_group_without_rows": ([5, 4, 3], [2, 1], [0, 2], 4, 2),
    "rows_without_candidates": ([5, 4, 3], [0, 2, 0, 1, 0], [0, 0, 1, 1, 1], 2, 2),
    "nothing": ([], [], [], 0, 3),
    "no_rows_but_groups": ([], [], [], 2, 3),
    "no_candidates": ([], [0, 0], [0, 1], 2, 1),
    "width_one": ([1, 2, 3, 3], [2, 2], [0, 0], 1, 1),
    "rows_of_no_group": ([5, NAN, INF, 4, 9, NAN], [1, 0, 2, 2, 1], [0, 1, 2, 2, 2], 2, 2),
    "all_rows_of_no_group": ([NAN, 1, INF], [2, 1], [2, 2], 2, 2),
    "no_groups_but_rows": ([NAN, 1], [1, 1], [0, 0], 0, 2),
    "extremes": ([3.4e38, -3.4e38, 1e-45, -1e-45, 0], [5], [0], 1, 4),
}


@pytest.mark.parametrize("layout", ["contiguous", "gaps", "shifted"])
@pytest.mark.parametrize("case", CASES)
def test_against_oracle(case, layout, backend, device, dtype) -> None:
    check(*CASES[case], dtype, device, LAYOUTS[layout])


def test_random(backend, examples, device, dtype) -> None:
    @examples
    @given(st.data(), st.lists(st.tuples(st.integers(0, 7), st.integers(0, 4)), max_size=8), st.integers(1, 9))
    def run(data: st.DataObject, shape: list[tuple[int, int]], width: int) -> None:
        counts, groups = [c for c, _ in shape], sorted(g for _, g in shape)
        reward = st.one_of(st.integers(-2, 2).map(float), st.floats(-1e3, 1e3, width=32), st.just(-INF))
        used = sum(count for count, group in zip(counts, groups, strict=True) if group < 4)
        rewards = data.draw(st.lists(reward, min_size=used, max_size=used))
        rewards += [data.draw(st.sampled_from([INF, NAN]))] * (sum(counts) - used)  # of rows of no group
        widths = data.draw(st.none() | st.lists(st.integers(1, width), min_size=4, max_size=4))
        check(rewards, counts, groups, 4, width, dtype, device, widths=widths)

    run()


@pytest.mark.parametrize("layout", ["contiguous", "gaps", "shifted"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("widest", [False, True])
def test_widths(widest, case, layout, backend, device, dtype) -> None:
    """Where all are the largest, as without them; what stands behind narrow groups moves up."""
    rewards, counts, groups, num_groups, width = CASES[case]
    widths = [width if widest else 1 + g % width for g in range(num_groups)]
    found = check(rewards, counts, groups, num_groups, width, dtype, device, LAYOUTS[layout], widths)
    if widest:
        expected = check(rewards, counts, groups, num_groups, width, dtype, device)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("bad", [0, -1, 4, 2**31 - 1])
def test_widths_out_of_range(bad, backend, device) -> None:
    rewards, tokens, offsets = torch.zeros(2, device=device), i32([1, 2], device), i32([0, 1, 2], device)
    with pytest.raises(ValueError, match="widths"):
        select_beam(rewards, tokens, offsets, i32([0, 1], device), 2, 3, widths=i32([3, bad], device))


@pytest.mark.parametrize("rows, count, width", [(32, 33, 32), (64, 129, 64), (7, 1000, 100)])
def test_larger(rows, count, width, backend, limit, device, dtype) -> None:
    if rows * count > limit:
        pytest.skip("too large for this backend here")
    rewards = (4 * randn(2, rows * count)).round().tolist()  # ties everywhere
    check(rewards, [count] * rows, [r * 3 // rows for r in range(rows)], 3, width, dtype, device)


def test_searching_together_or_alone(backend, device, dtype) -> None:
    """A group's beam does not depend on the other groups, and the result is the same every time."""
    counts, groups = [3, 5, 0, 4, 6, 2], [0, 0, 0, 1, 1, 1]
    rewards = randn(3, 20).round(decimals=1).tolist()
    parent, token, reward = check(rewards, counts, groups, 2, 4, dtype, device)
    again = check(rewards, counts, groups, 2, 4, dtype, device)
    assert all(torch.equal(x, y) for x, y in zip((parent, token, reward), again, strict=True))
    found = candidates(1, counts, 4 * max(counts), device)
    for group, rows, own in ((0, slice(0, 3), slice(0, 8)), (1, slice(3, 6), slice(8, 20))):
        offsets = i32([0, *torch.tensor(counts[rows]).cumsum(0).tolist()], device)
        values = torch.tensor(rewards[own], dtype=reward.dtype, device=device)
        alone = select_beam(values, found.tokens[own], offsets, i32([0, 0, 0], device), 1, 4)
        mine = slice(4 * group, 4 * group + 4)
        assert torch.equal(alone[0] + 3 * group, parent[mine]) and torch.equal(alone[1], token[mine])
        assert torch.equal(alone[2], reward[mine])


def test_nan_reward(backend, examples, device, dtype) -> None:
    """Wherever it stands, also where it would not be chosen."""

    @examples
    @given(st.integers(0, 299), st.integers(1, 4), st.sampled_from([torch.nan, -torch.nan]))
    def run(place: int, width: int, bad: float) -> None:
        rewards = randn(1, 300, dtype=compute_dtype(dtype), device=device)
        rewards[place] = bad
        with pytest.raises(ValueError, match=f"rewards: candidate {place} "):
            select_beam(rewards, i32(range(300), device), i32([0, 40, 300], device), i32([0, 1], device), 2, width)

    run()


@pytest.mark.parametrize("num_groups, width, name", [(-1, 1, "num_groups"), (1, 0, "width"), (1, -2, "width")])
def test_sizes_out_of_range(num_groups, width, name, backend, device) -> None:
    with pytest.raises(ValueError, match=name):
        select_beam(
            torch.zeros(1, device=device), i32([1], device), i32([0, 1], device), i32([0], device), num_groups, width
        )


@pytest.mark.parametrize("groups", [[0, 3], [-1, 0]])
def test_groups_out_of_range(groups, backend, device) -> None:
    rewards, tokens, offsets = torch.zeros(2, device=device), i32([1, 2], device), i32([0, 1, 2], device)
    with pytest.raises(ValueError, match="groups"):
        select_beam(rewards, tokens, offsets, i32(groups, device), 2, 1)


@pytest.mark.parametrize("offsets", [[0, 1, 3], [0, 1, 1], [1, 1, 2], [0, 3, 2], [0, -1, 2]])
def test_offsets_that_do_not_fit(offsets, backend, device) -> None:
    with pytest.raises(ValueError, match="offsets"):
        select_beam(torch.zeros(2, device=device), i32([1, 2], device), i32(offsets, device), i32([0, 0], device), 1, 1)
