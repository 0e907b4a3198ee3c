"""A decode step's attention in vLLM, on a CPU: its own kernel against Saffron's backend.

python benchmarks/bench_vllm_attention.py                     the whole table, into results/vllm/attention.csv
python benchmarks/bench_vllm_attention.py --batch 1 32 --prompt 2048 --dtype fp32 --threads 2

Every request has one query. What counts is a layer's time: its attention, and its share of the plan, of which each
step of a model of 30 layers makes one. The layers have caches of their own, so many that they do not stay in the
processor's cache unless those of 30 layers would. Both sides run in turn, and the ratio is of their medians: of
processor time with one thread, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # else the threads of vLLM's import count: --threads says how many

import torch
from timing import MAX_ROUNDS, Times
from torch import Tensor

from saffron_kernels import append_kv

LAYERS = 30  # of the model that the plan's time is divided by
BLOCK = 32  # tokens; the least that vLLM's kernel takes in its fastest layout
GENERATED = 16  # tokens of every request behind its prompt
SMALL = 96 << 20  # bytes of K and V that a processor's cache may hold
MOST = 1100 << 20  # of one side: what is larger is left out
HEADS = {"9/3x64": (9, 3, 64), "32/8x128": (32, 8, 128)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALLOWED = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # both against fp64, in units of the values' size
COLUMNS = ("heads", "dtype", "batch", "prompt", "shared", "threads", "isa", "vllm_us", "saffron_us", "plan_us", "ratio")


@dataclass(frozen=True)
class Case:
    heads: str
    dtype: str
    batch: int
    prompt: int
    shared: int  # per cent of the prompt

    @property
    def blocks_each(self) -> int:
        return -(-(self.prompt + GENERATED) // BLOCK)

    @property
    def blocks_shared(self) -> int:
        return self.prompt * self.shared // 100 // BLOCK if self.batch > 1 else 0

    @property
    def blocks(self) -> int:
        return self.blocks_shared + self.batch * (self.blocks_each - self.blocks_shared)

    @property
    def bytes(self) -> int:
        _, kv_heads, size = HEADS[self.heads]
        return self.blocks * BLOCK * kv_heads * 2 * size * DTYPES[self.dtype].itemsize


@dataclass
class Step:
    """The inputs of one step; K and V `[layer, ...]` in either layout."""

    q: Tensor
    table: Tensor
    lengths: Tensor
    starts: Tensor
    theirs: Tensor
    ours: Tensor


def step_of(case: Case, seed: int = 0) -> Step:
    """Blocks in the order in which requests that generate side by side take them: in runs, but not all in one."""
    from vllm import _custom_ops as vllm_ops

    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads, size = HEADS[case.heads]
    dtype = DTYPES[case.dtype]
    own = case.blocks_each - case.blocks_shared
    table = torch.zeros(case.batch, case.blocks_each, dtype=torch.int32)
    table[:, : case.blocks_shared] = torch.arange(case.blocks_shared)
    prompts = torch.arange(case.batch * (own - 1)).view(case.batch, own - 1)
    table[:, case.blocks_shared : -1] = case.blocks_shared + prompts
    table[:, -1] = case.blocks_shared + prompts.numel() + torch.arange(case.batch)
    layers = max(1, min(LAYERS, math.ceil(SMALL / case.bytes)))
    tokens = case.blocks * BLOCK
    pattern = torch.randn(4099, kv_heads, 2 * size, generator=generator).to(dtype)
    theirs = torch.zeros(layers, case.blocks, kv_heads, BLOCK, 2 * size, dtype=dtype)
    ours = torch.zeros(layers, tokens, kv_heads, 2 * size, dtype=dtype)
    isa = "vec" if not (torch.cpu._is_amx_tile_supported() and dtype == torch.bfloat16) else "amx"
    keys, values = theirs[0].view(case.blocks, kv_heads, 2 * BLOCK, size).chunk(2, dim=2)
    for first in range(0, tokens, len(pattern)):
        slots = torch.arange(first, min(first + len(pattern), tokens))
        k, v = pattern[: len(slots), :, :size], pattern[: len(slots), :, size:]
        vllm_ops.cpu_attn_reshape_and_cache(k.contiguous(), v.contiguous(), keys, values, slots, isa)
        append_kv(k, v, slots.int(), ours[0, ..., :size], ours[0, ..., size:])
    for layer in range(1, layers):
        theirs[layer], ours[layer] = theirs[0], ours[0]
    q = torch.randn(case.batch, heads, size, generator=generator).to(dtype)
    lengths = torch.full((case.batch,), case.prompt + GENERATED, dtype=torch.int32)
    return Step(q, table, lengths, torch.arange(case.batch + 1, dtype=torch.int32), theirs, ours)


def vllm_side(case: Case, step: Step) -> tuple[Callable[[], Tensor], Callable[[Tensor, int], Tensor]]:
    """The plan of a step and the attention of a layer, as `vllm.v1.attention.backends.cpu_attn` calls them."""
    from vllm import _custom_ops as vllm_ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    heads, kv_heads, size = HEADS[case.heads]
    isa = _get_attn_isa(step.q.dtype, BLOCK, size)
    out = torch.empty_like(step.q)

    def plan() -> Tensor:
        return vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=case.batch, num_heads=heads, num_kv_heads=kv_heads, head_dim=size, seq_lens=step.lengths,
            dtype=step.q.dtype, query_start_loc=step.starts, causal=True, sliding_window_size=-1, isa=isa,
            enable_kv_split=True,
        )  # fmt: skip

    def attend(metadata: Tensor, layer: int) -> Tensor:
        keys, values = step.theirs[layer].view(case.blocks, kv_heads, 2 * BLOCK, size).chunk(2, dim=2)
        vllm_ops.cpu_attention_with_kv_cache(
            query=step.q[: case.batch], key_cache=keys, value_cache=values, output=out[: case.batch],
            query_start_loc=step.starts, seq_lens=step.lengths, scale=size**-0.5, causal=True, alibi_slopes=None,
            sliding_window=-1, block_table=step.table, softcap=0, scheduler_metadata=metadata, s_aux=None,
        )  # fmt: skip
        return out

    return plan, attend


def saffron_side(case: Case, step: Step) -> tuple[Callable[[], Any], Callable[[Any, int], Tensor]]:
    """The same in `saffron.integrations.vllm.backend`; its caches are `[block, kv head, token, K | V]`."""
    from saffron.integrations.vllm.backend import SaffronAttention, plan_step

    heads, kv_heads, size = HEADS[case.heads]
    out = torch.empty_like(step.q)
    caches = [layer.view(case.blocks, BLOCK, kv_heads, 2 * size).transpose(1, 2) for layer in step.ours.unbind()]
    layers = [SaffronAttention(heads, size, size**-0.5, kv_heads) for _ in caches]

    def plan() -> Any:
        return plan_step(step.table, step.lengths, step.starts, BLOCK, case.batch, heads, step.q.dtype)

    def attend(planned: Any, layer: int) -> Tensor:
        return layers[layer].forward(None, step.q, step.q, step.q, caches[layer], planned, out)

    return plan, attend


def specification(case: Case, step: Step, request: int) -> Tensor:
    """One request in fp64."""
    heads, kv_heads, size = HEADS[case.heads]
    positions = torch.arange(int(step.lengths[request]))
    rows = step.ours[0, step.table[request].long()[positions // BLOCK] * BLOCK + positions % BLOCK].double()
    q = step.q[request].double().view(kv_heads, heads // kv_heads, size)
    scores = torch.einsum("hgd,thd->hgt", q, rows[..., :size]) * size**-0.5
    return torch.einsum("hgt,thd->hgd", scores.softmax(-1), rows[..., size:]).reshape(heads, size)


def measure(case: Case, seconds: float, threads: int) -> dict[str, object]:
    from saffron_kernels import _native

    step = step_of(case)
    sides = {"vllm": vllm_side(case, step), "saffron": saffron_side(case, step)}
    plans = {name: plan() for name, (plan, _) in sides.items()}
    for name, (_, attend) in sides.items():
        found = attend(plans[name], 0)
        for request in {0, case.batch // 2, case.batch - 1}:
            wanted = specification(case, step, request)
            error = float((found[request].double() - wanted).abs().max() / wanted.abs().max())
            if not error < ALLOWED[step.q.dtype]:
                raise AssertionError(f"{name}: {case}: off by {error:.2g} of the largest value")
    layers = len(step.ours)

    def all_layers(name: str) -> Callable[[], object]:
        attend = sides[name][1]
        return lambda: [attend(plans[name], layer) for layer in range(layers)]

    calls: dict[str, Callable[[], object]] = {name: all_layers(name) for name in sides}
    calls |= {f"{name} plan": plan for name, (plan, _) in sides.items()}
    # Processor time leaves out what others on the machine take; with several threads it would count waiting as work.
    times = time_in_turn(calls, seconds, time.process_time if threads == 1 else time.perf_counter)
    layer = {name: 1e6 * (times[name].median / layers + times[f"{name} plan"].median / LAYERS) for name in sides}
    return {
        "heads": case.heads, "dtype": case.dtype, "batch": case.batch, "prompt": case.prompt, "shared": case.shared,
        "threads": threads, "isa": _native.cpu.isa(), "vllm_us": round(layer["vllm"], 1),
        "saffron_us": round(layer["saffron"], 1), "plan_us": round(1e6 * times["saffron plan"].median, 1),
        "ratio": round(layer["saffron"] / layer["vllm"], 3),
    }  # fmt: skip


def time_in_turn(
    calls: dict[str, Callable[[], object]], seconds: float, clock: Callable[[], float]
) -> dict[str, Times]:
    """Times calls in turn, so that a disturbance of the machine falls on all of them; 3 rounds at least."""
    rounds: list[list[float]] = []
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while len(rounds) < 3 or (time.perf_counter() < end and len(rounds) < MAX_ROUNDS):
        taken = []
        for call in calls.values():
            start = clock()
            call()
            taken.append(clock() - start)
        rounds.append(taken)
    return {name: Times(sorted(column)) for name, column in zip(calls, zip(*rounds, strict=True), strict=True)}


def cases(options: argparse.Namespace) -> Iterator[Case]:
    axes = options.heads, options.dtype, options.batch, options.prompt, options.shared
    for case in itertools.starmap(Case, itertools.product(*axes)):
        if case.batch == 1 and case.shared != min(options.shared):
            continue  # a single request shares with nobody
        if case.bytes > MOST:
            print(f"left out, {case.bytes >> 20} MiB for each side: {case}", flush=True)
            continue
        yield case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 16, 32, 64])
    parser.add_argument("--prompt", nargs="+", type=int, default=[128, 512, 2048, 8192])
    parser.add_argument("--shared", nargs="+", type=int, default=[0, 50, 100], help="per cent of the prompt")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each case")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "vllm" / "attention.csv")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for case in cases(options):
            row = measure(case, options.seconds, options.threads)
            writer.writerow(row)
            file.flush()
            print(*(f"{row[name]!s:>9}" for name in COLUMNS), flush=True)


if __name__ == "__main__":
    main()
