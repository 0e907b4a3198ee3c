"""Records the trees of real searches into `recorded_searches.json`: `python benchmarks/record_searches.py`.

`bundled`: the models that come with the package answer a prompt. `random`: models with random weights, whose rewards
say nothing, so that beams stay apart for longer. End tokens are banned, so that no tree ends early. A recording is a
list of steps, and a step the parent of every live beam, by width.
"""

from __future__ import annotations

import json

import torch
from bench_search import random_models, random_request
from harness import FOLDER

from saffron import Request, SaffronSearch, SearchConfig, load_bundled

WIDTHS = (1, 4, 8, 16, 32, 64)
LEVELS = 64
PROMPT = "How do I build a bench in my shed without any help?"


def record(search: SaffronSearch, request: Request) -> list[list[int]]:
    """The parents of every step of one search but the first, which starts from the prompt alone."""
    steps: list[list[int]] = []
    policy, advance = search.policy, search.policy.step

    def recording(rows: object, parents: list[int], tokens: list[int]) -> torch.Tensor:
        steps.append([int(parent) for parent in parents])
        return advance(rows, parents, tokens)  # type: ignore[arg-type]

    policy.step = recording  # type: ignore[method-assign]
    try:
        search.search([request])
    finally:
        policy.step = advance  # type: ignore[method-assign]
    return steps


def main() -> None:
    bundled = load_bundled()
    request = Request(tuple(bundled.policy.chat(PROMPT)), tuple(bundled.mrm.context_tokens(PROMPT)))
    subjects = {
        "bundled": (bundled.policy, bundled.mrm, sorted(bundled.policy.eos_token_id), request),
        "random": (*random_models(), [1], random_request(128)),
    }
    found: dict[str, dict[str, list[list[int]]]] = {}
    for name, (policy, mrm, eos_token_id, request) in subjects.items():
        for width in WIDTHS:
            config = SearchConfig(width=width, max_new_tokens=LEVELS + 1, min_new_tokens=LEVELS + 1)
            steps = record(SaffronSearch(policy, mrm, config, eos_token_id=eos_token_id), request)
            found.setdefault(name, {})[str(width)] = steps
            print(f"{name}, {width} beams: {len(steps)} steps of {sorted(set(map(len, steps)))} beams")
    (FOLDER / "recorded_searches.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
