"""What tells checkpoints apart: results of other weights are other results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from transformers import AutoConfig

from saffron.errors import CheckpointError, outside
from saffron.storage.folders import checkpoint_fingerprint


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
    text = " ".join(fingerprint(one) for one in checkpoints if one)
    return hashlib.blake2s(text.encode(errors="surrogateescape"), digest_size=6).hexdigest()


def _base(folder: Path) -> Path | None:
    """The folder of the model that an adapter belongs to, None if there is none; its loader says what is wrong."""
    try:
        named = json.loads((folder / "adapter_config.json").read_bytes())["base_model_name_or_path"]
        base = folder / named
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return base if base.is_dir() else None
