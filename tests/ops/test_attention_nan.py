"""NaN goes to the outputs that depend on it and to no other, whichever operand and lane it is in; likewise infinity."""

from __future__ import annotations

import os
import subprocess
import sys

import hypothesis.strategies as st
import pytest
import torch
from cases import Forest, beams, caches, flatten, i32, randn
from conftest import UNLIMITED
from hypothesis import given
from torch import Tensor

import saffron_kernels
from saffron_kernels import append_kv, gather_kv, merge_attention, tree_attention
from saffron_kernels._native import cpu as native_cpu

OP = "tree_attention"
pytestmark = pytest.mark.usefixtures("poisoned")
HEADS, KV_HEADS = 4, 2
OPERANDS = ["q", "k", "v", "scale", "softcap", "sinks"]

FORESTS = {
    "small": flatten(beams(1, 2, 3, 6, 3), seed=1),
    "columns": flatten(beams(2, 1, 21, 40, 3), seed=2),  # rows of several vectors, tiles with masks and without
    "long": flatten(beams(3, 1, 3, 700, 2), seed=3),  # several splits
}


SIZES = {"small": (16, 24), "columns": (32, 64), "long": (32, 32)}  # of K and V; the last come in whole vectors


def arguments(
    forest: Forest, dtype: torch.dtype, device: torch.device, sizes: tuple[int, int] = (16, 24)
) -> dict[str, object]:
    head_dim, v_dim = sizes
    k_cache, v_cache = caches(5, forest, KV_HEADS, head_dim, dtype, device, v_dim)
    plan = {"slot": forest.slot, "begin": forest.begin, "end": forest.end}
    q = randn(6, forest.queries, HEADS, head_dim, dtype=dtype, device=device)
    sinks = randn(7, HEADS, dtype=dtype, device=device)
    return {"q": q, "k_cache": k_cache, "v_cache": v_cache, **plan, "scale": 0.3, "softcap": 3.0, "sinks": sinks}


def poison(
    operand: str, forest: Forest, given: dict, where: int, head: int, lane: int, value: float
) -> tuple[dict, Tensor, Tensor]:
    """The arguments with one number replaced, and which numbers of out and lse depend on it."""
    queries, head_dim, v_dim = forest.queries, given["q"].shape[2], given["v_cache"].shape[2]
    out, lse = torch.zeros(queries, HEADS, v_dim, dtype=torch.bool), torch.zeros(queries, HEADS, dtype=torch.bool)
    sees = forest.mask().any(1).cpu()
    changed = {name: x.clone() if isinstance(x, Tensor) else x for name, x in given.items()}
    if operand in ("scale", "softcap"):
        changed[operand] = value
        out[sees], lse[sees] = True, True
    elif operand == "sinks":
        changed["sinks"][head % HEADS] = value
        lse[:, head % HEADS] = True
        out[sees, head % HEADS] = True
    elif operand == "q":
        query = where % queries
        changed["q"][query, head % HEADS, lane % head_dim] = value
        out[query, head % HEADS] = lse[query, head % HEADS] = bool(sees[query])
    else:
        seen = [slot for slots in forest.seen for slot in slots]
        slot, kv, group = seen[where % len(seen)], head % KV_HEADS, HEADS // KV_HEADS
        seers = torch.tensor([slot in slots for slots in forest.seen])
        if operand == "k":
            changed["k_cache"][slot, kv, lane % head_dim] = value
            out[seers, kv * group : (kv + 1) * group] = True
            lse[seers, kv * group : (kv + 1) * group] = True
        else:
            changed["v_cache"][slot, kv, lane % v_dim] = value
            out[seers, kv * group : (kv + 1) * group, lane % v_dim] = True
    return changed, out, lse


def check(operand: str, forest: Forest, given: dict, clean: list[Tensor], where: int, head: int, lane: int) -> None:
    """Against `clean`, the output and LSE of the arguments as they are given."""
    changed, out_depends, lse_depends = poison(operand, forest, given, where, head, lane, torch.nan)
    out, lse = (x.cpu() for x in tree_attention(**changed))
    what = f"{operand}, {where}, {head}, {lane}"
    assert torch.equal(out.isnan(), out_depends) and torch.equal(lse.isnan(), lse_depends), what
    eps = torch.finfo(out.dtype).eps  # tokens may be added up otherwise
    for found, expected, depends in ((out, clean[0], out_depends), (lse, clean[1], lse_depends)):
        assert torch.allclose(found[~depends], expected[~depends], rtol=4 * eps, atol=4 * eps), what


@pytest.mark.parametrize("operand", OPERANDS)
@pytest.mark.parametrize("case", FORESTS)
def test_nan_in_one_lane(case, operand, backend, limit, examples, device, dtype) -> None:
    forest = FORESTS[case].to(device)
    if forest.queries * HEADS * forest.slot.numel() > limit:
        pytest.skip("too large for this backend here")
    if limit != UNLIMITED and case != "columns" and (dtype == torch.bfloat16 or operand not in ("k", "v")):
        pytest.skip("interpreted: K and V are read per tile, so in every case; the rest as in the other cases")
    given_arguments = arguments(forest, dtype, device, SIZES[case])
    clean = [x.cpu() for x in tree_attention(**given_arguments)]
    assert all(bool(x.isfinite().all()) for x in clean)

    @examples
    @given(st.integers(0, 2**16), st.integers(0, HEADS - 1), st.integers(0, SIZES[case][1] - 1))
    def run(where: int, head: int, lane: int) -> None:
        check(operand, forest, given_arguments, clean, where, head, lane)

    run()


@pytest.mark.parametrize("operand", ["q", "k", "v", "scale", "sinks"])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinity_is_not_made_finite(value, operand, backend, limit, device, dtype) -> None:
    """Where an infinite operand gives NaN or infinity in fp64, so it does here; elsewhere as without it."""
    forest = FORESTS["small"].to(device)
    given_arguments = arguments(forest, dtype, device) | {"softcap": None}
    for where in range(0, 40, 7 if limit == UNLIMITED else 20):
        changed, out_depends, lse_depends = poison(operand, forest, given_arguments, where, where % 3, where, value)
        out, lse = (x.cpu() for x in tree_attention(**changed))
        with saffron_kernels.backend("reference"):
            wide = {
                name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in changed.items()
            }
            exact, exact_lse = (x.cpu() for x in tree_attention(**wide))
        assert bool(exact.isfinite()[~out_depends].all() and exact_lse.isfinite()[~lse_depends].all())
        assert torch.equal(out.isfinite(), exact.isfinite()) and torch.equal(lse.isfinite(), exact_lse.isfinite())


@pytest.mark.parametrize("sinks", [False, True])
def test_all_scores_are_minus_infinity(sinks, backend, device, dtype) -> None:
    """Nothing to divide by: NaN. A sink then has all of the mass."""
    forest = FORESTS["small"].to(device)
    given_arguments = arguments(forest, dtype, device) | {"softcap": None}
    if not sinks:
        given_arguments["sinks"] = None
    given_arguments["q"] = given_arguments["q"].abs()
    given_arguments["k_cache"] = torch.full_like(given_arguments["k_cache"], -torch.inf)
    out, lse = tree_attention(**given_arguments)
    if sinks:
        assert not bool(out.any())
        assert torch.allclose(lse.double(), given_arguments["sinks"].double().expand_as(lse), rtol=1e-6)
    else:
        assert bool(out.isnan().all()) and bool((lse == -torch.inf).all())


def test_everything_is_nan(backend, device, dtype) -> None:
    nan = torch.full((2, 2, 16), torch.nan, dtype=dtype, device=device)
    k, v = (randn(8 + i, 2, 1, 16, dtype=dtype, device=device) for i in range(2))
    plan = (i32(x, device) for x in ([0, 1], [0, 1], [2, 2]))
    out, lse = tree_attention(nan, k, v, *plan, 0.25)
    assert bool(out.isnan().all()) and bool(lse.isnan().all())


def test_queries_that_see_nothing_stay_empty(backend, device, dtype) -> None:
    """Between others that see NaN, and with a scale that is NaN."""
    rows = torch.full((40, 1, 8), torch.nan, dtype=dtype, device=device)
    out, lse = tree_attention(rows, rows, rows, *(i32(x, device) for x in ([3, 4], [5, 30], [20, 40])), torch.nan)
    sees = torch.tensor([5 <= i < 20 or i >= 30 for i in range(40)])
    assert torch.equal(out.isnan().all(-1)[:, 0].cpu(), sees) and torch.equal(lse[:, 0].isnan().cpu(), sees)
    assert not bool(out.cpu()[~sees].any()) and bool((lse.cpu()[~sees] == -torch.inf).all())


def test_hidden_value_in_a_wide_block(backend, device, dtype) -> None:
    """V of one query's own token is NaN or infinite; there are more rows than a block of any kernel has."""
    queries, heads = (20, 2) if backend == "triton" else (70, 4)
    k, v = (randn(9 + i, queries + 64, 2, 64, dtype=dtype, device=device) for i in range(2))
    q = randn(11, queries, heads, 64, dtype=dtype, device=device)
    shared = [*range(queries, queries + 64)]
    plan = [
        i32(x, device)
        for x in ([*range(queries), *shared], [*range(queries), *[0] * 64], [*range(1, queries + 1), *[queries] * 64])
    ]
    clean, clean_lse = tree_attention(q, k, v, *plan, 0.2)
    for bad, value in ((0, torch.nan), (queries // 2, torch.inf), (queries - 1, torch.nan)):
        spoilt = v.clone()
        spoilt[bad, 1, 5] = value
        out, lse = tree_attention(q, k, spoilt, *plan, 0.2)
        changed = torch.zeros(out.shape, dtype=torch.bool)
        changed[bad, heads // 2 :, 5] = True
        assert torch.equal(out.isfinite().cpu(), ~changed) and torch.equal(lse, clean_lse)
        eps = torch.finfo(dtype).eps
        assert torch.allclose(out.cpu()[~changed], clean.cpu()[~changed], rtol=4 * eps, atol=4 * eps)


@pytest.mark.parametrize("op", ["merge_attention"])
def test_merge(op, backend, examples, device, dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    outs = [randn(12 + i, 5, 3, 20, dtype=dtype, device=device) for i in range(2)]
    lses = [randn(14 + i, 5, 3, dtype=wide, device=device) for i in range(2)]
    lses[1][2, 1] = -torch.inf

    @examples
    @given(st.sampled_from([0, 1]), st.booleans(), st.integers(0, 4), st.integers(0, 2), st.integers(0, 19))
    def run(side: int, in_lse: bool, query: int, head: int, lane: int) -> None:
        out, lse = [x.clone() for x in outs], [x.clone() for x in lses]
        expected, expected_lse = torch.zeros(5, 3, 20, dtype=torch.bool), torch.zeros(5, 3, dtype=torch.bool)
        if in_lse:
            lse[side][query, head] = torch.nan
            expected[query, head], expected_lse[query, head] = True, True
        else:
            out[side][query, head, lane] = torch.nan
            expected[query, head, lane] = True
        joined, joined_lse = merge_attention(out[0], lse[0], out[1], lse[1])
        assert torch.equal(joined.isnan().cpu(), expected) and torch.equal(joined_lse.isnan().cpu(), expected_lse)

    run()


@pytest.mark.parametrize("op", ["append_kv"])
def test_append_and_gather_keep_it(op, backend, device, dtype) -> None:
    k, v = (randn(16 + i, 3, 2, 6 + 2 * i, dtype=dtype, device=device) for i in range(2))
    k[1, 0, 3], v[2, 1, 7] = torch.nan, torch.nan
    k_cache, v_cache = (torch.zeros(5, 2, 6 + 2 * i, dtype=dtype, device=device) for i in range(2))
    append_kv(k, v, i32([4, 0, 2], device), k_cache, v_cache)
    assert k_cache.isnan().nonzero().tolist() == [[0, 0, 3]] and v_cache.isnan().nonzero().tolist() == [[2, 1, 7]]
    k_copy, v_copy = gather_kv(k_cache, v_cache, i32([0, 2], device).view(1, 2))
    assert k_copy.isnan().nonzero().tolist() == [[0, 0, 0, 3]] and v_copy.isnan().nonzero().tolist() == [[0, 1, 1, 7]]


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512bf16", "amx"])
def test_every_instruction_set(isa) -> None:
    """The tests above on the CPU, in a process that is asked for the instruction set."""
    environment = os.environ | {"SAFFRON_CPU_ISA": isa}
    asked = [sys.executable, "-c", "from saffron_kernels._native import cpu; print(cpu.isa())"]
    if subprocess.run(asked, env=environment, capture_output=True, text=True, check=True).stdout.strip() != isa:
        pytest.skip(f"this machine does not have {isa}")
    if native_cpu.isa() == isa:
        pytest.skip("the tests above run on it")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "cpu-cpu"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
