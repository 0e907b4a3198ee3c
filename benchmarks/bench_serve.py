"""`saffron serve` under load: speed and latency by concurrency and width, next to Best-of-N and undefended.

    python benchmarks/bench_serve.py --models bundled --concurrency 1 8 32 --width 4 16

First what a lone user pays for the server, and how long a short request waits behind a long one. Then cells of at most
--requests answers and --seconds each. Clients and server share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import replace
from typing import Any

import httpx
from serve_load import Timed, ask, models_of, prompt, served

from saffron import SaffronSearch, SearchConfig
from saffron.models.bundled import Models
from saffron.serving import Settings
from saffron.serving.run import Server

NAME = "bench"


async def cell(url: str, clients: int, most: int, seconds: float, body: dict[str, Any]) -> dict[str, Any]:
    """`clients` at once, each asking again as soon as it has its answer."""
    answers: list[Timed] = []
    left, started = iter(range(most)), time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits(max_connections=None)) as client:

        async def work() -> None:
            for i in left:
                if time.perf_counter() - started > seconds:
                    return
                answers.append(await ask(client, prompt(i), **body))

        await asyncio.gather(*(work() for _ in range(clients)))
    passed = time.perf_counter() - started

    def quantile(values: list[float], q: float) -> float:
        return sorted(values)[min(int(q * len(values)), len(values) - 1)]

    return {
        "answers": len(answers), "tokens_per_second": sum(a.tokens for a in answers) / passed,
        "first_text_p50": statistics.median(a.first for a in answers),
        "latency_p50": statistics.median(a.whole for a in answers),
        "latency_p95": quantile([a.whole for a in answers], 0.95),
    }  # fmt: skip


async def short_behind_long(url: str, server: Server, tokens: int) -> dict[str, Any]:
    """Steps that a long search takes while a request of 2 tokens, sent behind it, is answered."""
    engine = server.service.engine
    assert engine is not None
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        long = asyncio.create_task(ask(client, prompt(0), max_tokens=tokens, saffron={"min_new_tokens": tokens}))
        while not any(search.tree.steps for search in list(engine._searches)):
            await asyncio.sleep(0.001)
        (handle,) = engine._searches
        waits = []
        for i in range(5):
            before = len(handle.tree.steps)
            short = await ask(client, prompt(i + 1), max_tokens=2)
            waits.append(len(handle.tree.steps) - before - 2)  # two of them are its own
            assert not handle.done and short.tokens <= 2
        before = len(handle.tree.steps)
        reading = asyncio.create_task(ask(client, prompt(1, 300), max_tokens=1))
        await reading
        during = len(handle.tree.steps) - before
        await long
    return {"short_waits_steps": max(waits), "steps_while_a_long_prompt_is_read": during}


async def lone(url: str, models: Models, config: SearchConfig, rounds: int) -> dict[str, float]:
    """Seconds of an answer by the server and by a search in this process, in turn; medians and their ratio. The guard's
    verdict, which the server sends with its answer, is part of both."""
    search = SaffronSearch(models.policy, models.mrm, config)
    served_seconds, own_seconds = [], []
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        for i in range(rounds + 1):
            answer = await ask(client, prompt(i), saffron={"min_new_tokens": config.min_new_tokens})
            started = time.perf_counter()
            (result,) = await asyncio.to_thread(search.generate, [prompt(i)])
            if models.guard is not None:
                await asyncio.to_thread(models.guard.score, [(prompt(i), result.text)])
            own = time.perf_counter() - started
            assert answer.text == result.text
            if i:  # the first is warm-up
                served_seconds.append(answer.whole)
                own_seconds.append(own)
    one, other = statistics.median(served_seconds), statistics.median(own_seconds)
    ratio = statistics.median(a / b for a, b in zip(served_seconds, own_seconds, strict=True))
    return {"served_seconds": one, "library_seconds": other, "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=("bundled", "100m", "tiny"), default="bundled")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--width", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--requests", type=int, default=64, help="answers per cell")
    parser.add_argument("--seconds", type=float, default=60, help="per cell, until no more are asked for")
    parser.add_argument("--rounds", type=int, default=9, help="of the lone user")
    options = parser.parse_args()
    models = models_of(options.models)
    config = SearchConfig(width=options.width[0], max_new_tokens=options.tokens, min_new_tokens=options.tokens)
    settings = Settings(name=NAME, config=config, undefended=True, best_of_n=options.width[-1], max_batch=64)
    with served(models, replace(settings, prefill_tokens=64)) as (url, server):
        print(json.dumps(asyncio.run(short_behind_long(url, server, 200))), flush=True)
    with served(models, settings) as (url, _):
        print(json.dumps({"lone": asyncio.run(lone(url, models, config, options.rounds))}), flush=True)
        cells: list[tuple[str, dict[str, Any]]] = [
            (f"width {width}", {"model": NAME, "saffron": {"width": width}}) for width in options.width
        ]
        cells += [("undefended", {"model": f"{NAME}-undefended", "saffron": {"min_new_tokens": options.tokens}}),
                  (f"Best-of-{options.width[-1]}", {"model": f"{NAME}-best-of-n"})]  # fmt: skip
        for method, body in cells:
            for clients in options.concurrency:
                most = options.requests if clients > 1 else max(4, options.requests // 8)
                found = asyncio.run(cell(url, clients, most, options.seconds, body))
                shown = {name: round(value, 3) for name, value in found.items()}
                print(json.dumps({"method": method, "clients": clients, **shown}), flush=True)


if __name__ == "__main__":
    main()
