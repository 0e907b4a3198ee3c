"""Where models run."""

from __future__ import annotations

import torch

from saffron.errors import ConfigError, shown


def find_device(given: torch.device | str | None = None) -> torch.device:
    """A device that this machine has.

    Args:
        given: None: the GPU if there is one, else the CPU.

    Raises:
        ConfigError: there is no such device here, or the ops do not run on it.
    """
    here = torch.cuda.is_available()
    if given is None:
        return torch.device("cuda" if here else "cpu")
    try:
        device = torch.device(given)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device: got {shown(given)}, expected cpu, cuda or cuda:NUMBER") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: got {shown(given)}, expected cpu, cuda or cuda:NUMBER")
    if device.type == "cuda" and not here:
        raise ConfigError(f"device: got {shown(given)}, and PyTorch finds no CUDA GPU here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device: got {shown(given)}, and there are {torch.cuda.device_count()} CUDA GPUs here")
    if device.type == "cpu" and device.index not in (None, 0):
        raise ConfigError(f"device: got {shown(given)}, expected cpu")
    return device
