"""Counters by which the blocks of a launch find out who comes last."""

from __future__ import annotations

import torch
from torch import Tensor

from saffron_kernels.backends.cuda import native

# By device, stream and captured graph: launches that share counters must not overlap.
_counters: dict[tuple[torch.device, int, int], Tensor] = {}


def counters(tensor: Tensor) -> Tensor:
    """Zeros `[COUNTERS]` int32 for the stream of `tensor`; kernels leave them so.

    A graph that is being captured gets its own, zeroed at its beginning.
    """
    stream, launchers = native.stream(tensor), native.module(tensor)
    key = tensor.device, stream, launchers.capture_id(stream)
    if key not in _counters:
        _counters[key] = torch.zeros(launchers.COUNTERS, dtype=torch.int32, device=tensor.device)
    return _counters[key]
