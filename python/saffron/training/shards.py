"""Token-level rewards on disk: Parquet shards, one row a conversation, and a manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from saffron.errors import CheckpointError, MissingDependencyError
from saffron.training.files import read_json
from saffron.training.layout import Layout

FORMAT = "saffron token rewards, version 1"
MANIFEST = "manifest.json"


@dataclass(slots=True)
class Rewarded:
    """One conversation with its rewards.

    Attributes:
        input_ids: `[tokens]` int64, as the MRM reads it.
        roles: `[tokens]` int8 (see `saffron.training.layout`).
        rewards: `[tokens]` float32; `rewards[j]` is the PRM's of the prefix that ends with token `j`, else NaN.
    """

    input_ids: np.ndarray
    roles: np.ndarray
    rewards: np.ndarray


@dataclass(frozen=True, slots=True)
class RewardData:
    """A whole annotated corpus."""

    manifest: dict[str, Any]
    rows: list[Rewarded] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.parquet"


def encode_shard(first: int, layouts: Sequence[Layout], rewards: Sequence[Sequence[float]]) -> bytes:
    """Rows of a shard whose first conversation has the number `first`, as the bytes of a Parquet file."""
    pyarrow = _pyarrow()
    columns: list[list[float | None]] = []
    for layout, values in zip(layouts, rewards, strict=True):
        column: list[float | None] = [None] * len(layout.input_ids)
        for index, value in zip(layout.rewarded, values, strict=True):
            column[index] = value
        columns.append(column)
    table = pyarrow.table(
        {
            "conversation": pyarrow.array(range(first, first + len(layouts)), pyarrow.int64()),
            "input_ids": pyarrow.array([row.input_ids for row in layouts], pyarrow.list_(pyarrow.int32())),
            "roles": pyarrow.array([row.roles for row in layouts], pyarrow.list_(pyarrow.int8())),
            "rewards": pyarrow.array(columns, pyarrow.list_(pyarrow.float32())),
        }
    )
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def read_rewards(folder: str | Path) -> RewardData:
    """Reads what `saffron annotate` wrote.

    Raises:
        CheckpointError: nothing readable there, or an annotation that was not finished.
    """
    folder = Path(folder)
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder / MANIFEST}: format {manifest.get('format')!r}, expected {FORMAT!r}")
    files = [shard_file(folder, number) for number in range(manifest["shards"])]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(files)} shards are missing ({missing[0]} first); "
            "the same `saffron annotate` again makes them"
        )
    rows = [row for file in files for row in _read_shard(file)]
    if len(rows) != manifest["corpus"]["conversations"]:
        raise CheckpointError(
            f"{folder}: {len(rows)} conversations, and {MANIFEST} says {manifest['corpus']['conversations']}"
        )
    return RewardData(manifest, rows)


def _read_shard(file: Path) -> list[Rewarded]:
    pyarrow = _pyarrow()
    try:
        table = pyarrow.parquet.read_table(file, columns=["input_ids", "roles", "rewards"])
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors derive from these
        raise CheckpointError(f"{file}: cannot be read ({str(error).splitlines()[0]})") from error
    columns = []
    for name, dtype in (("input_ids", np.int64), ("roles", np.int8), ("rewards", np.float32)):
        column = table.column(name).combine_chunks()
        flat = column.flatten().to_numpy(zero_copy_only=False).astype(dtype)  # a null becomes NaN
        columns.append(np.split(flat, np.cumsum(column.value_lengths().to_numpy())[:-1]))
    return [Rewarded(*row) for row in zip(*columns, strict=True)]


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet  # noqa: F401  # used as pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "train") from error
    return pyarrow
