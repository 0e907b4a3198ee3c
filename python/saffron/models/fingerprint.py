"""Which weights a model runs with, cheaply: K and V that were cached with others must not be found again."""

from __future__ import annotations

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
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                seen += (id(parameter), _address(parameter), _version(parameter), parameter.dtype)
        if hasattr(module, "active_adapters"):
            seen += [str(getattr(module, name, None)) for name in _ADAPTER_STATE]
    return hash(tuple(seen))


_ADAPTER_STATE = ("active_adapters", "disable_adapters", "merged_adapters", "scaling", "_hf_peft_config_loaded")


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version


def _address(parameter: Tensor) -> int:
    try:
        return parameter.data_ptr()
    except RuntimeError:  # of a tensor without storage of its own
        return 0
