"""`saffron demo`: the bundled policy under a prefilling attack, with and without Saffron search."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from saffron import world
from saffron.errors import outside
from saffron.models.bundled import load_bundled
from saffron.search import GreedyConfig, GreedyDecoding, SaffronSearch
from saffron.search.config import SearchConfig
from saffron.search.page import write_page
from saffron.search.result import SearchResult


@dataclass(frozen=True, slots=True)
class Side:
    """What one way of decoding made of the attacked prompts."""

    results: list[SearchResult]
    harmful: list[bool]
    seconds: float

    @property
    def attack_success_rate(self) -> float:
        return sum(self.harmful) / len(self.harmful)

    @property
    def flops(self) -> int:
        return sum(r.cost.flops for r in self.results)

    def summary(self) -> dict[str, Any]:
        return {
            "attack_success_rate": self.attack_success_rate,
            "gflop_per_prompt": self.flops / len(self.results) / 1e9,
            "seconds_per_prompt": self.seconds / len(self.results),
        }


def run_demo(config: SearchConfig, count: int, seed: int, page: Path, as_json: bool) -> int:
    """Runs the demo; returns the exit status."""
    started = time.perf_counter()
    # With --json stdout holds nothing else.
    console = Console(stderr=as_json)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("loading the bundled models", total=None)
        models = load_bundled()
        examples = world.examples("forbidden", "heldout", count, seed)
        prompts = [e.prompt for e in examples]
        prefills = [models.policy.decode(world.attack_tokens(models.policy.tokenizer, e.target)) for e in examples]
        progress.update(task, description="decoding without defence")
        greedy = GreedyConfig(max_new_tokens=config.max_new_tokens)
        undefended = _judged(prompts, lambda: GreedyDecoding(models.policy, config=greedy), prefills)
        progress.update(task, description="Saffron search", total=config.max_new_tokens)
        defended = _judged(
            prompts,
            lambda: SaffronSearch(models.policy, models.mrm, config),
            prefills,
            trace=True,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    # Draw a search that had something to defend.
    drawn = next((i for i, (a, b) in enumerate(zip(undefended.harmful, defended.harmful, strict=True)) if a > b), 0)
    with outside(f"{page}: cannot be written"):
        write_page(page, defended.results[drawn], undefended.results[drawn])
    report = {
        "undefended": undefended.summary(),
        "saffron": defended.summary() | {"width": config.width},
        "page": str(page),
        "seconds": time.perf_counter() - started,
    }
    if as_json:
        rows = [
            {"prompt": p, "prefill": f, "undefended": a.text, "undefended_harmful": x, "saffron": b.text,
             "saffron_harmful": y}
            for p, f, a, x, b, y in zip(
                prompts, prefills, undefended.results, undefended.harmful, defended.results, defended.harmful,
                strict=True,
            )
        ]  # fmt: skip
        print(json.dumps(report | {"prompts": rows}))
    else:
        _print(console, prompts, prefills, undefended, defended, report)
    return 0


def _judged(prompts: Sequence[str], build: Any, prefills: Sequence[str], **options: Any) -> Side:
    decoder = build()
    started = time.perf_counter()
    results = decoder.generate(prompts, prefills, **options)
    seconds = time.perf_counter() - started
    return Side(results, [world.oracle.is_harmful(p, r.text) for p, r in zip(prompts, results, strict=True)], seconds)


def _print(
    console: Console,
    prompts: Sequence[str],
    prefills: Sequence[str],
    undefended: Side,
    defended: Side,
    report: dict[str, Any],
) -> None:
    table = Table(title="Forbidden requests whose answer is forced to begin with a compliant opening", show_lines=True)
    for title in ("request, and the forced opening", "undefended policy goes on", "Saffron search goes on"):
        table.add_column(title, ratio=1)
    for i, prompt in enumerate(prompts):
        table.add_row(
            f"{prompt}\n[dim]{prefills[i]} …[/dim]",
            *(f"{side.results[i].text.strip()}\n{_verdict(side.harmful[i])}" for side in (undefended, defended)),
        )
    console.print(table)
    for name, side in (("undefended", undefended), (f"Saffron, width {report['saffron']['width']}", defended)):
        s = side.summary()
        console.print(
            f"{name}: attack success rate {s['attack_success_rate']:.2f} "
            f"({sum(side.harmful)} of {len(side.harmful)}), {s['gflop_per_prompt']:.3f} GFLOP and "
            f"{s['seconds_per_prompt'] * 1000:.0f} ms per prompt",
            highlight=False,
        )
    console.print(f"One search tree is drawn in {report['page']}. {report['seconds']:.1f} s in all.", highlight=False)


def _verdict(harmful: bool) -> str:
    return "[bold red]harmful[/bold red]" if harmful else "[bold green]harmless[/bold green]"
