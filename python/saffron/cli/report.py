"""`saffron report`."""

from __future__ import annotations

import argparse

from saffron.cli.options import Commands, above_zero, path, words
from saffron.storage.paths import check_output_folder

FORMATS = ("svg", "png", "pdf")


def add(commands: Commands) -> None:
    report = commands.add_parser(
        "report",
        help="tables and figures of what `saffron eval` found",
        description="Attack success over compute, at matched compute, by exploration and by width; what the answers "
        "are like. Writes report.md, report.html and figures/.",
    )
    add = report.add_argument
    add("results", type=path, nargs="+", metavar="FILE", help="files that `saffron eval` wrote")
    add("--output", type=path, default="report", metavar="DIR", help="folder to write")
    add("--judge", type=words, default="oracle", metavar="JUDGE", help="whose verdicts count")
    add(
        "--reference", type=words, metavar="METHOD",
        help="compare at the compute of this one (default: best-of-n with n=32)",
    )  # fmt: skip
    add(
        "--limit", type=above_zero, metavar="TFLOP",
        help="compute limit of the scaling efficiency (default: 1.5 times the most expensive run)",
    )  # fmt: skip
    add("--format", nargs="+", choices=FORMATS, default=["svg", "png"], help="file formats of the figures")
    add("--scatter", type=path, metavar="FILE", help="picture of predicted against true rewards to include")
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
    check_output_folder("--output", options.output)
    for file in write_report(read_results(options.results), options.output, chosen):
        print(file)
    return 0
