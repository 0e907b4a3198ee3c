"""The command `saffron`. Errors a user can cause are one line on stderr, exit status 2."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from saffron.config import SearchConfig
from saffron.errors import ConfigError, SaffronError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    _quiet_transformers()
    from saffron_kernels import CacheFullError

    try:
        return options.run(options)
    except (SaffronError, CacheFullError) as error:
        print(f"saffron: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("saffron: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="saffron", description=f"{_summary()} Try `saffron demo`.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="attack the shipped model with and without the defence, and draw a search")
    demo.add_argument("--count", type=_positive, default=8, help="attacked prompts (default %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="which held-out prompts (default %(default)s)")
    demo.add_argument("--html", type=Path, default=Path("saffron-demo.html"), help="page to write (%(default)s)")
    demo.add_argument("--json", action="store_true", help="print JSON instead of the table")
    _add_search_options(demo)
    demo.set_defaults(run=_demo)

    generate = commands.add_parser("generate", help="answer prompts with Saffron search")
    generate.add_argument("--policy", help="checkpoint to defend (default: the shipped policy)")
    generate.add_argument("--mrm", help="folder of the reward model, published format (default: the shipped one)")
    generate.add_argument("--base", help="checkpoint the MRM's adapter belongs to (default: the one it names)")
    what = generate.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="one prompt")
    what.add_argument("--prompts", type=Path, help='JSON lines with "prompt" and, if wanted, "prefill"')
    generate.add_argument("--prefill", default="", help="text every answer is forced to begin with")
    generate.add_argument("--json", action="store_true", help="print results as JSON lines")
    generate.add_argument("--output", type=Path, help="append results to this file; prompts it holds are not run again")
    generate.add_argument("--trace", type=Path, help="write the whole search as JSON lines (with --prompt)")
    generate.add_argument("--stream", action="store_true", help="print text once it is final (with --prompt)")
    generate.add_argument("--batch", type=_positive, default=8, help="prompts searched together (default %(default)s)")
    generate.add_argument("--device", help="e.g. cpu or cuda:0 (default: the GPU if there is one)")
    _add_search_options(generate)
    generate.set_defaults(run=_generate)

    parity = commands.add_parser("parity", help="replay recorded runs of the published search")
    parity.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="holds policy/ guard/ mrm/ cases.json")
    parity.add_argument("--json", action="store_true", help="print one JSON line a case")
    parity.set_defaults(run=_parity)

    doctor = commands.add_parser("doctor", help="say what was built, what was found and which kernels will run")
    doctor.add_argument("--json", action="store_true", help="all of it, as JSON")
    doctor.set_defaults(run=_doctor)
    return parser


def _summary() -> str:
    return "Decoding that a multifurcation reward model steers away from harm."


def _add_search_options(parser: argparse.ArgumentParser) -> None:
    """One option for each field of `SearchConfig`, which checks them."""
    default = SearchConfig()
    group = parser.add_argument_group("search")
    group.add_argument("--width", type=int, default=default.width, help="beams kept (default %(default)s)")
    group.add_argument("--top-p", type=float, default=default.top_p, help="nucleus mass (default %(default)s)")
    group.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens, help="(default %(default)s)")
    group.add_argument("--min-new-tokens", type=int, default=default.min_new_tokens, help="(default %(default)s)")
    group.add_argument("--ranking", default=default.ranking, help="paper or released (default %(default)s)")
    group.add_argument("--eos-score", default=default.eos_score, help="parent or mrm (default %(default)s)")
    group.add_argument("--unseen-reward", type=float, default=default.unseen_reward, help="(default %(default)s)")
    group.add_argument(
        "--no-lm-head-bias", dest="lm_head_bias", action="store_false", help="leave out the trained bias of the MRM"
    )


def _search_config(options: argparse.Namespace) -> SearchConfig:
    return SearchConfig(**{name: getattr(options, name) for name in SearchConfig.__dataclass_fields__})


def _demo(options: argparse.Namespace) -> int:
    config = _search_config(options)
    from saffron.demo import run_demo

    return run_demo(config, options.count, options.seed, options.html, options.json)


def _generate(options: argparse.Namespace) -> int:
    config = _search_config(options)
    if options.prompts is not None and (options.trace or options.stream):
        raise ConfigError("--trace and --stream: work with --prompt, got --prompts")
    if options.stream and (options.trace or options.json or options.output):
        raise ConfigError("--stream: cannot be combined with --trace, --json or --output")
    work = _read_prompts(options)
    from saffron.search import SaffronSearch

    search = SaffronSearch(*_load(options), config)
    if options.stream:
        for piece in search.stream(options.prompt, options.prefill):
            print(piece, end="", flush=True)
        print()
        return 0
    with _progress(len(work)) as advance:
        for start in range(0, len(work), options.batch):
            batch = work[start : start + options.batch]
            prompts, prefills = [p for _, p, _ in batch], [f for _, _, f in batch]
            results = search.generate(prompts, prefills, trace=options.trace is not None)
            for (number, _, _), result in zip(batch, results, strict=True):
                _emit({"id": number, **result.to_json()}, options)
            advance(len(batch))
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
    for number, record in enumerate(_json_lines(options.prompts)):
        prompt, prefill = record.get("prompt"), record.get("prefill", options.prefill)
        if not isinstance(prompt, str) or not isinstance(prefill, str):
            raise ConfigError(f'{options.prompts}: line {number + 1} needs a text "prompt" and may have one "prefill"')
        work.append((number, prompt, prefill))
    done = _finished(options.output) if options.output else set()
    return [item for item in work if item not in done]


def _finished(output: Path) -> set[tuple[int, str, str]]:
    """What an earlier run wrote. A last line cut short by an interruption is taken off, so that it is run again."""
    if not output.exists():
        return set()
    text = output.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        output.write_text(whole)
    return {(r["id"], r["prompt"], r["prefill"]) for r in _json_lines(output) if {"id", "prompt", "prefill"} <= set(r)}


def _json_lines(file: Path) -> list[dict[str, Any]]:
    try:
        records = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from error
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON lines ({error})") from error
    if not all(isinstance(record, dict) for record in records):
        raise ConfigError(f"{file}: every line must be a JSON object")
    return records


def _load(options: argparse.Namespace) -> tuple[Any, Any]:
    from saffron.policy import Policy
    from saffron.reward_models import MultifurcationRewardModel
    from saffron.shipped import FOLDER

    policy = Policy.from_pretrained(options.policy or FOLDER / "policy", device=options.device)
    mrm = MultifurcationRewardModel.from_pretrained(
        options.mrm or FOLDER / "mrm", base=options.base, device=options.device
    )
    return policy, mrm


def _parity(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from saffron.parity import replay

    total = identical = 0
    for folder in options.folders:
        for report in replay(folder):
            total, identical = total + 1, identical + report.identical
            if options.json:
                print(json.dumps({"folder": str(folder), **asdict(report), "identical": report.identical}), flush=True)
            else:
                verdict = "identical" if report.identical else "DIFFERENT"
                print(
                    f"{folder} case {report.case}: {report.same_steps} of {report.steps} steps, {verdict}", flush=True
                )
    if not options.json:
        print(f"{identical} of {total} identical in every step and in the answer")
    return 0 if total and identical == total else 1


def _doctor(options: argparse.Namespace) -> int:
    from saffron_kernels import describe

    report = describe()
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    for name, version in {"python": report["python"], **report["versions"]}.items():
        print(f"{name:16} {version or 'not installed'}")
    print(f"{'native module':16} {report['native']} ({report['instruction_set']})")
    for device in ("cpu", "cuda"):
        print(f"\n{device}: {report['devices'].get(device, 'not found')}")
        for dtype, choices in report["backends"][device].items():
            _print_choices(dtype, choices)
    return 0


def _print_choices(dtype: str, choices: dict[str, dict[str, Any]]) -> None:
    """One line for the ops that share a choice, one for each backend that was not chosen."""
    kinds: dict[str, list[str]] = {}
    for op, choice in choices.items():
        kinds.setdefault(json.dumps(choice), []).append(op)
    for kind, ops in kinds.items():
        choice = json.loads(kind)
        which = "all ops" if len(kinds) == 1 else ", ".join(ops)
        print(f"  {dtype:9} {choice['used']}: {which}")
        for name, reason in choice["not"].items():
            print(f"            not {name}: {reason}")


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A progress bar on stderr for more than one prompt; yields what to call with the number done."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), disable=total < 2, transient=True) as progress:
        task = progress.add_task("searching", total=total)
        yield lambda count: progress.advance(task, count)


def _positive(text: str) -> int:
    value = int(text) if text.lstrip("-").isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return value


def _quiet_transformers() -> None:
    """Its progress bars and advice are not ours to show."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
