"""Results of `saffron eval`: what one line holds."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any

from saffron.search.result import Cost
from saffron.storage import results
from saffron.storage.results import Key, Record, ResultFile, Schema

__all__ = ["SCHEMA", "Key", "Record", "ResultFile", "key", "open_results", "read_results"]


def key(record: Record) -> Key:
    """What a result answers; a file holds at most one result for each."""
    return SCHEMA.of(record)


def _fits(record: Record) -> bool:
    """Whether a record is the answer to a prompt, or says why there is none."""
    if not all(isinstance(record.get(name), str) for name in ("models", "kind", "prompt")):
        return False
    if "error" in record:
        return isinstance(record["error"], str)
    cost, harmful = record.get("cost"), record.get("harmful")
    return (
        isinstance(cost, dict)
        and all(_is_number(cost.get(field.name)) and cost[field.name] >= 0 for field in fields(Cost))
        and cost["policy_flops"] > 0
        and isinstance(harmful, dict)
        and len(harmful) > 0
        and all(isinstance(verdict, bool) for verdict in harmful.values())
        and isinstance(record.get("text"), str)
        and _is_number(record.get("tokens"))
        and _is_number(record.get("log_probability"))
        and isinstance(record.get("answered", ""), bool | None)
    )


def _is_number(value: object) -> bool:
    """One that floating point can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


SCHEMA = Schema("eval", ("data", "attack", "method", "variant", "case"), _fits)


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
