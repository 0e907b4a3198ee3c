"""What tells checkpoints apart: results of other weights are other results."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from saffron.errors import CheckpointError, outside
from saffron.storage.folders import check_vacant, checkpoint_fingerprint, write_json
from saffron.storage.text import read_json


def fingerprint(checkpoint: str | Path) -> str:
    """SHA-256 of a folder's configuration, weights and tokenizer, and of the base that an adapter in it names; of a hub
    checkpoint its name and commit.

    Raises:
        CheckpointError: nothing readable there.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        with outside(f"{checkpoint}: no Hugging Face checkpoint there", CheckpointError):
            commit = getattr(AutoConfig.from_pretrained(str(checkpoint)), "_commit_hash", None)
        return checkpoint_fingerprint(checkpoint, commit)
    found, base = checkpoint_fingerprint(folder), _base(folder)
    return found if base is None else f"{found} {checkpoint_fingerprint(base)}"


def fingerprint_all(checkpoints: Iterable[str | Path | None]) -> str:
    """One short text for several checkpoints; None is left out."""
    return digest(fingerprint(one) for one in checkpoints if one)


def digest(fingerprints: Iterable[str]) -> str:
    """One short text for several fingerprints."""
    return hashlib.blake2s(" ".join(fingerprints).encode(errors="surrogateescape"), digest_size=6).hexdigest()


def tokenizer_fingerprint(checkpoint: str | Path) -> str:
    """SHA-256 of the files of a folder's tokenizer; of a hub checkpoint its name.

    Raises:
        CheckpointError: nothing readable there.
    """
    folder, digest = Path(checkpoint), hashlib.sha256()
    if not folder.is_dir():
        return str(checkpoint)
    with outside(f"{folder}: cannot be read", CheckpointError):
        for file in sorted(f for f in folder.iterdir() if f.name in _TOKENIZER_FILES):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


_TOKENIZER_FILES = {
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "added_tokens.json",
}  # fmt: skip


ORIGIN = "mrm_training.json"  # in an MRM's folder: what it was trained from


def write_origin(folder: Path, base: str | Path, manifest: Mapping[str, Any], calibration: Any) -> None:
    """Notes in an MRM's folder what it was trained from.

    Args:
        base: the checkpoint that was trained.
        manifest: of the annotated corpus: which reward, which corpus.
        calibration: agreement with the reward on what was held out.
    """
    record = {
        "reward": _without_folders(manifest.get("prm")),
        "corpus": _without_folders(manifest.get("corpus")),
        "scale": manifest.get("settings", {}).get("scale", 1.0),
        "base": {
            "configuration": _configuration(base),
            "tokenizer": tokenizer_fingerprint(base),
            "checkpoint": checkpoint_fingerprint(base),
        },
        "calibration": calibration,
    }
    write_json(folder / ORIGIN, record)


def check_vacant_for_mrm(folder: Path) -> None:
    """Raises `ConfigError` if a folder holds a model that is no MRM of ours: writing one there would spoil it."""
    if not (folder / ORIGIN).exists():
        check_vacant(folder, ("config.json", "adapter_config.json", "adapter_model.safetensors", "lm_head_bias.pt"))


def _without_folders(part: Any) -> Any:
    """A part of the manifest for others to see: of an absolute path its last name; the fingerprint identifies it."""
    if not isinstance(part, dict) or not isinstance(part.get("source"), str):
        return part
    return part | {"source": re.sub(r"(^|:)/(?:[^/]*/)*", r"\1", part["source"])}


def check_origin(folder: Path, base: str | Path) -> None:
    """Compares what an MRM's folder says it was trained on with what it is loaded with.

    Args:
        base: the checkpoint that it is loaded with; of a hub nothing is compared.

    Raises:
        CheckpointError: a base with another tokenizer than the MRM was trained with: its token ids mean other texts.
    """
    file = folder / ORIGIN
    trained = read_json(file).get("base") if file.exists() else None
    if isinstance(trained, dict) and Path(base).is_dir() and Path(base) != folder:
        if trained.get("tokenizer") != tokenizer_fingerprint(base):
            raise CheckpointError(f"{folder}: was trained with another tokenizer than that of {base}")
        if trained.get("configuration") != _configuration(base):
            warnings.warn(f"{folder}: was trained on another model than {base}", stacklevel=3)


def is_trained_on(folder: Path, base: str | Path | None, checkpoint: str) -> bool:
    """Whether a checkpoint is what the MRM in a folder says that it was trained on.

    Args:
        base: what its adapter names, if it is one.
    """
    here = bool(checkpoint) and Path(checkpoint).is_dir()
    if base is not None and not here:
        return str(base) == checkpoint
    if base is not None and Path(base).is_dir() and Path(base).samefile(checkpoint):
        return True
    trained = read_json(folder / ORIGIN).get("base") if (folder / ORIGIN).exists() else None
    trained = trained if isinstance(trained, dict) else {}
    if not here or trained.get("configuration", _configuration(checkpoint)) != _configuration(checkpoint):
        return False
    known = trained.get("checkpoint")
    if known is None and base is not None and _configuration(base) == _configuration(checkpoint):
        known = checkpoint_fingerprint(base)
    return known is not None and known == checkpoint_fingerprint(checkpoint)


def _configuration(base: str | Path) -> str:
    file = Path(base) / "config.json"
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else str(base)


def _base(folder: Path) -> Path | None:
    """The folder of the model that an adapter belongs to, None if there is none; its loader says what is wrong."""
    try:
        named = json.loads((folder / "adapter_config.json").read_bytes())["base_model_name_or_path"]
        base = folder / named
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return base if base.is_dir() else None
