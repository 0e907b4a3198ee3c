"""Answers of methods to prompts, with what the judges say; what is there already is not run again."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from reproduce.real_text.judges import judged, sentiment, vader
from reproduce.real_text.prompts import Case, cases
from reproduce.real_text.scales import TOP_P, Scale
from saffron.evaluation.run import log_probability
from saffron.models.bundled import Models
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.models.text_rewards import TextReward
from saffron.search import parse_method
from saffron.storage.folders import checkpoint_fingerprint
from saffron.storage.results import Record, Schema, open_results, read_results
from saffron.workers import Workers

Progress = Callable[[str, int, int], None]
REWARD = "reproduce.real_text.judges:vader"
SCHEMA = Schema("real-text", ("method", "prompt", "prefill"), lambda record: isinstance(record.get("text"), str))


class Task(NamedTuple):
    """Prompts that a method answers together. A batch is the same whatever is there already, and so are its answers."""

    method: str
    cases: tuple[Case, ...]


def sweep_tasks(scale: Scale, methods: Iterable[str]) -> list[Task]:
    """Of the validation prompts."""
    given = cases("validation", scale.grid.prompts)
    return _batches([(method, given) for method in methods], scale.batch)


def main_tasks(scale: Scale, values: dict[str, str]) -> list[Task]:
    """Of the test prompts: all methods on the first batch of prompts, then on the next, and the costly ones at the end.

    Args:
        values: what the sweep chose.
    """
    attacked, plain = cases("test", scale.test), [Case(case.prompt, "") for case in cases("test", scale.plain)]
    work = [
        (method, given)
        for methods, given in ((scale.methods, attacked), (scale.plain_methods, plain))
        for method in dict.fromkeys(name.format(**values) for name in methods)  # two names may be of one cap
    ]
    return [
        *_batches(work, scale.batch),
        *_batches([(method, attacked[: scale.few]) for method in scale.costly], scale.batch),
    ]


def _batches(work: Sequence[tuple[str, list[Case]]], size: int) -> list[Task]:
    longest = max((len(given) for _, given in work), default=0)
    return [
        Task(method, tuple(part))
        for first in range(0, longest, size)
        for method, given in work
        if (part := given[first : first + size])
    ]


def answer(
    file: Path, tasks: Sequence[Task], scale: Scale, policy: str, out: Path, workers: Workers,
    progress: Callable[[int, int], None],
) -> list[Record]:  # fmt: skip
    """All answers of a file, after those of the tasks that are not there yet.

    Args:
        out: holds the MRM, in `mrm`.
        progress: called with (prompts answered, prompts wanted).
    """
    settings = {"tokens": scale.tokens, "batch": scale.batch, "top_p": TOP_P,
                "models": checkpoint_fingerprint(out / "mrm")}  # fmt: skip
    total = sum(len(task.cases) for task in tasks)
    with open_results(file, SCHEMA, settings) as results:
        left = [task for task in tasks if not all((task.method, *case) in results.done for case in task.cases)]
        done = total - sum(len(task.cases) for task in left)
        progress(done, total)
        for number, records in workers.run(functools.partial(Answers, policy, out / "mrm", scale.tokens), left):
            results.append(records)
            done += len(left[number].cases)
            progress(done, total)
        return list(results.records)


def answered(file: Path) -> list[Record]:
    """What is there, even while another process writes to it."""
    return read_results([file], SCHEMA) if file.exists() else []


class Answers:
    """One worker: the models, loaded once."""

    def __init__(self, policy: str, mrm: Path, tokens: int) -> None:
        self.tokens = tokens
        self.models = Models(
            Policy.from_pretrained(policy, device="cpu"),
            MultifurcationRewardModel.from_pretrained(mrm, device="cpu"),
            TextReward(vader, name=REWARD),
        )

    def __call__(self, task: Task) -> list[Record]:
        tokens, given = self.tokens, task.cases
        method = parse_method(
            task.method, self.models, max_new_tokens=tokens, min_new_tokens=min(16, tokens), top_p=TOP_P
        )
        found = method.generate([case.prompt for case in given], [case.prefill for case in given])
        return [
            {
                "method": task.method, **case._asdict(), "text": result.text, "tokens": len(result.token_ids),
                "score": result.score, "reward": min(0.0, sentiment(result.text)), "judge": judged(result.text),
                "log_probability": log_probability(self.models.policy, *case, result.token_ids),
                "cost": asdict(result.cost),
            }
            for case, result in zip(given, found, strict=True)
        ]  # fmt: skip


def similarity(one: str, other: str) -> float:
    """Cosine of the counts of words."""
    a, b = Counter(one.lower().split()), Counter(other.lower().split())
    norm = math.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values()))
    return sum(a[word] * b[word] for word in a) / norm if norm else 0.0
