"""What only the CUDA backend has: kernels executed in any order of threads, faults they record, counters, workspace."""

from __future__ import annotations

from collections.abc import Callable

import cuda_host
import pytest
import torch
from cases import beams, caches, flatten, i32, prefill, randn
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import saffron_kernels
from saffron_kernels import BackendError, backends
from saffron_kernels import backend as use_backend
from saffron_kernels.backends import cuda, faults
from saffron_kernels.backends.cuda import counters
from saffron_kernels.checks import FP8

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def executed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run on the CPU."""
    monkeypatch.setenv("SAFFRON_CUDA_HOST", cuda_host.module())


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """Content is not looked at before a launch: what is wrong with it the kernels have to find."""
    monkeypatch.setattr(faults, "eager", lambda tensor: False)
    faults.clear(CPU)


def decode_step(heads: int, kv_heads: int, head_dim: int, width: int, dtype: torch.dtype = torch.bfloat16):
    """Arguments of tree_attention for a search of `width` beams."""
    forest = flatten(beams(1, 1, width, 90, 4), seed=2)
    k_cache, v_cache = caches(3, forest, kv_heads, head_dim, dtype)
    q = randn(4, forest.queries, heads, head_dim, dtype=dtype)
    return q, k_cache, v_cache, forest.slot, forest.begin, forest.end, head_dim**-0.5


def rows_of(dtype: torch.dtype, head_dim: int) -> list[Tensor]:
    cache = randn(5, 40, 2, head_dim, dtype=dtype)
    slots = i32([*range(0, 40, 3), -1, -1])
    written = cache.clone()
    cuda.append_kv(cache[:16], cache[16:32], slots, written, written.clone())
    lse = randn(6, 40, 2)
    return [written, *cuda.gather_kv(cache, cache, slots.view(4, 4)), *cuda.merge_attention(cache, lse, cache, -lse)]


def advanced() -> tuple[Tensor, ...]:
    forest = flatten(beams(7, 1, 30, 300, 4), seed=8, dead=0)
    parents = i32(sorted(i * 7 % forest.queries for i in range(50)))
    return cuda.advance_tree(forest.slot, forest.begin, forest.end, parents, i32(range(50)), forest.queries)


RACES: dict[str, Callable[[], object]] = {
    "rows, 16 bytes": lambda: rows_of(torch.bfloat16, 64),
    "rows, one element": lambda: rows_of(torch.float32, 3),
    "plan": advanced,
    "16 rows": lambda: cuda.tree_attention(*decode_step(4, 2, 128, 5)),
    "64 rows": lambda: cuda.tree_attention(*decode_step(8, 2, 64, 13)),
    "128 rows": lambda: cuda.tree_attention(*decode_step(8, 1, 96, 30, torch.float16)),
    "16 rows of 256": lambda: cuda.tree_attention(*decode_step(2, 1, 256, 3)),
    "64 rows of 256": lambda: cuda.tree_attention(*decode_step(4, 1, 256, 20)),
}


@pytest.mark.parametrize("case", RACES)
def test_same_bits_in_any_order_of_threads(case, monkeypatch) -> None:
    """Threads that wait for each other where they must give one result; blocks, up to four at once, likewise."""
    monkeypatch.setenv("SAFFRON_CUDA_HOST_SEED", "0")
    first = RACES[case]()
    for seed in range(1, 9):
        monkeypatch.setenv("SAFFRON_CUDA_HOST_SEED", str(seed))
        for ours, theirs in zip(RACES[case](), first, strict=True):
            assert torch.equal(ours, theirs), seed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [40, 64, 96, 128, 200, 256])
@pytest.mark.parametrize("width", [2, 12, 33])
def test_every_configuration_against_the_reference(width, head_dim, dtype) -> None:
    """16, 64 and 128 rows per block, tokens split over blocks; groups that do not divide 16."""
    arguments = decode_step(6, 2, head_dim, width, dtype)
    out, lse = cuda.tree_attention(*arguments)
    with use_backend("reference"):
        exact, exact_lse = saffron_kernels.tree_attention(*(x.double() for x in arguments[:3]), *arguments[3:])
    eps = torch.finfo(dtype).eps
    assert torch.allclose(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)
    assert torch.allclose(out.double(), exact, rtol=2 * eps, atol=2 * eps)


def test_a_chunk_of_a_prefill_against_the_reference() -> None:
    """More units than blocks: they are drawn from the list."""
    sequences = beams(9, 3, 2, 60, 30)
    forest = flatten(prefill(sequences, cached=20), seed=10)
    k_cache, v_cache = caches(11, forest, 2, 64, torch.bfloat16)
    q = randn(12, forest.queries, 8, 64, dtype=torch.bfloat16)
    assert q.shape[0] * 4 > 6 * 128  # rows of one KV head, of which 6 processors hold 128 each
    plan = forest.slot, forest.begin, forest.end
    out, lse = cuda.tree_attention(q, k_cache, v_cache, *plan, 0.125)
    with use_backend("reference"):
        exact, exact_lse = saffron_kernels.tree_attention(q.double(), k_cache.double(), v_cache.double(), *plan, 0.125)
    assert torch.allclose(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)
    assert torch.allclose(out.double(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_counters_are_left_zero(seed, monkeypatch) -> None:
    monkeypatch.setenv("SAFFRON_CUDA_HOST_SEED", str(seed))
    for width in (2, 12, 33):
        cuda.tree_attention(*decode_step(6, 2, 64, width))
    left = counters._counters
    assert left and not any(bool(zeros.any()) for zeros in left.values())


@pytest.mark.parametrize("count", [0, 1, 50, 1000])
def test_count_of_tokens_on_the_device(count, deferred) -> None:
    """A plan that is longer than what it holds; beyond the count, or its own end, it is not looked at."""
    q, k_cache, v_cache, slot, begin, end, scale = decode_step(4, 2, 64, 6)
    held = min(count, slot.shape[0])
    nonsense = torch.full_like(slot, 2**31 - 9)
    padded = [torch.cat([x[:held], nonsense[held:]]) for x in (slot, begin)]
    out, lse = cuda.tree_attention(q, k_cache, v_cache, *padded, end, scale, count=i32([count]))
    expected, expected_lse = cuda.tree_attention(q, k_cache, v_cache, slot[:held], begin[:held], end[:held], scale)
    assert torch.allclose(lse, expected_lse, atol=1e-5)
    assert torch.allclose(out.float(), expected.float(), atol=0.02)


def test_bad_slots_are_recorded_and_left_out(deferred) -> None:
    q, k_cache, v_cache, slot, begin, end, scale = decode_step(4, 2, 64, 6)
    bad = slot.clone()
    bad[0], begin[0], end[0] = 10**6, 0, 6
    out, _ = cuda.tree_attention(q, k_cache, v_cache, bad, begin, end, scale)
    without = cuda.tree_attention(q, k_cache, v_cache, slot[1:], begin[1:], end[1:], scale)
    assert torch.allclose(out.float(), without[0].float(), atol=0.02)
    with pytest.raises(ValueError, match="slot"):
        cuda.raise_faults("cpu")
    cuda.raise_faults("cpu")  # once

    k, k_new = k_cache.clone(), randn(13, 2, 2, 64, dtype=k_cache.dtype)
    cuda.append_kv(k_new, k_new, i32([-2, k.shape[0]]), k, k)
    assert torch.equal(k.nan_to_num(), k_cache.nan_to_num())
    with pytest.raises(ValueError, match="slot"):
        cuda.raise_faults("cpu")
    gathered, _ = cuda.gather_kv(k_cache, v_cache, i32([[-3, 10**6]]))
    assert not gathered.any()
    with pytest.raises(ValueError, match="slot"):
        cuda.raise_faults("cpu")


def test_bad_plan_is_recorded(deferred) -> None:
    one = i32([0])
    for begin, parents in ((9, [0, 0]), (0, [1, 0]), (0, [-1, 0])):
        cuda.advance_tree(one, i32([begin]), one + 1, i32(parents), i32([1, 2]), 2)
        with pytest.raises(ValueError, match="parents"):
            cuda.raise_faults("cpu")


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for the device, and so could not be captured in a CUDA graph."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique"), name
        return function(*args, **(kwargs or {}))


def test_no_op_waits_for_the_device(deferred) -> None:
    arguments = decode_step(8, 2, 64, 13)
    cache, lse = arguments[1], randn(6, arguments[1].shape[0], 2)
    index = i32([0, 1])
    with NoWaiting():
        cuda.tree_attention(*arguments)
        cuda.append_kv(cache[:2].clone(), cache[2:4].clone(), index, cache, cache)
        cuda.gather_kv(cache, cache, index[None])
        cuda.merge_attention(cache, lse, cache, lse)
        cuda.advance_tree(index, index, index + 1, index, index, 2)
    with NoWaiting(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        index.sum().item()


@pytest.mark.parametrize("stored", ["bfloat16", "fp8"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_configurations_for_99_kb_against_the_reference(head_dim, stored, monkeypatch) -> None:
    """Compute capability 8.9: other blocks for few rows, for many, and for the largest head size."""
    monkeypatch.setenv("SAFFRON_CUDA_HOST_CAPABILITY", "89")
    for width in (2, 12, 33):
        q, k_cache, v_cache, *rest = decode_step(6, 2, head_dim, width)
        if stored == "fp8":
            k_cache, v_cache = (x.nan_to_num().to(FP8) for x in (k_cache, v_cache))
        out, lse = cuda.tree_attention(q, k_cache, v_cache, *rest)
        exact = [x.float().double() for x in (q, k_cache, v_cache)]
        with use_backend("reference"):
            expected, expected_lse = saffron_kernels.tree_attention(*exact, *rest)
        assert torch.allclose(lse.double(), expected_lse, rtol=1e-6, atol=1e-5)
        assert torch.allclose(out.double(), expected, rtol=0.016, atol=0.016)


def test_beams_that_do_not_fit_a_block_are_refused_before_the_launch(monkeypatch) -> None:
    def select(width: int) -> None:
        rows = torch.arange(width + 1, dtype=torch.int32)
        cuda.select_beam(torch.zeros(width), rows[:-1], rows, torch.zeros(width, dtype=torch.int32), 1, width)

    select(4096)
    monkeypatch.setenv("SAFFRON_CUDA_HOST_CAPABILITY", "120")
    select(3200)
    with pytest.raises(ValueError, match="width: got 4096 of 4096 rows, expected fewer: .*shared memory"):
        select(4096)


def test_what_it_does_not_serve(monkeypatch) -> None:
    assert "tensor cores" in str(backends.why_not("cuda", "tree_attention", CPU, torch.float32))
    assert backends.why_not("cuda", "append_kv", CPU, torch.float32) is None
    assert "torch.float64" in str(backends.why_not("cuda", "append_kv", CPU, torch.float64))
    assert "CUDA device" in str(backends.why_not("cuda", "append_kv", torch.device("meta"), torch.float32))
    wide = decode_step(1, 1, 264, 2)
    with pytest.raises(ValueError, match="a head size of 264, expected at most 256"):
        cuda.tree_attention(*wide)
    monkeypatch.delenv("SAFFRON_CUDA_HOST")
    with use_backend("cuda"), pytest.raises(BackendError, match="SAFFRON_CUDA_HOST"):
        saffron_kernels.tree_attention(*decode_step(1, 1, 64, 2))


def test_it_comes_after_triton_until_it_is_measured() -> None:
    """What Triton does not serve, caches in fp8, it does: on a GPU the reference comes last."""
    assert backends.PREFERENCE["cuda"] == ("triton", "cuda", "reference")
