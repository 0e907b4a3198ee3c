"""`saffron generate`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from saffron.cli.options import Commands, add_search_options, json_lines, positive, search_config
from saffron.cli.progress import progress
from saffron.errors import ConfigError


def add(commands: Commands) -> None:
    generate = commands.add_parser("generate", help="answer prompts with Saffron search")
    generate.add_argument("--policy", help="checkpoint to defend (default: the bundled policy)")
    generate.add_argument("--mrm", help="folder of the reward model, published format (default: the bundled one)")
    generate.add_argument("--base", help="checkpoint the MRM's adapter belongs to (default: the one it names)")
    what = generate.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="one prompt")
    what.add_argument("--prompts", type=Path, help='JSON lines with "prompt" and, if wanted, "prefill"')
    generate.add_argument("--prefill", default="", help="text every answer is forced to begin with")
    generate.add_argument("--json", action="store_true", help="print results as JSON lines")
    generate.add_argument("--output", type=Path, help="append results to this file; prompts it holds are not run again")
    generate.add_argument("--trace", type=Path, help="write the whole search as JSON lines (with --prompt)")
    generate.add_argument("--stream", action="store_true", help="print text once it is final (with --prompt)")
    generate.add_argument("--batch", type=positive, default=8, help="prompts searched together (default %(default)s)")
    generate.add_argument("--device", help="e.g. cpu or cuda:0 (default: the GPU if there is one)")
    generate.add_argument("--capture", action="store_true", help="replay the steps as a CUDA graph (needs a GPU)")
    add_search_options(generate)
    generate.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    config = search_config(options)
    if options.prompts is not None and (options.trace or options.stream):
        raise ConfigError("--trace and --stream: work with --prompt, got --prompts")
    if options.stream and (options.trace or options.json or options.output):
        raise ConfigError("--stream: cannot be combined with --trace, --json or --output")
    work = _read_prompts(options)
    from saffron.search import SaffronSearch

    search = SaffronSearch(*load(options), config, capture=options.capture)
    if options.stream:
        for piece in search.stream(options.prompt, options.prefill):
            print(piece, end="", flush=True)
        print()
        return 0
    with progress("searching", shown=len(work) > 1) as show:
        for start in range(0, len(work), options.batch):
            batch = work[start : start + options.batch]
            prompts, prefills = [p for _, p, _ in batch], [f for _, _, f in batch]
            results = search.generate(prompts, prefills, trace=options.trace is not None)
            for (number, _, _), result in zip(batch, results, strict=True):
                _emit({"id": number, **result.to_json()}, options)
            show(start + len(batch), len(work))
    if options.trace:
        results[0].write_trace(options.trace)
    return 0


def _emit(record: dict[str, Any], options: argparse.Namespace) -> None:
    if options.output:
        with options.output.open("a") as file:
            file.write(json.dumps(record) + "\n")
    if options.json:
        print(json.dumps(record), flush=True)
    elif options.prompts is None:
        print(record["text"])
    elif not options.output:
        print(f"{record['id']}\t{record['text']!r}", flush=True)


def _read_prompts(options: argparse.Namespace) -> list[tuple[int, str, str]]:
    """(number, prompt, prefill) of what is to be run; what the output file holds already is left out."""
    if options.prompts is None:
        return [(0, options.prompt, options.prefill)]
    work = []
    for number, record in enumerate(json_lines(options.prompts)):
        prompt, prefill = record.get("prompt"), record.get("prefill", options.prefill)
        if not isinstance(prompt, str) or not isinstance(prefill, str):
            raise ConfigError(f'{options.prompts}: line {number + 1} needs a text "prompt" and may have one "prefill"')
        work.append((number, prompt, prefill))
    done = finished(options.output) if options.output else set()
    return [item for item in work if item not in done]


def finished(output: Path) -> set[tuple[int, str, str]]:
    """What an earlier run wrote. A last line cut short by an interruption is taken off, so that it is run again."""
    if not output.exists():
        return set()
    text = output.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        output.write_text(whole)
    return {(r["id"], r["prompt"], r["prefill"]) for r in json_lines(output) if {"id", "prompt", "prefill"} <= set(r)}


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    from saffron.models.bundled import FOLDER
    from saffron.models.policy import Policy
    from saffron.models.reward_models import MultifurcationRewardModel

    policy = Policy.from_pretrained(options.policy or FOLDER / "policy", device=options.device)
    mrm = MultifurcationRewardModel.from_pretrained(
        options.mrm or FOLDER / "mrm", base=options.base, device=options.device
    )
    return policy, mrm
