"""Two attention results over disjoint tokens are as good as one over all of them."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import LAYOUTS, beams, caches, flatten, i32, randn
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_as_good_as_torch
from torch import Tensor

from saffron_kernels import backend as use_backend
from saffron_kernels import merge_attention, tree_attention
from saffron_kernels.checks import compute_dtype

OP = "merge_attention"
pytestmark = pytest.mark.usefixtures("poisoned")


def formula(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """The docstring's expression, rounded to the dtype of the inputs."""
    lse = torch.logaddexp(lse_a, lse_b)
    out = out_a * (lse_a - lse).exp()[..., None] + out_b * (lse_b - lse).exp()[..., None]
    return out.nan_to_num(0).to(out_a.dtype), lse


def check(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    out, lse = merge_attention(out_a, lse_a, out_b, lse_b)
    assert out.dtype == out_a.dtype and lse.dtype == lse_a.dtype and out.is_contiguous() and lse.is_contiguous()
    exact = oracle.merge_attention(out_a, lse_a, out_b, lse_b)
    own = formula(out_a, lse_a, out_b, lse_b)
    finite = torch.stack([lse_a, lse_b])
    size = max([1.0, *finite[finite.isfinite()].abs().flatten().tolist()])
    largest = max([0.0, *torch.stack([out_a, out_b]).abs().flatten().tolist()])
    assert_as_good_as_torch("lse", lse, exact[1], own[1], size)
    # The weights are exp of a difference, which costs as many units as the log-sum-exps are large.
    assert_as_good_as_torch("out", out, exact[0], own[0], largest * size if out.dtype.itemsize > 2 else largest)


def inputs(seed: int, shape: tuple[int, ...], spread: float, dtype, device) -> list[Tensor]:
    outs = [randn(seed + i, *shape, dtype=dtype, device=device) for i in range(2)]
    lses = [spread * randn(seed + 2 + i, *shape[:2], dtype=compute_dtype(dtype), device=device) for i in range(2)]
    return [outs[0], lses[0], outs[1], lses[1]]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spread", [1.0, 60.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 3, 7), (33, 2, 64), (3, 8, 128)])
def test_against_oracle(shape, spread, layout, backend, device, dtype) -> None:
    check(*(LAYOUTS[layout](x) for x in inputs(1, shape, spread, dtype, device)))


@pytest.mark.parametrize("shape", [(0, 2, 4), (2, 0, 4)])
def test_empty(shape, backend, device, dtype) -> None:
    check(*inputs(2, shape, 1.0, dtype, device))


def test_one_side_saw_nothing(backend, device, dtype) -> None:
    """The other side's result comes through bit for bit."""
    out_a, lse_a, out_b, lse_b = inputs(3, (4, 2, 5), 3.0, dtype, device)
    out_b, lse_b = torch.zeros_like(out_b), torch.full_like(lse_b, -torch.inf)
    for arguments in ((out_a, lse_a, out_b, lse_b), (out_b, lse_b, out_a, lse_a)):
        out, lse = merge_attention(*arguments)
        assert torch.equal(out, out_a) and torch.equal(lse, lse_a)


def test_neither_saw_anything(backend, device, dtype) -> None:
    zero = torch.zeros(2, 3, 4, dtype=dtype, device=device)
    nothing = torch.full((2, 3), -torch.inf, dtype=compute_dtype(dtype), device=device)
    out, lse = merge_attention(zero, nothing, zero, nothing)
    assert torch.equal(out, zero) and torch.equal(lse, nothing)


def test_random(backend, examples, device, dtype) -> None:
    @examples
    @given(st.integers(0, 2**20), st.lists(st.sampled_from([-300.0, -1.0, 0.0, 2.5, 88.0, -torch.inf]), max_size=6))
    def run(seed: int, lses: list[float]) -> None:
        out_a, lse_a, out_b, _ = inputs(seed, (len(lses), 2, 3), 20.0, dtype, device)
        lse_b = torch.tensor(lses, dtype=lse_a.dtype, device=device)[:, None].repeat(1, 2)
        check(out_a, lse_a, out_b, lse_b)

    run()


def test_parts_of_a_tree_make_the_whole(backend, device, dtype) -> None:
    forest = flatten(beams(4, 2, 5, 12, 3), seed=4).to(device)
    k_cache, v_cache = caches(5, forest, 2, 16, dtype, device)
    q = randn(6, forest.queries, 4, 16, dtype=dtype, device=device)
    plan = [forest.slot, forest.begin, forest.end]
    half = forest.slot.numel() // 2
    with use_backend("reference"):
        wide = [x.double() for x in (q, k_cache, v_cache)]
        whole, whole_lse = tree_attention(*wide, *plan, 0.25)
        a, b = (
            tree_attention(q, k_cache, v_cache, *part, 0.25)
            for part in ([x[:half] for x in plan], [x[half:] for x in plan])
        )
    out, lse = merge_attention(*a, *b)
    eps, lse_eps = torch.finfo(dtype).eps, torch.finfo(lse.dtype).eps
    assert torch.allclose(lse.double(), whole_lse, rtol=0, atol=16 * lse_eps)
    assert torch.allclose(
        out.double(), whole, rtol=0, atol=4 * eps * float(v_cache[v_cache.isfinite()].abs().max()) + 16 * lse_eps
    )


def test_same_input_same_bits_and_order_of_sides(backend, device, dtype) -> None:
    out_a, lse_a, out_b, lse_b = inputs(7, (9, 4, 33), 5.0, dtype, device)
    first, again = (merge_attention(out_a, lse_a, out_b, lse_b) for _ in range(2))
    other = merge_attention(out_b, lse_b, out_a, lse_a)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    for x, y in zip(first, other, strict=True):
        assert torch.allclose(
            x.double(), y.double(), rtol=2 * torch.finfo(x.dtype).eps, atol=4 * torch.finfo(x.dtype).eps
        )


def test_index_tensor_for_out(device) -> None:
    out, lse = i32([1], device).view(1, 1, 1), torch.zeros(1, 1, device=device)
    with pytest.raises(TypeError, match="out_a"):
        merge_attention(out, lse, out, lse)
