"""tree_attention against SDPA over the flattened trie with its mask, and against one SDPA call a beam.

A beam's gathered cache is made beforehand and not timed; where all of them would not fit, one beam in N is timed.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from harness import DEVICE, Case, assert_close
from workloads import Plan, chain_plan, level_plan, search_plan

from saffron_kernels import tree_attention

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
GATHERED_BYTES = 1 << 28  # at most, of the caches gathered for the beams

# Nodes and tokens a node at every level: from FastTree's list.
TREES = {
    "1,10/4000,400": ((1, 10), (4000, 400)),
    "1,16,64/1024,256,32": ((1, 16, 64), (1024, 256, 32)),
    "1,2,4,8,16,32,64,128/16 each": ((1, 2, 4, 8, 16, 32, 64, 128), (16,) * 8),
}


def run(race, plan: Plan, shape: dict[str, object], dtype: torch.dtype, heads: tuple[int, int], head_dim: int) -> None:
    query_heads, kv_heads = heads
    scale = head_dim**-0.5
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(dtype).to(DEVICE)

    q = normal(plan.queries, query_heads, head_dim)
    k, v = normal(plan.slots, kv_heads, head_dim), normal(plan.slots, kv_heads, head_dim)
    flat_q, flat_k, flat_v = (x.transpose(0, 1)[None] for x in (q, k[plan.slot.long()], v[plan.slot.long()]))
    mask = plan.mask

    def ours() -> torch.Tensor:
        return tree_attention(q, k, v, plan.slot, plan.begin, plan.end, scale)[0]

    def masked() -> torch.Tensor:
        return F.scaled_dot_product_attention(flat_q, flat_k, flat_v, mask, scale=scale, enable_gqa=True)

    sequences = plan.sequences()
    one = 2 * kv_heads * head_dim * q.element_size() * max(len(s) for s in sequences)
    step = max(1, -(-len(sequences) * one // GATHERED_BYTES))
    timed = range(0, plan.queries, step)
    gathered = [tuple(x[sequences[i]].transpose(0, 1)[None].contiguous() for x in (k, v)) for i in timed]

    def per_beam() -> list[torch.Tensor]:
        return [
            F.scaled_dot_product_attention(q[i][None, :, None], keys, values, scale=scale, enable_gqa=True)
            for i, (keys, values) in zip(timed, gathered, strict=True)
        ]

    expected = masked()[0].transpose(0, 1)
    assert_close(ours(), expected, dtype)
    for i, one_beam in zip(timed, per_beam(), strict=True):
        assert_close(one_beam[0, :, 0], expected[i], dtype)
    case = Case(
        op="tree_attention",
        shape={**shape, "tokens": len(plan.slot), "heads": heads, "head_dim": head_dim},
        dtype=dtype,
        work=4.0 * plan.pairs * query_heads * head_dim,
        bytes=(2 * len(plan.slot) * kv_heads + 2 * plan.queries * query_heads) * head_dim * q.element_size(),
        ours=ours,
        contenders={"SDPA with mask": masked, "SDPA per beam": per_beam},
        part={"SDPA per beam": len(timed) / plan.queries},
    )
    race(case, seconds=2.0)


@DTYPES
@pytest.mark.parametrize("prompt", [512, 4096, 32768])
@pytest.mark.parametrize("beams", [8, 32, 64])
def test_search(race, beams: int, prompt: int, dtype: torch.dtype) -> None:
    plan = search_plan(beams, prompt, levels=32)
    run(race, plan, {"plan": "search", "beams": beams, "prompt": prompt}, dtype, (32, 8), 128)


@DTYPES
@pytest.mark.parametrize("beams", [8, 64])
def test_beams_that_share_only_the_prompt(race, beams: int, dtype: torch.dtype) -> None:
    plan = search_plan(beams, 512, levels=32, apart=True)
    run(race, plan, {"plan": "apart", "beams": beams, "prompt": 512}, dtype, (32, 8), 128)


@DTYPES
def test_forest(race, dtype: torch.dtype) -> None:
    plan = search_plan(8, 512, levels=32, searches=8)
    run(race, plan, {"plan": "8 searches", "beams": 8, "prompt": 512}, dtype, (32, 8), 128)


@DTYPES
def test_reward_model(race, dtype: torch.dtype) -> None:
    plan = search_plan(32, 512, levels=32)
    run(race, plan, {"plan": "search", "beams": 32, "prompt": 512}, dtype, (32, 8), 64)


@DTYPES
@pytest.mark.parametrize("tree", TREES)
def test_tree(race, tree: str, dtype: torch.dtype) -> None:
    run(race, level_plan(*TREES[tree]), {"plan": tree}, dtype, (32, 8), 128)


@DTYPES
def test_prefill(race, dtype: torch.dtype) -> None:
    run(race, chain_plan(512), {"plan": "prefill", "prompt": 512}, dtype, (32, 8), 128)


def test_tiny(race) -> None:
    run(race, search_plan(8, 16, levels=4), {"plan": "search", "beams": 8, "prompt": 16}, torch.float32, (4, 2), 64)
