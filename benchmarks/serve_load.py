"""Servers under load, for `bench_serve.py` and `soak_serve.py`: models of any size, and clients in an event loop."""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import torch
import uvicorn
from transformers import AutoModelForCausalLM, LlamaConfig

from saffron import MultifurcationRewardModel, Policy, load_bundled
from saffron.models.attention import ATTENTION
from saffron.models.bundled import Models
from saffron.serving import Settings, create_app
from saffron.serving.run import Server, serving

SIZES = {  # hidden, intermediate, layers, heads, KV heads
    "tiny": (32, 64, 1, 4, 2),
    "100m": (768, 2048, 12, 12, 4),
}
WORDS = ["how", "do", "I", "build", "a", "bench", "table", "gate", "in", "my", "shed", "near", "the", "river", "today"]


def models_of(size: str) -> Models:
    """The bundled models, or random ones of a size with the bundled tokenizer; those have no guard."""
    bundled = load_bundled()
    if size == "bundled":
        return bundled
    tokenizer = bundled.policy.require_tokenizer()

    def model(seed: int) -> Any:
        torch.manual_seed(seed)
        hidden, intermediate, layers, heads, kv_heads = SIZES[size]
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=2048,
            initializer_range=0.1, bos_token_id=0, eos_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION).eval()

    return Models(Policy(model(0), tokenizer), MultifurcationRewardModel(model(1), tokenizer), None)  # type: ignore[arg-type]


@contextlib.contextmanager
def served(models: Models, settings: Settings) -> Iterator[tuple[str, Server]]:
    """A server in a thread: its address, and itself."""
    app = create_app(models, settings)
    server = Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="on"), 60)
    with serving(server):
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", server


def prompt(seed: int, words: int = 12) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


@dataclass(frozen=True)
class Timed:
    """One answer: seconds to its first text and to its end, and its tokens."""

    first: float
    whole: float
    tokens: int
    text: str


async def ask(client: httpx.AsyncClient, text: str, **body: Any) -> Timed:
    """A streamed answer."""
    started, first, tokens, said = time.perf_counter(), 0.0, 0, ""
    body = {"messages": [{"role": "user", "content": text}], "stream": True,
            "stream_options": {"include_usage": True}, **body}  # fmt: skip
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError((await response.aread()).decode())
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            for choice in event["choices"]:
                if choice["delta"].get("content"):
                    first = first or time.perf_counter() - started
                    said += choice["delta"]["content"]
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
    whole = time.perf_counter() - started
    return Timed(first or whole, whole, tokens, said)
