"""The files of an MRM: an adapter as published, or a whole model, with the vectors over its vocabulary."""

from __future__ import annotations

import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saffron.errors import CheckpointError, ConfigError, shown
from saffron.models import adapter, loading
from saffron.models.provenance import check_origin, is_trained_on
from saffron.models.shared_trunk import SharedTrunk
from saffron.models.trie_model import TrieModel
from saffron.models.trunk_evidence import unembedding
from saffron.storage.text import read_json

LARGEST_BIAS = 1e30  # rewards and their differences stay finite in fp32
LAYOUT = "mrm_config.json"  # prefix and infix, where they are not the published ones
VECTORS = {"bias": "lm_head_bias.pt", "unseen": "unseen_mask.pt"}


def load(
    path: str | Path,
    base: str | Path | PreTrainedModel | TrieModel | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    given: Collection[str],
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, and arguments of `MultifurcationRewardModel` as the folder has them; see its `from_pretrained`.

    Args:
        given: arguments that the caller has: their files are not read.
    """
    folder = loading.fetch(path)
    merged = (folder / "config.json").is_file() and not (folder / adapter.CONFIG).exists()
    if isinstance(base, TrieModel) and (dtype, device) != (None, None):
        raise ConfigError("dtype and device: are those of the policy given as base=, whose weights the MRM shares")
    if merged and base is not None and not isinstance(base, TrieModel):
        raise CheckpointError(f"{path}: holds a whole model and no adapter, so base= has nothing to say")
    stored: dict[str, Any] = _stored_layout(folder)
    for name, file in VECTORS.items():
        if name not in given and (not merged or (folder / file).exists()):
            stored[name] = _load_vector(folder / file)
    if isinstance(base, TrieModel):
        shared = _share(base.model, folder, merged)
        check_origin(folder, base.model.name_or_path or folder)
        _check_tokenizer(base.tokenizer, folder, folder if merged else adapter.adapter_base(folder))
        return shared.model, {"tokenizer": base.tokenizer, "shared": shared, **stored}
    if isinstance(base, PreTrainedModel):
        return adapter.merge_adapter(base, folder), stored
    if base is None:
        base = folder if merged else adapter.adapter_base(folder)
    check_origin(folder, base)
    model = loading.load_model(base, dtype, device)
    model = model if merged else adapter.merge_adapter(model, folder)
    return model, {"tokenizer": loading.load_tokenizer(base), **stored}


def is_on(path: str | Path, policy: str) -> bool:
    """Whether an MRM says that a policy's checkpoint is what it was trained on."""
    folder = loading.fetch(path)
    named = adapter.adapter_base(folder) if (folder / adapter.CONFIG).exists() else None
    return is_trained_on(folder, named, policy)


def _share(policy: PreTrainedModel, folder: Path, merged: bool) -> SharedTrunk:
    """What an MRM has of its own over the policy's model, which it was trained on.

    Raises:
        CheckpointError: it was trained on another one.
    """
    if merged:
        return SharedTrunk(policy, {}, unembedding(policy, folder))
    named = adapter.adapter_base(folder)
    if not is_trained_on(folder, named, policy.name_or_path or ""):
        raise CheckpointError(
            f"{folder}: was trained on {named}, and the policy is {policy.name_or_path or 'a model without a folder'}"
        )
    return SharedTrunk(policy, *adapter.load_factors(policy, folder))


def _check_tokenizer(ours: PreTrainedTokenizerBase | None, folder: Path, trained_on: str | Path) -> None:
    """Refuses a policy whose token ids mean other texts than those that the MRM was trained with."""
    theirs = loading.load_tokenizer(trained_on) if Path(trained_on).is_dir() else None
    if ours is not None and theirs is not None and ours.get_vocab() != theirs.get_vocab():
        raise CheckpointError(f"{folder}: was trained with another tokenizer than the policy's")


def save(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    vectors: Mapping[str, Tensor | None],
    layout: Mapping[str, str],
) -> None:
    """Writes what `load` reads. Files of the same names are replaced.

    Args:
        vectors: by the names in `VECTORS`. layout: prefix and infix.
    """
    folder = Path(folder)
    with loading.quiet():
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    for name, file in VECTORS.items():
        (folder / file).unlink(missing_ok=True)
        vector = vectors[name]
        if vector is not None:
            torch.save(vector.cpu().clone(), folder / file)
    (folder / LAYOUT).write_text(json.dumps(layout, indent=2) + "\n", encoding="utf-8")


def _stored_layout(folder: Path) -> dict[str, str]:
    """Prefix and infix, where the folder says them."""
    file = folder / LAYOUT
    if not file.exists():
        return {}
    stored = read_json(file)
    if unknown := sorted(set(stored) - {"prefix", "infix"}):
        raise CheckpointError(f"{file}: got {loading.some(unknown)}, expected prefix and infix")
    for name, text in stored.items():
        if not isinstance(text, str):
            raise CheckpointError(f"{file}: {name}: got {shown(text)}, expected a text")
    return stored


def _load_vector(file: Path) -> Tensor:
    try:
        vector = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file") from error
    except Exception as error:  # torch's reader raises what the bytes lead it to, and advises to trust the file
        raise CheckpointError(f"{file}: cannot be loaded: damaged, or more than a tensor") from error
    if not isinstance(vector, Tensor) or vector.layout is not torch.strided or vector.dim() != 1:
        raise CheckpointError(f"{file}: expected one vector")
    return vector.detach()


def check_bias(bias: Tensor, vocab_size: int) -> None:
    _check_shape("lm_head_bias", bias, vocab_size)
    if not bias.is_floating_point():
        raise CheckpointError(f"lm_head_bias: got {bias.dtype}, expected a floating point dtype")
    if not bool(bias.isfinite().all()):
        raise CheckpointError("lm_head_bias: holds NaN or infinity")
    if bias.numel() and float(bias.abs().max()) > LARGEST_BIAS:
        raise CheckpointError(
            f"lm_head_bias: holds {float(bias.abs().max()):g}, expected values of at most {LARGEST_BIAS}"
        )


def check_unseen(unseen: Tensor, vocab_size: int) -> None:
    _check_shape("unseen_mask", unseen, vocab_size)
    if unseen.dtype is not torch.bool:
        raise CheckpointError(f"unseen_mask: got {unseen.dtype}, expected torch.bool")
    if bool(unseen.all()):
        warnings.warn(
            "unseen_mask: marks every token, so the MRM says nothing and the policy's own order decides", stacklevel=3
        )


def _check_shape(name: str, vector: Tensor, vocab_size: int) -> None:
    if vector.shape != (vocab_size,):
        raise CheckpointError(f"{name}: got shape {list(vector.shape)}, the base model has [{vocab_size}]")
