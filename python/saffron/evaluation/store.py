"""Results of `saffron eval`: what one line holds."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from saffron.storage import results
from saffron.storage.results import Key, Record, ResultFile, Schema

SCHEMA = Schema("eval", ("data", "attack", "method", "variant", "case"), ("models", "harmful", "cost"))

__all__ = ["SCHEMA", "Key", "Record", "ResultFile", "key", "open_results", "read_results"]


def key(record: Record) -> Key:
    """What a result answers; a file holds at most one result for each."""
    return SCHEMA.of(record)


def read_results(files: Iterable[Path]) -> list[Record]:
    """All results of files. A last line that was cut short is left out.

    Raises:
        ConfigError: a file that cannot be read or holds something else.
    """
    return results.read_results(files, SCHEMA)


def open_results(
    file: Path, settings: dict[str, Any] | None = None, inputs: Iterable[Path | None] = ()
) -> AbstractContextManager[ResultFile]:
    """Opens results to add to them; arguments and errors as of `saffron.storage.results.open_results`."""
    return results.open_results(file, SCHEMA, settings or {}, inputs)
