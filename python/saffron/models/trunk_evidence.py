"""The weights of a whole MRM, compared with those of the policy whose modules it is to share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from saffron.errors import CheckpointError, outside
from saffron.models.loading import quiet
from saffron.models.shared_trunk import name_of

_OF_NO_WEIGHT = ("tie_word_embeddings", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache")


def unembedding(policy: PreTrainedModel, folder: Path) -> Tensor | None:
    """The unembedding of a whole MRM over the policy's trunk, None if it is the policy's; reads the
    folder's weights once, one by one.

    Raises:
        CheckpointError: weights or a configuration that are not the policy's, named.
    """
    with outside(f"{folder}: cannot be read", CheckpointError), quiet():
        config = type(policy.config).from_pretrained(folder)
        ours, theirs = (_plain(one.to_dict()) for one in (policy.config, config))
        if differing := sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)):
            raise CheckpointError(f"{folder}: its {differing[0]} is {theirs.get(differing[0])!r}, the policy's "
                                  f"{ours.get(differing[0])!r}: it has another trunk")  # fmt: skip
        weights: dict[str, Any] = policy.state_dict()
        head_name = name_of(policy, policy.get_output_embeddings()) + ".weight"
        head, found = weights[head_name], set[str]()
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (not a dictionary)
                    found.add(name)
                    weight = stored.get_tensor(name)
                    if name == head_name:
                        head = weight
                    elif name not in weights or not _same(weight, weights[name]):
                        raise CheckpointError(f"{folder}: its weight {name} is not the policy's: it has another trunk")
    tied = {name for name in weights if weights[name].data_ptr() == weights[head_name].data_ptr()}
    if missing := sorted(weights.keys() - found - tied):
        raise CheckpointError(f"{folder}: the weight {missing[0]} is missing")
    return None if _same(head, weights[head_name]) else head


def _same(weight: Tensor, ours: Tensor) -> bool:
    return weight.shape == ours.shape and torch.equal(weight.to(ours), ours)


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _OF_NO_WEIGHT}
