"""An MRM on the policy's trunk against the same MRM as a model of its own: steps of a search, on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/bench_one_trunk.py MODEL --output one_trunk.csv

The MRM is MODEL with a random LoRA of rank 16 on every Linear layer of the trunk, or with a random unembedding over the
trunk as it is. Steps of both searches, and steps of the policy by itself over as many rows, are taken in turns, so that
what else runs on the machine hits all. CPU time of this process; the least and the median of the steps, and the median
of their ratios. `megabytes` are the weights of both models, what they share counted once. Searches that choose
different tokens are an error.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from saffron import MultifurcationRewardModel, Policy, Request, SearchConfig
from saffron.search import Engine
from saffron.search.model_pair import ModelPair

FIELDS = (
    "trunk", "prompt", "width", "steps", "two_min_ms", "one_min_ms", "policy_min_ms", "two_ms", "one_ms", "policy_ms",
    "one_to_two", "one_to_policy", "two_megabytes", "one_megabytes", "same_tokens",
)  # fmt: skip
RANK = 16


def write_mrm(kind: str, model: Path, folder: Path) -> Path:
    """A random MRM over the model: an adapter ("lora"), or a whole model with another unembedding ("frozen")."""
    torch.manual_seed(1)
    causal: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    vocabulary, hidden = causal.get_output_embeddings().weight.shape
    if kind == "frozen":
        causal.set_output_embeddings(nn.Linear(hidden, vocabulary, bias=False))
        causal.config.tie_word_embeddings = False
        MultifurcationRewardModel(causal, bias=torch.randn(vocabulary)).save_pretrained(folder)
        return folder
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(causal, config).save_pretrained(str(folder))
    torch.save(torch.randn(vocabulary), folder / "lm_head_bias.pt")
    torch.save(torch.zeros(vocabulary, dtype=torch.bool), folder / "unseen_mask.pt")
    return folder


def megabytes(*models: Any) -> float:
    """Of their weights, each counted once."""
    weights = {p.data_ptr(): p.nbytes for model in models for p in model.model.parameters()}
    return sum(weights.values()) / 1e6


def timed(run: Callable[[], object]) -> float:
    """CPU milliseconds."""
    start = time.process_time()
    run()
    return (time.process_time() - start) * 1e3


def race(policy: Policy, mrms: list[Any], prompt: int, widths: list[int], steps: int) -> list[list[Any]]:
    """One row of figures for each width, without the models' names."""
    low, high = min(1000, policy.vocab_size // 2), min(40_000, policy.vocab_size)
    tokens = torch.randint(low, high, (prompt,), generator=torch.Generator().manual_seed(prompt)).tolist()
    new = len(widths) * (steps + 2) + 1
    config = SearchConfig(width=widths[0], top_p=0.95, max_new_tokens=new, min_new_tokens=new)
    engines = [Engine(ModelPair(policy, mrm), config, prefill_tokens=None, eos_token_id=[2]) for mrm in mrms]
    request = Request(tuple(tokens), tuple(tokens))
    handles = [engine.submit(request, max_width=max(widths)) for engine in engines]
    for engine in engines:
        engine.step()  # with the prefill, in which the second engine finds the policy's part in its cache
    rows, found = policy.prefill([tokens])[0], []
    for width in widths:
        policy.step(rows, [0] * width, range(low, low + width))
        for handle in handles:
            handle.width = width
        runs: list[Callable[[], object]] = [*(engine.step for engine in engines)]
        runs.append(lambda w=width: policy.step(rows, range(w), [low] * w))
        for _ in range(2):  # the beams become as many
            for run in runs:
                run()
        times = [[timed(run) for run in runs] for _ in range(steps)]
        two, one, alone = (list(column) for column in zip(*times, strict=True))
        ratios = [statistics.median(a / b for a, b in zip(one, other, strict=True)) for other in (two, alone)]
        found.append([prompt, width, steps, *map(min, (two, one, alone)), *map(statistics.median, (two, one, alone)),
                      *ratios])  # fmt: skip
    policy.release(rows)
    same = handles[0].tokens == handles[1].tokens
    for engine in engines:
        engine.close(drain=False)
    return [[*row, *(megabytes(policy, mrm) for mrm in mrms), same] for row in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--trunks", nargs="+", default=["lora", "frozen"], choices=["lora", "frozen"])
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    policy, rows = Policy.from_pretrained(options.model, device="cpu"), []
    for kind in options.trunks:
        with tempfile.TemporaryDirectory() as place:
            folder = write_mrm(kind, options.model.resolve(), Path(place))
            base = options.model if kind == "lora" else None
            two = MultifurcationRewardModel.from_pretrained(folder, base=base, device="cpu")
            one = MultifurcationRewardModel.from_pretrained(folder, base=policy)
        for prompt in options.prompts:
            for row in race(policy, [two, one], prompt, options.widths, options.steps):
                rows.append([kind, *(f"{x:.2f}" if isinstance(x, float) else str(x).lower() for x in row)])
                print(*rows[-1], flush=True)
            with options.output.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows([FIELDS, *rows])
    return 0 if all(row[-1] == "true" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
