"""`saffron demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from saffron.cli.options import Commands, add_search_options, path, positive, search_config, seed
from saffron.storage.folders import check_replaceable


def add(commands: Commands) -> None:
    demo = commands.add_parser("demo", help="attack the bundled model with and without the defence, and draw a search")
    demo.add_argument("--count", type=positive, default=8, metavar="N", help="attacked prompts")
    demo.add_argument("--seed", type=seed, default=0, metavar="N", help="which held-out prompts")
    demo.add_argument("--html", type=path, default="saffron-demo.html", metavar="FILE", help="page to write")
    demo.add_argument("--json", action="store_true", help="print JSON instead of the table")
    add_search_options(demo)
    demo.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    config = search_config(options)
    from saffron.search.page import PAGE
    from saffron.world.demo import run_demo

    check_replaceable("--html", Path(options.html), PAGE)

    return run_demo(config, options.count, options.seed, options.html, options.json)
