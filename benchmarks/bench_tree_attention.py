"""tree_attention against SDPA over the flattened trie with its mask, and against one SDPA call per beam.

A beam's gathered cache is made beforehand and not timed; where all of them would not fit, some beams are timed and
stand for the rest. So do some queries for all where SDPA with the mask of a wide tree would take seconds. On a GPU also
against FlexAttention and FlashInfer, on more sizes, with caches in fp8, and captured in CUDA graphs, alone and with as
many layers in a row as a model has; on Hopper by both paths of the CUDA backend.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import competitors
import pytest
import torch
import torch.nn.functional as F
from harness import Case, assert_close, on_backend, usable
from timing import DEVICE
from torch import Tensor
from workloads import TREES, Plan, chain_plan, parse_tree, search_plan

from saffron_kernels import backends, tree_attention

PATH = "SAFFRON_CUDA_ATTENTION"  # environment variable by which a path of the CUDA backend is asked for
ON_GPU = DEVICE.type == "cuda"
GATHERED_BYTES = 1 << 28  # at most, of the caches gathered for the beams
GATHERED_BEAMS = 32
MASKED_WORK = 4e10 if not ON_GPU else 2e11  # floating-point operations of one SDPA with mask, at most
CACHE_BYTES = 1 << 30 if not ON_GPU else 1 << 34  # at most, of K and V; trees beyond it are run with fewer heads

Shape = dict[str, object]
_dtypes = {"bf16": torch.bfloat16} if ON_GPU else {"fp32": torch.float32, "bf16": torch.bfloat16}
DTYPES = pytest.mark.parametrize("dtype", _dtypes.values(), ids=_dtypes)
WIDTHS = (1, 4, 8, 16, 32, 64)
PROMPTS = (128, 512, 4096, 32768)
SEARCHES = [(n, p) for n in WIDTHS for p in PROMPTS if ON_GPU or p == 4096 or (n in (8, 32, 64) and p > 128)]


def spread(queries: int, most: float) -> range:
    """At most `most` queries, evenly spread; at least one."""
    return range(0, queries, max(1, -(-queries // max(1, int(most)))))


@dataclass
class Inputs:
    """Q, and K and V of one or more layers, for one plan."""

    plan: Plan
    q: Tensor
    layers: list[tuple[Tensor, Tensor]]
    scale: float

    def ours(self) -> list[tuple[Tensor, Tensor]]:
        plan, scales = self.plan, self.scales
        return [
            tree_attention(self.q, k, v, plan.slot, plan.begin, plan.end, self.scale, **scales) for k, v in self.layers
        ]

    @property
    def scales(self) -> dict[str, Tensor]:
        """Of caches in fp8. 1, since FlashInfer takes none a head; what they are costs nothing."""
        k = self.layers[0][0]
        if k.dtype == self.q.dtype:
            return {}
        return dict.fromkeys(("k_scale", "v_scale"), torch.ones(k.shape[1], device=DEVICE))


def make(plan: Plan, dtype: torch.dtype, heads: tuple[int, int], head_dim: int, layers: int, kv: torch.dtype) -> Inputs:
    query_heads, kv_heads = heads
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = kv) -> Tensor:
        return torch.randn(*size, generator=generator, device=DEVICE).to(dtype)

    q = normal(plan.queries, query_heads, head_dim, dtype=dtype)
    caches = [tuple(normal(plan.slots, kv_heads, head_dim) for _ in "kv") for _ in range(layers)]
    return Inputs(plan, q, caches, head_dim**-0.5)


def with_sdpa(given: Inputs, result: Tensor) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """SDPA with the mask, and a call of it a beam, both checked; and the share of the queries that each is given."""
    plan, q, scale, (k, v) = given.plan, given.q, given.scale, given.layers[0]
    kv_heads, head_dim, sees, dtype = k.shape[1], q.shape[2], plan.mask, q.dtype
    some = spread(plan.queries, MASKED_WORK / (4 * len(plan.slot) * q[0].numel()))
    slots, mask = plan.slot.long(), sees[some]
    flat_q, flat_k, flat_v = (x.transpose(0, 1)[None] for x in (q[some], k[slots], v[slots]))

    def masked() -> Tensor:
        return F.scaled_dot_product_attention(flat_q, flat_k, flat_v, mask, scale=scale, enable_gqa=True)

    assert_close(result[some], masked()[0].transpose(0, 1), dtype)
    longest = int(sees.sum(1).max())
    bytes_of_one = 2 * kv_heads * head_dim * q.element_size() * longest
    timed = spread(plan.queries, min(GATHERED_BEAMS, GATHERED_BYTES / bytes_of_one))
    seen = [plan.slot[sees[i]].long() for i in timed]
    gathered = [tuple(x[slots].transpose(0, 1)[None].contiguous() for x in (k, v)) for slots in seen]

    def per_beam() -> list[Tensor]:
        return [
            F.scaled_dot_product_attention(q[i][None, :, None], keys, values, scale=scale, enable_gqa=True)
            for i, (keys, values) in zip(timed, gathered, strict=True)
        ]

    for i, one_beam in zip(timed, per_beam(), strict=True):
        assert_close(one_beam[0, :, 0], result[i], dtype)
    share = {"SDPA with mask": len(some) / plan.queries, "SDPA per beam": len(timed) / plan.queries}
    return {"SDPA with mask": masked, "SDPA per beam": per_beam}, share


def paths(given: Inputs) -> dict[str, Callable[[], Callable[[], list[Tensor]]]]:
    """On Hopper, both ways in which the CUDA backend can do it: which one it takes by itself follows from these."""
    if not ON_GPU or torch.cuda.get_device_capability()[0] != 9 or given.scales:  # fp8: one way only
        return {}

    def make(path: str) -> Callable[[], list[Tensor]]:
        attend = on_backend("cuda", given.ours)

        def call() -> list[Tensor]:
            os.environ[PATH] = path
            try:
                return [out for out, _ in attend()]
            finally:
                del os.environ[PATH]

        return call

    return {f"cuda {path}": partial(make, path) for path in ("mma", "wgmma")}


def run(
    race,
    plan: Plan,
    shape: Shape,
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    *,
    flex: bool = False,
    layers: int = 1,
    kv: torch.dtype | None = None,
) -> None:
    """`layers` are called one after the other, each with its own caches, and the time is that of one.

    `kv`: the dtype of the caches, if not that of Q.
    """
    query_heads, kv_heads = heads
    tokens, stored = len(plan.slot), kv or dtype
    given = make(plan, dtype, heads, head_dim, layers, stored)
    first = [out for out, _ in given.ours()]

    def check_other(result: list[Tensor]) -> None:
        for one, expected in zip(result, first, strict=True):
            assert_close(one, expected, dtype)

    sdpa, part = with_sdpa(given, first[0]) if layers == 1 and stored == dtype else ({}, {})
    makers = {**competitors.on_gpu(plan, given.q, given.layers, given.scale, flex), **paths(given)}
    others = usable(makers, check_other)  # type: ignore[arg-type]
    names = {"", *others} | ({name + " backend" for name in backends.MODULES} if layers > 1 else set())
    cache_bytes = 2 * tokens * kv_heads * head_dim * stored.itemsize
    case = Case(
        op="tree_attention",
        shape={**shape, "tokens": tokens, "heads": heads, "head_dim": head_dim},
        dtype=dtype,
        work=4.0 * plan.pairs * query_heads * head_dim,
        bytes=cache_bytes + 2 * given.q.nbytes,
        ours=given.ours,
        contenders={**sdpa, **others},
        part={**part, **(dict.fromkeys(names, float(layers)) if layers > 1 else {})},
        capture=("", *sdpa, *others),
        stored=() if stored == dtype else (stored,),
    )
    race(case, seconds=0.3 if ON_GPU else 0.6)


@DTYPES
@pytest.mark.parametrize("beams, prompt", SEARCHES)
def test_search(race, beams: int, prompt: int, dtype: torch.dtype) -> None:
    plan = search_plan(beams, prompt, levels=32)
    flex = beams == 32 and prompt in (512, 32768)
    run(race, plan, {"plan": "search", "beams": beams, "prompt": prompt}, dtype, (32, 8), 128, flex=flex)


@pytest.mark.skipif(not ON_GPU, reason="a CPU has nothing to launch")
@pytest.mark.parametrize("head_dim", [128, 64])
@pytest.mark.parametrize("beams, prompt", [(n, p) for n in (8, 32, 64) for p in (512, 3400)])
def test_layers(race, beams: int, prompt: int, head_dim: int) -> None:
    """What a layer costs within a captured step: 32 in a row, whose caches together do not fit into the chip's."""
    shape: Shape = {"plan": "32 layers", "beams": beams, "prompt": prompt}
    run(race, search_plan(beams, prompt, levels=32), shape, torch.bfloat16, (32, 8), head_dim, layers=32)


@pytest.mark.skipif(not ON_GPU, reason="caches in fp8 are for GPUs")
@pytest.mark.parametrize("beams, prompt", [(n, p) for n in (8, 32, 64) for p in (512, 4096, 32768)])
def test_fp8(race, beams: int, prompt: int) -> None:
    shape: Shape = {"plan": "search", "beams": beams, "prompt": prompt}
    run(race, search_plan(beams, prompt, levels=32), shape, torch.bfloat16, (32, 8), 128, kv=torch.float8_e4m3fn)


@DTYPES
@pytest.mark.parametrize("levels", [1, 8, 64] if ON_GPU else [1, 64])
def test_length(race, levels: int, dtype: torch.dtype) -> None:
    plan = search_plan(32, 512, levels)
    run(race, plan, {"plan": f"search, {levels} levels", "beams": 32, "prompt": 512}, dtype, (32, 8), 128)


@DTYPES
@pytest.mark.parametrize("beams", WIDTHS if ON_GPU else (8, 32, 64))
def test_search_of_the_bundled_models(race, beams: int, dtype: torch.dtype) -> None:
    plan = search_plan(beams, 512, levels=64, models="bundled")
    run(race, plan, {"plan": "bundled models, 64 levels", "beams": beams, "prompt": 512}, dtype, (32, 8), 128)


@DTYPES
@pytest.mark.parametrize("beams", [8, 64])
def test_beams_that_share_only_the_prompt(race, beams: int, dtype: torch.dtype) -> None:
    plan = search_plan(beams, 512, levels=32, apart=True)
    run(race, plan, {"plan": "apart", "beams": beams, "prompt": 512}, dtype, (32, 8), 128)


@DTYPES
@pytest.mark.parametrize("searches", [8, 32, 64] if ON_GPU else [8, 32])
def test_forest(race, searches: int, dtype: torch.dtype) -> None:
    plan = search_plan(8, 512, levels=32, searches=searches)
    run(race, plan, {"plan": f"{searches} searches", "beams": 8, "prompt": 512}, dtype, (32, 8), 128)


@DTYPES
def test_reward_model(race, dtype: torch.dtype) -> None:
    plan = search_plan(32, 512, levels=32)
    run(race, plan, {"plan": "search", "beams": 32, "prompt": 512}, dtype, (32, 8), 64)


@DTYPES
@pytest.mark.parametrize("heads", [(16, 1), (32, 8), (32, 32)] if ON_GPU else [(32, 8)], ids=str)
@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.replace(",", "-").replace("/", ":"))
def test_tree(race, tree: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    plan = parse_tree(tree)
    if 2 * plan.slots * heads[1] * 128 * dtype.itemsize > CACHE_BYTES:
        heads = (16, 1)
    run(race, plan, {"plan": tree}, dtype, heads, 128)


@DTYPES
def test_prefill(race, dtype: torch.dtype) -> None:
    run(race, chain_plan(512), {"plan": "prefill", "prompt": 512}, dtype, (32, 8), 128)


def test_tiny(race) -> None:
    run(race, search_plan(8, 16, levels=4), {"plan": "search", "beams": 8, "prompt": 16}, torch.float32, (4, 2), 64)
