"""Which implementation of an op runs: by device, from one table, or the one that was asked for by name.

A backend is a module with one function an op (the signature of its op; a missing one means the backend does not serve
it) and `why_not(device, dtype)`: None if it can run there, else the reason. Where one of its ops serves fewer dtypes
than the others, `why_not_op(op, dtype)` says so.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch

from saffron_kernels.checks import expect

# Modules by name, imported when first considered: importing the package needs no compiler and no GPU.
MODULES = {
    "triton": "saffron_kernels.backends.triton",
    "cuda": "saffron_kernels.backends.cuda",
    "cpu": "saffron_kernels.backends.cpu",
    "reference": "saffron_kernels.backends.reference",
}

# The order of choice for tensors on a device. A backend asked for by name need not stand here: "cuda" does not until a
# measurement shows for which ops it is at least as fast as "triton".
PREFERENCE = {"cuda": ("triton", "reference"), "cpu": ("cpu", "reference")}
FALLBACK = ("reference",)  # on any other device

_forced: ContextVar[str | None] = ContextVar("saffron_backend", default=None)
forced_backend = _forced.get  # the backend of the innermost block `with backend(name)`, or None


class BackendError(RuntimeError):
    """The backend that was asked for cannot run this op here."""


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Within the block every op runs on backend `name`, or raises `BackendError`; nothing falls back.

    The environment variable `SAFFRON_BACKEND` does the same for a whole process. It is read when an op is first called.
    """
    expect(name in MODULES, "name", repr(name), f"one of {', '.join(MODULES)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def implementation(op: str, device: torch.device, *dtypes: torch.dtype) -> Callable[..., object]:
    """The function that runs `op` on tensors of this device and these storage dtypes.

    Raises:
        BackendError: a backend was asked for by name and cannot.
    """
    forced = _forced.get() or asked_by_environment()
    if forced is None:
        name = next(n for n in PREFERENCE.get(device.type, FALLBACK) if why_not(n, op, device, *dtypes) is None)
        return getattr(_module(name), op)
    expect(forced in MODULES, "SAFFRON_BACKEND", repr(forced), f"one of {', '.join(MODULES)}")
    reason = why_not(forced, op, device, *dtypes)
    if reason is not None:
        stored = " and ".join(map(str, dtypes))
        raise BackendError(f"backend {forced!r} cannot run {op} on {device.type} in {stored}: {reason}")
    return getattr(_module(forced), op)


def why_not(name: str, op: str, device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why backend `name` cannot run `op` there; None if it can."""
    try:
        module = _module(name)
    except ImportError as error:
        return f"it cannot be imported ({error})"
    for dtype in dtypes:
        reason: str | None = module.why_not(device, dtype)
        if reason is None and hasattr(module, "why_not_op"):
            reason = module.why_not_op(op, dtype)
        if reason is not None:
            return reason
    return None if hasattr(module, op) else "it does not serve this op"


@functools.cache
def asked_by_environment() -> str | None:
    return os.environ.get("SAFFRON_BACKEND") or None


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(MODULES[name])
