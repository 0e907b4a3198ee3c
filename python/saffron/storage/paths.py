"""Paths that a person gave: what is wrong with one is said before anything slow begins."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

from saffron.errors import CheckpointError, ConfigError, outside

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def kind_of(mode: int) -> str | None:
    """What a path is, None for an ordinary file; `mode` as in `os.stat_result`."""
    return next((name for is_kind, name in _KINDS if is_kind(mode)), None)


def check_output_file(name: str, file: Path, inputs: Iterable[Path | None] = ()) -> None:
    """Refuses a file that could not be written, without touching it.

    Args:
        name: of the option.
        inputs: files that are read; writing to one of them would destroy it.

    Raises:
        ConfigError: a folder, device or pipe; no such folder; no permission; one of the inputs.
    """
    with outside(f"{name}: {file}: cannot be written"):
        try:
            there = os.stat(file)
        except FileNotFoundError:
            there = None
        if there is not None:
            if found := kind_of(there.st_mode):
                raise ConfigError(f"{name}: {file}: is {found}, expected an ordinary file")
            if not os.access(file, os.W_OK):
                raise PermissionError(13, os.strerror(13))
        for given in inputs:
            if there is not None and given is not None and os.path.exists(given) and os.path.samefile(file, given):
                raise ConfigError(f"{name}: {file}: is what is read; choose another file")
        _check_folder(Path(os.path.realpath(file)).parent)


def check_output_folder(name: str, folder: Path) -> None:
    """Refuses a folder that could be neither used nor made. Raises `ConfigError`."""
    with outside(f"{name}: {folder}: cannot be made"):
        above = Path(os.path.realpath(folder))
        while not above.exists() and above != above.parent:
            above = above.parent
        _check_folder(above)


def _check_folder(folder: Path) -> None:
    if not stat.S_ISDIR(os.stat(folder).st_mode):
        raise NotADirectoryError(20, f"{folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(13, os.strerror(13))


def check_checkpoint(name: str, given: str | Path | None) -> None:
    """Refuses what looks like a path and is none, before a hub is asked for it.

    Args:
        name: of the option.
        given: a folder, or the name of a checkpoint on a hub; None passes.

    Raises:
        CheckpointError: nothing is there.
    """
    if given is None:
        return
    text = os.fspath(given)
    with outside(f"{name}: {text!r}: no checkpoint there", CheckpointError):
        if os.path.isdir(text):
            return
        if os.path.lexists(text):
            raise CheckpointError(f"{name}: {text}: expected a folder, this is a file")
        is_local = "/" in text and os.path.isdir(text.partition("/")[0])  # "models/polcy" next to "models/policy"
        if is_local or not _HUB_NAME.fullmatch(text):
            raise CheckpointError(f"{name}: {text!r}: there is no such folder, and it is no name of a hub")
