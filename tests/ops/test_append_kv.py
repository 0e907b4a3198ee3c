"""New K and V rows land in their slots and nowhere else."""

from __future__ import annotations

import random

import hypothesis.strategies as st
import oracle
import pytest
import torch
from cases import LAYOUTS, NONSENSE, i32, randn
from hypothesis import given

from saffron_kernels import append_kv

OP = "append_kv"
pytestmark = pytest.mark.usefixtures("poisoned")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, but any NaN equals any NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(0.5), b.nan_to_num(0.5))


def check(seed: int, tokens: int, slots: list[int], capacity: int, kv_heads: int, head_dim: int, layout, dtype, device):
    k, v = (layout(randn(seed + i, tokens, kv_heads, head_dim, dtype=dtype, device=device)) for i in range(2))
    caches = [randn(seed + 2 + i, capacity, kv_heads, head_dim, dtype=dtype, device=device) for i in range(2)]
    caches[0][::3], caches[1][::2] = torch.nan, torch.inf  # free slots hold anything
    k_cache, v_cache = (layout(c.clone()) for c in caches)
    index = layout(i32(slots, device))
    expected = oracle.append_kv(k, v, index, *caches)
    assert append_kv(k, v, index, k_cache, v_cache) is None
    assert same(k_cache, expected[0]) and same(v_cache, expected[1])
    return k_cache, v_cache


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tokens, kv_heads, head_dim", [(1, 1, 1), (5, 3, 7), (33, 2, 64), (7, 8, 128)])
def test_against_oracle(tokens, kv_heads, head_dim, layout, backend, device, dtype) -> None:
    slots = random.Random(tokens).sample(range(50), tokens)
    slots[::4] = [-1] * len(slots[::4])
    check(1, tokens, slots, 50, kv_heads, head_dim, LAYOUTS[layout], dtype, device)


def test_random(backend, examples, device, dtype) -> None:
    @examples
    @given(st.lists(st.integers(0, 12), unique=True), st.sets(st.integers(0, 12)), st.sampled_from(sorted(LAYOUTS)))
    def run(slots: list[int], skipped: set[int], layout: str) -> None:
        slots = [-1 if s in skipped else s for s in slots]
        check(2, len(slots), slots, 13, 2, 3, LAYOUTS[layout], dtype, device)

    run()


ROTATED = [(1, 2, 2), (5, 7, 6), (9, 64, 64), (3, 80, 32), (3, 5, 0)]


@pytest.mark.parametrize("layout, turn_dtype", [*((x, None) for x in LAYOUTS), ("contiguous", torch.float32)])
@pytest.mark.parametrize("tokens, head_dim, rotated", ROTATED)
def test_rope_is_turning_then_appending(tokens, head_dim, rotated, layout, turn_dtype, backend, device, dtype) -> None:
    """Partial rotary, odd halves, and cos and sin in the dtype of K and in another."""
    kv_heads, capacity, lay = 3, 12, LAYOUTS[layout]
    turn_dtype = turn_dtype or dtype
    k, v = (randn(20 + i, tokens, kv_heads, head_dim, dtype=dtype, device=device) for i in range(2))
    slots = random.Random(tokens).sample(range(capacity), tokens)
    slots[3::4] = [-1] * len(slots[3::4])
    # cos and sin of no angle in common, so that none is taken for another
    cos, sin = (randn(22 + i, tokens, rotated, dtype=turn_dtype, device=device) for i in range(2))
    caches = [randn(24 + i, capacity, kv_heads, head_dim, dtype=dtype, device=device) for i in range(2)]
    k_cache, v_cache = (lay(c.clone()) for c in caches)
    append_kv(lay(k), lay(v), lay(i32(slots, device)), k_cache, v_cache, cos=lay(cos), sin=lay(sin))

    expected_k = oracle.rotated(k, cos, sin)
    expected = oracle.append_kv(expected_k, v, i32(slots), caches[0].double().cpu(), caches[1])
    assert same(v_cache, expected[1])
    written = torch.tensor([s for s in slots if s >= 0])
    others = torch.ones(capacity, dtype=torch.bool).index_fill(0, written, False)
    assert same(k_cache.cpu()[others], caches[0].cpu()[others])
    assert same(k_cache[..., rotated:].double().cpu(), expected[0][..., rotated:])
    # Rounded once to the storage dtype, after two products and a sum in fp32 (fp64 for fp64) of terms of this size.
    compute = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    terms = (k.abs().max() * (cos.abs().max() + sin.abs().max())).item() if rotated else 0.0
    error = (k_cache.double().cpu() - expected[0]).abs()
    assert bool((error <= torch.finfo(dtype).eps / 2 * expected[0].abs() + 2 * compute * terms).all())


def test_storage_around_a_strided_cache_is_untouched(backend, device, dtype) -> None:
    k_cache, _ = check(3, 4, [0, 8, -1, 3], 9, 2, 5, LAYOUTS["gaps"], dtype, device)
    storage = torch.tensor([], dtype=dtype, device=device).set_(k_cache.untyped_storage())
    whole = storage.view(2 * 9 + 1, 2 * 2 + 1, 2 * 5 + 1).clone()
    whole[1::2, 1::2, 1::2] = torch.nan
    assert bool(whole.isnan().all())


@pytest.mark.parametrize("k_dim, v_dim", [(24, 16), (5, 8), (192, 128)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_v_of_another_size(layout, k_dim, v_dim, backend, device, dtype) -> None:
    lay, slots = LAYOUTS[layout], [3, -1, 0, 6]
    k, v = (randn(30 + size, 4, 3, size, dtype=dtype, device=device) for size in (k_dim, v_dim))
    before = [randn(31 + size, 7, 3, size, dtype=dtype, device=device) for size in (k_dim, v_dim)]
    k_cache, v_cache = (lay(cache.clone()) for cache in before)
    append_kv(lay(k), lay(v), lay(i32(slots, device)), k_cache, v_cache)
    expected = oracle.append_kv(k, v, i32(slots), *before)
    assert same(k_cache, expected[0]) and same(v_cache, expected[1])


def test_rows_of_the_caches_themselves(backend, device, dtype) -> None:
    """K and V are views of the caches, and slots that are read are written too: all is read first."""
    for shift in (1, 3, -2):
        before = [randn(32 + i, 300, 2, 16, dtype=dtype, device=device) for i in range(2)]
        k_cache, v_cache = (cache.clone() for cache in before)
        slots = [(i + shift) % 300 for i in range(300)]
        append_kv(k_cache[:], v_cache[:], i32(slots, device), k_cache, v_cache)
        expected = oracle.append_kv(*before, i32(slots), *before)
        assert same(k_cache, expected[0]) and same(v_cache, expected[1])


def test_one_layer_of_a_cache(backend, device, dtype) -> None:
    layers = torch.zeros(3, 6, 2, 4, dtype=dtype, device=device)
    k, v = (randn(4 + i, 2, 2, 4, dtype=dtype, device=device) for i in range(2))
    append_kv(k, v, i32([5, 2], device), layers[1], layers.clone()[1])
    assert torch.equal(layers[1, [5, 2]], k)
    assert not layers[0].any() and not layers[2].any() and not layers[1, [0, 1, 3, 4]].any()


@pytest.mark.parametrize("tokens, capacity", [(0, 0), (0, 4), (3, 0)])
def test_empty(tokens, capacity, backend, device, dtype) -> None:
    check(5, tokens, [-1] * tokens, capacity, 1, 2, LAYOUTS["contiguous"], dtype, device)


@pytest.mark.parametrize("bad", [-2, 4, NONSENSE, -NONSENSE])
def test_bad_slot_changes_nothing(bad, backend, device, dtype) -> None:
    k = randn(6, 2, 1, 3, dtype=dtype, device=device)
    k_cache, v_cache = (
        torch.zeros(4, 1, 3, dtype=dtype, device=device),
        torch.zeros(4, 1, 3, dtype=dtype, device=device),
    )
    with pytest.raises(ValueError, match="slots"):
        append_kv(k, k, i32([1, bad], device), k_cache, v_cache)
    assert not k_cache.any() and not v_cache.any()
