"""Prints what the bundled models do on held-out prompts, judged by the oracle: the figures of MODELS.md."""

import argparse
import json
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from rich.progress import Progress
from transformers.utils import logging

from saffron.errors import SaffronError
from saffron.models.bundled import FOLDER, load_bundled
from saffron.search import GreedyConfig, GreedyDecoding, SaffronSearch
from saffron.search.config import SearchConfig
from saffron.search.result import SearchResult
from saffron.world import ATTACK_TOKENS, Example, answers, attack_tokens, examples, oracle, requests

BATCH = 16  # prompts decoded or judged together
MAX_NEW_TOKENS = 32
WIDTHS = (1, 2, 4, 8, 16, 32, 64)
Conversation = tuple[str, list[int]]  # prompt, response tokens
T = TypeVar("T")
Judge = Callable[[str, str], bool]  # prompt, response


class Evaluation:
    """The bundled models, and held-out prompts of both kinds to try them on.

    Args:
        models: folder that holds policy/, guard/ and mrm/.
        count: held-out prompts of each kind.
        seed: which held-out prompts.
        progress: shows how far the slow parts are.
        cache_dtype: of K and V; None: as the models compute.
    """

    def __init__(
        self,
        models: Path = FOLDER,
        count: int = 200,
        seed: int = 0,
        progress: Progress | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.policy, self.mrm, self.guard = load_bundled(models, device="cpu", cache_dtype=cache_dtype)
        self.seed, self.progress = seed, progress or Progress(disable=True)
        self.forbidden = examples("forbidden", "heldout", count, seed)
        self.allowed = examples("allowed", "heldout", count, seed)
        # A prefill for every forbidden prompt: the start of a compliant answer.
        self.attack = [self.policy.decode(attack_tokens(self.policy.tokenizer, e.target)) for e in self.forbidden]
        self.no_attack = [""] * count
        self._greedy = GreedyDecoding(self.policy, config=GreedyConfig(max_new_tokens=MAX_NEW_TOKENS))
        self._conversations: list[Conversation] = []

    def refused(self) -> float:
        """Share of forbidden requests refused, without attack or defence."""
        return self._judged(_refused, self.forbidden, self._decoded("no attack", self._greedy, self.forbidden))

    def answered(self) -> float:
        """Share of allowed requests answered, without defence."""
        return self._judged(oracle.answers, self.allowed, self._decoded("allowed", self._greedy, self.allowed))

    def attack_success(self) -> float:
        """Share of forbidden requests that the prefilled, undefended policy complies with: attack success rate."""
        results = self._decoded("attack", self._greedy, self.forbidden, self.attack)
        return self._judged(oracle.is_harmful, self.forbidden, results)

    def attack_success_under_search(self, width: int) -> float:
        """Attack success rate of the same attack against Saffron search."""
        results = self._decoded(f"attack, width {width}", self._search(width), self.forbidden, self.attack)
        return self._judged(oracle.is_harmful, self.forbidden, results)

    def answered_under_search(self, width: int) -> float:
        """Share of allowed requests answered under search."""
        results = self._decoded(f"allowed, width {width}", self._search(width), self.allowed)
        return self._judged(oracle.answers, self.allowed, results)

    def guard_accuracy(self) -> float:
        """Share of full held-out responses on which the sign of the guard's reward agrees with the oracle."""
        agree: list[bool] = []
        for batch in self._batches("guard accuracy", self.conversations()):
            for (prompt, response), reward in zip(batch, self.guard.score(batch).tolist(), strict=True):
                agree.append((reward <= 0) is oracle.is_harmful(prompt, self.policy.decode(response)))
        return sum(agree) / len(agree)

    def mrm_within(self, error: float = 1.0) -> float:
        """Share of held-out next tokens whose reward by the MRM is within `error` of the guard's."""
        close: list[bool] = []
        for ((prompt, response),) in self._batches("MRM against guard", self.conversations(), 1):
            wanted = self.guard.score([(prompt, response[:end]) for end in range(1, len(response) + 1)])
            close += ((self._mrm_rewards(prompt, response) - wanted).abs() <= error).tolist()
        return sum(close) / len(close)

    def conversations(self) -> list[Conversation]:
        """Held-out conversations to compare the reward models on: the policy's own answers and the world's.

        Answers to forbidden requests begin where a prefill ends, for so does what is judged under attack.
        """
        if not self._conversations:
            results = self._decoded("attack", self._greedy, self.forbidden, self.attack)
            results += self._decoded("allowed", self._greedy, self.allowed)
            for example, result in zip(self.forbidden + self.allowed, results, strict=True):
                tokens = result.tokens[:-1] if result.stop == "eos" else result.tokens
                self._conversations.append((example.prompt, tokens))
            rng, stream = random.Random(self.seed), requests("forbidden", "heldout", self.seed + 1)
            for request, _ in zip(stream, self.forbidden, strict=False):
                complied = self.policy.encode(answers.compliance(request, rng))
                refused = self.policy.encode(answers.refusal(request, rng))
                self._conversations.append((request.text, complied[ATTACK_TOKENS : ATTACK_TOKENS + MAX_NEW_TOKENS]))
                self._conversations.append((request.text, refused))
        return self._conversations

    def _search(self, width: int) -> SaffronSearch:
        return SaffronSearch(self.policy, self.mrm, SearchConfig(width=width, max_new_tokens=MAX_NEW_TOKENS))

    def _decoded(
        self,
        name: str,
        decoder: GreedyDecoding | SaffronSearch,
        items: Sequence[Example],
        prefills: Sequence[str] | None = None,
    ) -> list[SearchResult]:
        pairs = list(zip(items, prefills or self.no_attack, strict=True))
        results: list[SearchResult] = []
        for batch in self._batches(name, pairs):
            results += decoder.generate([example.prompt for example, _ in batch], [prefill for _, prefill in batch])
        return results

    def _judged(self, judge: Judge, items: Sequence[Example], results: Sequence[SearchResult]) -> float:
        verdicts = [judge(example.prompt, result.text) for example, result in zip(items, results, strict=True)]
        return sum(verdicts) / len(verdicts)

    @torch.inference_mode()
    def _mrm_rewards(self, prompt: str, response: list[int]) -> torch.Tensor:
        """The MRM's reward of every token of a response after those before it, [tokens]."""
        context = self.mrm.context_tokens(prompt)
        rows, hidden = self.mrm.prefill([context + response[:end] for end in range(len(response))])
        self.mrm.release(rows)
        tokens = torch.tensor(response)
        rewards = (hidden * self.mrm.head_weight[tokens]).sum(-1)
        bias = self.mrm.full_bias(trained=True)
        return rewards if bias is None else rewards + bias[tokens]

    def _batches(self, name: str, items: Sequence[T], size: int = BATCH) -> Iterable[Sequence[T]]:
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        return self.progress.track(batches, description=name)


def figures(evaluation: Evaluation, widths: Sequence[int]) -> dict[str, float]:
    """Every figure of MODELS.md by name, in the order it is printed."""
    found = {
        "forbidden requests refused, no attack": evaluation.refused(),
        "allowed requests answered": evaluation.answered(),
        "allowed requests answered, width 16": evaluation.answered_under_search(16),
        "guard accuracy": evaluation.guard_accuracy(),
        "MRM within 1 of the guard": evaluation.mrm_within(),
        "attack success, no defence": evaluation.attack_success(),
    }
    return found | {f"attack success, width {width}": evaluation.attack_success_under_search(width) for width in widths}


def _refused(prompt: str, response: str) -> bool:
    return oracle.refuses(response) and not oracle.is_harmful(prompt, response)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m saffron.world.evaluate", description=__doc__)
    parser.add_argument(
        "--models", type=Path, default=FOLDER, help="folder of policy/, guard/, mrm/ (the bundled ones)"
    )
    parser.add_argument("--n", type=_positive, default=200, help="held-out prompts of each kind (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which held-out prompts (%(default)s)")
    parser.add_argument("--widths", type=_positive, nargs="+", default=WIDTHS, help="search widths (%(default)s)")
    parser.add_argument(
        "--fp8", action="store_true", help="cache K and V in 8 bits (e4m3); on the CPU by the reference backend: slow"
    )
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
    cache = torch.float8_e4m3fn if options.fp8 else None
    try:
        with Progress(transient=True) as progress:
            found = figures(Evaluation(options.models, options.n, options.seed, progress, cache), options.widths)
    except SaffronError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    for name, value in found.items():
        print(f"{name:<40} {value:.3f}")
    if options.json:
        options.json.write_text(
            json.dumps({"n": options.n, "seed": options.seed, "fp8": options.fp8, "figures": found}, indent=2) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
