"""Whole sequences copied out of the trie, bit for bit."""

from __future__ import annotations

import hypothesis.strategies as st
import oracle
import pytest
import torch
from cases import LAYOUTS, NONSENSE, i32, randn
from hypothesis import given

from saffron_kernels import gather_kv

OP = "gather_kv"
pytestmark = pytest.mark.usefixtures("poisoned")


def check(seed: int, slots: list[list[int]], length: int, kv_heads: int, head_dim: int, layout, dtype, device) -> None:
    caches = [randn(seed + i, 11, kv_heads, head_dim, dtype=dtype, device=device) for i in range(2)]
    named = {s for row in slots for s in row}
    for cache in caches:  # what nobody names may be anything, the last row too (a padding of -1 must not wrap to it)
        cache[[s for s in range(11) if s not in named]] = torch.nan
    index = layout(i32([s for row in slots for s in row], device).view(len(slots), length))
    k_cache, v_cache = (layout(c) for c in caches)
    k, v = gather_kv(k_cache, v_cache, index)
    for actual, expected in zip((k, v), oracle.gather_kv(*caches, index), strict=True):
        assert actual.dtype == dtype and actual.is_contiguous() and torch.equal(actual, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kv_heads, head_dim", [(1, 1), (3, 7), (2, 64), (8, 128)])
def test_against_oracle(kv_heads, head_dim, layout, backend, device, dtype) -> None:
    slots = [[0, 3, 5, -1, -1], [0, 3, 9, 4, 1], [-1, -1, -1, -1, -1], [7, -1, 7, 0, -1]]
    check(1, slots, 5, kv_heads, head_dim, LAYOUTS[layout], dtype, device)


@pytest.mark.parametrize("sequences, length", [(0, 0), (0, 3), (2, 0)])
def test_empty(sequences, length, backend, device, dtype) -> None:
    check(2, [[0] * length] * sequences, length, 2, 3, LAYOUTS["contiguous"], dtype, device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("k_dim, v_dim", [(24, 16), (5, 8), (192, 128)])
def test_v_of_another_size(k_dim, v_dim, layout, backend, device, dtype) -> None:
    caches = [randn(5 + size, 11, 3, size, dtype=dtype, device=device) for size in (k_dim, v_dim)]
    index = i32([0, 3, -1, 10, -1, 7], device).view(2, 3)
    found = gather_kv(*map(LAYOUTS[layout], caches), LAYOUTS[layout](index))
    for actual, expected in zip(found, oracle.gather_kv(*caches, index), strict=True):
        assert actual.is_contiguous() and torch.equal(actual, expected)


def test_random(backend, examples, device, dtype) -> None:
    @examples
    @given(st.data(), st.integers(1, 4), st.integers(1, 6), st.sampled_from(sorted(LAYOUTS)))
    def run(data: st.DataObject, sequences: int, length: int, layout: str) -> None:
        row = st.lists(st.integers(-1, 10), min_size=length, max_size=length)
        slots = data.draw(st.lists(row, min_size=sequences, max_size=sequences))
        check(3, slots, length, 2, 3, LAYOUTS[layout], dtype, device)

    run()


def test_padding_of_an_empty_cache(backend, device, dtype) -> None:
    cache = torch.zeros(0, 1, 2, dtype=dtype, device=device)
    k, v = gather_kv(cache, cache, i32([-1, -1], device).view(1, 2))
    assert torch.equal(k, torch.zeros(1, 1, 2, 2, dtype=dtype, device=device)) and torch.equal(k, v)


@pytest.mark.parametrize("bad", [-2, 4, NONSENSE, -NONSENSE])
def test_slot_that_does_not_exist(bad, backend, device, dtype) -> None:
    cache = randn(4, 4, 1, 2, dtype=dtype, device=device)
    with pytest.raises(ValueError, match="slots"):
        gather_kv(cache, cache, i32([0, bad], device).view(1, 2))
