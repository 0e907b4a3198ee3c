"""A call of many kernels as a CUDA graph, and two calls at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import torch

Replay = Callable[[], object]

# All captures of PyTorch share a stream, and streams come from a small pool: of two threads one waits here.
_one_at_a_time = threading.RLock()


def run_before_capture(body: Replay, device: torch.device) -> None:
    """Runs `body` as it is, to its end: what is made at a first call must not be made within a capture."""
    with _one_at_a_time:
        body()
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def capture_on_gpu(body: Replay) -> Replay:
    """Captures `body`, which has run before, in a CUDA graph; returns what replays it.

    Other threads may use the GPU meanwhile. After a failure this thread is on the stream that it was on before.

    Raises:
        RuntimeError: `body` did what a graph cannot hold; the message is that of the call that was refused.
    """
    failure: BaseException | None = None
    with _one_at_a_time:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                try:
                    body()
                except BaseException as error:
                    failure = error
                    raise
        except BaseException as error:
            torch.cuda.set_stream(stream)
            # Ending the capture fails too, and its message says only that something else has failed before.
            failure = failure or error
            if not isinstance(failure, Exception):  # the interruption by a user
                raise failure from None
            raise RuntimeError(str(failure)) from failure
    return graph.replay


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for `at_once`, whose owner must be in one thread at a time; None for a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def at_once(side: torch.cuda.Stream | None, on_main: Callable[[], Any], on_side: Callable[[], Any]) -> list[Any]:
    """What two calls return that need nothing of each other; what is launched here afterwards waits for both.

    Within a capture the second call is a branch of the graph. Its memory is not reused too early: all that runs on
    `side` waits for what its owner launched here before. Without `side` the second call follows the first.
    """
    if side is None:
        return [on_main(), on_side()]
    main = torch.cuda.current_stream(side.device)
    side.wait_stream(main)
    try:
        with torch.cuda.stream(side):
            of_side = on_side()
        of_main = on_main()
    except BaseException:
        with contextlib.suppress(RuntimeError):  # refused where a capture has failed, which is not the reason
            main.wait_stream(side)
        raise
    main.wait_stream(side)
    return [of_main, of_side]
