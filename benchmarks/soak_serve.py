"""Thousands of requests with departures at random: nothing leaks, counters add up, answers are those of lone searches.

python benchmarks/soak_serve.py --requests 10000
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import os
import random
import time
from collections import Counter
from pathlib import Path

import httpx
from serve_load import ask, models_of, prompt, served

from saffron import SaffronSearch, SearchConfig
from saffron.models.bundled import Models
from saffron.serving import Settings
from saffron.serving.service import Service

CONFIGS = [SearchConfig(width=w, top_p=p, max_new_tokens=t, min_new_tokens=0) for w, p, t in
           ((1, 0.8, 3), (2, 0.8, 5), (3, 0.5, 4), (4, 0.95, 6))]  # fmt: skip
PROMPTS = 16
FRESH = httpx.Limits(max_keepalive_connections=0)  # a connection that broke is then an error of the server


def resident() -> int:
    """Bytes in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Lines(logging.Handler):
    """Counts the server's log, which has one line for each request; looks at `/metrics` do not count."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "POST" in (record.args or ())


def expected(models: Models) -> dict[tuple[int, int], str]:
    """The answer of each prompt under each configuration, each search alone."""
    found = {}
    for c, config in enumerate(CONFIGS):
        search = SaffronSearch(models.policy, models.mrm, config)
        for i in range(PROMPTS):
            found[i, c] = search.generate([prompt(i)])[0].text
    return found


async def soak(url: str, requests: int, clients: int, answers: dict[tuple[int, int], str], seed: int) -> Counter[str]:
    chance, seen, left = random.Random(seed), Counter[str](), iter(range(requests))
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=FRESH) as client:

        async def work() -> None:
            for _ in left:
                i, c = chance.randrange(PROMPTS), chance.randrange(len(CONFIGS))
                config = CONFIGS[c]
                own = {"width": config.width, "top_p": config.top_p, "min_new_tokens": 0}
                body = {"saffron": own, "max_tokens": config.max_new_tokens}
                patience = chance.uniform(0, 0.5) if chance.random() < 0.4 else None
                try:
                    async with asyncio.timeout(patience):
                        if chance.random() < 0.5:
                            text = (await ask(client, prompt(i), **body)).text
                        else:
                            messages = [{"role": "user", "content": prompt(i)}]
                            said = await client.post("/v1/chat/completions", json={"messages": messages, **body})
                            if said.status_code == 429:
                                seen["refused"] += 1
                                continue
                            text = said.json()["choices"][0]["message"]["content"]
                except TimeoutError:
                    seen["left"] += 1
                    continue
                seen["answered" if text == answers[i, c] else "different"] += 1

        await asyncio.gather(*(work() for _ in range(clients)))
    return seen


def counters(service: Service) -> dict[str, float]:
    metrics = service.metrics
    total = sum(s.value for m in metrics.success.collect() for s in m.samples if s.name.endswith("_total"))
    errors = sum(s.value for m in metrics.errors.collect() for s in m.samples if s.name.endswith("_total"))
    return {"success": total, "errors": errors, "cancelled": metrics.cancelled._value.get()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    lines = Lines()
    logging.getLogger("saffron.serving").addHandler(lines)
    logging.getLogger("saffron.serving").setLevel(logging.INFO)
    models = models_of("tiny")
    answers, started = expected(models), time.perf_counter()
    with served(models, Settings(config=CONFIGS[0], queue=4096, max_batch=32)) as (url, server):
        service = server.service
        warm = asyncio.run(soak(url, max(options.requests // 10, 50), options.clients, answers, options.seed + 1))
        before, files = resident(), descriptors()
        seen = warm + asyncio.run(soak(url, options.requests, options.clients, answers, options.seed))
        end = time.monotonic() + 60
        while (service.unfinished or (service.engine and service.engine.busy)) and time.monotonic() < end:
            time.sleep(0.05)
        gc.collect()  # connections that a client left while they were made are the client's, and garbage
        report = {
            "requests": seen.total(), **seen, "reached": lines.count, "counted": counters(service),
            "seconds": time.perf_counter() - started, "unfinished": service.unfinished,
            "slots_left": models.policy.kv.num_nodes + models.mrm.kv.num_nodes,
            "mib_grown": (resident() - before) / 2**20, "descriptors_grown": descriptors() - files,
        }  # fmt: skip
    print(json.dumps(report))
    assert not seen["different"], "an answer differs from that of a lone search"
    assert report["slots_left"] == report["unfinished"] == 0
    assert report["descriptors_grown"] <= 0, "descriptors leak"
    assert report["mib_grown"] < 64, "memory leaks"
    assert counters(service)["success"] >= seen["answered"]
    assert seen["answered"] + seen["left"] + seen["refused"] == seen.total()
    assert sum(counters(service).values()) == lines.count <= seen.total(), "each request is counted once"


if __name__ == "__main__":
    main()
