"""A call of many kernels as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch

Replay = Callable[[], object]


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
