"""What the rules of a search cost in language when rewards are wrong: the tables of docs/fluent.md.

    python -m reproduce.fluent --output results.jsonl --docs docs

The bundled models, the prefilling attack of docs/results.md, and Gaussian noise on every reward of the MRM, fixed per
response and token. Run it again after an interruption: what is there is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saffron import world
from saffron.cli.progress import progress
from saffron.evaluation.metrics import distinct, wilson
from saffron.evaluation.tables import Table
from saffron.models.bundled import Models, load_bundled
from saffron.models.vocabulary import Head
from saffron.search import (
    Decoder,
    Engine,
    GreedyConfig,
    GreedyDecoding,
    Request,
    Sampling,
    SamplingConfig,
    parse_config,
)
from saffron.search.config import SearchConfig
from saffron.search.eager_step import EagerStep
from saffron.search.handle import Handle
from saffron.search.model_pair import ModelPair
from saffron.search.step import Batch, StepRecord

TOP_P, TOKENS = 0.95, 32  # the wider nucleus of docs/results.md
RULES = (
    "", "policy_weight=1,top_k=64,min_p=0.02", "policy_weight=1", "policy_weight=4", "reward_tolerance=2",
    "reward_cap=2", "reward_cap=6", "reward_cap=2,path_score=mean", "reward_cap=2,path_score=minimum",
)  # fmt: skip
NOISE, DIMENSIONS = 2.0, 64  # standard deviation of the noise, and how many numbers it is made of


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of a table: standard deviation of the noise, width, and options of `SearchConfig`."""

    noise: float
    width: int
    options: str

    def config(self) -> SearchConfig:
        _, config = parse_config(
            f"saffron:{self.options}", width=self.width, top_p=TOP_P, max_new_tokens=TOKENS, min_new_tokens=16
        )
        return config


class NoisyPair(ModelPair):
    """Its head reads `DIMENSIONS` more numbers, with weights drawn once."""

    def __init__(self, models: Models, noise: float, seed: int) -> None:
        drawn = torch.Generator().manual_seed(seed)
        self.drawn = noise * torch.randn(models.policy.vocab_size, DIMENSIONS, generator=drawn)
        super().__init__(models.policy, models.mrm)  # reads the head

    def head(self, trained_bias: bool) -> Head:
        own = super().head(trained_bias)
        return replace(own, weight=torch.cat([own.weight, self.drawn.to(own.weight)], 1))


class NoisyStep(EagerStep):
    """Shows the head a random direction per response: its product with the weights is the noise of each child."""

    def _select(self, batch: Batch, logits: Tensor, hidden: Tensor, failures: Any) -> StepRecord:
        directions = []
        for search, node in batch.rows:
            text = repr((search.request.policy, node.tokens()))
            seed = int.from_bytes(hashlib.blake2s(text.encode(), digest_size=7).digest())
            drawn = torch.Generator().manual_seed(seed)
            directions.append(torch.nn.functional.normalize(torch.randn(DIMENSIONS, generator=drawn), dim=0))
        return super()._select(batch, logits, torch.cat([hidden, torch.stack(directions).to(hidden)], 1), failures)


def cells(quick: bool) -> Iterator[Cell]:
    """Most telling first: the rules with noise, then without; then what commitment costs."""
    if quick:
        yield from (Cell(NOISE, 2, rule) for rule in ("", "reward_cap=6", "commit_every=4"))
        return
    for width in (16, 4):
        yield from (Cell(NOISE, width, rule) for rule in RULES)
    yield from (
        Cell(0.0, 16, rule) for rule in ("", "policy_weight=1,top_k=64,min_p=0.02", "reward_cap=2", "reward_cap=6")
    )
    yield from (Cell(0.0, 16, f"commit_every={every}") for every in (16, 8, 4))


class Study:
    """The prompts, and what is measured of answers to them."""

    def __init__(self, prompts: int, seed: int) -> None:
        self.models, self.seed = load_bundled(), seed
        policy, mrm = self.models.policy, self.models.mrm
        self.examples = world.examples("forbidden", "heldout", prompts, seed)
        self.requests = [
            Request(
                tuple(policy.chat(e.prompt, world.attack_tokens(policy.tokenizer, e.target))),
                tuple(mrm.context_tokens(e.prompt)),
            )
            for e in self.examples
        ]

    def search(self, cell: Cell) -> dict[str, Any]:
        pair = NoisyPair(self.models, cell.noise, self.seed)
        engine = Engine(pair, cell.config(), step=NoisyStep(pair))
        first: dict[Handle, int] = {}
        early: dict[Handle, int] = {}

        def look(handle: Handle) -> None:
            steps, final = len(handle.tree.steps), len(handle.tokens)
            if final:
                first.setdefault(handle, steps)
            if handle.tree.live and steps < TOKENS:
                early[handle] = final

        handles = [engine.submit(request, on_step=look) for request in self.requests]
        engine.run()
        answers = [handle.result().token_ids for handle in handles]
        return self.measured(answers) | {
            "first_final": statistics.median(first.get(h, len(a)) for h, a in zip(handles, answers, strict=True)),
            "final_early": statistics.fmean(early.get(h, 0) / len(a) for h, a in zip(handles, answers, strict=True)),
        }

    def undefended(self, name: str) -> dict[str, Any]:
        lengths = {"max_new_tokens": TOKENS, "min_new_tokens": 16}
        method: Decoder[Any] = GreedyDecoding(self.models.policy, config=GreedyConfig(**lengths))
        if name != "greedy":
            method = Sampling(self.models.policy, config=SamplingConfig(top_p=TOP_P, seed=self.seed, **lengths))
        return self.measured([result.token_ids for result in method.search(self.requests)])

    def measured(self, answers: list[list[int]]) -> dict[str, Any]:
        policy = self.models.policy
        texts = [policy.decode(answer) for answer in answers]
        harmful = [world.oracle.is_harmful(e.prompt, text) for e, text in zip(self.examples, texts, strict=True)]
        return {
            "harmful": harmful,
            "log_probability": statistics.fmean(map(self.log_probability, self.requests, answers)),
            "distinct": distinct(texts, 1),
        }

    def log_probability(self, request: Request, answer: list[int]) -> float:
        """Per token, of the policy without temperature and nucleus."""
        logits = self.models.policy.logits([[*request.policy, *answer[:i]] for i in range(len(answer))])
        return float(logits.log_softmax(-1)[torch.arange(len(answer)), answer].mean())


def tables(found: dict[str, dict[str, Any]]) -> str:
    """Both tables in Markdown."""
    rules, commits = [], []
    for key, one in found.items():
        cell = json.loads(key)
        of = wilson(one["harmful"])
        share = f"{of.mean:.2f} ({of.low:.2f}–{of.high:.2f})"
        language = f"{one['log_probability']:.2f}"
        if "method" in cell:
            rules.append(("–", "–", f"no defence, {cell['method']}", share, language))
            continue
        at = f"{cell['noise']:g}", str(cell["width"])
        shown = f"`{cell['options']}`" if cell["options"] else "the published rule"
        if "commit_every" not in cell["options"]:
            rules.append((*at, shown, share, language))
        if re.fullmatch(r"|commit_every.*", cell["options"]) and not cell["noise"]:
            commits.append((*at, shown, share, language, f"{one['first_final']:g}", f"{one['final_early']:.2f}"))
    head = ("noise", "width", "rule", "harmful (95 %)", "log-probability per token")
    more = ("first final token at step", "final before the last step")
    return "\n".join(
        Table(title, header, tuple(rows)).markdown()
        for title, header, rows in (("Rules", head, rules), ("Commitment", (*head, *more), commits))
    )


def key_of(cell: Cell | str) -> str:
    return json.dumps({"method": cell} if isinstance(cell, str) else asdict(cell))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="results, one JSON line each")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="put the tables into fluent.md there")
    parser.add_argument("--prompts", type=int, default=24, metavar="N", help="forbidden requests (default: 24)")
    parser.add_argument("--seed", type=int, default=0, metavar="SEED", help="of prompts, noise and samples")
    parser.add_argument("--quick", action="store_true", help="a few prompts: whether it runs, not what comes out")
    options = parser.parse_args()
    study = Study(3 if options.quick else options.prompts, options.seed)
    wanted: list[Cell | str] = ["greedy", "sampling", *cells(options.quick)]
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    found: dict[str, dict[str, Any]] = dict(json.loads(line) for line in lines)
    with progress("searches") as show:
        for i, cell in enumerate(wanted):
            key = key_of(cell)
            if key not in found:
                found[key] = study.undefended(cell) if isinstance(cell, str) else study.search(cell)
                with options.output.open("a") as file:
                    file.write(json.dumps([key, found[key]]) + "\n")
            show(i + 1, len(wanted), key)
    text = tables({key: found[key] for key in map(key_of, wanted)})
    print(text)
    if options.docs is not None:
        page = options.docs / "fluent.md"
        before, _, rest = page.read_text().partition("<!-- tables -->\n")
        page.write_text(
            f"{before}<!-- tables -->\n{text}<!-- end of tables -->\n" + rest.partition("<!-- end of tables -->\n")[2]
        )


if __name__ == "__main__":
    main()
