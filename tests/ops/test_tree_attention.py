"""Attention over a flattened trie, held against the docstring in fp64."""

from __future__ import annotations

import random
from typing import Any

import hypothesis.strategies as st
import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS, NONSENSE, Forest, beams, caches, flatten, forests, i32, prefill, randn
from hypothesis import given
from tolerance import assert_as_good_as_torch
from torch import Tensor

from saffron_kernels import backend as use_backend
from saffron_kernels import tree_attention

OP = "tree_attention"
pytestmark = pytest.mark.usefixtures("poisoned")


def own_result(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    forest: Forest,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, float, float]:
    """PyTorch's attention in the same dtype, its log-sum-exp in the dtype of ours, and the size of V and of scores."""
    mask = forest.mask()
    alive = mask.any(0)
    rows, mask = forest.slot[alive].long(), mask[:, alive]
    group = q.shape[1] // k_cache.shape[1]
    k, v = (c[rows].repeat_interleave(group, 1).transpose(0, 1) for c in (k_cache, v_cache))
    qh = q.transpose(0, 1)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = qh.to(wide) * scale @ k.to(wide).mT
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~mask, -torch.inf)
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(qh[None], k[None], v[None], attn_mask=mask, scale=scale)[0]
    else:
        sink = q.new_full((q.shape[1],), -torch.inf) if sinks is None else sinks
        scores = torch.cat([scores, sink.to(wide)[:, None, None].expand(-1, q.shape[0], 1)], -1)
        out = scores.softmax(-1)[..., :-1].to(q.dtype) @ v
    out = out.transpose(0, 1)
    out = out.masked_fill(~mask.any(1)[:, None, None], 0)
    size = scores[scores.isfinite()].abs().max().item() if scores.isfinite().any() else 1.0
    return out, scores.logsumexp(-1).T, v.abs().max().item() if v.numel() else 1.0, max(1.0, size)


def check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    forest: Forest,
    scale: float,
    exact: tuple[Tensor, Tensor],
    **extra: Any,
) -> None:
    out, lse = tree_attention(q, k_cache, v_cache, forest.slot, forest.begin, forest.end, scale, **extra)
    assert out.dtype == q.dtype and out.is_contiguous()
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    own_out, own_lse, largest_v, largest_score = own_result(q, k_cache, v_cache, forest, scale, **extra)
    assert_as_good_as_torch("lse", lse, exact[1], own_lse, largest_score)
    assert_as_good_as_torch("out", out, exact[0], own_out, largest_v)


def by_oracle(q: Tensor, k_cache: Tensor, v_cache: Tensor, forest: Forest, scale: float, **extra: Any) -> None:
    exact = oracle.tree_attention(q, k_cache, v_cache, forest.slot, forest.begin, forest.end, scale, **extra)
    check(q, k_cache, v_cache, forest, scale, exact, **extra)


def by_reference(q: Tensor, k_cache: Tensor, v_cache: Tensor, forest: Forest, scale: float, **extra: Any) -> None:
    """For sizes that the oracle's loops cannot do: the reference in fp64, which the oracle has checked."""
    with use_backend("reference"):
        exact = tree_attention(
            q.double(), k_cache.double(), v_cache.double(), forest.slot, forest.begin, forest.end, scale, **extra
        )
    check(q, k_cache, v_cache, forest, scale, exact, **extra)


TINY = {
    "one_beam": (beams(0, 1, 1, 5, 3), 1, 1, 1),
    "one_token": ([(4,)], 2, 1, 3),
    "odd": (beams(1, 1, 7, 3, 3), 6, 2, 5),
    "forest": (beams(2, 3, 3, 4, 2), 4, 4, 8),
    "prefill": (prefill(beams(3, 1, 3, 4, 2)), 3, 1, 7),
    "prefix_of_another": ([(1,), (1, 2), (1, 2, 3, 4), (2, 1)], 2, 2, 4),
    "long_and_short": ([(1, *range(40)), (2,)], 2, 1, 4),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", TINY)
def test_tiny_against_oracle(case, layout, backend, device, dtype) -> None:
    queries, heads, kv_heads, head_dim = TINY[case]
    forest = flatten(queries, seed=len(case)).to(device)
    k_cache, v_cache = caches(5, forest, kv_heads, head_dim, dtype, device)
    q = randn(6, forest.queries, heads, head_dim, dtype=dtype, device=device)
    lay = LAYOUTS[layout]
    forest.slot, forest.begin, forest.end = lay(forest.slot), lay(forest.begin), lay(forest.end)
    by_oracle(lay(q), lay(k_cache), lay(v_cache), forest, head_dim**-0.5)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (16, 1), (8, 2), (3, 3)])
def test_head_geometries(heads, kv_heads, head_dim, backend, device, dtype) -> None:
    forest = flatten(beams(7, 2, 3, 9, 3), seed=7).to(device)
    k_cache, v_cache = caches(8, forest, kv_heads, head_dim, dtype, device)
    q = randn(9, forest.queries, heads, head_dim, dtype=dtype, device=device)
    by_reference(q, k_cache, v_cache, forest, head_dim**-0.5)


@pytest.mark.parametrize("softcap, with_sinks", [(None, False), (2.0, False), (30.0, False), (None, True), (0.5, True)])
@pytest.mark.parametrize("head_dim, v_dim", [(24, 16), (16, 40), (64, 64), (192, 128), (40, 128)])
def test_softcap_sinks_and_size_of_v(head_dim, v_dim, softcap, with_sinks, backend, limit, device, dtype) -> None:
    """Sizes of Gemma 2's, gpt-oss' and DeepSeek's heads among them; a query without tokens has its sink alone."""
    forest = flatten(beams(50, 1, 7, 30 if limit < 1 << 30 else 170, 3), seed=12).to(device)
    forest.paths = [*forest.paths, ()]
    k_cache, v_cache = caches(51, forest, 2, head_dim, dtype, device, v_dim)
    q = randn(52, forest.queries, 4, head_dim, dtype=dtype, device=device)
    sinks = randn(53, 4, dtype=dtype, device=device) * 3 if with_sinks else None
    by_reference(q, k_cache, v_cache, forest, 2 * head_dim**-0.5, softcap=softcap, sinks=sinks)
    out, lse = tree_attention(
        q, k_cache, v_cache, forest.slot, forest.begin, forest.end, 0.3, softcap=softcap, sinks=sinks
    )
    assert out.shape == (forest.queries, 4, v_dim) and not bool(out[-1].any())
    alone = torch.full((4,), -torch.inf) if sinks is None else sinks.float().cpu()
    assert torch.allclose(lse[-1].float().cpu(), alone, rtol=1e-6)


def test_random_softcap_sinks_and_size_of_v(backend, examples, device, dtype) -> None:
    @examples
    @given(forests(), st.sampled_from([None, 0.3, 5.0]), st.booleans(), st.integers(1, 9), st.integers(0, 2**20))
    def run(forest: Forest, softcap: float | None, with_sinks: bool, v_dim: int, seed: int) -> None:
        forest = forest.to(device)
        k_cache, v_cache = caches(seed, forest, 2, 3, dtype, device, v_dim)
        q = randn(seed + 2, forest.queries, 4, 3, dtype=dtype, device=device)
        sinks = randn(seed + 3, 4, dtype=torch.float32, device=device) if with_sinks else None
        by_oracle(q, k_cache, v_cache, forest, 0.7, softcap=softcap, sinks=sinks)

    run()


def test_sinks_that_dominate_or_vanish(backend, device, dtype) -> None:
    """Far above and below all scores, beyond what exp holds, and -inf, which is none."""
    forest = flatten(beams(54, 1, 5, 6, 2), seed=5).to(device)
    k_cache, v_cache = caches(55, forest, 1, 8, dtype, device)
    q = randn(56, forest.queries, 4, 8, dtype=dtype, device=device)
    plan = forest.slot, forest.begin, forest.end
    sinks = torch.tensor([300.0, -300.0, -torch.inf, 0.0], device=device)
    out, lse = tree_attention(q, k_cache, v_cache, *plan, 0.3, sinks=sinks)
    without, lse_without = tree_attention(q, k_cache, v_cache, *plan, 0.3)
    assert float(out[:, 0].abs().max()) < 1e-100 and torch.allclose(lse[:, 0], lse.new_tensor(300.0), rtol=1e-6)
    eps = torch.finfo(dtype).eps
    assert torch.allclose(out[:, 1:3], without[:, 1:3], rtol=4 * eps, atol=4 * eps)
    assert torch.allclose(lse[:, 1:3], lse_without[:, 1:3], rtol=1e-6)
    assert bool((lse[:, 3] > lse_without[:, 3]).all())


@pytest.mark.parametrize(
    "wrong, error, message",
    [
        ({"softcap": 0.0}, ValueError, "softcap: got 0.0, expected a finite number above 0"),
        ({"softcap": torch.inf}, ValueError, "softcap: got inf"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks: got shape \[3\], expected \[2\]"),
        ({"sinks": torch.zeros(2, dtype=torch.int32)}, TypeError, "sinks: got torch.int32"),
        ({"sinks": torch.zeros(2, dtype=torch.complex64)}, TypeError, "sinks: got torch.complex64"),
    ],
)
def test_softcap_and_sinks_that_do_not_fit(wrong, error, message) -> None:
    cache, index = torch.zeros(1, 1, 4), i32([0])
    with pytest.raises(error, match=message):
        tree_attention(torch.zeros(1, 2, 4), cache, cache, index, index, index + 1, 1.0, **wrong)


@pytest.mark.parametrize("size", [(0, 4), (4, 0)])
def test_head_size_of_zero(size) -> None:
    k_cache, v_cache, index = torch.zeros(1, 1, size[0]), torch.zeros(1, 1, size[1]), i32([0])
    name = "k_cache" if size[0] == 0 else "v_cache"
    with pytest.raises(ValueError, match=rf"{name}: got shape \[1, 1, 0\], expected a head size of at least 1"):
        tree_attention(torch.zeros(1, 2, size[0]), k_cache, v_cache, index, index, index + 1, 1.0)


LARGER = {
    "deep": (1, 5, 600, 3),
    "wide": (1, 65, 20, 4),
    "many_searches": (9, 7, 33, 5),
    "one_long_beam": (1, 1, 2047, 2),
    "tile_edge": (1, 64, 126, 2),
}


@pytest.mark.parametrize("case", LARGER)
def test_larger_trees(case, backend, limit, device, dtype) -> None:
    live = beams(10, *LARGER[case])
    queries, heads, kv_heads, head_dim = live, 4, 2, 32
    if case == "one_long_beam":
        queries = live + prefill(live, cached=len(live[0]) - 70)  # a chunk of a prefill
    forest = flatten(queries, seed=11).to(device)
    if forest.queries * heads * forest.slot.numel() > limit:
        pytest.skip("too large for this backend here")
    k_cache, v_cache = caches(12, forest, kv_heads, head_dim, dtype, device)
    q = randn(13, forest.queries, heads, head_dim, dtype=dtype, device=device)
    by_reference(q, k_cache, v_cache, forest, head_dim**-0.5)


def test_random_forests(backend, examples, device, dtype) -> None:
    @examples
    @given(forests(), st.sampled_from([(1, 1, 1), (2, 1, 3), (4, 2, 4), (3, 3, 2)]), st.integers(0, 2**20))
    def run(forest: Forest, geometry: tuple[int, int, int], seed: int) -> None:
        heads, kv_heads, head_dim = geometry
        forest = forest.to(device)
        k_cache, v_cache = caches(seed, forest, kv_heads, head_dim, dtype, device)
        q = randn(seed + 2, forest.queries, heads, head_dim, dtype=dtype, device=device)
        by_oracle(q, k_cache, v_cache, forest, 0.7)

    run()


@pytest.mark.parametrize("queries, tokens", [(0, 0), (3, 0), (0, 4), (3, 4)])
def test_nothing_to_see(queries, tokens, backend, device, dtype) -> None:
    """No queries, no tokens, or only dead ones: nothing is read, out is 0 and lse -inf."""
    k_cache = torch.full((2, 1, 4), torch.nan, dtype=dtype, device=device)
    q = randn(14, queries, 2, 4, dtype=dtype, device=device)
    dead = i32([-1, 99, 0, 1][:tokens], device)
    begin, end = i32([0, 2, 3, 1][:tokens], device), i32([0, 1, 3, 0][:tokens], device)
    out, lse = tree_attention(q, k_cache, k_cache, dead, begin, end, 1.0)
    assert out.shape == q.shape and torch.equal(out, torch.zeros_like(q))
    assert torch.equal(lse, torch.full_like(lse, -torch.inf)) and lse.shape == (queries, 2)


@pytest.mark.parametrize("layout", ["contiguous", "gaps"])
@pytest.mark.parametrize("held", [0, 1, 17, 63])
def test_count_of_tokens_on_the_device(held, layout, backend, device, dtype) -> None:
    """A plan in buffers: beyond the count nothing is looked at."""
    forest = flatten(beams(42, 2, 4, 20, 4), seed=9, dead=0).to(device)
    assert forest.slot.shape[0] == 63
    k_cache, v_cache = caches(43, forest, 2, 16, dtype, device)
    q = randn(44, forest.queries, 4, 16, dtype=dtype, device=device)
    plan = [x[:held] for x in (forest.slot, forest.begin, forest.end)]
    room = [x.new_full((60,), value) for x, value in zip(plan, (NONSENSE, -3, NONSENSE), strict=True)]
    lay, count = LAYOUTS[layout], i32([held], device)
    buffers = [lay(torch.cat(pair)) for pair in zip(plan, room, strict=True)]
    out, lse = tree_attention(q, k_cache, v_cache, *buffers, 0.25, count=count)
    expected, expected_lse = tree_attention(q, k_cache, v_cache, *plan, 0.25)
    eps = torch.finfo(dtype).eps  # the tokens are cut into other ranges
    assert torch.allclose(out.double(), expected.double(), rtol=8 * eps, atol=8 * eps)
    assert torch.allclose(lse.double(), expected_lse.double(), rtol=1e-6, atol=1e-5)
    assert held or not bool(out.any())


@pytest.mark.parametrize("count", [-1, 3, NONSENSE, -NONSENSE])
def test_count_that_does_not_fit(count, backend, device, dtype) -> None:
    cache = randn(45, 2, 1, 4, dtype=dtype, device=device)
    plan = (i32(x, device) for x in ([0, 1], [0, 0], [1, 1]))
    with pytest.raises(ValueError, match="count"):
        tree_attention(cache[:1], cache, cache, *plan, 1.0, count=i32([count], device))


def test_caches_without_slots(backend, device, dtype) -> None:
    empty = torch.zeros(0, 1, 4, dtype=dtype, device=device)
    q = randn(15, 2, 1, 4, dtype=dtype, device=device)
    out, lse = tree_attention(q, empty, empty, i32([-1], device), i32([1], device), i32([1], device), 1.0)
    assert torch.equal(out, torch.zeros_like(q)) and bool((lse == -torch.inf).all())


def test_some_queries_see_nothing(backend, device, dtype) -> None:
    forest = flatten([(1, 2), (3, 4)], seed=3, dead=4).to(device)
    forest.paths = [*forest.paths, (), ()]  # two queries more than the plan knows
    k_cache, v_cache = caches(16, forest, 1, 4, dtype, device)
    by_oracle(randn(17, 4, 2, 4, dtype=dtype, device=device), k_cache, v_cache, forest, 0.5)


def test_intervals_may_reach_beyond_the_queries(backend, device, dtype) -> None:
    forest = flatten([(1, 2), (1, 3), (4,)], seed=4, dead=0).to(device)
    forest.begin = torch.where(forest.begin == 0, -5, forest.begin)
    forest.end = torch.where(forest.end == 3, NEVER, forest.end)
    k_cache, v_cache = caches(18, forest, 1, 4, dtype, device)
    by_oracle(randn(19, 3, 1, 4, dtype=dtype, device=device), k_cache, v_cache, forest, 0.5)


NEVER = 2**31 - 1


@pytest.mark.parametrize("scale", [0.0, -0.3, 1.0, 30.0])
def test_scales(scale, backend, device, dtype) -> None:
    """Scores far beyond what exp can hold, all alike, or negated."""
    forest = flatten(beams(20, 1, 5, 6, 2), seed=5).to(device)
    k_cache, v_cache = caches(21, forest, 1, 8, dtype, device)
    by_oracle(randn(22, forest.queries, 2, 8, dtype=dtype, device=device), k_cache, v_cache, forest, scale)


def test_sees_the_same_slot_twice(backend, device, dtype) -> None:
    """Two entries of a plan may name one slot; a query that sees both counts it twice."""
    forest = Forest([(), ()], i32([0, 0, 1], device), i32([0, 0, 1], device), i32([2, 1, 2], device), 2, [[0], [0, 1]])
    k_cache, v_cache = caches(23, forest, 1, 4, dtype, device)
    by_oracle(randn(24, 2, 1, 4, dtype=dtype, device=device), k_cache, v_cache, forest, 0.5)


def test_same_input_same_bits(backend, limit, device, dtype) -> None:
    forest = flatten(beams(25, 1, 6, 20 if limit < 1 << 30 else 200, 4), seed=6).to(device)
    k_cache, v_cache = caches(26, forest, 2, 16, dtype, device)
    q = randn(27, forest.queries, 4, 16, dtype=dtype, device=device)
    first, *others = (
        tree_attention(q, k_cache, v_cache, forest.slot, forest.begin, forest.end, 0.25) for _ in range(3)
    )
    for other in others:
        assert torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])


def test_threads_change_nothing(backend, limit, device, dtype) -> None:
    """So many KV heads and tokens that the work of one thread is cut otherwise than that of several."""
    if device.type != "cpu" or limit < 1 << 30:
        pytest.skip("on the CPU, and not interpreted")
    forest = flatten(beams(39, 1, 3, 2100, 2), seed=8)
    k_cache, v_cache = caches(40, forest, 8, 32, dtype, device)
    q = randn(41, forest.queries, 16, 32, dtype=dtype, device=device)
    by_reference(q, k_cache, v_cache, forest, 0.2)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(tree_attention(q, k_cache, v_cache, forest.slot, forest.begin, forest.end, 0.2))
    torch.set_num_threads(threads)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_permuting_beams_permutes_results(backend, device, dtype) -> None:
    """Renaming tokens reorders siblings, so queries, intervals and slots all move; each path keeps its result."""
    live = beams(28, 2, 5, 6, 3)
    rng = random.Random(29)
    rename = list(range(1000))
    rng.shuffle(rename)
    one = flatten(live, seed=30, dead=0)
    other = flatten([tuple(rename[t] for t in path) for path in live], seed=31, dead=5)
    number = {path: i for i, path in enumerate(other.paths)}
    moved = [number[tuple(rename[t] for t in path)] for path in one.paths]
    assert moved != sorted(moved)

    k_one, v_one = caches(32, one, 2, 8, dtype, device)
    k_other, v_other = caches(33, other, 2, 8, dtype, device)
    for q, path in enumerate(one.seen):
        k_other[other.seen[moved[q]]], v_other[other.seen[moved[q]]] = k_one[path], v_one[path]
    q_one = randn(34, one.queries, 4, 8, dtype=dtype, device=device)
    q_other = torch.zeros_like(q_one)
    q_other[moved] = q_one

    one, other = one.to(device), other.to(device)
    out, lse = tree_attention(q_one, k_one, v_one, one.slot, one.begin, one.end, 0.4)
    out_other, lse_other = tree_attention(q_other, k_other, v_other, other.slot, other.begin, other.end, 0.4)
    # Tokens are summed in another order, so the last bit may differ.
    rounding = 8 * torch.finfo(lse.dtype).eps
    assert torch.allclose(lse, lse_other[moved], rtol=rounding, atol=rounding)
    last_bit = torch.finfo(dtype).eps if dtype.itemsize == 2 else rounding
    assert torch.allclose(out.double(), out_other[moved].double(), rtol=2 * last_bit, atol=last_bit)


@pytest.mark.parametrize("bad", [-1, 7, NEVER, -NEVER])
def test_slot_that_does_not_exist(bad, backend, device, dtype) -> None:
    cache = randn(35, 7, 1, 4, dtype=dtype, device=device)
    q = randn(36, 2, 1, 4, dtype=dtype, device=device)
    with pytest.raises(ValueError, match="slot"):
        tree_attention(q, cache, cache, i32([0, bad], device), i32([0, 1], device), i32([2, 2], device), 1.0)


def test_heads_that_do_not_divide(backend, device, dtype) -> None:
    cache = randn(37, 3, 2, 4, dtype=dtype, device=device)
    q = randn(38, 1, 3, 4, dtype=dtype, device=device)
    with pytest.raises(ValueError, match="q: got 3 heads, expected a multiple of 2 KV heads"):
        tree_attention(q, cache, cache, i32([0], device), i32([0], device), i32([1], device), 1.0)
