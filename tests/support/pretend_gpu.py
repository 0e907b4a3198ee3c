"""A CUDA device that the CPU plays: what runs Python for a GPU where there is none, on the values that it would have.

A tensor "on cuda" holds its values on the CPU and says that it is on the GPU. As on a GPU, it cannot be used together
with one that is not, nor be read while a graph is captured. A captured graph is the list of its calls; replaying it
makes them again and writes their results where the first ones are. Ops of saffron_kernels run on the CPU backend,
whichever is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from saffron_kernels import backends, ops, schemas
from saffron_kernels.backends import cuda
from saffron_kernels.checks import FP8

CUDA = torch.device("cuda", 0)
# To the host: results are no longer on the device, and a graph cannot hold them.
TO_HOST = {"cpu", "tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__", "__len__", "equal",
           "allclose", "nonzero", "masked_select", "unique", "__repr__", "__format__", "__array__", "__contains__",
           "assert_close"}  # fmt: skip
KEPT = {"__len__", "nonzero", "masked_select", "unique"}  # of them: `len` reads nothing, the others stay on the device
MAY_MIX = {"to", "copy_", "__setitem__", "__getitem__", "_has_compatible_shallow_copy_type"}
_ASSERT_CLOSE, _GENERATOR = torch.testing.assert_close, torch.Generator

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[Any]]


class OnGpu(Tensor):
    """Marks a tensor as being on the device."""

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]


def _host(x: Any) -> Any:
    return x.as_subclass(Tensor) if isinstance(x, OnGpu) else x


def _on_gpu(x: Any) -> Any:
    if not isinstance(x, Tensor) or isinstance(x, OnGpu):
        return x
    if isinstance(x, torch.nn.Parameter):
        return torch.nn.Parameter(x.data.as_subclass(OnGpu), x.requires_grad)
    return x.as_subclass(OnGpu)


class Pretend(TorchFunctionMode):
    """Runs every function of torch on the CPU, and keeps account of what is where."""

    def __init__(self) -> None:
        super().__init__()
        self.tape: list[Call] | None = None
        self.untouched: dict[int, tuple[Tensor, Tensor]] = {}  # storages before the capture, which runs nothing

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func is torch.device or name == "_parse_to":  # they name a device, and touch none
            return func(*args, **kwargs)
        if name == "__get__":  # an attribute
            return self._attribute(func, args)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = any(isinstance(x, OnGpu) for x in given)
        target = self._target(name, args, kwargs, there)
        if there:
            self._refuse(name, given)
        if name == "cuda":
            func, args, kwargs = Tensor.to, (args[0], torch.device("cpu")), {}
        call, call_kwargs = tree_map(_to_cpu, args), tree_map(_to_cpu, kwargs)
        if self.tape is not None:
            self._keep(given)
        result = func(*tree_map(_host, call), **tree_map(_host, call_kwargs))
        if (
            name.endswith("_")
            and not name.endswith("__")
            and args
            and result is not None
            and isinstance(args[0], OnGpu)
        ):
            result = args[0]
        if target:
            result = tree_map(_on_gpu, result)
            if self.tape is not None:
                self.tape.append((func, call, call_kwargs, tree_leaves(result)))
        return result

    def _keep(self, given: list[Tensor]) -> None:
        for x in map(_host, given):
            held = torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage())
            self.untouched.setdefault(held.data_ptr(), (held, held.clone()))

    def restore(self) -> None:
        for held, before in self.untouched.values():
            held.copy_(before)
        self.untouched.clear()

    def _attribute(self, func: Any, args: tuple[Any, ...]) -> Any:
        x = args[0]
        if not isinstance(x, OnGpu):
            return func(*args)
        attribute = getattr(func.__self__, "__name__", "")
        special = {"device": CUDA, "is_cuda": True, "is_cpu": False}
        return special[attribute] if attribute in special else tree_map(_on_gpu, func(_host(x)))

    def _target(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], there: bool) -> bool:
        """Whether the result is on the device."""
        if name in TO_HOST:
            return name in KEPT and there
        if name == "cuda":
            return True
        devices = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)]
        if name == "to":
            devices += [torch.device(x) for x in args[1:2] if isinstance(x, str)]
            devices += [x.device for x in args[1:2] if isinstance(x, Tensor)]
        if isinstance(kwargs.get("device"), str):
            devices.append(torch.device(kwargs["device"]))
        return devices[0].type == "cuda" if devices else there

    def _refuse(self, name: str, given: list[Tensor]) -> None:
        if name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy; copy it to host memory first")
        if self.tape is not None and name in TO_HOST - {"__len__"}:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        elsewhere = [x for x in given if not isinstance(x, OnGpu) and x.dim() > 0]
        if elsewhere and name not in MAY_MIX:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found cuda:0 and cpu")


def _to_cpu(x: Any) -> Any:
    names = isinstance(x, str) and x.partition(":")[0] == "cuda"
    return torch.device("cpu") if names or (isinstance(x, torch.device) and x.type == "cuda") else x


class Graph:
    """The calls of a capture."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def replay(self) -> None:
        for func, args, kwargs, before in self.calls:
            with torch._C.DisableTorchFunction():
                again = func(*tree_map(_host, args), **tree_map(_host, kwargs))
                for old, new in zip(before, tree_leaves(again), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        _host(old).copy_(new)


def _why_not(
    known: Callable[..., str | None], name: str, op: str, device: torch.device, *dtypes: torch.dtype
) -> str | None:
    """On the device Triton, CUDA and the reference serve everything."""
    return known(name, op, device, *dtypes) if device.type == "cpu" else "not on a GPU" if name == "cpu" else None


def _implementation(known: Callable[..., Any], op: str, device: torch.device, *dtypes: torch.dtype) -> Any:
    """What runs for the backend that was asked for: ops are given the values on the CPU."""
    if backends.forced_backend() in (None, "reference") and FP8 not in dtypes:
        return known(op, device, *dtypes)
    with backends.backend("reference" if FP8 in dtypes else "cpu"):
        return known(op, device, *dtypes)


def _called_as_op(op: str, *given: object, **named: object) -> object:
    """A function of the CUDA backend, whose kernels are not here."""
    handle = getattr(torch.ops.saffron_kernels, op).default
    names = [argument.name for argument in handle._schema.arguments]
    return handle(*{**dict.fromkeys(names), **dict(zip(names, given, strict=False)), **named}.values())


class _Generator(_GENERATOR):  # type: ignore[misc, valid-type]
    """Of any device."""

    def __new__(cls, device: object = "cpu") -> Any:
        return _GENERATOR()


def _assert_close(actual: object, expected: object, **options: Any) -> None:
    places = [{x.device for x in tree_leaves(side) if isinstance(x, Tensor)} for side in (actual, expected)]
    assert places[0] == places[1], f"on {places[0]} and {places[1]}"
    with torch._C.DisableTorchFunction():
        _ASSERT_CLOSE(tree_map(_host, actual), tree_map(_host, expected), **options)


class _Stream:
    cuda_stream, device = 0, CUDA

    def __init__(self, *given: object, **options: object) -> None: ...

    def wait_stream(self, other: object) -> None:
        """One stream after the other is all there is."""

    synchronize = record = wait_event = lambda self, *given: None


class _Event(_Stream):
    def elapsed_time(self, other: object) -> float:
        return 10.0


@contextlib.contextmanager
def pretended(patches: pytest.MonkeyPatch) -> Iterator[Pretend]:
    """Within the block there is a GPU."""
    patch = patches.setattr
    mode = Pretend()

    @contextlib.contextmanager
    def capturing(graph: Graph, *given: object, **options: object) -> Iterator[None]:
        mode.tape = graph.calls
        try:
            yield
        finally:
            mode.tape = None
            with torch._C.DisableTorchFunction():
                mode.restore()

    def anything(*given: object, **options: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    properties = SimpleNamespace(L2_cache_size=1 << 12, multi_processor_count=132, total_memory=1 << 37)
    for name, value in {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_capability": lambda *_: (9, 0), "get_device_name": lambda *_: "pretended",
        "get_device_properties": lambda *_: properties, "synchronize": lambda *_: None, "Stream": _Stream,
        "Event": _Event, "stream": anything, "current_stream": lambda *_: _Stream(), "set_stream": lambda _: None,
        "device_of": anything, "device": anything, "CUDAGraph": Graph, "graph": capturing, "manual_seed_all": anything,
        "is_current_stream_capturing": lambda: mode.tape is not None, "empty_cache": lambda: None,
        "is_bf16_supported": lambda *_: True, "_lazy_init": lambda: None,
    }.items():  # fmt: skip
        patch(torch.cuda, name, value)
    patch(torch.cuda.profiler, "start", lambda: None)
    patch(torch.cuda.profiler, "stop", lambda: None)
    patch(torch.cuda.nvtx, "range", anything)
    patch(torch, "Generator", _Generator)
    patch(torch.testing, "assert_close", _assert_close)
    patch(torch, "compile", lambda function, **options: function)
    triton = ModuleType("pretended_triton")
    patches.setitem(sys.modules, triton.__name__, triton)
    patches.setitem(backends.MODULES, "triton", triton.__name__)  # type: ignore[arg-type]
    triton.why_not = lambda device, dtype: "not on a CPU"  # type: ignore[attr-defined]
    for op in ops.NAMES:
        patch(cuda, op, functools.partial(_called_as_op, op))
        setattr(triton, op, functools.partial(_called_as_op, op))
    patch(cuda, "raise_faults", lambda device: None)
    patch(backends, "why_not", functools.partial(_why_not, backends.why_not))
    patch(schemas, "implementation", functools.partial(_implementation, backends.implementation))
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with mode:
            yield mode
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
