"""Checkpoints become models and tokenizers; whatever is wrong with them is a `CheckpointError` that names them."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import cached_file, logging

from saffron.errors import CheckpointError, ConfigError, SaffronError, UnsupportedModelError, reason
from saffron.models.attention import ATTENTION
from saffron.models.devices import find_device
from saffron.models.inspection import check_supported

GGUF = "whose weights are quantised: convert it to a folder first (docs/defend.md)"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def load_model(
    path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> PreTrainedModel:
    """A causal language model of `transformers`, ready for the trie cache. Errors as `TrieModel.from_pretrained`."""
    place = find_device(device)
    path = check_place(path, "config.json")
    with quiet():
        try:
            config = AutoConfig.from_pretrained(path)
        except Exception as error:  # of many types: damaged JSON, values that no model has, an unreachable hub
            raise CheckpointError(f"{path}: no Hugging Face checkpoint there ({_reason(error)})") from error
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        _check_unquantised(path, config)
        check_supported(config, model_class[0] if isinstance(model_class, tuple) else model_class)
        _check_generation_config(path)
        if getattr(config.get_text_config(), "num_hidden_layers", 1) == 0:
            raise CheckpointError(f"{path}: its configuration has no layers (num_hidden_layers is 0)")
        wanted: torch.dtype | str = dtype or (torch.float32 if place.type == "cpu" else "auto")
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=wanted, attn_implementation=ATTENTION, output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are named below
            )  # fmt: skip
        except SaffronError:
            raise
        except Exception as error:  # transformers, safetensors and torch each raise types of their own
            raise CheckpointError(f"{path}: cannot be loaded as a causal language model ({_reason(error)})") from error
    model, info = loaded
    if info["missing_keys"]:  # transformers fills what is missing with random numbers
        raise CheckpointError(f"{path}: weights are missing: {some(sorted(info['missing_keys']))}")
    if info.get("mismatched_keys"):
        wrong = [f"{name} {list(there)} instead of {list(here)}" for name, there, here in info["mismatched_keys"]]
        raise CheckpointError(f"{path}: weights of other shapes than its configuration says: {some(sorted(wrong))}")
    return model.to(place)


def _check_unquantised(path: str, config: PretrainedConfig) -> None:
    given = getattr(config, "quantization_config", None)
    if given:
        method = given.get("quant_method") if isinstance(given, dict) else getattr(given, "quant_method", None)
        raise UnsupportedModelError(
            f"{path}: its weights are quantised ({getattr(method, 'value', method)}); expected fp32, fp16 or bf16, as "
            "heads and hidden states are read as they are: save them dequantised"
        )


def _check_generation_config(path: str) -> None:
    """`from_pretrained` passes over a file that it cannot read, and with it over the end tokens."""
    found = cached_file(
        path, "generation_config.json", local_files_only=Path(path).is_dir(),
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    if found is None:
        return
    try:
        content = json.loads(Path(found).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got a {type(content).__name__}")
        ends = GenerationConfig.from_dict(content).eos_token_id
        if not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends or 0])):
            raise ValueError(f"eos_token_id: got {ends!r}, expected token ids")
    except Exception as error:  # whatever a class of transformers makes of wrong values
        raise CheckpointError(f"{found}: not a generation configuration ({_reason(error)})") from error


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint, None if it holds none."""
    path = check_place(path)
    if Path(path).is_dir() and not any(Path(path).glob("*tokenizer*")):
        return None
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(path)
        except Exception as error:  # as above
            raise CheckpointError(f"{path}: its tokenizer cannot be loaded ({_reason(error)})") from error


def check_place(path: str | Path, *files: str) -> str:
    """A folder or the name of a repository on the hub, before anybody asks a hub for it.

    Args:
        path: taken as a folder if it is one, or if it cannot be the name of a repository.
        files: that a folder must hold.

    Raises:
        CheckpointError: a folder that is not there, or lacks a file. ConfigError: neither text nor path.
    """
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(f"path: got a value of type {type(path).__name__}, expected a folder or a name on the hub")
    text = os.fspath(path)
    folder = Path(text).expanduser()
    if folder.is_dir():
        for file in files:
            if not (folder / file).is_file():
                found = "a GGUF file, " + GGUF if any(folder.glob("*.gguf")) else f"no {file} in this folder"
                raise CheckpointError(f"{text}: no Hugging Face checkpoint there ({found})")
        return str(folder)
    if folder.exists():
        found = "a GGUF file, " + GGUF if folder.suffix == ".gguf" else "a file, expected a folder"
        raise CheckpointError(f"{text}: no Hugging Face checkpoint there ({found})")
    is_local = len(folder.parts) > 1 and Path(folder.parts[0]).is_dir()  # "models/policy" where there is a "models"
    if not isinstance(path, str) or HUB_NAME.fullmatch(text) is None or is_local:
        raise CheckpointError(f"{text}: no Hugging Face checkpoint there (no such folder)")
    return text


def fetch(path: str | Path) -> Path:
    """The folder that a path or the name of a repository on the hub stands for; the repository is downloaded.

    Raises:
        CheckpointError: no such folder, and no such repository that the hub shows us.
    """
    place = check_place(path)
    if Path(place).is_dir():
        return Path(place)
    from huggingface_hub import snapshot_download

    with quiet():
        try:
            return Path(snapshot_download(place))
        except Exception as error:  # of many types: no such repository, no access, no network
            raise CheckpointError(f"{path}: cannot be downloaded ({_reason(error)})") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Within it, other libraries show no progress bars, warnings and advice."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def some(names: list[str], count: int = 4) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _reason(error: Exception) -> str:
    """What went wrong, without the advice of other libraries, which is often about something else."""
    text = str(error)
    if "huggingface.co" in text or "couldn't connect" in text.lower():
        return "neither a folder here nor a repository that the hub shows us"
    return reason(error)
