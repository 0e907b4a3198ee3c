"""State of a controller as one .npz file, written so that a reader finds the old one or the new one.

Every write is a revision with a random name, and a file names the revisions that its state contains. So a writer knows
what the file is to it: what it goes on from (replaced), a later state that contains its own (joined), or another one
(refused).
"""

from __future__ import annotations

import io
import json
import os
import threading
import uuid
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from saffron.errors import CheckpointError, ConfigError, outside, shown
from saffron.storage.folders import write_replaceable

SCHEMA = 1
REMEMBERED = 1000  # revisions that a file names; a writer that missed more is refused
Settings = dict[str, Any]
Arrays = dict[str, np.ndarray]


class Shared(Protocol):
    """A state that several processes may save to one file."""

    def _saved(self) -> tuple[Settings, Arrays, bool]:
        """What is to be written, and whether anything was counted since the beginning; notes that a file has it."""

    def _unsaved(self) -> None:
        """Takes the note back."""

    def _joined(self, settings: Settings, arrays: Arrays) -> None:
        """Adds what was counted here since the last load or save to the state of a file. All of it, or an error."""


class Lineage:
    """Which revisions a state in memory contains, the last one first, each with whether anything was counted on it."""

    def __init__(self, revisions: Sequence[tuple[str, bool]] = ()) -> None:
        self.revisions = list(revisions)[:REMEMBERED]
        self._writing = threading.Lock()  # of the threads of this process

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Lineage:
        """That of a file. Files without one, of earlier versions, are a revision named after what they hold.

        Raises:
            ValueError: it is none.
        """
        stored = settings.get("revisions")
        if stored is None:
            return cls([(f"{zlib.crc32(json.dumps(settings).encode()):08x}", True)])
        return cls([(str(name), bool(counted)) for name, counted in stored])

    def save(self, path: Path, shared: Shared) -> None:
        """Writes a state.

        Raises:
            CheckpointError: the file holds another state, which does not contain this one's last revision, or which
                cannot be joined.
        """
        with self._writing, _held(path):
            found = self._found(path)
            if found is not None:
                theirs = Lineage.of(found[0])
                if self._names() & {theirs.revisions[0][0]}:
                    pass  # what it goes on from
                elif self.revisions[0][0] in theirs._names():
                    try:
                        shared._joined(*found)
                    except (IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
                        raise CheckpointError(
                            f"{path}: cannot be joined with what others saved there ({error})"
                        ) from error
                    self.revisions = theirs.revisions
                else:
                    raise CheckpointError(
                        f"{path}: got a state that others saved there and that does not contain this one's; expected "
                        "the one that this was loaded from or saved to (load it again, or save to another file)"
                    )
            settings, arrays, counted = shared._saved()
            revisions = Lineage([(uuid.uuid4().hex[:16], counted), *self.revisions]).revisions
            try:
                write(path, {**settings, "revisions": revisions}, arrays)
            except BaseException:
                shared._unsaved()
                raise
            self.revisions = revisions

    def _names(self) -> set[str]:
        return {name for name, _ in self.revisions}

    def _found(self, path: Path) -> tuple[Settings, Arrays] | None:
        """What lies there; None: nothing, nothing that can be read, or this state was never in a file, and replaces
        it."""
        if not self.revisions:
            return None
        try:
            found = read(path)
            return found if Lineage.of(found[0]).revisions else None
        except (CheckpointError, TypeError, ValueError):
            return None


def common(lineages: Sequence[Lineage]) -> bool:
    """Whether some of them share a revision with counts, which would be added more than once."""
    seen: set[str] = set()
    for lineage in lineages:
        counted = {name for name, counted in lineage.revisions if counted}
        if seen & counted:
            return True
        seen |= counted
    return False


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Keeps other writers of a file out while it is read, changed and replaced; the lock is on the file itself."""
    import fcntl

    while True:
        try:
            lock = os.open(path, os.O_RDWR)
        except OSError:  # there is none yet, or `write` says what is wrong
            yield
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                yield
                return
        finally:
            os.close(lock)


def write(path: Path, settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a state; readers see the old one or the new one, and something else that lies there stays.

    Raises:
        ConfigError: the file cannot be written there, or holds something else.
        CheckpointError: it holds a state of another version or of something else.
    """
    _check_replaceable(path, settings)
    content = io.BytesIO()
    np.savez(content, schema=np.array(SCHEMA), settings=np.array(json.dumps(settings)), **arrays)  # type: ignore[arg-type]
    write_replaceable(path, content.getvalue(), b"schema.npy")


def _check_replaceable(path: Path, settings: Mapping[str, Any]) -> None:
    """Refuses what somebody could still read; a damaged state can be replaced."""
    try:
        with np.load(path, allow_pickle=False) as file:
            schema = file["schema"]
    except Exception:  # NumPy, zipfile and zlib raise types of their own; `write_replaceable` has the last word
        return
    if schema.shape or schema != SCHEMA:
        raise CheckpointError(f"{path}: got version {shown(schema)}, expected {SCHEMA}, or another file")
    with suppress(CheckpointError):
        if read(path)[0].get("kind") != settings.get("kind"):
            raise ConfigError(f"{path}: holds a state of something else, which is not overwritten; choose another file")


def read(path: Path) -> tuple[Settings, Arrays]:
    """Settings and arrays.

    Raises:
        CheckpointError: the file is missing, damaged, or of another version.
    """
    with outside(f"{path}: not a controller's state", CheckpointError):
        with path.open("rb") as opened:
            if opened.read(2) != b"PK":  # of which NumPy says that it is a pickle, and how to load that
                raise ValueError("File is no .npz file")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        schema = int(arrays.pop("schema"))
        settings = json.loads(str(arrays.pop("settings")))
        if not isinstance(settings, dict):
            raise TypeError(f"settings: got {settings!r}")
    if schema != SCHEMA:
        raise CheckpointError(f"{path}: got version {schema}, expected {SCHEMA}")
    return settings, arrays
