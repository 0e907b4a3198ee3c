"""Token-level rewards on disk: Parquet shards, one row per conversation, and a manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from saffron.errors import CheckpointError, MissingDependencyError, outside, shown
from saffron.storage.text import read_json
from saffron.training.layout import Layout

FORMAT = "saffron token rewards, version 2"
MANIFEST = "manifest.json"


@dataclass(slots=True)
class AnnotatedConversation:
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
    rows: list[AnnotatedConversation] = field(repr=False)

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.parquet"


def decisive(manifest: dict[str, Any]) -> dict[str, Any]:
    """What decides the rewards: all but what corpus and guard are called."""
    corpus, prm = (manifest[name] if isinstance(manifest.get(name), dict) else {} for name in ("corpus", "prm"))
    return {
        "format": manifest.get("format"),
        "corpus": {"fingerprint": corpus.get("fingerprint")},
        "prm": {"fingerprint": prm.get("fingerprint")},
        "settings": manifest.get("settings"),
    }


def identity(manifest: dict[str, Any]) -> str:
    """What tells the shards of one annotation from those of another; every shard holds it."""
    return hashlib.sha256(json.dumps(decisive(manifest), sort_keys=True).encode()).hexdigest()


def encode_shard(identity: str, first: int, layouts: Sequence[Layout], rewards: Sequence[Sequence[float]]) -> bytes:
    """Rows of a shard whose first conversation has the number `first`, as the bytes of a Parquet file.

    Args:
        identity: of the annotation.
    """
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
    table = table.replace_schema_metadata({"saffron": identity})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def read_rewards(folder: str | Path) -> RewardData:
    """Reads what `saffron annotate` wrote.

    Raises:
        CheckpointError: nothing readable there, or an annotation that was not finished.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder / MANIFEST)
    files = [shard_file(folder, number) for number in range(manifest["shards"])]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(files)} shards are missing ({missing[0]} first); "
            "the same `saffron annotate` again makes them"
        )
    rows: list[AnnotatedConversation] = []
    for file in files:
        rows += _read_shard(file, identity(manifest), len(rows))
    if len(rows) != manifest["corpus"]["conversations"]:
        raise CheckpointError(
            f"{folder}: {len(rows)} conversations, and {MANIFEST} says {manifest['corpus']['conversations']}"
        )
    return RewardData(manifest, rows)


def _read_manifest(file: Path) -> dict[str, Any]:
    manifest = read_json(file)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file}: format {shown(manifest.get('format'))}, expected {FORMAT!r}")
    corpus, prm = manifest.get("corpus"), manifest.get("prm")
    numbers = manifest.get("shards"), corpus.get("conversations") if isinstance(corpus, dict) else None
    if not all(type(n) is int and 0 < n < 2**31 for n in numbers):
        raise CheckpointError(f"{file}: shards and corpus.conversations must be whole numbers above 0")
    if not isinstance(prm, dict) or not isinstance(prm.get("source"), str):
        raise CheckpointError(f"{file}: prm.source must be a text")
    return manifest


def _read_shard(file: Path, identity: str, first: int) -> list[AnnotatedConversation]:
    """Rows of the shard of that annotation whose first conversation has that number."""
    pyarrow = _pyarrow()
    with outside(f"{file}: cannot be read", CheckpointError):
        table = pyarrow.parquet.read_table(file, columns=["conversation", "input_ids", "roles", "rewards"])
        if (table.schema.metadata or {}).get(b"saffron", b"").decode() != identity:
            raise CheckpointError(f"{file}: is of another annotation than {MANIFEST}")
        numbers = table.column("conversation").to_pylist()
        if numbers != list(range(first, first + len(numbers))):
            raise CheckpointError(f"{file}: its first conversation is number {numbers[:1]}, expected {first}")
        columns = []
        for name, dtype in (("input_ids", np.int64), ("roles", np.int8), ("rewards", np.float32)):
            column = table.column(name).combine_chunks()
            flat = column.flatten().to_numpy(zero_copy_only=False).astype(dtype)  # a null becomes NaN
            columns.append(np.split(flat, np.cumsum(column.value_lengths().to_numpy())[:-1]))
        rows = [AnnotatedConversation(*row) for row in zip(*columns, strict=True)]
        if any(not len(row.input_ids) == len(row.roles) == len(row.rewards) for row in rows):
            raise CheckpointError(f"{file}: a conversation's columns differ in length")
        return rows


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet  # noqa: F401  # used as pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "train") from error
    return pyarrow
