"""`saffron stepmix`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from saffron.cli.options import Commands, add_worker_options, positive, seed, workers
from saffron.storage.paths import check_output_folder


def add(commands: Commands) -> None:
    stepmix = commands.add_parser(
        "stepmix",
        help="conservative exploration: StepMix, EpsMix and others on random MDPs",
        description="Runs the experiment of the StepMix paper (random MDPs of 5 states, 5 actions and 3 steps) and "
        "sweeps of the interval scale, the floor and the offline log. Writes records.jsonl, results-conservative.md "
        "and figures/. Run it again after an interruption: finished jobs are kept.",
    )
    stepmix.add_argument("--output", type=Path, default=Path("stepmix"), metavar="DIR", help="folder to write")
    stepmix.add_argument("--docs", type=Path, metavar="DIR", help="also write the page and its figures there")
    stepmix.add_argument(
        "--experiment",
        nargs="+",
        choices=["paper", "proof", "scale", "floor", "offline"],
        metavar="NAME",
        help="only these, on a page that replaces the whole one: paper, proof, scale, floor, offline (default: all)",
    )
    stepmix.add_argument(
        "--trials", type=positive, default=20, metavar="N", help="MDPs of each setting (default %(default)s)"
    )
    stepmix.add_argument(
        "--episodes", type=positive, default=40_000, metavar="N", help="of each trial (default %(default)s)"
    )
    stepmix.add_argument("--seed", type=seed, default=0, metavar="N", help="of MDPs and episodes (default %(default)s)")
    stepmix.add_argument("--json", action="store_true", help="print the records as JSON lines instead of the tables")
    stepmix.add_argument(
        "--quick",
        action="store_true",
        help="does it run? 2 trials of 400 episodes, whatever --trials and --episodes say",
    )
    add_worker_options(stepmix)
    stepmix.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from saffron.conservative import experiment, report

    for option in ("output", "docs"):
        if folder := getattr(options, option):
            check_output_folder(f"--{option}", folder)
            report.check(folder)
    report.pyplot()  # whatever is missing is said now and not at the end
    jobs = [replace(job, seed=options.seed) for job in experiment.jobs(options.trials, options.episodes, options.quick)]
    if options.experiment:
        jobs = [job for job in jobs if job.experiment in options.experiment]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("jobs", total=len(jobs))
        records = experiment.run(
            jobs,
            options.output / "records.jsonl",
            workers(options).run,
            lambda done, total: bar.update(task, completed=done, total=total),
        )
    page = report.write(records, options.output)
    if options.docs:
        report.write(records, options.docs)
    if options.json:
        for record in records:
            print(json.dumps(record))
    else:
        print(page)
    return 0
