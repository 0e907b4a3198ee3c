"""How kernels are launched: the one place that knows the device, and that a launch can be a compilation only."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch

# Triton reads this when a kernel is defined, so a later change has no effect on kernels that are imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")

_Compile = Callable[..., None]
_compile_only: ContextVar[tuple[_Compile, DeviceProperties] | None] = ContextVar("triton_compile_only", default=None)


class DeviceProperties(NamedTuple):
    """What configurations and grids depend on.

    Attributes:
        arch: compute capability times ten (80, 90, 100, ...).
        processors: streaming multiprocessors.
    """

    arch: int
    processors: int


# The interpreter runs one program after the other: few of them, yet enough that work is split.
_INTERPRETER = DeviceProperties(arch=90, processors=2)


# Kernels are not specialised on sizes that change from call to call (`do_not_specialize`): a search would compile them
# again whenever such a size becomes a multiple of 16. Strides are specialised: they decide how wide loads can be.


def launch(kernel: Any, grid: tuple[int, ...], *args: object, **meta: object) -> None:
    """`kernel[grid](*args, **meta)`; nothing if the grid is empty; under `compile_only`, the compilation alone."""
    meta.setdefault("enable_fp_fusion", False)  # the default differs between versions of Triton; kernels ask for fma
    compile_only = _compile_only.get()
    if compile_only is not None:
        compile_only[0](kernel, grid, *args, **meta)
    elif all(grid):
        kernel[grid](*args, **meta)


def device_properties(device: torch.device) -> DeviceProperties:
    """The chip whose configurations serve `device`."""
    compile_only = _compile_only.get()
    if compile_only is not None:
        return compile_only[1]
    return _cuda_properties(device) if device.type == "cuda" else _INTERPRETER


@functools.cache
def _cuda_properties(device: torch.device) -> DeviceProperties:
    properties = torch.cuda.get_device_properties(device)
    return DeviceProperties(properties.major * 10 + properties.minor, properties.multi_processor_count)


@contextmanager
def compile_only(compile_kernel: _Compile, for_device: DeviceProperties) -> Iterator[None]:
    """Within the block launches call `compile_kernel(kernel, grid, *args, **meta)`, as if on `for_device`."""
    token = _compile_only.set((compile_kernel, for_device))
    try:
        yield
    finally:
        _compile_only.reset(token)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`, and at least 1: sizes of Triton blocks."""
    return 1 << max(0, n - 1).bit_length()


def cdiv(n: int, d: int) -> int:
    return -(-n // d)
