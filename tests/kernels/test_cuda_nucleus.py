"""What only the CUDA nucleus has: rows in parts, blocks that meet, lists that shared memory does not hold."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import cuda_host
import pytest
import torch
from cases import i32, randn
from torch import Tensor

from saffron_kernels import backend as use_backend
from saffron_kernels import multifurcate, nucleus
from saffron_kernels.backends import cuda, faults
from saffron_kernels.backends.cuda import counters

CPU = torch.device("cpu")
# Tokens of one part of a row: 2048 loads of 16 bytes.
PART = {torch.float32: 8192, torch.bfloat16: 16384, torch.float16: 16384}
pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def executed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run on the CPU."""
    monkeypatch.setenv("SAFFRON_CUDA_HOST", cuda_host.module())


@pytest.fixture
def in_any_order(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`nucleus` under orders of threads and blocks that must not matter.

    Under seed 0 blocks come one after another: none meets the others, and the last does the work of all.
    """

    def run(*arguments: object, seeds: int = 3) -> tuple[Tensor, Tensor, Tensor]:
        results = []
        for seed in range(seeds):
            monkeypatch.setenv("SAFFRON_CUDA_HOST_SEED", str(seed))
            results.append(cuda.nucleus(*arguments))
            assert counters._counters and not any(bool(zeros.any()) for zeros in counters._counters.values())
            assert all(torch.equal(a, b) for a, b in zip(results[0], results[-1], strict=True)), seed
        return results[0]

    return run


def check(found: tuple[Tensor, Tensor, Tensor], logits: Tensor, top_p: float, banned: Tensor | None = None) -> None:
    """The same tokens as the reference's, but for one at the edge, where a sum may round to the other side of it."""
    with use_backend("reference"):
        tokens, probability, offsets = nucleus(logits.double(), top_p, banned)
    for row in range(logits.shape[0]):
        ours, exact = (slice(*x[row : row + 2].tolist()) for x in (found[2], offsets))
        expected = tokens[exact][probability[exact] >= torch.finfo(torch.float32).tiny]
        kept, chance = found[0][ours], found[1][ours]
        assert abs(len(kept) - len(expected)) <= 1
        both = min(len(kept), len(expected))
        assert torch.equal(kept[:both], expected[:both])
        assert torch.allclose(chance[:both].double(), probability[exact][:both], rtol=2e-6, atol=0)


SEVERAL_PARTS = [(0.02, 0.001), (0.02, 0.8), (1.0, 1.0), (6.0, 0.8), (6.0, 0.999)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale, top_p", SEVERAL_PARTS)
def test_rows_of_several_parts(scale, top_p, dtype, in_any_order) -> None:
    """Flat, as drawn and peaked; rows that begin anywhere; a vocabulary that ends within a part."""
    vocab, banned = 2 * PART[dtype] + 1235, i32([3, PART[dtype], PART[dtype] + 1, 2 * PART[dtype] + 1234])
    logits = (scale * randn(1, 2, vocab)).to(dtype)
    logits[1, 5:3000] = -torch.inf
    logits[1, PART[dtype] + 7] = 5 * scale
    check(in_any_order(logits, top_p, banned), logits, top_p, banned)


@pytest.mark.parametrize("rows", [4, 6])
def test_blocks_that_meet(rows, in_any_order) -> None:
    """Two blocks a row, which see each other's sums or do not, and come last in turns."""
    logits = 4 * randn(11, rows, PART[torch.float32] + 800)
    check(in_any_order(logits, 0.8, None, seeds=25), logits, 0.8)


def test_blocks_that_come_late() -> None:
    """A row of 16 parts, four blocks at once: most of the row's bins are left to its last block."""
    logits = 4 * randn(2, 1, 128_256)
    check(cuda.nucleus(logits, 0.8, None), logits, 0.8)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_largest_vocabulary(seed, monkeypatch) -> None:
    monkeypatch.setenv("SAFFRON_CUDA_HOST_SEED", str(seed))
    logits = 6 * randn(3, 1, 1 << 20)
    check(cuda.nucleus(logits, 0.9, None), logits, 0.9)


@pytest.mark.parametrize("rows, vocab, most", [(1, (1 << 20) + 1, 1 << 20), (4097, 1, 4096)])
def test_sizes_it_does_not_serve(rows, vocab, most) -> None:
    with pytest.raises(ValueError, match=f"at most {most}"):
        cuda.nucleus(torch.zeros(rows, vocab), 0.9, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [1, 129, 20_000])
def test_one_logit_all_over(kept, dtype, in_any_order) -> None:
    """All probabilities are 2^-15: the set is exact. More tokens are at the edge than shared memory holds."""
    logits = torch.full((1, 40_000), -torch.inf, dtype=dtype)
    alive = torch.arange(40_000)[torch.arange(40_000) % 5 < 4][:32_000]
    alive = torch.cat([alive, torch.arange(4, 40_000, 5)[:768]]).sort()[0]
    logits[0, alive] = -3.25
    tokens, probability, _ = in_any_order(logits, kept / 32_768, None, seeds=2)
    assert torch.equal(tokens, alive[:kept].int()) and bool((probability == 2.0**-15).all())


@pytest.mark.parametrize("dtype", PART)
@pytest.mark.parametrize("before", [0, 1, 500])
def test_ties_across_parts(before, dtype, in_any_order) -> None:
    """Tokens of one logit stand in all parts, the edge among them: the lower ids are in, exactly."""
    vocab = 3 * PART[dtype]
    logits = torch.full((1, vocab), -torch.inf, dtype=dtype)
    places = torch.arange(1024) * (vocab // 1024)
    logits[0, places] = 2.5
    tokens, _, _ = in_any_order(logits, max(before, 0.5) / 1024, None)
    assert torch.equal(tokens, places[: max(before, 1)].int())


def counted(what: str) -> int:
    """How often kernels that the CPU executes did it so far: `atomics`, or `copies` of 16 bytes."""
    count = getattr(ctypes.CDLL(cuda_host.module()), f"saffron_{what}")
    count.restype = ctypes.c_size_t
    return count()


@pytest.mark.parametrize("kept", [100, 20_000])
def test_a_flat_row_needs_one_atomic_for_a_warp(kept) -> None:
    """Atomics on one address take turns; here all tokens have one bin, and then one range of token ids."""
    logits, before = torch.zeros(1, 32_768, dtype=torch.bfloat16), counted("atomics")
    tokens, _, _ = cuda.nucleus(logits, kept / 32_768, None)
    assert torch.equal(tokens, torch.arange(kept, dtype=torch.int32))
    assert counted("atomics") - before < 32_768 / 2  # four for every token without


@pytest.mark.parametrize("dtype, vocab", [(torch.bfloat16, 20_001), (torch.float16, 16_383), (torch.float32, 9_003)])
def test_rows_of_an_odd_vocabulary_move_16_bytes_at_a_time(dtype, vocab) -> None:
    """Rows begin anywhere; what they give is what each gives alone, where it is aligned."""
    rows, in_vector = 16 // dtype.itemsize + 1, 16 // dtype.itemsize
    logits = (4 * randn(21, rows, vocab)).to(dtype)
    assert logits.data_ptr() % 16 == 0 and vocab % in_vector
    before = counted("copies")
    tokens, probability, offsets = cuda.nucleus(logits, 0.9, None)
    parts = -(-vocab // PART[dtype])
    assert counted("copies") - before >= rows * (vocab // in_vector - 2 * parts)
    for row in range(rows):
        own = slice(*offsets[row : row + 2].tolist())
        alone = cuda.nucleus(logits[row : row + 1].clone(), 0.9, None)
        assert torch.equal(tokens[own], alone[0]) and torch.equal(probability[own], alone[1])


def test_sorted_runs_are_joined_in_two_steps(in_any_order) -> None:
    """More than eight chunks of 2,048 members; another row has two chunks, and one is done at once."""
    logits = torch.full((3, 20_000), -torch.inf)
    logits[0] = randn(12, 20_000)
    logits[1, ::7] = randn(13, 2858)
    logits[2, 5:9] = 1.0
    tokens, probability, offsets = in_any_order(logits, 1.0, None, seeds=2)
    assert offsets.tolist() == [0, 20_000, 22_858, 22_862]
    for row in range(3):
        own = tokens[offsets[row] : offsets[row + 1]].long()
        order = logits[row].argsort(descending=True, stable=True)[: len(own)]
        assert torch.equal(own, order)


def test_logits_that_share_a_bin(in_any_order) -> None:
    """Neighbouring floats, more than are compared each with each: only their bits tell them apart."""
    one = torch.tensor(1.0).view(torch.int32)
    logits = (one + torch.arange(9000, dtype=torch.int32) * 7919 % 9000).view(torch.float32)[None]
    tokens, _, offsets = in_any_order(logits, 0.3, None)
    assert torch.equal(tokens, logits[0].argsort(descending=True)[: tokens.shape[0]].int())
    assert abs(int(offsets[1]) - 2700) <= 2


@pytest.mark.parametrize("layout", ["strided", "transposed", "shifted"])
def test_layouts_of_several_parts(layout, in_any_order) -> None:
    """The same bits, whatever unit the layout lets rows be read in."""
    logits = 3 * randn(5, 3, 20_000, dtype=torch.bfloat16)
    view = {
        "strided": lambda: torch.stack([logits, -logits], -1)[..., 0],
        "transposed": lambda: logits.t().contiguous().t(),
        "shifted": lambda: torch.cat([logits, logits[:, :3]], 1)[:, :20_000],
    }[layout]()
    assert view.stride() != logits.stride() and torch.equal(view, logits)
    for ours, expected in zip(in_any_order(view, 0.8, None), cuda.nucleus(logits, 0.8, None), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("bad, part", [(torch.nan, 0), (torch.nan, 2), (torch.inf, 1), (-torch.inf, 0)])
def test_bad_rows_leave_no_trace(bad, part, in_any_order) -> None:
    """Wherever the bad logit stands; counters are as before, and so is the next result."""
    logits = randn(7, 2, 20_000)
    good = in_any_order(logits, 0.5, None)
    broken = logits.clone()
    if bad == -torch.inf:
        broken[1] = bad
    else:
        broken[1, part * PART[torch.float32] + 99] = bad
    with pytest.raises(ValueError, match="logits: row 1 has no finite maximum"):
        in_any_order(broken, 0.5, None)
    assert not any(bool(zeros.any()) for zeros in counters._counters.values())
    cuda.raise_faults("cpu")  # it was raised already
    assert all(torch.equal(a, b) for a, b in zip(in_any_order(logits, 0.5, None), good, strict=True))


def test_banned_tokens_that_do_not_exist(monkeypatch) -> None:
    """Found by the kernel where nobody looked before: the others are banned all the same."""
    monkeypatch.setattr(faults, "eager", lambda tensor: False)
    logits = torch.zeros(1, 20_000)
    tokens, _, _ = cuda.nucleus(logits, 1.0, i32([-1, 0, 20_000, 12_000]))
    assert sorted({*range(20_000)} - {*tokens.tolist()}) == [0, 12_000]
    with pytest.raises(ValueError, match="banned"):
        cuda.raise_faults("cpu")


def test_rows_of_no_group_are_not_read() -> None:
    """In a step: their logits are NaN here, and no row of theirs has candidates."""
    rows, vocab = 6, 20_000
    logits, hidden, weight = randn(8, rows, vocab), randn(9, rows, 16), randn(10, vocab, 16)
    logits[4:] = torch.nan
    arguments = hidden, weight, None, None, 0.0, i32([0, 0, 1, 1, 2, 2]), 2, 3, 0.7
    with use_backend("cuda"):
        counts = multifurcate(logits, *arguments)[3]
    assert bool((counts[:4] > 0).all()) and counts[4:].tolist() == [0, 0]
