"""Saffron search whose policy runs in vLLM, against our own loop: milliseconds a step by width and prompt, on a CPU.

    SAFFRON_VLLM=1 OMP_NUM_THREADS=1 python benchmarks/bench_vllm_search.py MODEL --output results.csv

The steps of both searches are taken in turns, so that what else runs on the machine hits both; medians of steps, and of
their ratios. The MRM is a small Llama with random weights over the policy's tokens. A run that chooses other tokens
than our own loop is an error.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from saffron import MultifurcationRewardModel, Policy, Request, SaffronSearch, SearchConfig
from saffron.integrations.vllm import VllmPolicy
from saffron.models.attention import ATTENTION

FIELDS = (
    "width", "prompt", "steps", "ours_ms", "vllm_ms", "ours_cpu_ms", "vllm_cpu_ms", "wall_ratio", "cpu_ratio",
    "same_tokens",
)  # fmt: skip


def small_mrm(policy: Policy) -> MultifurcationRewardModel:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=policy.vocab_size, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192, initializer_range=0.1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).eval()
    return MultifurcationRewardModel(model, policy.tokenizer)


def race(searches: list[SaffronSearch], request: Request) -> tuple[list[list[tuple[float, float]]], bool]:
    """Wall and CPU milliseconds of each step of each search, and whether they chose the same tokens."""
    runs = [search.run([request]) for search in searches]
    handles: list[list[object]] = [[] for _ in runs]
    times: list[list[tuple[float, float]]] = [[] for _ in runs]
    for _ in range(searches[0].config.max_new_tokens):
        for run, mine, handle in zip(runs, times, handles, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            handle[:] = next(run)
            mine.append(((time.perf_counter() - wall) * 1e3, (time.process_time() - cpu) * 1e3))
    answers = [handle[0].result(0).token_ids for handle in handles]  # type: ignore[attr-defined]
    for run in runs:
        run.close()
    return times, answers[0] == answers[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--steps", type=int, default=13, help="the first of which joins, and is not counted")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ours = Policy.from_pretrained(options.model, device="cpu")
    mrm = small_mrm(ours)
    theirs = VllmPolicy.from_pretrained(options.model, max_model_len=max(options.prompts) + options.steps + 1)
    rows = []
    for prompt in options.prompts:
        for width in options.widths:
            tokens = torch.randint(1000, 40_000, (prompt,), generator=torch.Generator().manual_seed(width)).tolist()
            config = SearchConfig(width=width, max_new_tokens=options.steps, min_new_tokens=options.steps)
            searches = [SaffronSearch(policy, mrm, config, eos_token_id=[2]) for policy in (ours, theirs)]
            times, same = race(searches, Request(tuple(tokens), tuple(tokens[:32])))
            steps = [one[1:] for one in times]
            wall, cpu = ([statistics.median(step[i] for step in mine) for mine in steps] for i in (0, 1))
            ratios = [statistics.median(b[i] / a[i] for a, b in zip(*steps, strict=True)) for i in (0, 1)]
            row = [width, prompt, options.steps - 1, *wall, *cpu, *ratios]
            rows.append([f"{x:.2f}" if isinstance(x, float) else str(x) for x in row] + [str(same).lower()])
            print(*rows[-1], flush=True)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            with options.output.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows([FIELDS, *rows])
    return 0 if all(row[-1] == "true" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
