"""vLLM as a server, in processes of its own, with our attention: answers, groups, requests that are given up."""

from __future__ import annotations

import importlib.util
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM
from vllm_server import served

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
SHARED = [2 + 7 * i % 250 for i in range(150)]
PROMPTS = [SHARED + [i + 5] * 5 for i in range(4)] + [[7, 8, 9]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    return tiny.save_checkpoint(
        folder, hidden_size=128, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024
    )


def greedy(model: Path, prompt: list[int], tokens: int) -> list[int]:
    """By transformers, without a cache."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(loaded(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def running(address: str) -> float:
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_client_of_openai(model: Path, tmp_path: Path, ranks: int) -> None:
    """Requests at once equal transformers; a stream that is closed is forgotten, and what follows is right.

    With two ranks (gloo) each has half of the heads.
    """
    openai = pytest.importorskip("openai")
    log = tmp_path / "log"
    with served(model, log, "--tensor-parallel-size", str(ranks)) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=300)

        def ask(prompt: list[int], **options: Any) -> Any:
            extra = {"ignore_eos": True, "return_token_ids": True}
            return client.completions.create(
                model="tiny", prompt=prompt, max_tokens=12, extra_body=extra, **options
            )  # fmt: skip

        def check() -> None:
            with ThreadPoolExecutor(len(PROMPTS)) as threads:
                answers = list(threads.map(lambda prompt: ask(prompt, temperature=0), PROMPTS))
            assert [answer.choices[0].token_ids for answer in answers] == expected

        expected = [greedy(model, prompt, 12) for prompt in PROMPTS]
        check()
        groups = [ask(SHARED, n=4, temperature=1.0, seed=1) for _ in range(2)]
        sampled = [[choice.token_ids for choice in answer.choices] for answer in groups]
        assert sampled[0] == sampled[1] and len({tuple(tokens) for tokens in sampled[0]}) > 1
        stream = client.completions.create(
            model="tiny", prompt=SHARED, max_tokens=300, n=8, stream=True, temperature=1.0,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        next(iter(stream))
        assert running(address) > 0
        stream.close()
        for _ in range(100):
            if running(address) == 0:
                break
            time.sleep(0.1)
        assert running(address) == 0
        check()
    assert log.read_text().count("SAFFRON: attention of 3 layers") == ranks
