"""What shows, when an MRM is loaded on a policy, that it may share its modules: weights, and what both compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from saffron.errors import CheckpointError, UnsupportedModelError, outside
from saffron.models.loading import quiet
from saffron.models.shared_trunk import MERGED, SharedTrunk, name_of
from saffron.models.trie_model import TrieModel

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


@torch.inference_mode()
def check_together(shared: SharedTrunk, policy: TrieModel, mrm: TrieModel) -> None:
    """Compares a pass over both models with one of each, over a few tokens.

    Raises:
        UnsupportedModelError: layers with LoRA factors that do not run, logits that are more than the unembedding of
            the last hidden state, rows that depend on each other.
    """
    ran = set[nn.Module]()
    one, other = (lambda model=model: model.run_alone([[0, 1, 2]]) for model in (policy, mrm))
    alone = [one(), other()]
    hooks = [down.register_forward_hook(lambda layer, *_: ran.add(layer)) for down, _ in shared.factors.values()]
    try:
        both = shared.together(policy, mrm, one, other)
    finally:
        for hook in hooks:
            hook.remove()
    if idle := [name for name, (down, _) in shared.factors.items() if down not in ran]:
        raise UnsupportedModelError(f"{idle[0]}: has LoRA factors and does not run; {MERGED}")
    for found, expected in zip(both, alone, strict=True):
        tolerance = expected.abs().max() * (1e-4 if expected.dtype.itemsize > 2 else 0.05)
        if bool((found - expected).abs().max() > tolerance):
            raise UnsupportedModelError(
                f"{shared.trunk.config.model_type} model: in one pass the rows of policy and MRM have other outputs "
                f"than in one each; {MERGED}"
            )
