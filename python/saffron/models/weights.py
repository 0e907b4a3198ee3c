"""Weights that are not finite: refused when a model is loaded, named when one of its outputs is not."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from saffron.errors import CheckpointError


def check_weights(model: PreTrainedModel, owner: str) -> None:
    """Raises `CheckpointError` for weights that are NaN or infinite. Reads each weight once."""
    if name := bad_weight(model):
        where = f" ({model.name_or_path})" if model.name_or_path else ""
        raise CheckpointError(
            f"{owner}{where}: the weight {name} holds NaN or infinity; check_weights=False loads it all the same"
        )


def bad_weight(model: nn.Module) -> str | None:
    """The first weight that holds NaN or infinity, and the kind of its layer. Reads each weight once."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        values = parameter.detach()
        if values.element_size() == 1:  # float8 has no minimum and maximum of its own
            values = values.to(torch.bfloat16)
        low, high = torch.aminmax(values)  # NaN if one of the weights is
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            return f"{name} (of a {type(model.get_submodule(name.rpartition('.')[0])).__name__})"
    return None
