"""`saffron report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from saffron.cli.options import Commands


def add(commands: Commands) -> None:
    report = commands.add_parser(
        "report",
        help="tables and figures of what `saffron eval` found",
        description="Attack success over compute, at matched compute, by exploration and by width; what the answers "
        "are like. Writes report.md, report.html and figures/.",
    )
    report.add_argument("results", type=Path, nargs="+", help="files that `saffron eval` wrote")
    report.add_argument(
        "--output", type=Path, default=Path("report"), metavar="DIR", help="folder to write (%(default)s)"
    )
    report.add_argument("--judge", default="oracle", help="whose verdicts count (default %(default)s)")
    report.add_argument(
        "--reference", metavar="METHOD", help="compare at the compute of this one (default: best-of-n with n=32)"
    )
    report.add_argument(
        "--limit", type=float, metavar="TFLOP", help="of the scaling efficiency (default: 1.5 times the dearest run)"
    )
    report.add_argument("--format", nargs="+", default=["svg", "png"], help="of the figures: svg, png, pdf (svg png)")
    report.add_argument(
        "--scatter", type=Path, metavar="FILE", help="picture of predicted against true rewards to include"
    )
    report.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from saffron.evaluation.report import ReportOptions, write_report
    from saffron.evaluation.store import read_results

    chosen = ReportOptions(
        judge=options.judge,
        reference=options.reference,
        limit=options.limit * 1e12 if options.limit else None,
        formats=tuple(options.format),
        scatter=options.scatter,
    )
    for file in write_report(read_results(options.results), options.output, chosen):
        print(file)
    return 0
