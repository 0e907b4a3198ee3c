"""Runs cases in vLLM on a CPU and writes what came out as JSON: `vllm_run.py MODEL OUTPUT CASE...`, run by tests.

`SAFFRON_VLLM=1` in the environment makes it use our attention backend; each case has an engine of its own.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}

import torch  # noqa: E402 (vLLM reads the environment when it is imported)
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402
from vllm.sampling_params import BeamSearchParams  # noqa: E402

# What a case changes in the engine. Chunks: prompts are read in pieces of 128 tokens, next to decoding requests.
CHUNKS: dict[str, object] = {"max_num_batched_tokens": 128}
CASES: dict[str, dict[str, object]] = {
    "caching": {},
    "plain": {"enable_prefix_caching": False},
    "chunks": CHUNKS,
    "chunks, plain": CHUNKS | {"enable_prefix_caching": False},
    "block 1": CHUNKS | {"block_size": 1},
    "block 16": CHUNKS | {"block_size": 16},
    "block 128": CHUNKS | {"block_size": 128},
    "preemption": {"num_gpu_blocks_override": 18, "max_model_len": 512},
    "preemption, block 1": {"num_gpu_blocks_override": 18 * 32, "block_size": 1, "max_model_len": 512},
    "lora": CHUNKS | {"enable_lora": True, "max_lora_rank": 8},
    "compiled": CHUNKS | {"enforce_eager": False},
    "speculative": {
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    },
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
}  # fmt: skip


def run(llm: LLM, prompts: list[list[int]], adapter: LoRARequest | None = None, **options: Any) -> list[Any]:
    params = SamplingParams(detokenize=False, ignore_eos=True, **options)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    adapters = [adapter if i % 2 else None for i in range(len(prompts))] if adapter else None
    return llm.generate(asked, params, lora_request=adapters, use_tqdm=False)


def tokens(outputs: list[Any]) -> list[list[list[int]]]:
    return [[list(choice.token_ids) for choice in output.outputs] for output in outputs]


def probabilities(llm: LLM, prompts: list[list[int]]) -> list[list[float]]:
    """Log-probabilities of the prompts' tokens."""
    found = run(llm, prompts, max_tokens=1, prompt_logprobs=0, temperature=0)
    return [[next(iter(one.values())).logprob for one in output.prompt_logprobs[1:]] for output in found]


def counter(llm: LLM, name: str) -> int:
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == name)


def answers(llm: LLM, prompts: list[list[int]], seeded: bool, length: int) -> dict[str, object]:
    """Greedy, sampled and by beam search; twice, so that what is cached is used; short prompts next to long ones."""
    shared, n = prompts[0][:-3], 32 if length < 20 else 13
    found: dict[str, object] = {"greedy": tokens(run(llm, prompts, temperature=0, max_tokens=length))}
    if seeded:
        found["samples"] = tokens(run(llm, [shared], n=n, seed=3, temperature=1.0, max_tokens=length))
        groups = run(llm, [shared, shared[:70], prompts[-1]], n=4, seed=5, temperature=0.8, max_tokens=12)
        found["groups"] = tokens(groups)
    found["again"] = tokens(run(llm, prompts, temperature=0, max_tokens=length))
    beams = llm.beam_search(
        [{"prompt_token_ids": prompts[0]}, {"prompt_token_ids": prompts[-1]}],
        BeamSearchParams(beam_width=4, max_tokens=8, ignore_eos=True),
    )
    found["beams"] = [[list(beam.tokens) for beam in output.sequences] for output in beams]
    return found


def case(model: str, name: str) -> dict[str, object]:
    options: dict[str, Any] = {
        "enforce_eager": True, "dtype": "float32", "max_model_len": 1024, "block_size": 32, "disable_log_stats": False,
        "max_num_batched_tokens": 16384,
    }  # fmt: skip
    llm = LLM(model, **options | CASES[name])
    prompts: list[list[int]] = json.loads((Path(model) / "prompts.json").read_text())
    layer = next(iter(llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()))
    found: dict[str, object] = {"backend": type(layer.impl).__name__}
    if "16" in str(CASES[name].get("dtype")):
        found["greedy"] = tokens(run(llm, prompts, temperature=0, max_tokens=20))
    else:
        # vLLM's seeds fail on CPUs where a prompt is read in pieces ("CPU Generator does not use offset").
        whole = "max_num_batched_tokens" not in CASES[name] and "speculative" not in name
        found |= answers(llm, prompts, whole, 30 if "preemption" in name else 13)
    found["preemptions"] = counter(llm, "vllm:num_preemptions")
    if name == "lora":
        adapter = LoRARequest("adapter", 1, str(Path(model) / "adapter"))
        found["adapter"] = tokens(run(llm, prompts, adapter, temperature=0, max_tokens=13))
    else:  # vLLM on CPUs fails at log-probabilities of prompts where adapters are enabled
        found["probabilities"] = probabilities(llm, prompts[:2])
    del llm, layer
    return found


def main() -> None:
    model, output, *names = sys.argv[1:]
    results: dict[str, dict[str, object]] = {}
    for name in names:
        started = time.perf_counter()
        try:
            results[name] = case(model, name)
        except Exception as error:  # the other cases still count
            results[name] = {"error": f"{type(error).__name__}: {error}"}
        results[name]["seconds"] = round(time.perf_counter() - started, 1)
        with contextlib.suppress(Exception):
            cleanup_dist_env_and_memory()
        torch._dynamo.reset()
        gc.collect()
        Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
