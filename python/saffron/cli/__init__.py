"""The command `saffron`. Errors that come from outside are one line on stderr, exit status 2."""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NoReturn

from saffron import __version__
from saffron.cli import (
    annotate,
    collect,
    demo,
    doctor,
    eval_mrm,
    evaluate,
    generate,
    parity,
    report,
    reproduce,
    serve,
    stepmix,
    train_mrm,
)
from saffron.errors import SaffronError, reason

_LONGEST = 1000  # characters of a message; a path may have thousands
_NEGATIVE_NUMBER = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|^-inf$|^-nan$")


class _Formatter(argparse.HelpFormatter):
    """Shows the default of every option that has one and does not speak of it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = isinstance(action.default, bool) or action.default in (None, "", [], argparse.SUPPRESS)
        if silent or "default" in text or not action.option_strings:
            return text
        if isinstance(action.default, list | tuple):
            return f"{text} (default {' '.join(map(str, action.default))})"
        return f"{text} (default %(default)s)"


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=_Formatter, **options)
        self._negative_number_matcher = _NEGATIVE_NUMBER  # argparse takes -1e3 for an option

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {_one_line(message)}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be Unicode
            stream.reconfigure(errors="backslashreplace")
    options = parser().parse_args(arguments)
    try:
        from saffron.quiet import quiet_transformers

        quiet_transformers()
        status = options.run(options)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("saffron: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        with suppress(OSError):
            print(f"saffron: {_one_line(message)}", file=sys.stderr)
        return 2


def _message(error: Exception) -> str | None:
    """What a person is told of an error that came from outside; None: it is a fault of this program."""
    kernels = sys.modules.get("saffron_kernels")
    if isinstance(error, SaffronError) or (kernels is not None and isinstance(error, kernels.CacheFullError)):
        return str(error)
    if isinstance(error, OSError):
        if error.filename is None and error.errno is not None:
            with suppress(OSError, ValueError):  # what waits for a full disk would be tried again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return f"standard output: cannot be written ({reason(error)})"
        return f"{error.filename}: {reason(error)}" if error.filename else reason(error)
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, RuntimeError) and re.search("not enough memory|can't allocate|out of memory", str(error)):
        return f"not enough memory ({reason(error)})"
    return None


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    made = _Parser(prog="saffron", description=f"{_summary()} Try `saffron demo`.")
    made.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = made.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (
        demo,
        generate,
        serve,
        parity,
        doctor,
        collect,
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


def _one_line(text: str) -> str:
    """Short, without line breaks and other characters that move a terminal's cursor."""
    text = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    return "".join(c if c.isprintable() else " " if c.isspace() else ascii(c)[1:-1] for c in text)
