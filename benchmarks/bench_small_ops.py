"""The ops around attention and the reward head, against plain PyTorch: append_kv, gather_kv, merge_attention,
select_beam, advance_tree, block_plan.

A decode step calls advance_tree once per model and append_kv once per layer, on little data: what counts is the cost of
a launch. The others serve decoders that mix these ops with their own; gather_kv alone moves much.
"""

from __future__ import annotations

import inspect
import math
import sys
import time
from pathlib import Path

import floors
import pytest
import torch
from harness import Case, assert_same, on_backend
from timing import DEVICE
from torch import Tensor
from workloads import search_plan

from saffron_kernels import advance_tree, append_kv, backends, block_plan, gather_kv, merge_attention, ops, select_beam

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from cases import example  # noqa: E402 - one good call of every op

ON_GPU = DEVICE.type == "cuda"
DTYPE = torch.bfloat16
BEAMS, HEADS, KV_HEADS, HEAD_DIM = 32, 32, 8, 128
WAYS = ["as it is", "with rope", *(["with rope, fp8 caches"] if ON_GPU else [])]


def normal(*size: int, dtype: torch.dtype = DTYPE) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(len(size) + size[0])
    return torch.randn(*size, generator=generator, device=DEVICE).to(dtype)


def indices(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("tokens", [BEAMS, 4096])
@pytest.mark.parametrize("how", WAYS)
def test_append_kv(race, how: str, tokens: int) -> None:
    rope, stored = "rope" in how, torch.float8_e4m3fn if "fp8" in how else DTYPE
    k, v = normal(tokens, KV_HEADS, HEAD_DIM), normal(tokens, KV_HEADS, HEAD_DIM)
    k_cache, v_cache = (torch.zeros(2 * tokens, KV_HEADS, HEAD_DIM, device=DEVICE).to(stored) for _ in "kv")
    slots = torch.randperm(2 * tokens, generator=torch.Generator().manual_seed(0))[:tokens].int().to(DEVICE)
    angle = torch.arange(tokens, device=DEVICE)[:, None] * 0.01 + torch.arange(HEAD_DIM, device=DEVICE) % 64
    cos, sin = angle.cos().to(DTYPE), angle.sin().to(DTYPE)
    turn = {"cos": cos, "sin": sin} if rope else {}
    scales = dict.fromkeys(("k_scale", "v_scale"), torch.ones(KV_HEADS, device=DEVICE)) if stored != DTYPE else {}

    def ours() -> None:
        append_kv(k, v, slots, k_cache, v_cache, **turn, **scales)

    rows = slots.long()

    def with_torch() -> None:
        left, right = k.chunk(2, -1)
        rotated = k * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None] if rope else k
        k_cache[rows] = rotated
        v_cache[rows] = v

    def held() -> list[Tensor]:
        return [cache.view(torch.uint8)[rows].view(stored).float() for cache in (k_cache, v_cache)]

    def wipe() -> None:
        for cache in (k_cache, v_cache):
            cache.view(torch.uint8).zero_()

    def check(_: object, atol: float = 2e-2) -> None:
        """What a call has written, which has just been made; nothing of it was there before."""
        for one, other in zip(held(), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2 if stored == DTYPE else 0.13, atol=atol)  # an fp8 step
        wipe()

    on_backend("reference", ours)()
    expected = held()
    wipe()
    contenders = {"PyTorch": with_torch} if stored == DTYPE else {}
    for contender in contenders.values():
        check(contender(), atol=6e-2)  # rounds after every operation
    case = Case(
        op="append_kv",
        shape={"how": how, "tokens": tokens, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM},
        dtype=DTYPE,
        work=0,
        bytes=k.nbytes + v.nbytes + slots.nbytes + 2 * k.numel() * stored.itemsize + 2 * rope * cos.nbytes,
        ours=ours,
        contenders=contenders,
        capture=("", "PyTorch"),
        stored=() if stored == DTYPE else (stored,),
        check=check,
    )
    race(case, seconds=0.5)


@pytest.mark.parametrize("beams, length", [(8, 600), (32, 4096 if ON_GPU else 1024)])
def test_gather_kv(race, beams: int, length: int) -> None:
    plan = search_plan(beams, length - 32, levels=32)
    k_cache, v_cache = normal(plan.slots, KV_HEADS, HEAD_DIM), normal(plan.slots, KV_HEADS, HEAD_DIM)
    slots = torch.stack(plan.sequences()).int()

    def ours() -> tuple[Tensor, Tensor]:
        return gather_kv(k_cache, v_cache, slots)

    def with_torch() -> list[Tensor]:
        return [cache[slots.long()].transpose(1, 2).contiguous() for cache in (k_cache, v_cache)]

    assert_same(with_torch(), list(ours()), DTYPE)
    moved = slots.numel() * KV_HEADS * HEAD_DIM * DTYPE.itemsize
    case = Case(
        op="gather_kv",
        shape={"beams": beams, "length": length, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM},
        dtype=DTYPE,
        work=0,
        bytes=2 * moved + 2 * len(plan.slot) * KV_HEADS * HEAD_DIM * DTYPE.itemsize + slots.nbytes,
        ours=ours,
        contenders={"PyTorch": with_torch},
        capture=("", "PyTorch"),
    )
    race(case, seconds=0.5)


def test_merge_attention(race) -> None:
    outs = [normal(BEAMS, HEADS, HEAD_DIM), normal(BEAMS, HEADS, HEAD_DIM).flip(0)]
    lses = [normal(BEAMS, HEADS, dtype=torch.float32), normal(BEAMS, HEADS, dtype=torch.float32).flip(0)]

    def with_torch() -> tuple[Tensor, Tensor]:
        lse = torch.logaddexp(*lses)
        return sum(out * (own - lse).exp()[..., None] for out, own in zip(outs, lses, strict=True)), lse

    def ours() -> tuple[Tensor, Tensor]:
        return merge_attention(outs[0], lses[0], outs[1], lses[1])

    assert_same(with_torch(), ours(), DTYPE)
    case = Case(
        op="merge_attention",
        shape={"queries": BEAMS, "heads": HEADS, "head_dim": HEAD_DIM},
        dtype=DTYPE,
        work=0,
        bytes=3 * (outs[0].nbytes + lses[0].nbytes),
        ours=ours,
        contenders={"PyTorch": with_torch},
        capture=("", "PyTorch"),
        stored=(torch.float32,),
    )
    race(case, seconds=0.5)


@pytest.mark.parametrize("searches, of_a_row", [(1, 32), (8, 32), (1, 4096)])
def test_select_beam(race, searches: int, of_a_row: int) -> None:
    rows = BEAMS * searches
    rewards = normal(rows * of_a_row, dtype=torch.float32)
    tokens = indices(list(range(of_a_row)) * rows)
    offsets = indices([of_a_row * row for row in range(rows + 1)])
    groups = indices([row // BEAMS for row in range(rows)])

    def with_torch() -> tuple[Tensor, Tensor, Tensor]:
        best, which = rewards.view(searches, -1).topk(BEAMS)
        which = which.sort().values
        flat = (which + torch.arange(searches, device=DEVICE)[:, None] * (BEAMS * of_a_row)).flatten()
        return flat // of_a_row, tokens[flat], rewards[flat]

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        return select_beam(rewards, tokens, offsets, groups, searches, BEAMS)

    for found, expected in zip(with_torch(), ours(), strict=True):  # siblings stand in another order
        assert_same(found.sort().values, expected.sort().values, torch.float32)
    case = Case(
        op="select_beam",
        shape={"searches": searches, "beams": BEAMS, "candidates": rows * of_a_row},
        dtype=torch.float32,
        work=0,
        bytes=rewards.nbytes + 12 * rows,
        ours=ours,
        contenders={"PyTorch": with_torch},
        capture=("", "PyTorch"),
    )
    race(case, seconds=0.5)


@pytest.mark.parametrize("prompt", [512, 32768])
def test_advance_tree(race, prompt: int) -> None:
    plan = search_plan(BEAMS, prompt, levels=32)
    parents = indices(sorted(7 * i % BEAMS for i in range(BEAMS)))
    new_slots = indices([plan.slots + i for i in range(BEAMS)])

    def with_torch() -> tuple[Tensor, Tensor, Tensor]:
        before = torch.searchsorted(parents, torch.arange(BEAMS + 1, device=DEVICE, dtype=torch.int32))
        own = torch.arange(BEAMS, device=DEVICE)
        begin, end = before[plan.begin.long()], before[plan.end.long()]
        return torch.cat([plan.slot, new_slots]), torch.cat([begin, own]), torch.cat([end, own + 1])

    def ours() -> tuple[Tensor, Tensor, Tensor]:
        return advance_tree(plan.slot, plan.begin, plan.end, parents, new_slots, plan.queries)

    assert_same(with_torch(), ours(), torch.int32)
    case = Case(
        op="advance_tree",
        shape={"beams": BEAMS, "prompt": prompt, "tokens": len(plan.slot)},
        dtype=torch.int32,
        work=0,
        bytes=6 * 4 * len(plan.slot),
        ours=ours,
        contenders={"PyTorch": with_torch},
        capture=("", "PyTorch"),
    )
    race(case, seconds=0.5)


@pytest.mark.parametrize("requests, shared, own", [(32, 256, 16), (1024, 8000, 192)])
def test_block_plan(race, requests: int, shared: int, own: int) -> None:
    """The page table of a decode step: blocks that all requests share, then those of each. Nothing to compare with."""
    size = 16
    prefix = torch.arange(shared, dtype=torch.int32, device=DEVICE).expand(requests, shared)
    rest = torch.arange(requests * own, dtype=torch.int32, device=DEVICE).view(requests, own) + shared
    table = torch.cat([prefix, rest], 1)
    seq_lens = torch.full((requests,), (shared + own) * size, dtype=torch.int32, device=DEVICE)
    query_start = torch.arange(requests + 1, dtype=torch.int32, device=DEVICE)
    room = (shared + requests * own) * size

    def ours() -> tuple[Tensor, ...]:
        return block_plan(table, seq_lens, query_start, size, requests, room)

    def check(result: object) -> None:
        """All of it: shared blocks are seen by all, those of a request where its query stands."""
        order, slot, begin, end, count = result  # type: ignore[misc]
        assert int(count) == room and torch.equal(order.sort().values, query_start[:-1]), "another plan"
        place = torch.empty_like(order).scatter_(0, order.long(), query_start[:-1]).repeat_interleave(own * size)
        first = torch.cat([torch.zeros(shared * size, dtype=torch.int32, device=DEVICE), place])
        slots, by_slot = slot.sort()
        assert torch.equal(slots, torch.arange(room, dtype=torch.int32, device=DEVICE)), "other slots"
        assert torch.equal(begin[by_slot], first), "other intervals"
        last = torch.cat([torch.full((shared * size,), requests, dtype=torch.int32, device=DEVICE), place + 1])
        assert torch.equal(end[by_slot], last), "other intervals"

    check(ours())
    case = Case(
        op="block_plan",
        shape={"requests": requests, "shared_blocks": shared, "own_blocks": own, "block_size": size},
        dtype=torch.int32,
        work=0,
        bytes=floors.pages(requests, shared, own, size)[0],
        ours=ours,
        contenders={},
        capture=("",),
        check=check,
    )
    race(case, seconds=0.5)


MOST_OVER_BARE = 1.6


@pytest.mark.parametrize("op", ops.NAMES)
def test_host_cost(op: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What an op costs the host, compared with the same function registered with PyTorch and nothing around it.

    CPU time of the process for small calls in turn, the least of many rounds: another process cannot change it much.
    """
    arguments = example(op, torch.float32, DEVICE)
    arguments |= {name: None for name in ("cos", "sin") if name in arguments}  # what is left is cheapest
    handle, values = getattr(torch.ops.saffron_kernels, op).default, tuple(arguments.values())
    library = torch.library.Library("saffron_bare", "FRAGMENT")
    library.define(str(handle._schema).split("::")[1])
    chosen = backends.implementation(op, DEVICE, torch.float32)
    library.impl(op, chosen, "CompositeExplicitAutograd")
    library.impl(op, torch.library.fallthrough_kernel, "Autograd")
    bare = getattr(torch.ops.saffron_bare, op).default
    public = getattr(ops, op)
    named = {n for n, p in inspect.signature(public).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    unnamed = [value for name, value in arguments.items() if name not in named]
    options = {name: value for name, value in arguments.items() if name in named and value is not None}
    calls = {
        "function": lambda: chosen(*values),
        "bare": lambda: bare(*values),
        "ours": lambda: public(*unnamed, **options),
    }
    best = dict.fromkeys(calls, math.inf)
    with torch.inference_mode():
        for _ in range(30):
            for name, call in calls.items():
                start = time.process_time()
                for _ in range(300):
                    call()
                best[name] = min(best[name], (time.process_time() - start) / 300)
    ratio = best["ours"] / best["bare"]
    times = ", ".join(f"{name} {1e6 * seconds:.1f} us" for name, seconds in best.items())
    with capsys.disabled():
        print(f"\nhost cost of {op}: {times}: {ratio:.2f} times the bare op")
    assert ratio <= MOST_OVER_BARE
