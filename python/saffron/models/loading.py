"""Checkpoints of Hugging Face: models and tokenizers, or an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import cached_file

from saffron.errors import CheckpointError, SaffronError
from saffron.models import attention


def load_model(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> PreTrainedModel:
    """A causal language model of `transformers`, ready for the trie cache. Errors as `TrieModel.from_pretrained`."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: no Hugging Face checkpoint there ({_first_line(error)})") from error
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    attention.check_supported(config, model_class[0] if isinstance(model_class, tuple) else model_class)
    _check_generation_config(path)
    wanted: torch.dtype | str = dtype or (torch.float32 if device.type == "cpu" else "auto")
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=wanted, attn_implementation=attention.ATTENTION, output_loading_info=True
        )
    except SaffronError:
        raise
    except Exception as error:  # transformers, safetensors and torch each raise types of their own
        raise CheckpointError(f"{path}: cannot be loaded as a causal language model ({_first_line(error)})") from error
    model, info = loaded
    if info["missing_keys"]:  # transformers fills what is missing with random numbers
        raise CheckpointError(f"{path}: weights are missing: {', '.join(sorted(info['missing_keys']))}")
    return model.to(device)


def _check_generation_config(path: str | Path) -> None:
    """`from_pretrained` passes over a file that it cannot read, and with it over the end tokens."""
    found = cached_file(
        str(path), "generation_config.json", local_files_only=Path(path).is_dir(),
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    if found is None:
        return
    try:
        content = json.loads(Path(found).read_text())
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got a {type(content).__name__}")
        ends = GenerationConfig.from_dict(content).eos_token_id
        if not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends or 0])):
            raise ValueError(f"eos_token_id: got {ends!r}, expected token ids")
    except Exception as error:  # whatever a class of transformers makes of wrong values
        raise CheckpointError(f"{found}: not a generation configuration ({_first_line(error)})") from error


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint, None if it holds none."""
    if Path(path).is_dir() and not any(Path(path).glob("*tokenizer*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # as above
        raise CheckpointError(f"{path}: its tokenizer cannot be loaded ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
