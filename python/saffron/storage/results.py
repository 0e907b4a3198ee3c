"""Results as JSON lines: first a manifest, then one record per line. The one writer of all such files.

What was written is kept whatever ends the process, and is not run again. What is not ours is never changed: only a last
line that begins like one of our records, and that an interruption left unfinished, is taken off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saffron.errors import ConfigError, outside, reason
from saffron.storage.folders import expect_same, lock_or_refuse
from saffron.storage.paths import check_output_file, kind_of
from saffron.storage.text import parse_json, read_bytes

VERSION = 1
Record = dict[str, Any]
Key = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Schema:
    """What a file of results holds.

    Attributes:
        kind: the command that writes it.
        key: fields that tell results apart, all text; a file holds at most one result for each. The first of them is
            the first of a record.
        fits: whether the other fields of a record are as they should be.
    """

    kind: str
    key: tuple[str, ...]
    fits: Callable[[Record], bool]

    def of(self, record: Record) -> Key:
        """What a record is the result of."""
        return tuple(record[name] for name in self.key)

    def manifest(self, settings: dict[str, Any]) -> bytes:
        """The first line."""
        return _line({"saffron": self.kind, "version": VERSION, "settings": settings})

    @property
    def begin(self) -> bytes:
        """How every record begins."""
        return f'{{"{self.key[0]}": "'.encode()

    def parse(self, file: Path, content: bytes) -> tuple[dict[str, Any] | None, list[Record]]:
        """The manifest, if there is one, and the records of whole lines.

        Raises:
            ConfigError: a line that is neither.
        """
        manifest, records = None, []
        for number, line in enumerate(content.split(b"\n")[:-1], 1):
            value = parse_json(line, f"{file}: not JSON lines: line {number}")
            if number == 1 and isinstance(value, dict) and "saffron" in value:
                manifest = value
                if (value["saffron"], value.get("version")) != (self.kind, VERSION):
                    raise ConfigError(
                        f"{file}: written by `saffron {value['saffron']}`, version {value.get('version')}, "
                        f"expected `saffron {self.kind}`, version {VERSION}"
                    )
            elif self._fits(value):
                records.append(value)
            else:
                raise ConfigError(f"{file}: line {number} is not a result of `saffron {self.kind}`")
        return manifest, records

    def _fits(self, value: Any) -> bool:
        keyed = isinstance(value, dict) and all(isinstance(value.get(name), str) for name in self.key)
        return keyed and self.fits(value)


class ResultFile:
    """A file of results, held by one process. Use `open_results`.

    Attributes:
        records: all there are.
        done: what they are the results of.
    """

    def __init__(self, file: Path, descriptor: int, schema: Schema, settings: dict[str, Any]) -> None:
        self.file, self.schema, self._descriptor = file, schema, descriptor
        content = _read(descriptor)
        manifest, tail = schema.manifest(settings), content[content.rfind(b"\n") + 1 :]
        begin = manifest if len(tail) == len(content) else schema.begin
        if not (tail.startswith(begin) or begin.startswith(tail)):
            raise ConfigError(f"{file}: holds something else (its last line); choose another file")
        there, self.records = schema.parse(file, content)
        if there is None and len(tail) != len(content):
            raise ConfigError(f"{file}: holds something else (no manifest); choose another file")
        if there is not None and self.records:  # a manifest alone binds nobody
            expect_same(file, there["settings"] if isinstance(there.get("settings"), dict) else {}, _plain(settings))
        self.done = {schema.of(record) for record in self.records}
        if len(self.done) < len(self.records):
            raise ConfigError(f"{file}: holds a result twice")
        with outside(f"{file}: cannot be written"):
            os.ftruncate(descriptor, len(content) - len(tail) if self.records else 0)
        if not self.records:
            self._write(manifest)

    def append(self, records: Iterable[Record]) -> None:
        """Adds those results that are not there yet; returns when they are on the disk.

        Raises:
            ConfigError: they cannot be written (a full disk); the file holds what it held before.
        """
        new = {self.schema.of(record): record for record in records}
        new = {key: record for key, record in new.items() if key not in self.done}
        self._write(b"".join(map(_line, new.values())))
        self.records += new.values()
        self.done.update(new)

    def _write(self, lines: bytes) -> None:
        size = os.fstat(self._descriptor).st_size
        try:
            while lines:
                lines = lines[os.write(self._descriptor, lines) :]
            os.fsync(self._descriptor)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._descriptor, size)
            raise ConfigError(f"{self.file}: cannot be written ({reason(error)})") from error


@contextmanager
def open_results(
    file: Path, schema: Schema, settings: dict[str, Any], inputs: Iterable[Path | None] = ()
) -> Iterator[ResultFile]:
    """Opens results to add to them, or begins a file.

    Args:
        settings: what decides the results; a file that was begun with other settings is refused.
        inputs: files that are read, none of which may be written to.

    Raises:
        ConfigError: it cannot be written, another process writes to it, it holds something else, or results of other
            settings.
    """
    with outside(f"{file}: cannot be written"):
        file.parent.mkdir(parents=True, exist_ok=True)
    check_output_file("output", file, inputs)
    with outside(f"{file}: cannot be written"):
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        descriptor = os.open(file, flags, 0o666)
    try:
        if found := kind_of(os.fstat(descriptor).st_mode):  # it may have changed since it was looked at
            raise ConfigError(f"{file}: is {found}, expected an ordinary file")
        lock_or_refuse(descriptor, file)
        yield ResultFile(file, descriptor, schema, settings)
    finally:
        os.close(descriptor)


def read_results(files: Iterable[Path], schema: Schema) -> list[Record]:
    """All results of files. A last line that was cut short is left out.

    Raises:
        ConfigError: a file that cannot be read or holds something else.
    """
    records = []
    for file in files:
        records += schema.parse(file, read_bytes(file))[1]
    return records


def _read(descriptor: int) -> bytes:
    with os.fdopen(os.dup(descriptor), "rb") as stream:
        stream.seek(0)
        return stream.read()


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record) + "\n").encode()


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back: tuples are lists."""
    return json.loads(json.dumps(settings))
