"""`saffron reproduce`: the door to the package `reproduce` of a clone, which is not installed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from saffron.cli.options import Commands, add_worker_options, path, workers
from saffron.cli.progress import progress
from saffron.errors import ConfigError
from saffron.storage.paths import check_output_folder


def add(commands: Commands) -> None:
    reproduce = commands.add_parser(
        "reproduce",
        help="run everything that docs/results.md shows (from a clone of the repository)",
        description="Runs every method of docs/results.md on the bundled models and writes that page and its figures. "
        "Run it again after an interruption: what is there is kept. It needs a clone of the repository.",
    )
    reproduce.add_argument(
        "--output", type=path, required=True, metavar="DIR", help="folder for results, page and figures"
    )
    reproduce.add_argument("--docs", type=path, metavar="DIR", help="also put results.md and figures/ there")
    reproduce.add_argument("--quick", action="store_true", help="a few prompts: whether it runs, not what comes out")
    add_worker_options(reproduce)
    reproduce.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    _find()
    for name in ("output", "docs"):
        if folder := getattr(options, name):
            check_output_folder(f"--{name}", folder)
    from reproduce.runs import FULL, QUICK
    from reproduce.write_up import reproduce
    from saffron.evaluation.plots import pyplot

    pyplot()  # a missing library is reported now and not at the end
    with progress("", kept=True) as show:
        page = reproduce(
            QUICK if options.quick else FULL,
            options.output,
            options.docs,
            workers(options),
            lambda title, done, total: show(done, total, title=title),
        )
    print(page)
    return 0


def _find() -> None:
    """Makes `reproduce` importable: it lies next to the package in a clone, or in the folder of a clone one stands in.

    Raises:
        ConfigError: in neither.
    """
    for root in (Path(__file__).resolve().parents[3], Path.cwd()):
        if (root / "reproduce" / "write_up.py").is_file():
            sys.path.insert(0, str(root))
            return
    raise ConfigError("reproduce: works from a clone of the repository only: go to its folder and run it there")
