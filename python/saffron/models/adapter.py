"""A PEFT adapter merged into its base model, so that the merged model is the adapted one to the last weight; or its
factors, for a base that stays as it is."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from saffron.errors import CheckpointError, UnsupportedModelError, reason
from saffron.models.loading import quiet, some
from saffron.models.shared_trunk import MERGED, name_of

CONFIG = "adapter_config.json"


def adapter_base(folder: Path) -> str | Path:
    """The checkpoint that an adapter says it was trained on; a relative path is taken from the adapter's folder.

    Raises:
        CheckpointError: it names none.
    """
    named = _config(folder).get("base_model_name_or_path")
    if not named or not isinstance(named, str):
        raise CheckpointError(f"{folder / CONFIG}: names no base model; say which with base=")
    local = folder / named
    return local if local.is_dir() else named


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model with the adapter's weights merged. The model given is changed.

    Embeddings that are tied and that the adapter changes are untied first: merging would change both at once.

    Raises:
        CheckpointError: another kind of adapter than LoRA, an option that cannot be merged, weights that do not belong
            to the model's modules or are missing, or that are not finite.
    """
    _check_kind(folder, _config(folder))
    with quiet():
        wrapped, _ = _wrap(model, folder)
        _untie(wrapped.get_base_model())
        try:
            merged = wrapped.merge_and_unload()
        except Exception as error:  # as above
            raise CheckpointError(f"{folder}: its adapter cannot be merged ({reason(error)})") from error
    left = [name for name, module in merged.named_modules() if type(module).__module__.startswith("peft.")]
    if left:
        raise CheckpointError(f"{folder}: its adapter cannot be merged: PEFT leaves its own modules at {some(left)}")
    return merged


def load_factors(model: PreTrainedModel, folder: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor | None]:
    """The adapter's weights, for a model that stays as it is: the arguments `factors` and `head` of `SharedTrunk`.

    Raises:
        CheckpointError: as for `merge_adapter`. UnsupportedModelError: an adapter that is more than LoRA factors of
            Linear layers, and an unembedding.
    """
    config = _config(folder)
    _check_kind(folder, config)
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init != "gaussian":
        raise UnsupportedModelError(f"{folder}: init_lora_weights={init!r} changes the base's weights; {MERGED}")
    with quiet():
        with torch.device("meta"):  # PEFT says what belongs where, and changes what it is given
            empty = type(model)(copy.deepcopy(model.config))
        wrapped, weights = _wrap(empty, folder, low_cpu_mem_usage=True)
    layers = dict(wrapped.get_base_model().named_modules())
    head_name = name_of(model, model.get_output_embeddings())
    own = head = model.get_output_embeddings().weight.detach()
    found: dict[str, dict[str, Tensor]] = {}
    for key, weight in weights.items():
        name = key.removeprefix("base_model.model.")
        layer, _, part = name.rpartition(".lora_")
        if layer and part in ("A.weight", "B.weight") and _is_plain(layers[layer]):
            found.setdefault(layer, {})[part[0]] = weight
        elif name in (f"{head_name}.weight", f"{head_name}.base_layer.weight"):
            head = weight
        else:
            raise UnsupportedModelError(f"{folder}: the adapter's {name} is more than LoRA of a Linear layer; {MERGED}")
    factors = {name: (pair["A"], pair["B"] * layers[name].scaling["default"]) for name, pair in found.items()}
    if head_name in factors:
        down, up = (factor.to(head) for factor in factors.pop(head_name))
        head = head + up @ down
    return factors, None if head is own else head


def _is_plain(layer: Any) -> bool:
    """Whether a layer of PEFT adds `scaling * B A x` to what a Linear layer gives, and no more."""
    kind = f"{type(layer).__module__}.{type(layer).__name__}"
    return kind == "peft.tuners.lora.layer.Linear" and not (layer.lora_variant or layer.fan_in_fan_out)


def _wrap(model: PreTrainedModel, folder: Path, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """The model in the hands of PEFT, and the weights of the adapter, all of which have their places."""
    from peft import PeftModel, load_peft_weights  # its import takes as long as that of transformers

    try:
        weights = load_peft_weights(str(folder), device="cpu")
        wrapped = PeftModel.from_pretrained(model, str(folder), **options)
    except Exception as error:  # peft, safetensors and torch each raise types of their own for a damaged adapter
        raise CheckpointError(f"{folder}: its adapter cannot be applied to the base model ({reason(error)})") from error
    _check_keys(folder, wrapped, weights)
    for name, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(f"{folder}: the adapter's weight {name} holds NaN or infinity")
    return wrapped, weights


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not an adapter configuration ({reason(error)})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: not an adapter configuration (a {type(config).__name__}, not an object)")
    return config


def _check_kind(folder: Path, config: dict[str, Any]) -> None:
    """Refuses what cannot be merged, or what nobody has compared with the unmerged model."""
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{folder / CONFIG}: peft_type: got {config.get('peft_type')!r}, expected 'LORA'")
    for option in ("r", "lora_alpha"):
        value = config.get(option, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise CheckpointError(f"{folder / CONFIG}: {option}: got {value!r}, expected a finite number")
    for option in ("alora_invocation_tokens", "layer_replication", "arrow_config", "megatron_config", "use_qalora"):
        if config.get(option):
            raise CheckpointError(f"{folder / CONFIG}: {option} is not supported: such an adapter cannot be merged")


def _check_keys(folder: Path, wrapped: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Every weight of the file has a place in the model, and every place a weight."""
    from peft import get_peft_model_state_dict

    needed = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    allowed = needed | set(get_peft_model_state_dict(wrapped, save_embedding_layers=True))
    unknown, missing = sorted(weights.keys() - allowed), sorted(needed - weights.keys())
    if unknown or missing:
        parts = [f"weights that the base model has no module for: {some(unknown)}"] if unknown else []
        parts += [f"weights are missing: {some(missing)}"] if missing else []
        raise CheckpointError(f"{folder}: its adapter does not fit the base model; {'; '.join(parts)}")


def _untie(model: Any) -> None:
    """Gives input and output embeddings a weight each where they share one and an adapter is on one of them."""
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    bare = [getattr(layer, "base_layer", layer) for layer in layers]
    weights = [getattr(layer, "weight", None) for layer in bare]
    if weights[0] is None or weights[0] is not weights[1] or bare == list(layers):
        return
    bare[1].weight = nn.Parameter(weights[1].detach().clone(), requires_grad=False)
    model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
