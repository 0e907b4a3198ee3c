"""What was built, what was found, what will run, and why nothing else."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from saffron_kernels import _native, backends, ops


def describe() -> dict[str, Any]:
    """The state of the package on this machine, as plain data.

    Returns:
        `versions`, `native` (path of the compiled module), `instruction_set` (what its CPU kernels use), `devices`, and
        `backends`: for each device type and storage dtype the backend every op runs on (`used`), and for each other
        one why not (`not`). A backend that could run but stands behind another says so.
    """
    devices = {"cpu": platform.processor() or platform.machine()}
    if torch.cuda.is_available():
        devices["cuda"] = torch.cuda.get_device_name()
    return {
        "versions": {name: _version(name) for name in ("saffron-kernels", "torch", "triton", "transformers")},
        "python": platform.python_version(),
        "native": _native.__file__,
        "instruction_set": _native.cpu.isa(),
        "devices": devices,
        "backends": {
            device: {
                str(dtype).removeprefix("torch."): _choices(torch.device(device), dtype)
                for dtype in (torch.float32, torch.bfloat16, torch.float16)
            }
            for device in ("cpu", "cuda")
        },
    }


def _choices(device: torch.device, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    return {op: _choice(op, device, dtype) for op in ops.NAMES}


def _choice(op: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    order = backends.PREFERENCE[device.type]
    reasons = {name: backends.why_not(name, op, device, dtype) for name in backends.MODULES}
    used = next(name for name in order if reasons[name] is None)
    others = {
        name: reason or (f"{used} goes first" if name in order else "only if asked for by name")
        for name, reason in reasons.items()
        if name != used
    }
    return {"used": used, "not": others}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
