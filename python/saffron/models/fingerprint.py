"""Which weights a model runs with, cheaply: K and V that were cached with others must not be found again."""

from __future__ import annotations

import sys
from itertools import islice
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from saffron.errors import UnsupportedModelError

_OWN = len(nn.Module().__dict__)  # attributes that every module has; those of its class come after them


def fingerprint(model: nn.Module) -> int:
    """A number that changes when the weights do, or what else decides K and V.

    It looks at the identity of every module, at identity, address, version and dtype of every parameter and buffer,
    at numbers that are attributes of modules (`scaling`, epsilons, ...), at forward hooks and replaced `forward`
    methods of its modules, at the state of PEFT adapters (active, disabled, merged, their scaling), and at autocast;
    not at the numbers in tensors. So a change in place that PyTorch does not count (through `parameter.data`, or of
    parameters made in inference mode) is not noticed.
    """
    seen: list[object] = [torch.is_autocast_enabled(), torch.is_autocast_enabled("cpu")]
    if any(seen):
        seen += [torch.get_autocast_dtype("cuda"), torch.get_autocast_dtype("cpu")]
    for hooks in (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks):
        seen += hooks
    adapter = adapter_class()
    stack = [model]
    while stack:  # `model.modules()` takes three times as long
        module = stack.pop()
        state = module.__dict__
        seen.append(id(module))
        for tensor in state["_parameters"].values():
            if tensor is not None:
                seen.append((id(tensor), _address(tensor), times_written(tensor), tensor.dtype))
        if state["_buffers"]:
            written = any(name.endswith("long_inv_freq") for name in state)  # longrope writes them in every call
            for tensor in state["_buffers"].values():
                if tensor is not None:
                    version = 0 if written else times_written(tensor)
                    seen.append((id(tensor), _address(tensor), version, tensor.dtype))
        for hooks in (state["_forward_hooks"], state["_forward_pre_hooks"]):
            if hooks:  # their keys are numbers that are given once
                seen += [number for number, hook in hooks.items() if not is_ours(hook)]
        if len(state) > _OWN:
            seen += [x for x in islice(state.values(), _OWN, None) if type(x) is float or type(x) is int]
            if "forward" in state and module is not model:  # K and V come from within
                seen.append(id(state["forward"]))
        if isinstance(module, adapter):
            seen += [str(getattr(module, name, None)) for name in _ADAPTER_STATE]
        stack += [child for child in state["_modules"].values() if child is not None]
    return hash(tuple(seen))


_ADAPTER_STATE = ("active_adapters", "disable_adapters", "merged_adapters", "scaling")


def check_adapters(model: nn.Module) -> None:
    """Raises `UnsupportedModelError` for adapters whose effect on a token depends on more than the tokens before it."""
    kind = adapter_class()
    for name, module in model.named_modules():
        if not isinstance(module, kind) or module.disable_adapters:  # type: ignore[attr-defined]
            continue
        variants: dict[str, Any] = getattr(module, "lora_variant", {})
        for hook in module._forward_pre_hooks.values():  # type: ignore[attr-defined]
            if len(getattr(hook, "keywords", {}).get("adapter_names", ())) > 1:
                raise UnsupportedModelError(
                    "adapter_names: one adapter for each row is not served by the trie cache, whose prefixes rows "
                    "share; call set_adapter, and give each adapter a call of its own"
                )
        for adapter in module.active_adapters:  # type: ignore[attr-defined]
            if "ALora" in type(variants.get(adapter)).__name__:
                raise UnsupportedModelError(
                    f"{name}: the adapter {adapter!r} is an aLoRA (alora_invocation_tokens), which begins to act at a "
                    "place that differs from row to row; it is not served by the trie cache"
                )


def adapter_class() -> type:
    """Of PEFT's layers, without an import of PEFT, which takes long."""
    return getattr(sys.modules.get("peft.tuners.tuners_utils"), "BaseTunerLayer", NoneType)


def is_ours(hook: object) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("saffron.")


def times_written(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # of a tensor without storage of its own
        return 0
