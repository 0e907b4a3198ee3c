"""The command `saffron`. Errors a user can cause are one line on stderr, exit status 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from saffron import __version__
from saffron.cli import (
    annotate,
    demo,
    doctor,
    eval_mrm,
    evaluate,
    generate,
    parity,
    report,
    reproduce,
    stepmix,
    train_mrm,
)
from saffron.errors import SaffronError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    options = parser().parse_args(arguments)
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


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    made = _Parser(prog="saffron", description=f"{_summary()} Try `saffron demo`.")
    made.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = made.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (
        demo,
        generate,
        parity,
        doctor,
        annotate,
        train_mrm,
        eval_mrm,
        evaluate,
        report,
        reproduce,
        stepmix,
    ):
        command.add(commands)
    return made


def _summary() -> str:
    return "Decoding that a multifurcation reward model steers away from harm."


def _quiet_transformers() -> None:
    """Its progress bars and advice are not ours to show."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
