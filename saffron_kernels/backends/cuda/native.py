"""The compiled module, and how tensors, streams and workspace are handed to it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.checks import FP8

# Of storage, as csrc/cuda/ops.h numbers them: what is computed with, and what K and V are stored in besides.
COMPUTED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CODE = {**COMPUTED, FP8: 3}
_CODES = {**CODE, torch.float64: 4}  # of parameters
_OTHER = 5

_LEAST_CAPABILITY = (8, 0)
_MODULE = "saffron_kernels._cuda"
_HOST = "SAFFRON_CUDA_HOST"  # path of a module whose kernels the CPU executes


def why_not_loaded(device: torch.device) -> str | None:
    """Why there are no kernels for `device`; None if there are."""
    if device.type == "cpu":
        return None if os.environ.get(_HOST) else f"on CPU tensors it runs only in tests, executed by the CPU ({_HOST})"
    return _why_not_on(device)


@functools.cache
def _why_not_on(device: torch.device) -> str | None:
    try:
        _compiled()
    except ImportError as error:
        return f"it was not built: nvcc was not found, or SAFFRON_CUDA was off ({error})"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < _LEAST_CAPABILITY:
        return f"it needs compute capability 8.0, this device has {major}.{minor}"
    return None


def module(tensor: Tensor) -> ModuleType:
    """The launchers for the device of `tensor`."""
    return _compiled() if tensor.is_cuda else _executed_by_cpu(os.environ[_HOST])


def launch(op: str, like: Tensor, *arguments: object) -> None:
    """Runs a launcher for the device of `like`, on the stream that PyTorch uses there now."""
    on = faults.word(like.device), stream(like)
    with torch.cuda.device_of(like):
        getattr(module(like), op)(*map(_argument, (*arguments, on)))


def _argument(value: object) -> object:
    """A tensor as address, strides, dtype and shape; a group of arguments as the tuple of them; all else as it is."""
    if isinstance(value, Tensor):
        return value.data_ptr(), value.stride(), _CODES.get(value.dtype, _OTHER), tuple(value.shape)
    return tuple(map(_argument, value)) if isinstance(value, tuple) else value


def of_each_row(ids: Tensor | None, rows: int) -> Tensor | None:
    """Token ids `[rows, n]`: those that hold for all rows, `[n]`, are shared (a stride of 0)."""
    return ids if ids is None or ids.dim() == 2 else ids.expand(rows, -1)


def stream(tensor: Tensor) -> int:
    """The stream that PyTorch uses for the device of `tensor` now."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


@functools.cache
def _compiled() -> ModuleType:
    return importlib.import_module(_MODULE)


@functools.cache
def _executed_by_cpu(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("saffron_cuda_host._cuda", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{_HOST}={path} is no compiled module")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
