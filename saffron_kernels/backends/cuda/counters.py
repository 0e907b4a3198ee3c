"""Counters by which the blocks of a launch find out who comes last."""

from __future__ import annotations

import torch
from torch import Tensor

from saffron_kernels.backends.cuda import native

# By device and stream: launches that share counters must not overlap. And the graph that the stream was captured into
# when they were made; 0: none. Nothing keeps a graph's counters once its capture has ended: their memory is the graph's
# own, and each replay zeroes them before the first launch.
_counters: dict[tuple[torch.device, int], Tensor] = {}
_graphs: dict[tuple[torch.device, int], int] = {}


def counters(tensor: Tensor) -> Tensor:
    """Zeros `[COUNTERS]` int32 for the stream of `tensor`; kernels leave them so.

    A graph that is being captured gets its own, zeroed at its beginning.
    """
    stream, launchers = native.stream(tensor), native.module(tensor)
    key, graph = (tensor.device, stream), launchers.capture_id(stream)
    if _graphs.get(key) != graph:
        _counters[key] = torch.zeros(launchers.COUNTERS, dtype=torch.int32, device=tensor.device)
        _graphs[key] = graph
    return _counters[key]
