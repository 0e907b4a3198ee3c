"""`saffron collect`."""

from __future__ import annotations

import argparse
import json
import time

from saffron.cli.options import (
    DEVICE_HELP,
    Commands,
    above_zero,
    add_worker_options,
    check_models,
    check_prompt,
    name,
    number,
    path,
    positive,
    seed,
    whole,
    workers,
)
from saffron.cli.progress import progress
from saffron.errors import ConfigError
from saffron.storage.paths import check_output_folder
from saffron.storage.text import read_json_lines


def add(commands: Commands) -> None:
    collect = commands.add_parser(
        "collect",
        help="draw a training corpus from the policy's own continuations, for `saffron annotate`",
        description="Continues prompts with the policy, drawn by its probabilities and evenly from its nucleus, as a "
        "search proposes. What comes with a prefill is continued with it and without. Run it again after an "
        "interruption: what is there is kept. DIR/corpus.jsonl holds every conversation once.",
    )
    add = collect.add_argument
    add("prompts", type=path, metavar="FILE", help='JSON lines with "prompt" and, if wanted, "prefill"')
    add("--output", type=path, required=True, metavar="DIR", help="folder to write")
    add("--policy", type=name, metavar="CHECKPOINT", help="whose continuations (default: the bundled policy)")
    add("--samples", type=whole(0), default=2, metavar="N", help="continuations drawn by the policy's probabilities")
    add("--even", type=whole(0), default=2, metavar="N", help="continuations drawn evenly from the nucleus")
    add("--max-new-tokens", type=positive, default=32, metavar="N", help="longest continuation, without the prefill")
    add("--min-new-tokens", type=whole(0), default=0, metavar="N", help="tokens before a continuation may end")
    add("--top-p", type=number, default=0.8, metavar="P", help="probability mass of the nucleus")
    add("--temperature", type=above_zero, default=1.0, metavar="X", help="divides the policy's logits")
    add("--seed", type=seed, default=0, metavar="N", help="decides all that is drawn")
    add("--batch", type=positive, default=8, metavar="N", help="prompts per forward pass")
    add("--device", metavar="DEVICE", help=DEVICE_HELP)
    add("--json", action="store_true", help="print what was done as JSON")
    add_worker_options(collect)
    collect.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from saffron.training.collect import CORPUS, CollectConfig, collect

    config = CollectConfig(**{name: getattr(options, name) for name in CollectConfig.__dataclass_fields__})
    check_models(options)
    check_output_folder("--output", options.output)
    prompts = _read(options)
    began = time.monotonic()
    with progress("collecting") as show:
        corpus = collect(
            prompts, options.policy, options.output, config, workers(options), device=options.device, progress=show
        )
    done = {"conversations": len(corpus), "tokens": sum(len(one["response"]) for one in corpus)}
    if options.json:
        print(json.dumps({"out": str(options.output), **done, "seconds": time.monotonic() - began}))
    else:
        print(f"{options.output / CORPUS}: {done['conversations']} conversations, {done['tokens']} tokens of responses")
    return 0


def _read(options: argparse.Namespace) -> list[tuple[str, str]]:
    prompts = []
    for line, record in read_json_lines(options.prompts):
        where = f"{options.prompts}: line {line}"
        if not isinstance(record, dict):
            raise ConfigError(f"{where} must be a JSON object")
        prompts.append(check_prompt(where, record.get("prompt"), record.get("prefill", "")))
    if not prompts:
        raise ConfigError(f"{options.prompts}: holds no prompts")
    return prompts
