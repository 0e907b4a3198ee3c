"""The path of tree_attention for Hopper (`wgmma`, boxes of a tensor), asked for wherever it can run; on the CPU too.

Besides its own tests, all of test_tree_attention.py run on it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import cuda_host
import pytest
import torch
from cases import Forest, beams, caches, flatten, i32, prefill, randn
from test_attention_nan import (  # noqa: F401 - tests, with the fixtures below
    test_all_scores_are_minus_infinity,
    test_everything_is_nan,
    test_hidden_value_in_a_wide_block,
    test_infinity_is_not_made_finite,
    test_nan_in_one_lane,
    test_queries_that_see_nothing_stay_empty,
)
from test_tree_attention import *  # noqa: F403
from torch import Tensor

import saffron_kernels
from saffron_kernels import backend as use_backend
from saffron_kernels.backends import cuda, faults
from saffron_kernels.backends.cuda import counters

del test_threads_change_nothing  # noqa: F821 - of the host, which these kernels do not ask for

OP = "tree_attention"
LAYERS = ("contiguous", "runs", "scattered")
pytestmark = pytest.mark.usefixtures("poisoned", "hopper")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for CPU tensors run as they would on Hopper; this path is taken wherever it can run."""
    monkeypatch.setenv("SAFFRON_CUDA_HOST", cuda_host.module())
    monkeypatch.setenv("SAFFRON_CUDA_HOST_CAPABILITY", "90")
    monkeypatch.setenv("SAFFRON_CUDA_ATTENTION", "wgmma")


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def backend(hopper: None, device: torch.device) -> Iterator[str]:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("not a Hopper GPU")
    with use_backend("cuda"):
        yield "cuda"


def described() -> int:
    """How many tensors launchers have described so far."""
    library = ctypes.CDLL(cuda_host.module())
    library.saffron_described.restype = ctypes.c_size_t
    return library.saffron_described()


def boxes() -> int:
    """How many boxes kernels have copied so far."""
    library = ctypes.CDLL(cuda_host.module())
    library.saffron_boxes.restype = ctypes.c_size_t
    return library.saffron_boxes()


def decode_step(
    heads: int,
    kv_heads: int,
    head_dim: int,
    width: int,
    dtype: torch.dtype,
    prompt: int = 90,
    layout: str = "scattered",
) -> tuple[Tensor, Tensor, Tensor, Forest]:
    """q, caches and plan of a search of `width` beams. Slots follow each other: all, in runs of 100, or none."""
    forest = flatten(beams(1, 1, width, prompt, 4), seed=2, shuffle=layout == "scattered")
    if layout != "scattered":
        place = {slot: i for i, slot in enumerate(forest.slot[forest.begin < forest.end].tolist())}
        if layout == "runs":
            place = {slot: i + 3 * (i // 100) for slot, i in place.items()}
        forest.slots = max(place.values()) + 1
        forest.slot = i32([place.get(slot, -1) for slot in forest.slot.tolist()])
        forest.seen = [[place[slot] for slot in path] for path in forest.seen]
    q = randn(4, forest.queries, heads, head_dim, dtype=dtype)
    return q, *caches(3, forest, kv_heads, head_dim, dtype), forest


def check_against_reference(
    q: Tensor, k: Tensor, v: Tensor, forest: Forest, device: torch.device | str = "cpu"
) -> None:
    forest, (q, k, v) = forest.to(device), (x.to(device) for x in (q, k, v))
    plan, scale = (forest.slot, forest.begin, forest.end), q.shape[2] ** -0.5
    out, lse = cuda.tree_attention(q, k, v, *plan, scale)
    with use_backend("reference"):
        exact, exact_lse = saffron_kernels.tree_attention(q.double(), k.double(), v.double(), *plan, scale)
    eps = torch.finfo(q.dtype).eps
    assert torch.allclose(lse.double(), exact_lse, rtol=1e-6, atol=1e-5)
    assert torch.allclose(out.double(), exact, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("layout", LAYERS)
@pytest.mark.parametrize("head_dim", [40, 64, 96, 128])
@pytest.mark.parametrize("width", [2, 21, 22, 43])
def test_every_configuration_against_the_reference(width, head_dim, layout, dtype, backend, device) -> None:
    """64 and 128 rows per block, 6 to 129 of them, tokens split over blocks; groups that do not divide 16."""
    check_against_reference(*decode_step(6, 2, head_dim, width, dtype, layout=layout), device=device)


@pytest.mark.parametrize("layout", LAYERS)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_many_tiles(head_dim, layout, monkeypatch) -> None:
    """More tiles in a unit than stages: every stage is filled again, by boxes and row by row in turn."""
    monkeypatch.setenv("SAFFRON_CUDA_HOST_PROCESSORS", "1")

    def copied(layout: str) -> int:
        before = boxes()
        check_against_reference(*decode_step(8, 1, head_dim, 17, torch.bfloat16, prompt=1000, layout=layout))
        return boxes() - before

    if layout == "contiguous":
        assert copied(layout) >= 1000 // 64 * 2 * (head_dim // 64)  # boxes of K and V of the prompt
    elif layout == "runs":
        assert 0 < copied(layout) < copied("contiguous")
    else:
        assert copied(layout) == 0


def test_caches_are_described_once() -> None:
    """The driver does it on the host, which every layer of a step would wait for; other sizes are other caches."""
    q, k, v, forest = decode_step(8, 1, 64, 9, torch.bfloat16, layout="contiguous")
    k, v = (torch.cat([x, torch.zeros(977 - len(x), *x.shape[1:], dtype=x.dtype)]) for x in (k, v))
    before = described()
    for _ in range(3):
        check_against_reference(q, k, v, forest)
    assert described() - before == 2
    check_against_reference(q, k[:-1], v[:-1], forest)
    assert described() - before == 4


@pytest.mark.parametrize("seed", range(3))
def test_many_units(seed, monkeypatch) -> None:
    """A chunk of a prefill, more units than blocks: tiles take turns with results in the same shared memory."""
    monkeypatch.setenv("SAFFRON_CUDA_HOST_SEED", str(seed))
    monkeypatch.setenv("SAFFRON_CUDA_HOST_PROCESSORS", "2")
    q, k, v, forest = decode_step(8, 2, 64, 1, torch.bfloat16, prompt=200, layout="contiguous")
    queries = prefill([forest.paths[0]], cached=120)
    chunk = flatten(queries, shuffle=False)
    chunk.slot = torch.arange(chunk.slots, dtype=torch.int32)[: chunk.slot.shape[0]]
    keys, values = (randn(i, chunk.slots, 2, 64, dtype=torch.bfloat16) for i in (5, 6))
    check_against_reference(randn(7, chunk.queries, 8, 64, dtype=torch.bfloat16), keys, values, chunk)


RACES = {
    "128 rows of 128": (8, 1, 128, 17, torch.bfloat16),
    "128 rows of 64": (8, 2, 64, 33, torch.float16),
    "64 rows of 128": (4, 1, 128, 13, torch.float16),
    "64 rows of 64": (8, 2, 64, 13, torch.bfloat16),
}


@pytest.mark.parametrize("layout", LAYERS)
@pytest.mark.parametrize("case", RACES)
def test_same_bits_in_any_order_of_threads(case, layout, monkeypatch) -> None:
    q, k, v, forest = decode_step(*RACES[case], prompt=300, layout=layout)
    results = []
    for seed in range(5):
        monkeypatch.setenv("SAFFRON_CUDA_HOST_SEED", str(seed))
        results.append(cuda.tree_attention(q, k, v, forest.slot, forest.begin, forest.end, 0.1))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


@pytest.mark.parametrize("name", ["one KV head", "heads first", "shared heads", "few columns of more", "odd stride"])
def test_layouts_of_caches(name, dtype, monkeypatch) -> None:
    """Those that can be described as a tensor are copied as boxes, the others row by row."""
    monkeypatch.setenv("SAFFRON_CUDA_HOST_PROCESSORS", "1")
    q, k, v, forest = decode_step(4, 1 if name == "one KV head" else 2, 64, 17, dtype, layout="contiguous")
    slots, kv_heads, _ = k.shape
    described = name in ("one KV head", "few columns of more")
    if name == "heads first":
        k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
    elif name == "shared heads":
        k, v = (x[:, :1].expand(-1, 2, -1) for x in (k, v))
    elif name == "few columns of more":
        k, v = (torch.nn.functional.pad(x, (0, 24), value=torch.nan)[..., :64] for x in (k, v))
    elif name == "odd stride":
        k, v = (x.new_empty(slots, kv_heads * 64 + 8)[:, :-8].unflatten(1, (kv_heads, 64)).copy_(x) for x in (k, v))
    before = boxes()
    check_against_reference(q, k, v, forest)
    assert (boxes() > before) == described


def test_the_rule(monkeypatch) -> None:
    """Which path a launch takes, by itself and when asked."""
    path = cuda.native.module(torch.empty(0)).tree_attention_path
    code = {dtype: cuda.native.CODE[dtype] for dtype in (torch.bfloat16, torch.float16)}

    def taken(queries: int, head_dim: int = 128, group: int = 4) -> str:
        return path(queries, 8 * group, 8, head_dim, code[torch.bfloat16])

    assert taken(1) == "wgmma" and taken(1, 40) == "wgmma" and taken(100, 136) == "mma"
    monkeypatch.setenv("SAFFRON_CUDA_ATTENTION", "mma")
    assert taken(32) == "mma"
    for unset in ("", None):
        if unset is None:
            monkeypatch.delenv("SAFFRON_CUDA_ATTENTION")
        else:
            monkeypatch.setenv("SAFFRON_CUDA_ATTENTION", unset)
        assert [taken(n) for n in (1, 16, 17, 32, 64)] == ["mma", "mma", "wgmma", "wgmma", "wgmma"]
        assert [taken(64, head_dim) for head_dim in (40, 64, 96, 128, 256)] == ["mma", "wgmma", "mma", "wgmma", "mma"]
    monkeypatch.setenv("SAFFRON_CUDA_HOST_CAPABILITY", "100")  # no `wgmma` there
    assert taken(64) == "mma"
    monkeypatch.setenv("SAFFRON_CUDA_HOST_CAPABILITY", "90")
    monkeypatch.setenv("SAFFRON_CUDA_ATTENTION", "hopper")
    with pytest.raises(ValueError, match="SAFFRON_CUDA_ATTENTION: got 'hopper', expected 'mma', 'wgmma' or nothing"):
        taken(64)


def test_counters_are_left_zero(monkeypatch) -> None:
    for seed in range(3):
        monkeypatch.setenv("SAFFRON_CUDA_HOST_SEED", str(seed))
        q, k, v, forest = decode_step(8, 2, 64, 17, torch.bfloat16)
        cuda.tree_attention(q, k, v, forest.slot, forest.begin, forest.end, 0.1)
    assert counters._counters and not any(bool(zeros.any()) for zeros in counters._counters.values())


def test_bad_slots_are_recorded_and_left_out(monkeypatch) -> None:
    monkeypatch.setattr(faults, "eager", lambda tensor: False)
    q, k, v, forest = decode_step(8, 2, 64, 17, torch.bfloat16, layout="contiguous")
    slot, begin, end = forest.slot.clone(), forest.begin, forest.end
    assert begin[5] < end[5]
    slot[5] = 10**6
    out, _ = cuda.tree_attention(q, k, v, slot, begin, end, 0.1)
    rest = torch.arange(slot.shape[0]) != 5
    without, _ = cuda.tree_attention(q, k, v, slot[rest], begin[rest], end[rest], 0.1)
    assert torch.allclose(out.float(), without.float(), atol=0.02)
    with pytest.raises(ValueError, match="slot"):
        cuda.raise_faults("cpu")
