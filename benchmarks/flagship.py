"""Runs the kernels of the sizes that count most, each call between the profiler's marks: what `ncu` is to look at.

    ncu --profile-from-start off --nvtx python benchmarks/flagship.py [--backend cuda] [--case NAME]

One call per case, after two that are not looked at; an NVTX range holds its name. Needs a CUDA GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from bench_tree_attention import make
from harness import on_backend
from timing import DEVICE
from torch import Tensor
from workloads import peaked_logits, search_plan

from saffron_kernels import append_kv, backends, multifurcate, nucleus

Call = Callable[[], object]
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def attention(
    beams: int,
    prompt: int,
    head_dim: int = 128,
    kv: torch.dtype = BF16,
    heads: tuple[int, int] = (32, 8),
) -> Call:
    """A layer of a decode step 32 steps after the prompt."""
    return make(search_plan(beams, prompt, levels=32), BF16, heads, head_dim, 1, kv).ours


def choice(rows: int, vocab: int = 128_256, hidden: int = 2048) -> Call:
    """What follows both models: nucleus, rewards and the best of all, nuclei of 32 tokens on average."""
    logits = peaked_logits(rows, vocab, size=32, top_p=0.8, dtype=BF16)
    states, weight = (torch.randn(n, hidden, device=DEVICE).to(BF16) for n in (rows, vocab))
    groups = torch.zeros(rows, dtype=torch.int32, device=DEVICE)
    return lambda: multifurcate(logits, states, weight, None, None, -1024.0, groups, 1, rows, 0.8)


def nuclei(rows: int, vocab: int = 128_256) -> Call:
    logits = peaked_logits(rows, vocab, size=32, top_p=0.8, dtype=BF16)
    return lambda: nucleus(logits, 0.8)


def append(tokens: int, head_dim: int = 128) -> Call:
    """K rotated by its position, as a layer of a step writes it."""
    shape = (tokens, 8, head_dim)
    rows = [torch.randn(shape, device=DEVICE).to(BF16) for _ in range(2)]
    caches: list[Tensor] = [torch.zeros(2 * tokens, *shape[1:], dtype=BF16, device=DEVICE) for _ in range(2)]
    turn = dict.fromkeys(("cos", "sin"), torch.ones(tokens, head_dim, dtype=BF16, device=DEVICE))
    slots = torch.arange(tokens, dtype=torch.int32, device=DEVICE)
    return lambda: append_kv(*rows, slots, *caches, **turn)


CASES: dict[str, Callable[[], Call]] = {
    "attention 8B, 32 beams, prompt 512": partial(attention, 32, 512),
    "attention 8B, 32 beams, prompt 3400": partial(attention, 32, 3400),
    "attention 8B, 32 beams, prompt 32768": partial(attention, 32, 32768),
    "attention 8B, 64 beams, prompt 32768": partial(attention, 64, 32768),
    "attention 8B, 32 beams, prompt 32768, fp8": partial(attention, 32, 32768, kv=FP8),
    "attention 1B, 32 beams, prompt 512": partial(attention, 32, 512, head_dim=64),
    "multifurcate, 32 rows": partial(choice, 32),
    "nucleus, 32 rows": partial(nuclei, 32),
    "append_kv with RoPE, 32 tokens": partial(append, 32),
}


def profiled(name: str, call: Call) -> None:
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    with torch.cuda.nvtx.range(name):
        call()
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="cuda", choices=backends.MODULES, help="(default: %(default)s)")
    parser.add_argument("--case", action="append", choices=CASES, help="only this one; may be repeated")
    args = parser.parse_args()
    if DEVICE.type != "cuda":
        parser.exit(2, "no CUDA GPU\n")
    for name in args.case or CASES:
        call = on_backend(args.backend, CASES[name]())
        try:
            profiled(name, call)
        except backends.BackendError as error:
            print(f"{name}: left out: {error}")
        else:
            print(f"{name}: done")


if __name__ == "__main__":
    main()
