"""`saffron demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from saffron.cli.options import Commands, add_search_options, positive, search_config


def add(commands: Commands) -> None:
    demo = commands.add_parser("demo", help="attack the bundled model with and without the defence, and draw a search")
    demo.add_argument("--count", type=positive, default=8, help="attacked prompts (default %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="which held-out prompts (default %(default)s)")
    demo.add_argument("--html", type=Path, default=Path("saffron-demo.html"), help="page to write (%(default)s)")
    demo.add_argument("--json", action="store_true", help="print JSON instead of the table")
    add_search_options(demo)
    demo.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    config = search_config(options)
    from saffron.world.demo import run_demo

    return run_demo(config, options.count, options.seed, options.html, options.json)
