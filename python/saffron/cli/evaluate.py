"""`saffron eval`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from saffron.cli.options import (
    Commands,
    add_model_options,
    add_worker_options,
    check_models,
    name,
    path,
    positive,
    seed,
    words,
    workers,
)
from saffron.cli.progress import progress

if TYPE_CHECKING:
    from saffron.evaluation.metrics import Group
    from saffron.evaluation.run import Plan
    from saffron.evaluation.store import Record

DESCRIPTION = """Attacks a policy that methods defend, and judges what it says: every method against every attack on
every data set, one JSON line per prompt. Run it again after an interruption: what is there is kept. A method is written
as `saffron:width=16,top_p=0.9` or `best-of-n:n=32`; `best-of-n:n=8/16/32` stands for three. `saffron report` makes
tables and figures of the results."""


VARIANTS = ("", "no unseen mask", "no trie cache")


def add(commands: Commands) -> None:
    evaluate = commands.add_parser(
        "eval", help="attack a defended policy and judge what it says", description=DESCRIPTION
    )
    add = evaluate.add_argument
    add("--output", type=path, required=True, metavar="FILE", help="JSON lines to add results to")
    add(
        "--data", type=name, nargs="+", default=["world"], metavar="DATA",
        help="world, world-allowed (its allowed requests), harmful-hex-phi, ai2-refusals (from the hub, or NAME=FILE), "
        'or a file of JSON lines with "prompt" and "target"',
    )  # fmt: skip
    add(
        "--attack", type=words, nargs="+", default=["prefill:10"], metavar="ATTACK",
        help="none, prefill:TOKENS, role-play, suffix, 'wrap:TEXT with {prompt}', or several joined by + "
        "(default: prefill:10; prefill:0/4/10 are three)",
    )  # fmt: skip
    add("--method", type=words, nargs="+", default=["greedy", "saffron:width=4/16"], metavar="METHOD", help="see above")
    add(
        "--judge", type=name, nargs="+", default=["oracle", "prm"], metavar="JUDGE",
        help="oracle (of the bundled world), prm (the guard), model:CHECKPOINT (another guard)",
    )  # fmt: skip
    add("--count", type=positive, metavar="N", help="prompts of each set (default: world 200, else all)")
    add("--seed", type=seed, default=0, metavar="N", help="which requests of the world")
    add("--batch", type=positive, default=16, metavar="N", help="prompts decoded together")
    models = evaluate.add_argument_group("models")
    add_model_options(models, "policy", "mrm", "base", "prm")
    models.add_argument(
        "--variant", choices=VARIANTS, default="", metavar="VARIANT",
        help="for ablations: 'no unseen mask' or 'no trie cache' (default: neither)",
    )  # fmt: skip
    evaluate.add_argument("--json", action="store_true", help="print the summary as JSON")
    add_worker_options(evaluate)
    evaluate.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from saffron.evaluation.attacks import expand_attack
    from saffron.evaluation.choices import expand
    from saffron.evaluation.metrics import group
    from saffron.evaluation.run import Plan, run_plans
    from saffron.evaluation.tables import summary
    from saffron.models.files import ModelFiles

    check_models(options)
    plan = Plan(
        data=tuple(options.data),
        attacks=tuple(attack for text in options.attack for attack in expand_attack(text)),
        methods=tuple(method for text in options.method for method in expand(text)),
        judges=tuple(options.judge),
        count=options.count,
        seed=options.seed,
        batch=options.batch,
        models=ModelFiles(options.policy, options.mrm, options.base, options.prm, options.device, options.variant),
    )
    with progress("attacking") as show:
        records = run_plans([plan], options.output, workers(options), progress=show)
    _say_skipped(records, plan)
    asked = [
        one
        for one in group(records, variant=plan.models.variant)
        if one.data in plan.data and one.attack in plan.attacks and one.method in plan.methods
    ]
    asked.sort(key=lambda g: (plan.data.index(g.data), plan.attacks.index(g.attack), plan.methods.index(g.method)))
    if options.json:
        print(json.dumps({"out": str(options.output), "results": [summary(one) for one in asked]}))
    else:
        _print(asked)
    return 0


def _say_skipped(records: Sequence[Record], plan: Plan) -> None:
    """On stderr: prompts that were too long."""
    for one in records:
        if "error" in one and one["data"] in plan.data and one["attack"] in plan.attacks:
            prompt = one["prompt"][:40] + "…" * (len(one["prompt"]) > 40)
            print(f"saffron: {one['data']}, {one['method']}: {prompt!r}: skipped ({one['error']})", file=sys.stderr)


def _print(groups: Sequence[Group]) -> None:
    """Attack success and cost of every group."""
    from rich.console import Console
    from rich.table import Table

    from saffron.evaluation.tables import compute, interval

    judges = list(dict.fromkeys(name for one in groups for name in one.records[0]["harmful"]))
    header = ("data", "attack", "method", "prompts", *judges, "answered", "compute", "ms")
    table = Table(*header, title="Attack success [95 %], and cost per prompt")
    for one in groups:
        known = one.records[0]["harmful"]
        table.add_row(
            one.data,
            one.attack,
            one.method + (f", {one.variant}" if one.variant else ""),
            str(len(one.records)),
            *(interval(one.success(name)).replace("[", r"\[") if name in known else "" for name in judges),
            "" if one.answered is None else f"{one.answered:.3f}",
            compute(one.flops),
            f"{one.cost('seconds') * 1000:.0f}",
        )
    # Lines are broken for a terminal alone.
    Console(width=None if Console().is_terminal else 200).print(table)
