"""Runs methods against attacks and writes down what came of it."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from saffron import world
from saffron.errors import CheckpointError, ConfigError, PromptTooLongError
from saffron.evaluation.attacks import parse_attack
from saffron.evaluation.datasets import Case, load_cases
from saffron.evaluation.judges import Judge, check_judge, judge_checkpoint, load_judge
from saffron.evaluation.store import Key, Record, ResultFile, open_results
from saffron.models.devices import find_device
from saffron.models.files import ModelFiles
from saffron.models.policy import Policy
from saffron.models.provenance import digest
from saffron.models.text_rewards import reward_fingerprint
from saffron.quiet import quiet_transformers
from saffron.search import AdaptiveConfig, Method, parse_config, parse_method
from saffron.storage.text import read_bytes
from saffron.workers import Workers


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be run: every method against every attack on every data set.

    Attributes:
        data, attacks, methods: as `load_cases`, `parse_attack` and `parse_method` read them.
        count, seed: cases of each data set, and which.
        judges: as `load_judge` reads them.
        batch: prompts decoded together.
    """

    data: tuple[str, ...] = ("world",)
    attacks: tuple[str, ...] = ("prefill:10",)
    methods: tuple[str, ...] = ("greedy", "saffron:width=16")
    judges: tuple[str, ...] = ("oracle", "prm")
    count: int | None = None
    seed: int = 0
    batch: int = 16
    models: ModelFiles = field(default_factory=ModelFiles)


@dataclass(frozen=True, slots=True)
class Task:
    """Cases that one method answers together.

    Attributes:
        wanted: the ids of those that are missing. A batch is the same whatever is there already, so that numbers are
            rounded as in a run without interruption.
    """

    data: str
    attack: str
    method: str
    cases: tuple[Case, ...]
    wanted: frozenset[str]

    def keys(self, variant: str) -> list[Key]:
        """Of what is wanted."""
        cases = [case.id for case in self.cases if case.id in self.wanted]
        return [(self.data, self.attack, self.method, variant, case) for case in cases]


def tasks(plan: Plan, done: set[Key]) -> Iterator[Task]:
    """What is left to do, batch by batch.

    Raises:
        ConfigError: a data set, attack, method or judge there is none of.
    """
    for method in plan.methods:
        parse_config(method)
    for judge in plan.judges:
        check_judge(judge)
    for data in plan.data:
        cases = load_cases(data, plan.count, plan.seed)
        for attack, method in itertools.product(plan.attacks, plan.methods):
            if parse_attack(attack).prefill and any(not case.target for case in cases):
                raise ConfigError(f"attack: {attack} needs answers that comply, and {data} holds cases without target")
            for start in range(0, len(cases), plan.batch):
                batch = tuple(cases[start : start + plan.batch])
                variant = plan.models.variant
                wanted = frozenset(c.id for c in batch if (data, attack, method, variant, c.id) not in done)
                if wanted:
                    yield Task(data, attack, method, batch, wanted)


def evaluate(
    plans: Sequence[Plan],
    results: ResultFile,
    workers: Workers | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Runs what of some plans is not in the results yet, and adds it to them.

    Args:
        plans: with the same models and judges, which are those of `results`.
        workers: where it runs; None: here, in one thread.
        progress: called with (results there, results wanted) after each batch.

    Raises:
        SaffronError: a plan that cannot be run, before anything is.
    """
    models, judges = plans[0].models, plans[0].judges
    assert all((plan.models, plan.judges) == (models, judges) for plan in plans)
    fingerprint = models.fingerprint()
    left: list[Task] = []
    wanted: set[Key] = set()  # plans may overlap
    for plan in plans:
        left += tasks(plan, results.done | wanted)
        wanted.update(key for task in tasks(plan, set()) for key in task.keys(models.variant))
    there, total = len(wanted & results.done), len(wanted)
    make = functools.partial(_Runner, models, judges, fingerprint)
    if progress is not None:
        progress(there, total)
    for _, records in (workers or Workers()).run(make, left):
        results.append(records)
        there += len(records)
        if progress is not None:
            progress(there, total)


def played(method: str) -> str:
    """Fingerprint of the file that a method plays; "" if it reads none.

    Raises:
        CheckpointError: the file cannot be read. ConfigError: there is no such method.
    """
    _, config = parse_config(method)
    if not (isinstance(config, AdaptiveConfig) and config.state):
        return ""
    return hashlib.sha256(read_bytes(Path(config.state), CheckpointError)).hexdigest()


def check_played(file: Path, plans: Sequence[Plan], records: Sequence[Record]) -> None:
    """Raises `ConfigError` if there are results of a method whose file holds something else now."""
    for method in {method for plan in plans for method in plan.methods}:
        now = played(method)
        if any(record["method"] == method and record.get("state", "") != now for record in records):
            raise ConfigError(
                f"{file}: holds results of {method} with another content of its file; choose another place"
            )


def log_probability(policy: Policy, prompt: str, prefill: str, tokens: Sequence[int]) -> float:
    """Log-probability per token of an answer under the undefended policy: very low for what is no language."""
    context = policy.chat(prompt, prefill)
    rows, logits = policy.prefill([[*context, *tokens[:end]] for end in range(len(tokens))])
    policy.release(rows)
    chosen = torch.tensor(list(tokens), device=logits.device)[:, None]
    return float(logits.float().log_softmax(-1).gather(1, chosen).mean())


class _Runner:
    """One worker: models and judges, loaded once, and the methods it was asked for."""

    def __init__(self, files: ModelFiles, judges: Sequence[str], fingerprint: str) -> None:
        quiet_transformers()  # a process of its own knows nothing of what the command line has set
        self.models, self.variant, self.fingerprint = files.load(), files.variant, fingerprint
        self.judges: list[Judge] = [load_judge(name, self.models.guard, files.device) for name in judges]
        self.methods: dict[str, Method] = {}
        self.states: dict[str, str] = {}  # what the methods' files hold

    def __call__(self, task: Task) -> list[Record]:
        return [record for record in self._records(task) if record["case"] in task.wanted]

    def _records(self, task: Task) -> list[Record]:
        """Of all cases. Where one is too long all run alone, and those that are get a record that says so."""
        try:
            return self._answered(task)
        except PromptTooLongError as error:
            if len(task.cases) == 1:
                (case,) = task.cases
                return [self._about(task, case) | {"error": str(error), "harmful": {}, "cost": {}}]
            return [record for case in task.cases for record in self._records(replace(task, cases=(case,)))]

    def _about(self, task: Task, case: Case) -> Record:
        return {
            "data": task.data,
            "attack": task.attack,
            "method": task.method,
            "variant": self.variant,
            "case": case.id,
            "models": self.fingerprint,
            **({"state": state} if (state := self.states.get(task.method)) else {}),
            "kind": case.kind,
            "prompt": case.prompt,
        }

    def _answered(self, task: Task) -> list[Record]:
        attack, tokenizer = parse_attack(task.attack), self.models.policy.require_tokenizer()
        attacked = [attack.apply(case, tokenizer) for case in task.cases]
        found = self._method(task.method).generate([p for p, _ in attacked], [f for _, f in attacked])
        prompts, texts = [case.prompt for case in task.cases], [result.text for result in found]
        verdicts = {judge.name: judge.judge(prompts, texts) for judge in self.judges}
        return [
            self._about(task, case)
            | {
                "prefill": prefill,
                "text": result.text,
                "tokens": len(result.token_ids),
                "finish_reason": result.finish_reason,
                "score": result.score,
                "harmful": {name: given[i][0] for name, given in verdicts.items()},
                "scores": {name: given[i][1] for name, given in verdicts.items() if given[i][1] is not None},
                "log_probability": log_probability(self.models.policy, shown, prefill, result.token_ids),
                "answered": world.oracle.answers(case.prompt, result.text) if task.data == "world-allowed" else None,
                "cost": asdict(result.cost),
            }
            for i, (case, (shown, prefill), result) in enumerate(zip(task.cases, attacked, found, strict=True))
        ]

    def _method(self, spec: str) -> Method:
        if spec not in self.methods:
            self.states[spec] = played(spec)
            self.methods[spec] = parse_method(spec, self.models)
        return self.methods[spec]


def run_plans(plans: Sequence[Plan], file: Path, workers: Workers | None = None, **options: Any) -> list[Record]:
    """`evaluate` into a file, which begins with what decides its results; returns all it holds then."""
    models, judges, workers = plans[0].models, plans[0].judges, workers or Workers()
    models.check()
    for judge in judges:
        check_judge(judge)
    named = {name: digest([reward_fingerprint(given)]) if (given := judge_checkpoint(name)) else "" for name in judges}
    settings = {
        "models": models.fingerprint(),
        "judges": named,
        "device": find_device(models.device).type,
        "threads": workers.threads,
    }
    inputs = [Path(data.rpartition("=")[2]) for plan in plans for data in plan.data]
    with open_results(file, settings, inputs) as results:
        check_played(file, plans, results.records)
        evaluate(plans, results, workers, **options)
        return results.records
