"""vLLM on a CPU: samples of one prompt and beam search, its own attention against ours.

    python benchmarks/bench_vllm.py --model DIR                 measures both and appends to results/vllm/results.csv
    python benchmarks/bench_vllm.py --model DIR --only beams    beam search alone
    python benchmarks/bench_vllm.py --draw                      draws the latest rows, without vLLM

The engines stand in one process and are timed in turn. Before that their answers are compared: a case whose greedy
tokens or beams differ is not measured. Prompts are in the prefix cache, as in a service after the first request; timed
is an answer of --tokens tokens by each sample, or --tokens steps of `LLM.beam_search`. Bytes are those of the K and V
rows that the backend reads per decode step: all tokens of every request, or the tokens of our plan. Times are
also given as the CPU time of the process, which other work on the machine disturbs least: curves show the best round's,
`times` is the median over rounds of (CPU time of the first contender / of this one).
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from saffron.evaluation.plots import pyplot

FOLDER = Path(__file__).resolve().parent / "results" / "vllm"
COLUMNS = (
    "time", "commit", "model", "dtype", "threads", "vllm", "kind", "number", "prompt", "tokens", "backend", "block",
    "rounds", "best_ms", "median_ms", "cpu_ms", "times", "tokens_per_cpu_second", "kv_bytes_per_step", "same_samples",
)  # fmt: skip
CASE = ("model", "dtype", "threads", "vllm", "kind", "number", "prompt", "backend", "block")
Row = dict[str, Any]


class Engine:
    """One `LLM`, and how many K and V rows its attention reads."""

    def __init__(self, model: str, ours: bool, block: int, tokens: int) -> None:
        from vllm import LLM
        from vllm.v1.attention import selector
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        from saffron.integrations import vllm as integration

        os.environ["SAFFRON_VLLM"] = "1" if ours else "0"
        AttentionBackendEnum.CPU_ATTN.clear_override()
        integration.register()
        selector._cached_get_attn_backend.cache_clear()
        self.llm = LLM(
            model, dtype="float32", enforce_eager=True, block_size=block, max_model_len=4096, max_logprobs=64,
            max_num_batched_tokens=8192, num_gpu_blocks_override=tokens // block + 1,
        )  # fmt: skip
        self.name, self.block, self.rows, self.steps = "saffron-kernels" if ours else "vLLM", block, 0, 0
        config = self.llm.llm_engine.vllm_config
        layers = list(config.compilation_config.static_forward_context.values())
        assert {type(layer.impl).__name__ for layer in layers} == {
            "SaffronAttention" if ours else "CPUAttentionBackendImpl"
        }
        self.row_bytes = sum(8 * layer.num_kv_heads * layer.head_size for layer in layers)  # K and V, 4 bytes each
        worker = self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
        worker = getattr(worker, "worker", worker)
        for groups in worker.model_runner.attn_groups:
            for group in groups:
                for builder in group.metadata_builders:
                    self._count(builder)

    def _count(self, builder: Any) -> None:
        build = builder.build

        def counting(*args: Any, **options: Any) -> Any:
            plan = build(*args, **options)
            self.rows += plan.slot.numel() if self.name != "vLLM" else int(plan.seq_lens.sum())
            self.steps += 1
            return plan

        builder.build = counting

    def sample(self, prompt: list[int], n: int, tokens: int, seed: int = 0) -> list[list[int]]:
        """`n` answers; greedy for one."""
        from vllm import SamplingParams

        how: dict[str, Any] = {"n": n, "seed": seed, "temperature": 1.0} if n > 1 else {"temperature": 0}
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, **how)
        (output,) = self.llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        return [list(choice.token_ids) for choice in output.outputs]

    def beams(self, prompt: list[int], width: int, tokens: int) -> list[list[int]]:
        from vllm.sampling_params import BeamSearchParams

        params = BeamSearchParams(beam_width=width, max_tokens=tokens, ignore_eos=True)
        (output,) = self.llm.beam_search([{"prompt_token_ids": prompt}], params)
        return [list(beam.tokens) for beam in output.sequences]


def measure(engines: list[Engine], kind: str, number: int, length: int, options: argparse.Namespace) -> list[Row]:
    """A row per engine."""
    # One token more: of a prompt of whole blocks alone vLLM would compute the last block again for each sample.
    prompt = [100 + (i * i + 37 * i) % 40_000 for i in range(length + 1)]
    tokens, answers, rows = options.tokens, [], []
    for engine in engines:
        engine.sample(prompt, 1, 1)  # the prompt is read once
        call = engine.sample if kind == "samples" else engine.beams
        answers.append((engine.sample(prompt, 1, tokens), call(prompt, number, tokens)))
    for engine, (greedy, found) in zip(engines, answers, strict=True):
        if greedy != answers[0][0] or (kind == "beams" and found != answers[0][1]):
            raise SystemExit(f"{kind} {number}, prompt {length}: {engine.name}, block {engine.block} answers otherwise")
    for engine in engines:
        engine.rows = engine.steps = 0
    calls = [
        functools.partial(engine.sample if kind == "samples" else engine.beams, prompt, number, tokens)
        for engine in engines
    ]
    rounds = in_turn(calls, options.seconds)
    for i, (engine, (_, found)) in enumerate(zip(engines, answers, strict=True)):
        taken = [times[i][0] / tokens for times in rounds]
        cpu = [times[i][1] / tokens for times in rounds]
        rows.append({
            "kind": kind, "number": number, "prompt": length, "tokens": tokens,
            "backend": engine.name, "block": engine.block, "rounds": len(rounds),
            "best_ms": f"{1e3 * min(taken):.1f}", "median_ms": f"{1e3 * statistics.median(taken):.1f}",
            "cpu_ms": f"{1e3 * min(cpu):.1f}", "tokens_per_cpu_second": f"{number / min(cpu):.1f}",
            "times": f"{statistics.median(times[0][1] / times[i][1] for times in rounds):.2f}",
            "kv_bytes_per_step": round(engine.rows / engine.steps * engine.row_bytes),
            "same_samples": sum(a == b for a, b in zip(found, answers[0][1], strict=True)),
        })  # fmt: skip
    return rows


def in_turn(calls: Sequence[Callable[[], object]], seconds: float) -> list[list[tuple[float, float]]]:
    """(Seconds, CPU seconds) of each call by round, so that ratios are of neighbours in time; 3 rounds at least."""
    rounds: list[list[tuple[float, float]]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < 3 or time.perf_counter() < end:
        taken = []
        for call in calls:
            start, cpu = time.perf_counter(), time.process_time()
            call()
            taken.append((time.perf_counter() - start, time.process_time() - cpu))
        rounds.append(taken)
    return rounds


def measure_all(options: argparse.Namespace) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                   "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    import torch
    import vllm

    git = subprocess.run(
        ["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, cwd=FOLDER.parent
    )
    common = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"), "commit": git.stdout.strip(), "dtype": "float32",
        "model": Path(options.model).name, "threads": torch.get_num_threads(), "vllm": vllm.__version__,
    }  # fmt: skip
    file = options.output / "results.csv"
    options.output.mkdir(parents=True, exist_ok=True)
    made: dict[tuple[bool, int], Engine] = {}
    plans = {
        "samples": ([(False, 128), (True, 128)], options.n, options.prompt),
        "beams": ([(False, 128), (False, 32), (True, 128), (True, 1)], options.width, [600]),
    }
    for kind in (kind for kind in plans if options.only in (None, kind)):
        wanted, numbers, lengths = plans[kind]
        for key in wanted:
            made[key] = made.get(key) or Engine(options.model, *key, 8192)
        for length in lengths:
            for number in numbers:
                rows = measure([made[key] for key in wanted], kind, number, length, options)
                with file.open("a", newline="") as stream:
                    writer = csv.DictWriter(stream, COLUMNS)
                    if not stream.tell():
                        writer.writeheader()
                    writer.writerows(common | row for row in rows)
                for row in rows:
                    print(*(f"{name} {row[name]}" for name in row), sep=", ", flush=True)


def draw(folder: Path) -> None:
    """The latest row of each case: samples as tokens/s and bytes by n, beams as ms per token by width."""
    with (folder / "results.csv").open(newline="") as stream:
        rows = list({tuple(row[name] for name in CASE): row for row in csv.DictReader(stream)}.values())
    plt = pyplot()
    samples = [row for row in rows if row["kind"] == "samples"]
    beams = [row for row in rows if row["kind"] == "beams"]
    prompts = sorted({int(row["prompt"]) for row in samples})
    figure, axes = plt.subplots(2, len(prompts), figsize=(3.2 * len(prompts), 5.2), squeeze=False, sharex=True)
    for column, prompt in enumerate(prompts):
        mine = [row for row in samples if int(row["prompt"]) == prompt]
        curves(axes[0][column], mine, lambda row: float(row["tokens_per_cpu_second"]))
        curves(axes[1][column], mine, lambda row: float(row["kv_bytes_per_step"]) / 1e6)
        axes[0][column].set(title=f"prompt of {prompt} tokens")
        axes[1][column].set(xlabel="samples per prompt (n)")
    axes[0][0].set_ylabel("tokens per CPU second")
    axes[1][0].set_ylabel("MB of K and V per decode step")
    finish(figure, axes[0][0], folder / "samples.svg")
    if beams:
        figure, axis = plt.subplots(figsize=(4.6, 3.6))
        curves(axis, beams, lambda row: float(row["cpu_ms"]))
        axis.set(
            xlabel="beams",
            ylabel="CPU ms per token of the answer",
            title=f"LLM.beam_search, prompt of {beams[0]['prompt']} tokens",
        )
        finish(figure, axis, folder / "beams.svg")


def curves(axis: Any, rows: list[Row], value: Any) -> None:
    points: dict[tuple[str, int], list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        points[row["backend"], int(row["block"])].append((int(row["number"]), value(row)))
    for (backend, block), found in sorted(points.items()):
        ours = backend != "vLLM"
        style = {"color": "C0" if ours else "C1", "marker": "o" if ours else "s", "linewidth": 2 if ours else 1.2}
        axis.plot(*zip(*sorted(found), strict=True), label=f"{backend}, block {block}", markersize=4,
                  linestyle="--" if block < 128 else "-", **style)  # fmt: skip
    sizes = sorted({int(row["number"]) for row in rows})
    axis.set(xscale="log", yscale="log")
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    plain_ticks(axis.yaxis)


def plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:g}")


def finish(figure: Any, axis: Any, file: Path) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(file, metadata={"Date": None})
    print(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder; results/vllm was measured with SmolLM2-135M-Instruct")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, nargs="+", default=[128, 1024, 2048])
    parser.add_argument("--width", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--tokens", type=int, default=16, help="per answer")
    parser.add_argument("--seconds", type=float, default=30, help="per case; 3 rounds at least")
    parser.add_argument("--only", choices=("samples", "beams"))
    parser.add_argument("--draw", action="store_true", help="draw what was measured before")
    parser.add_argument("--output", type=Path, default=FOLDER)
    options = parser.parse_args()
    if options.draw:
        return draw(options.output)
    if options.model is None:
        parser.error("--model: which model?")
    measure_all(options)


if __name__ == "__main__":
    main()
