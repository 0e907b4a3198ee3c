"""Generates with vLLM on a CPU and prints the tokens as JSON: `vllm_run.py MODEL BLOCK_SIZE CACHING`, run by a test.

`SAFFRON_VLLM=1` in the environment makes it use our attention backend.
"""

from __future__ import annotations

import json
import os
import sys

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}

from vllm import LLM, SamplingParams  # noqa: E402 (it reads the environment when it is imported)


def main(model: str, block_size: int, caching: bool) -> dict[str, object]:
    llm = LLM(
        model,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=1024,
        block_size=block_size,
        enable_prefix_caching=caching,
        max_num_batched_tokens=128,  # prompts are prefilled in chunks, next to decoding requests
    )
    shared = list(range(2, 202))
    prompts = [{"prompt_token_ids": shared + [i] * 5} for i in range(6)] + [{"prompt_token_ids": [7, 8, 9]}]

    def run(prompts: list[dict[str, list[int]]], **options: object) -> list[list[list[int]]]:
        params = SamplingParams(detokenize=False, **options)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [[list(choice.token_ids) for choice in output.outputs] for output in outputs]

    layer = next(iter(llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()))
    return {
        "backend": type(layer.impl).__name__,
        "greedy": run(prompts, temperature=0, max_tokens=20),
        "samples": run([{"prompt_token_ids": shared}], n=16, seed=3, temperature=1.0, max_tokens=16),
        "again": run(prompts, temperature=0, max_tokens=20),  # with what is cached now
    }


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "caching")))
