"""Files that are whole or absent, whatever ends the process that writes them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saffron.errors import CheckpointError, ConfigError


def write_atomically(file: Path, content: bytes) -> None:
    """Writes beside the file, then renames: readers see the old content or the new, never a part."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def write_json(file: Path, record: Any) -> None:
    write_atomically(file, (json.dumps(record, indent=2) + "\n").encode())


def read_json(file: Path) -> dict[str, Any]:
    """Raises `CheckpointError` where there is no such file or it holds no JSON object."""
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error
    if not isinstance(record, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return record


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it for one process; what an interrupted one left half written is removed.

    Raises:
        ConfigError: another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made ({error})") from error
    with (folder / ".lock").open("w") as lock:  # the system gives it back however the process ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"{folder}: another process is writing there") from error
        for left in folder.glob(".*.tmp"):
            left.unlink(missing_ok=True)
        yield


def expect_same(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises `ConfigError` that names what differs between two (nested) records of settings."""
    old, new = dict(_flat(there)), dict(_flat(here))
    names = [name for name in [*old, *(n for n in new if n not in old)] if old.get(name) != new.get(name)]
    if names:
        found = "; ".join(f"{name} was {old.get(name)!r} and is now {new.get(name)!r}" for name in names)
        raise ConfigError(f"{folder}: holds a run that was begun otherwise ({found}); choose another folder")


def _flat(record: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, value


def checkpoint_fingerprint(path: str | Path, commit: str | None = None) -> str:
    """SHA-256 of a checkpoint's configuration, weights and tokenizer; of a hub checkpoint, its commit."""
    folder = Path(path)
    if not folder.is_dir():
        return f"{path}@{commit}"
    digest = hashlib.sha256()
    for file in sorted(f for f in folder.iterdir() if f.suffix in (".json", ".safetensors", ".bin", ".pt", ".jinja")):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
