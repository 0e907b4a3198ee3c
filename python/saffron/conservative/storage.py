"""State of a controller as one .npz file, written so that a reader finds the old one or the new one."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from saffron.errors import CheckpointError, outside

SCHEMA = 1


def write(path: Path, settings: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes to a temporary file in the same folder, flushes it to the disk, and renames it.

    Raises:
        ConfigError: the file cannot be written there.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    with outside(f"{path}: cannot be written"):
        try:
            with draft.open("wb") as file:
                np.savez(file, **{**arrays, "schema": np.array(SCHEMA), "settings": np.array(json.dumps(settings))})  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the renaming itself
        finally:
            os.close(folder)


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Settings and arrays.

    Raises:
        CheckpointError: the file is missing, damaged, or of another version.
    """
    with outside(f"{path}: not a controller's state", CheckpointError):
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        schema = int(arrays.pop("schema"))
        settings = json.loads(str(arrays.pop("settings")))
    if schema != SCHEMA:
        raise CheckpointError(f"{path}: got version {schema}, expected {SCHEMA}")
    return settings, arrays
