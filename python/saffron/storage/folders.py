"""Files that are whole or absent, folders that one process holds, and manifests that say what a run was begun with."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from saffron.errors import CheckpointError, ConfigError, outside
from saffron.storage.paths import check_output_file
from saffron.storage.text import read_bytes

PICTURE = b"saffron-kernels"  # the title of our pictures, by which they are known
_TEMPORARY = ".saffron-{}.tmp"  # of a process and thread: two may write the same file, and the last one stays


def write_atomically(file: Path, content: bytes) -> None:
    """Writes next to the file, then renames: readers see the old content or the new, never a part.

    Raises:
        ConfigError: the file cannot be written; what was there stays.
    """
    check_output_file("file", file)
    with outside(f"{file}: cannot be written"):
        file = Path(os.path.realpath(file))  # a link stays a link
        temporary = file.with_name(_TEMPORARY.format(f"{os.getpid()}-{threading.get_ident()}"))
        temporary.unlink(missing_ok=True)  # of a process that was killed and had this number
        try:
            with temporary.open("xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(file)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def check_replaceable(name: str, file: Path, mark: bytes, inputs: Iterable[Path | None] = ()) -> None:
    """`check_output_file`, and refuses a file that holds something else than what this program writes there.

    Args:
        mark: what each file of this kind begins with or holds.

    Raises:
        ConfigError: as `check_output_file`, or somebody else's content, which stays.
    """
    check_output_file(name, file, inputs)
    if file.exists():
        content = read_bytes(file)
        if content and mark not in content:
            raise ConfigError(f"{name}: {file}: holds something else, which is not overwritten; choose another file")


def write_replaceable(file: Path, content: bytes, mark: bytes) -> None:
    """`write_atomically` after `check_replaceable`."""
    assert mark in content
    check_replaceable("file", file, mark)
    write_atomically(file, content)


def check_vacant(folder: Path, names: Iterable[str]) -> None:
    """Raises `ConfigError` if one of the files that a new run will write there is there already: it is another's."""
    for name in names:
        if os.path.lexists(folder / name):
            raise ConfigError(f"{folder}: holds {name} of something else; choose another folder")


def write_json(file: Path, record: Any) -> None:
    write_atomically(file, (json.dumps(record, indent=2) + "\n").encode())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Makes the folder and holds it for one process; what an interrupted one left half written is removed.

    Raises:
        ConfigError: it cannot be made, or another process holds it.
    """
    with outside(f"{folder}: cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
        check_output_file(f"{folder}", folder / ".lock")  # to open a pipe would wait for its reader
        lock = (folder / ".lock").open("a")  # whatever it holds, and wherever it leads, stays
    with lock:  # the system gives it back however the process ends
        lock_or_refuse(lock.fileno(), folder)
        with outside(f"{folder}: cannot be written"):
            for left in folder.glob(_TEMPORARY.format("*")):
                left.unlink(missing_ok=True)
        yield


def lock_or_refuse(descriptor: int, path: Path) -> None:
    """Holds an open file for this process. Raises `ConfigError` if another one holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(f"{path}: another process is writing there") from error
    except OSError as error:  # some network file systems have no locks
        raise ConfigError(f"{path}: cannot be locked ({error.strerror})") from error


def expect_same(place: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises `ConfigError` that names what differs between two (nested) records of settings."""
    old, new = dict(_flat(there)), dict(_flat(here))
    names = [name for name in [*old, *(n for n in new if n not in old)] if old.get(name) != new.get(name)]
    if names:
        found = "; ".join(f"{name} was {old.get(name)!r} and is now {new.get(name)!r}" for name in names)
        raise ConfigError(f"{place}: holds a run that was begun otherwise ({found}); choose another place")


def _flat(record: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, value


def checkpoint_fingerprint(path: str | Path, commit: str | None = None) -> str:
    """SHA-256 of a checkpoint's configuration, weights and tokenizer; of a hub checkpoint, its commit.

    Raises:
        CheckpointError: a file that cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        return f"{path}@{commit}"
    digest = hashlib.sha256()
    with outside(f"{folder}: cannot be read", CheckpointError):
        files = (f for f in folder.iterdir() if f.suffix in (".json", ".safetensors", ".bin", ".pt", ".jinja"))
        for file in sorted(f for f in files if f.is_file()):
            digest.update(file.name.encode(errors="surrogateescape"))
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
