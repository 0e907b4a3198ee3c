"""Caches in fp8 (e4m3): what is stored to the bit, attention over it in fp64, and who serves it."""

from __future__ import annotations

from collections.abc import Iterator

import cuda_host
import pytest
import torch
from cases import LAYOUTS, beams, caches, example, flatten, i32, randn
from torch import Tensor

import saffron_kernels
from saffron_kernels import BackendError, append_kv, backends, gather_kv, tree_attention
from saffron_kernels.backends import cuda
from saffron_kernels.checks import FP8

pytestmark = pytest.mark.usefixtures("poisoned")
SCALES = [0.25, 0.031], [3.0, 0.7]  # of K and of V, two heads each


@pytest.fixture(params=["cuda", "reference"])
def fp8_backend(request, device, monkeypatch) -> Iterator[str]:
    """Every backend that has caches in fp8."""
    if request.param == "cuda" and device.type == "cpu":
        monkeypatch.setenv("SAFFRON_CUDA_HOST", cuda_host.module())
    if (reason := backends.why_not(request.param, "append_kv", device, FP8)) is not None:
        pytest.skip(reason)
    with backends.backend(request.param):
        yield request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
def dtype(request) -> torch.dtype:
    """What K, V and queries are computed in."""
    return request.param


def code(x: Tensor) -> Tensor:
    """The bits, but one NaN for all."""
    return torch.where(x.float().isnan(), 255, x.contiguous().view(torch.uint8))


def nearest(x: Tensor) -> Tensor:
    """The codes of the nearest e4m3 numbers, ties to the even code; beyond the largest number the largest; by search.

    `x` is fp64; every code but those of NaN is looked at.
    """
    numbers = torch.arange(127, dtype=torch.uint8).view(FP8).double()  # 0 to 448
    assert bool((numbers.diff() > 0).all()) and numbers[-1] == 448
    size = x.abs().clamp(max=448)
    above = torch.searchsorted(numbers, size.contiguous()).clamp(max=126)
    below = (above - 1).clamp(min=0)
    to_above, to_below = numbers[above] - size, size - numbers[below]
    even = torch.where(above % 2 == 0, above, below)
    found = torch.where(to_above < to_below, above, torch.where(to_above > to_below, below, even))
    return torch.where(x.isnan(), 255, found + torch.where(torch.signbit(x), 128, 0)).to(torch.uint8)


def hard_numbers() -> Tensor:
    """Every e4m3 number, what lies halfway between two, the fp32 numbers next to those, and what does not fit."""
    numbers = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    exact = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2, torch.tensor([449.0, 464, 480, 1e6, torch.inf])])
    around = [torch.nextafter(exact, torch.tensor(limit)) for limit in (-torch.inf, torch.inf)]
    tiny = torch.tensor([2.0**-10, 2.0**-11, 1e-30, 1e-40])
    sized = torch.cat([exact, *around, tiny])
    return torch.cat([sized, -sized, torch.tensor([torch.nan])])


def test_every_number_is_rounded_to_the_nearest(fp8_backend, device) -> None:
    x = hard_numbers().view(-1, 1, 1).to(device)
    k_cache, v_cache = (torch.zeros(x.shape, dtype=FP8, device=device) for _ in range(2))
    append_kv(x, -x, i32(range(x.shape[0]), device), k_cache, v_cache)
    assert torch.equal(code(k_cache).cpu(), nearest(x.cpu().double()))
    assert torch.equal(code(v_cache).cpu(), nearest(-x.cpu().double()))


@pytest.mark.parametrize("value", [torch.bfloat16, torch.float16])
def test_sixteen_bit_numbers_are_rounded_once(fp8_backend, device, value) -> None:
    """All of them but NaN, 16 bytes at a time."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(value)
    x = bits[~bits.isnan()]
    x = x[: x.shape[0] // 64 * 64].view(-1, 2, 32).to(device)
    k_cache = torch.zeros(x.shape, dtype=FP8, device=device)
    append_kv(x, x, i32(range(x.shape[0]), device), k_cache, k_cache.clone())
    assert torch.equal(code(k_cache).cpu(), nearest(x.cpu().double()))


@pytest.mark.parametrize("layout, scales", [*((x, SCALES) for x in LAYOUTS), ("contiguous", (None, None))])
@pytest.mark.parametrize("head_dim, rotated", [(8, 0), (64, 64), (128, 32), (7, 6), (80, 0)])
def test_append(head_dim, rotated, scales, layout, fp8_backend, device, dtype) -> None:
    """Turned in fp32, divided by the scale in fp32, rounded once; every other slot as it was."""
    tokens, kv_heads, lay = 11, 2, LAYOUTS[layout]
    k, v = (lay(randn(1 + i, tokens, kv_heads, head_dim, dtype=dtype, device=device)) for i in range(2))
    slots = i32([4, -1, 0, 7, 19, 2, -1, 11, 12, 6, 3], device)
    before = [randn(3 + i, 20, kv_heads, head_dim, device=device).to(FP8) for i in range(2)]
    k_cache, v_cache = (lay(cache.clone()) for cache in before)
    k_scale, v_scale = (None if s is None else torch.tensor(s, device=device) for s in scales)
    angle = randn(5, tokens, max(1, rotated), device=device)[:, :rotated]
    cos, sin = (None, None) if rotated == 0 else (lay(angle.cos().to(dtype)), lay(angle.sin().to(dtype)))
    append_kv(k, v, slots, k_cache, v_cache, cos=cos, sin=sin, k_scale=k_scale, v_scale=v_scale)

    wide_k, wide_v = k.float().cpu(), v.float().cpu()
    if cos is not None:
        c, s = (x.float().cpu()[:, None] for x in (cos, sin))
        left, right = wide_k[..., : rotated // 2], wide_k[..., rotated // 2 : rotated]
        turned_k = torch.cat([left, right], -1) * c + torch.cat([-right, left], -1) * s
        wide_k = torch.cat([turned_k, wide_k[..., rotated:]], -1)
    rows = slots.cpu() >= 0
    for cache, old, wide, scale in ((k_cache, before[0], wide_k, k_scale), (v_cache, before[1], wide_v, v_scale)):
        expected = code(old.cpu())
        quotient = wide if scale is None else wide / scale.cpu()[:, None]
        expected[slots.cpu()[rows].long()] = nearest(quotient[rows].double())
        assert torch.equal(code(cache.cpu()), expected)


def test_a_bad_slot_and_no_tokens(fp8_backend, device) -> None:
    cache = torch.zeros(4, 1, 16, dtype=FP8, device=device)
    k = randn(6, 2, 1, 16, device=device)
    append_kv(k[:0], k[:0], i32([], device), cache, cache)
    with pytest.raises(ValueError, match="slots"):
        append_kv(k, k, i32([1, 4], device), cache, cache)
    assert not cache.float().any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dim", [1, 7, 16, 128])
def test_gather(head_dim, layout, fp8_backend, device) -> None:
    k_cache, v_cache = (randn(7 + i, 11, 3, head_dim, device=device).to(FP8) for i in range(2))
    slots = i32([0, 3, -1, 10, -1, 7], device).view(2, 3)
    found = gather_kv(*map(LAYOUTS[layout], (k_cache, v_cache)), slots)
    for rows, cache in zip(found, (k_cache, v_cache), strict=True):
        expected = code(cache.cpu())[slots.cpu().clamp(min=0).long()].masked_fill(slots.cpu()[..., None, None] < 0, 0)
        assert rows.dtype == FP8 and rows.is_contiguous()
        assert torch.equal(code(rows.cpu()), expected.transpose(1, 2))


def exact_attention(q, k_cache, v_cache, forest, scale, k_scale, v_scale) -> tuple[Tensor, Tensor]:
    """In fp64, on what the caches stand for."""
    k, v = k_cache.double() * k_scale.double()[:, None], v_cache.double() * v_scale.double()[:, None]
    with backends.backend("reference"):
        return tree_attention(q.double(), k, v, forest.slot, forest.begin, forest.end, scale)


def attention_inputs(head_dim, width, dtype, device, prompt=90):
    heads, kv_heads = 6, 2
    forest = flatten(beams(11, 1, width, prompt, 4), seed=2).to(device)
    k_cache, v_cache = (x.to(FP8) for x in caches(12, forest, kv_heads, head_dim, torch.float32, device))
    q = randn(13, forest.queries, heads, head_dim, dtype=dtype, device=device)
    return q, k_cache, v_cache, forest


@pytest.mark.parametrize("head_dim", [4, 20, 64, 128, 200, 256])
@pytest.mark.parametrize("width", [2, 12, 33])
def test_attention(width, head_dim, fp8_backend, device, dtype) -> None:
    """16, 64 and 128 rows per block, tokens split over blocks, query heads in groups of 3."""
    if backends.why_not(fp8_backend, "tree_attention", device, FP8, dtype) is not None:
        pytest.skip("its products are of 16-bit numbers")
    q, k_cache, v_cache, forest = attention_inputs(head_dim, width, dtype, device)
    k_scale, v_scale = (torch.tensor(s, device=device) for s in SCALES)
    scale, plan = head_dim**-0.5, (forest.slot, forest.begin, forest.end)
    out, lse = tree_attention(q, k_cache, v_cache, *plan, scale, k_scale=k_scale, v_scale=v_scale)
    exact, exact_lse = exact_attention(q, k_cache, v_cache, forest, scale, k_scale, v_scale)
    eps, largest = max(torch.finfo(dtype).eps, 2e-6), max(1.0, float(exact.abs().max()))
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert torch.allclose(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)
    assert torch.allclose(out.double(), exact, rtol=2 * eps, atol=2 * eps * largest)


@pytest.mark.parametrize("value", [torch.bfloat16, torch.float16])
def test_attention_reads_every_number_as_it_is(value, fp8_backend, device) -> None:
    """Each query sees one token: the result is its V, the log-sum-exp its K."""
    numbers = torch.arange(256, dtype=torch.uint8, device=device)
    numbers = numbers[numbers % 128 != 127].view(FP8)  # all but the two NaN
    cache = numbers.view(-1, 1, 1).expand(-1, 1, 16).contiguous()
    q = torch.ones(len(numbers), 1, 16, dtype=value, device=device)
    index = i32(range(len(numbers)), device)
    out, lse = tree_attention(q, cache, cache, index, index, index + 1, 0.5)
    assert torch.equal(out.float(), cache.float())
    assert torch.allclose(lse[:, 0], 8 * numbers.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operand", ["k", "v", "k_scale", "v_scale"])
@pytest.mark.parametrize("width", [3, 30])
def test_nan_in_fp8(width, operand, value, fp8_backend, device) -> None:
    """Both codes of NaN, and scales that are NaN: in what depends on them, and nowhere else."""
    q, k_cache, v_cache, forest = attention_inputs(64, width, value, device)
    scales = {name: torch.tensor(s, device=device) for name, s in zip(("k_scale", "v_scale"), SCALES, strict=True)}
    forest.paths = [*forest.paths, ()]  # a query that sees nothing
    q = torch.cat([q, q[:1]])
    group, sees = q.shape[1] // 2, forest.mask().any(1).cpu()
    for code_of_nan, token in ((0x7F, 0), (0xFF, len(forest.seen[0]) - 1)):
        slot = forest.seen[0][token]
        seers = torch.tensor([slot in slots for slots in forest.seen] + [False])
        caches = {"k": k_cache.clone(), "v": v_cache.clone()}
        expected = torch.zeros(q.shape, dtype=torch.bool)
        if operand in caches:
            caches[operand].view(torch.uint8)[slot, 1, 9] = code_of_nan
            rows = seers
        else:
            scales[operand] = torch.tensor([0.5, torch.nan], device=device)
            rows = sees
        expected[rows, group:, 9 if operand == "v" else slice(None)] = True
        plan = forest.slot, forest.begin, forest.end
        out, lse = tree_attention(q, caches["k"], caches["v"], *plan, 0.1, **scales)
        assert torch.equal(out.isnan().cpu(), expected)
        expected_lse = expected.any(-1) if operand.startswith("k") else torch.zeros_like(expected[..., 0])
        assert torch.equal(lse.isnan().cpu(), expected_lse)
        assert not bool(out[-1].any()) and bool((lse[-1] == -torch.inf).all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_over_strided_caches(layout, fp8_backend, device) -> None:
    q, k_cache, v_cache, forest = attention_inputs(64, 5, torch.bfloat16, device)
    lay, plan = LAYOUTS[layout], (forest.slot, forest.begin, forest.end)
    scales = [torch.tensor(s, device=device) for s in SCALES]
    expected = tree_attention(q, k_cache, v_cache, *plan, 0.1, k_scale=scales[0], v_scale=scales[1])
    found = tree_attention(*map(lay, (q, k_cache, v_cache)), *plan, 0.1, k_scale=lay(scales[0]), v_scale=lay(scales[1]))
    for x, y in zip(found, expected, strict=True):
        assert torch.allclose(x.float(), y.float(), rtol=1e-2, atol=1e-3)


def test_count_and_nothing_to_see(fp8_backend, device) -> None:
    q, k_cache, v_cache, forest = attention_inputs(32, 3, torch.float16, device)
    plan = forest.slot, forest.begin, forest.end
    for held in (0, 40):
        out, lse = tree_attention(q, k_cache, v_cache, *plan, 0.2, count=i32([held], device))
        expected, expected_lse = tree_attention(q, k_cache, v_cache, *(x[:held] for x in plan), 0.2)
        assert torch.allclose(out.float(), expected.float(), atol=2e-3) and torch.allclose(lse, expected_lse, atol=1e-5)
        assert held or (not out.any() and bool((lse == -torch.inf).all()))


@pytest.mark.parametrize("width, head_dim", [(3, 128), (12, 64), (30, 128), (3, 256), (20, 256)])
def test_same_bits_in_any_order_of_threads(width, head_dim, monkeypatch) -> None:
    """Rows of fp8 are converted by one thread and multiplied by others, tile after tile."""
    monkeypatch.setenv("SAFFRON_CUDA_HOST", cuda_host.module())
    q, k_cache, v_cache, forest = attention_inputs(head_dim, width, torch.bfloat16, torch.device("cpu"), prompt=300)
    scales = [torch.tensor(s) for s in SCALES]
    exact, exact_lse = exact_attention(q, k_cache, v_cache, forest, 0.1, *scales)
    k, angle = randn(14, 9, 2, head_dim, dtype=torch.bfloat16), randn(15, 9, head_dim // 2)

    def run() -> list[Tensor]:
        out = tree_attention(
            q, k_cache, v_cache, forest.slot, forest.begin, forest.end, 0.1, k_scale=scales[0], v_scale=scales[1]
        )
        caches = [torch.zeros(9, 2, head_dim, dtype=FP8) for _ in range(2)]
        turn = {"cos": angle.cos(), "sin": angle.sin()}
        append_kv(k, k, i32(range(9)), *caches, **turn, k_scale=scales[0], v_scale=scales[1])
        return [*out, *map(code, (*caches, *gather_kv(*caches, i32([[0, 5, -1]]))))]

    results = []
    with backends.backend("cuda"):
        for seed in range(4):
            monkeypatch.setenv("SAFFRON_CUDA_HOST_SEED", str(seed))
            results.append(run())
    assert torch.allclose(results[0][0].double(), exact, rtol=0.02, atol=0.02)
    assert torch.allclose(results[0][1].double(), exact_lse, rtol=1e-6, atol=1e-5)
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


# --- who serves it ---------------------------------------------------------------------------------------------------


def in_fp8(op: str) -> dict:
    arguments = example(op, torch.bfloat16)
    return arguments | {name: arguments[name].to(FP8) for name in ("k_cache", "v_cache")}


@pytest.mark.parametrize("op", ["append_kv", "tree_attention", "gather_kv"])
def test_backends_without_it_are_not_chosen(op) -> None:
    run, arguments = getattr(saffron_kernels, op), in_fp8(op)
    result = run(**arguments)  # on the CPU this is the reference's
    with backends.backend("reference"):
        expected = run(**arguments)
    assert result is expected is None or all(
        torch.equal(x.float(), y.float()) for x, y in zip(result, expected, strict=True)
    )
    for name in ("cpu", "triton"):
        with backends.backend(name), pytest.raises(BackendError, match=rf"{name}.*{op}.*float8_e4m3fn"):
            run(**arguments)


def test_a_gpu_has_a_kernel_for_it(monkeypatch) -> None:
    """The default there does not serve it; the next one does, and not the reference."""
    monkeypatch.setattr(cuda.native, "why_not_loaded", lambda device: None)
    for op in ("append_kv", "tree_attention", "gather_kv"):
        dtypes = (torch.bfloat16, FP8) if op != "gather_kv" else (FP8,)
        assert backends.chosen(op, torch.device("cuda", 7), *dtypes) == "cuda"
    backends._first.cache_clear()


def test_scales_do_not_decide_the_backend() -> None:
    """They are fp32 whatever K and V are: a backend without fp32 attention serves them."""
    given: list[tuple[torch.dtype, ...]] = []
    arguments = in_fp8("tree_attention") | {"k_scale": torch.ones(2), "v_scale": torch.ones(2)}
    original = backends.why_not
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            backends, "why_not", lambda name, op, device, *d: given.append(d) or original(name, op, device, *d)
        )
        tree_attention(**arguments)
    assert given and all(set(dtypes) == {FP8, torch.bfloat16} for dtypes in given)


@pytest.mark.parametrize(
    "name, wrong, error",
    [
        ("k_scale", torch.ones(3), ValueError),
        ("v_scale", torch.ones(2, dtype=torch.bfloat16), TypeError),
        ("q", randn(1, 6, 4, 8, dtype=torch.float64), TypeError),
        ("q", randn(1, 6, 4, 8).to(FP8), TypeError),
    ],
)
def test_what_does_not_fit(name, wrong, error) -> None:
    with pytest.raises(error, match=name):
        tree_attention(**(in_fp8("tree_attention") | {name: wrong}))


def test_scales_belong_to_fp8() -> None:
    with pytest.raises(ValueError, match="k_scale: got a scale for caches in torch.bfloat16"):
        tree_attention(**(example("tree_attention", torch.bfloat16) | {"k_scale": torch.ones(2)}))
