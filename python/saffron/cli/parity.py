"""`saffron parity`."""

from __future__ import annotations

import argparse
import json

from saffron.cli.options import Commands, path


def add(commands: Commands) -> None:
    parity = commands.add_parser("parity", help="replay recorded runs of the published search")
    parity.add_argument("folders", nargs="+", type=path, metavar="DIR", help="holds policy/ guard/ mrm/ cases.json")
    parity.add_argument("--json", action="store_true", help="print one JSON line per case")
    parity.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
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
