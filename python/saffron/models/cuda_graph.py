"""A call of many kernels as a CUDA graph, and two calls at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

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


def at_once(side: torch.cuda.Stream | None, on_main: Callable[[], Any], on_side: Callable[[], Any]) -> list[Any]:
    """What two calls return that need nothing of each other; what is launched here afterwards waits for both.

    `side` is a stream of the same GPU that nothing else uses; within a capture the second call is a branch of the
    graph. Its memory is not reused too early: all that runs there waits for what was launched here before. None: a CPU.
    """
    if side is None:
        return [on_main(), on_side()]
    main = torch.cuda.current_stream(side.device)
    side.wait_stream(main)
    try:
        with torch.cuda.stream(side):
            of_side = on_side()
        of_main = on_main()
    except Exception:
        with contextlib.suppress(RuntimeError):  # refused where a capture has failed, which is not the reason
            main.wait_stream(side)
        raise
    main.wait_stream(side)
    return [of_main, of_side]
