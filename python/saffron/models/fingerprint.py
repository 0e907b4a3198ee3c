"""Which weights a model runs with, cheaply: K and V that were cached with others must not be found again."""

from __future__ import annotations

import sys
from types import NoneType

import torch
from torch import Tensor, nn


def fingerprint(model: nn.Module) -> int:
    """A number that changes when the weights do.

    It looks at the identity, address, version, dtype and device of every parameter, at the state of PEFT adapters
    (active, disabled, merged, their scaling), and at autocast; not at the numbers themselves. So a change in place that
    PyTorch does not count (through `parameter.data`, or of parameters made in inference mode) is not noticed.
    """
    seen: list[object] = [torch.is_autocast_enabled(), torch.is_autocast_enabled("cpu")]
    if any(seen):
        seen += [torch.get_autocast_dtype("cuda"), torch.get_autocast_dtype("cpu")]
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    adapter: type = getattr(tuners, "BaseTunerLayer", NoneType)
    stack = [model]
    while stack:  # `model.modules()` takes three times as long
        module = stack.pop()
        for parameter in module._parameters.values():
            if parameter is not None:
                seen.append((id(parameter), _address(parameter), _version(parameter), parameter.dtype))
        if isinstance(module, adapter):
            seen += [str(getattr(module, name, None)) for name in _ADAPTER_STATE]
        stack += [child for child in module._modules.values() if child is not None]
    return hash(tuple(seen))


_ADAPTER_STATE = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version


def _address(parameter: Tensor) -> int:
    try:
        return parameter.data_ptr()
    except RuntimeError:  # of a tensor without storage of its own
        return 0
