"""A call of many kernels as a CUDA graph, and what in a model cannot be part of one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Replay = Callable[[], object]

# RoPE types of transformers whose frequencies depend on the length of the text: it compares positions on the host.
_ROPE_OF_LENGTH = ("dynamic", "longrope")


def capture_on_gpu(body: Replay) -> Replay:
    """Captures `body`, which has run before, in a CUDA graph; returns what replays it.

    Other threads may use the GPU meanwhile. After a failure this thread is on the stream that it was on before.

    Raises:
        RuntimeError: `body` did what a graph cannot hold; the message is that of the call that was refused.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            body()
    except Exception as error:
        torch.cuda.set_stream(stream)
        # Ending the capture fails too, and its message says only that something else has failed before.
        reason = error.__context__ if isinstance(error.__context__, Exception) else error
        raise RuntimeError(str(reason)) from reason
    return graph.replay


def reads_on_the_host(model: nn.Module) -> str | None:
    """Why a step of the model reads from the device, as far as its RoPE is concerned; None if it does not."""
    for name, module in model.named_modules():
        kind = getattr(module, "rope_type", None)
        kinds = kind.values() if isinstance(kind, dict) else [kind]
        for one in kinds:
            if one in _ROPE_OF_LENGTH:
                return f'RoPE of type "{one}" ({name}) looks at the longest position'
    return None
