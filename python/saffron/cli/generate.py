"""`saffron generate`."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saffron.cli.options import (
    Commands,
    add_engine_options,
    add_model_options,
    add_search_options,
    check_engine,
    check_models,
    check_prompt,
    engine,
    path,
    positive,
    search_config,
    words,
)
from saffron.cli.progress import progress
from saffron.cli.timing import Clock
from saffron.errors import ConfigError, PromptTooLongError, outside
from saffron.storage.folders import check_replaceable
from saffron.storage.paths import check_output_file
from saffron.storage.results import ResultFile, Schema, open_results
from saffron.storage.text import check_keys, read_json_lines

if TYPE_CHECKING:
    from saffron.models.files import ModelFiles
    from saffron.search import SaffronSearch

SCHEMA = Schema("generate", ("id",), lambda record: isinstance(record.get("text", record.get("error")), str))


@dataclass(frozen=True, slots=True)
class Work:
    """One prompt.

    Attributes:
        id: a hash of prompt and prefill, the same wherever they stand; a number behind it tells repetitions apart.
        where: what a message calls it.
    """

    id: str
    where: str
    prompt: str
    prefill: str


def add(commands: Commands) -> None:
    generate = commands.add_parser("generate", help="answer prompts with Saffron search")
    what = generate.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", type=words, metavar="TEXT", help="one prompt")
    what.add_argument("--prompts", type=path, metavar="FILE", help='JSON lines with "prompt" and, if wanted, "prefill"')
    add = generate.add_argument
    add("--prefill", type=words, default="", metavar="TEXT", help="text every answer is forced to begin with")
    add("--json", action="store_true", help="print results as JSON lines")
    add("--output", type=path, metavar="FILE", help="add results to this file; prompts it holds are not run again")
    add("--trace", type=path, metavar="FILE", help="write the whole search as JSON lines (with --prompt)")
    add("--stream", action="store_true", help="print text once it is final (with --prompt)")
    add("--batch", type=positive, default=8, metavar="N", help="prompts searched together")
    add("--capture", action="store_true", help="replay the steps as a CUDA graph (needs a GPU)")
    group = generate.add_argument_group("models")
    add_model_options(group, "policy", "mrm", "base")
    add_engine_options(group)
    add_search_options(generate)
    generate.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    config = search_config(options)
    if options.prompts is not None and (options.trace or options.stream):
        raise ConfigError("--trace and --stream: work with --prompt, got --prompts")
    if options.stream and (options.trace or options.json or options.output):
        raise ConfigError("--stream: cannot be combined with --trace, --json or --output")
    work = _read_prompts(options)
    check_engine(options)
    check_models(options)
    if options.trace:
        from saffron.search.result import TRACE

        check_replaceable("--trace", options.trace, TRACE, [options.output])
    with _results(options) as results:
        left = list(batches(work, options.batch, results.done if results else set()))
        if results is not None and not left:
            for record in results.records if options.prompts is None else ():
                if record["id"] == work[0].id:
                    _print(record, options)
            print(f"{options.output}: holds every answer already", file=sys.stderr)
            return 0
        from saffron.search import SaffronSearch

        models = _models(options)
        policy = models.load_policy()
        search = SaffronSearch(policy, models.load_mrm(policy), config, capture=options.capture)
        with Clock(search.policy, search.mrm) as clock:
            if options.stream:
                clock.tokens = _stream(search, options)
            else:
                clock.tokens = _search(search, left, options, results)
        clock.report(config.width)
    return 0


def batches(work: Sequence[Work], size: int, done: set[tuple[str, ...]]) -> Iterator[tuple[list[Work], set[str]]]:
    """Prompts that are searched together, and which of them are wanted.

    Batches are the same whatever is done already: numbers are rounded as in a run without interruption.
    """
    for start in range(0, len(work), size):
        batch = list(work[start : start + size])
        wanted = {one.id for one in batch if (one.id,) not in done}
        if wanted:
            yield batch, wanted


def _search(
    search: SaffronSearch,
    left: list[tuple[list[Work], set[str]]],
    options: argparse.Namespace,
    results: ResultFile | None,
) -> int:
    """Returns the number of new tokens, those of repeated answers included."""
    total, done, tokens = sum(len(wanted) for _, wanted in left), 0, 0
    with progress("searching", shown=total > 1) as show:
        for batch, wanted in left:
            records = answer(search, batch, skip=options.prompts is not None, trace=options.trace)
            new = [record for record in records if record["id"] in wanted]
            if results is not None:
                results.append(new)
            for record in new:
                _print(record, options)
            done += len(new)
            tokens += sum(len(record.get("token_ids", ())) for record in records)
            show(done, total)
    return tokens


def answer(search: SaffronSearch, batch: Sequence[Work], *, skip: bool, trace: Path | None = None) -> list[Any]:
    """Records of prompts that are searched together. What is too long has an "error" instead of an answer.

    Args:
        skip: otherwise such a prompt is an error.
        trace: file for the whole search.

    Raises:
        PromptTooLongError: it names the prompt's line.
    """
    try:
        found = search.generate([w.prompt for w in batch], [w.prefill for w in batch], trace=trace is not None)
    except PromptTooLongError as error:
        if len(batch) > 1:
            return [record for one in batch for record in answer(search, [one], skip=skip)]
        if not skip:
            raise
        print(f"saffron: {batch[0].where}: skipped ({error})", file=sys.stderr)
        return [{"id": batch[0].id, "prompt": batch[0].prompt, "prefill": batch[0].prefill, "error": str(error)}]
    if trace is not None:
        with outside(f"{trace}: cannot be written"):
            found[0].write_trace(trace)
    return [{"id": one.id, **result.to_json()} for one, result in zip(batch, found, strict=True)]


def _stream(search: SaffronSearch, options: argparse.Namespace) -> int:
    """Returns the number of new tokens, as the text is encoded."""
    text = ""
    for piece in search.stream(options.prompt, options.prefill):
        print(piece, end="", flush=True)
        text += piece
    print()
    return len(search.policy.encode(text))


def _print(record: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        print(json.dumps(record), flush=True)
    elif options.prompts is None:
        print(record["text"])
    elif not options.output and "error" not in record:
        print(f"{record['id']}\t{record['text']!r}", flush=True)


@contextlib.contextmanager
def _results(options: argparse.Namespace) -> Iterator[ResultFile | None]:
    """The file of results, None if none is asked for."""
    if options.output is None:
        yield None
        return
    from saffron.models.devices import find_device

    inputs = [options.prompts, options.trace]
    check_output_file("--output", options.output, inputs)
    settings = {
        **asdict(search_config(options)),
        "batch": options.batch,
        "device": find_device(options.device).type,
        "models": _models(options).fingerprint(guard=False),
        **({} if options.engine == "saffron" else {"engine": options.engine}),
    }
    with open_results(options.output, SCHEMA, settings, inputs) as results:
        yield results


def _models(options: argparse.Namespace) -> ModelFiles:
    from saffron.models.files import ModelFiles

    return ModelFiles(options.policy, options.mrm, options.base, device=options.device, **engine(options))


def _read_prompts(options: argparse.Namespace) -> list[Work]:
    number = _numbering()
    if options.prompts is None:
        prompt, prefill = check_prompt("--prompt", options.prompt, options.prefill)
        return [Work(number(prompt, prefill), "--prompt", prompt, prefill)]
    work = []
    for line, record in read_json_lines(options.prompts):
        where = f"{options.prompts}: line {line}"
        if not isinstance(record, dict):
            raise ConfigError(f"{where} must be a JSON object")
        check_keys(where, record, ("prompt", "prefill"))
        prompt, prefill = check_prompt(where, record.get("prompt"), record.get("prefill", options.prefill))
        work.append(Work(number(prompt, prefill), where, prompt, prefill))
    if not work:
        raise ConfigError(f"{options.prompts}: holds no prompts")
    return work


def _numbering() -> Callable[[str, str], str]:
    """Gives every prompt its id."""
    seen: Counter[str] = Counter()

    def number(prompt: str, prefill: str) -> str:
        found = hashlib.blake2s(json.dumps([prompt, prefill]).encode(), digest_size=8).hexdigest()
        seen[found] += 1
        return found if seen[found] == 1 else f"{found}-{seen[found]}"

    return number
