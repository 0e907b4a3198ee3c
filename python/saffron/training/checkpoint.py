"""The state of a training, in one file that is whole or absent."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from saffron.errors import CheckpointError, outside
from saffron.storage.folders import write_atomically


def save_checkpoint(
    file: Path, step: int, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Parameters and optimizer state after `step` steps, as safetensors: `parameter/<name>`, `exp_avg/<name>`, ..."""
    tensors = {}
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}/{name}"] = value
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    write_atomically(file, save(tensors, {"step": str(step)}))


def load_checkpoint(file: Path, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> int:
    """Puts a saved state in place; returns how many steps it is after.

    Raises:
        CheckpointError: the file is damaged or belongs to other parameters.
    """
    with (
        outside(f"{file}: cannot be taken up", CheckpointError),
        safe_open(file, "pt") as stored,
        torch.no_grad(),
    ):
        for name, parameter in parameters.items():
            parameter.copy_(stored.get_tensor(f"parameter/{name}"))
            state = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                value = stored.get_tensor(f"{key}/{name}")
                state[key] = value if key == "step" else value.to(parameter)
            optimizer.state[parameter] = state
        return int(stored.metadata()["step"])
