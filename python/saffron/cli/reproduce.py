"""`saffron reproduce`."""

from __future__ import annotations

import argparse
from pathlib import Path

from saffron.cli.options import Commands, add_worker_options, workers


def add(commands: Commands) -> None:
    reproduce = commands.add_parser(
        "reproduce",
        help="run everything that docs/results.md shows",
        description="Runs every method of docs/results.md on the bundled models and writes that page and its figures. "
        "Run it again after an interruption: what is there is kept.",
    )
    reproduce.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for results, page and figures"
    )
    reproduce.add_argument("--docs", type=Path, metavar="DIR", help="also put results.md and figures/ there")
    reproduce.add_argument("--quick", action="store_true", help="a few prompts: whether it runs, not what comes out")
    add_worker_options(reproduce)
    reproduce.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from saffron.evaluation.figures import pyplot
    from saffron.evaluation.reproduce import FULL, QUICK
    from saffron.evaluation.write_up import reproduce

    pyplot()  # whatever is missing is said now and not at the end
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        bars: dict[str, int] = {}

        def progress(title: str, done: int, total: int) -> None:
            if title not in bars:
                bars[title] = bar.add_task(title, total=total)
            bar.update(bars[title], completed=done, total=total)  # type: ignore[arg-type]

        scale = QUICK if options.quick else FULL
        page = reproduce(scale, options.out, options.docs, workers(options), progress)
    print(page)
    return 0
