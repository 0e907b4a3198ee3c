"""Threads that take turns far more often than Python lets them: what they share is met half done."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable


def in_threads(count: int, client: Callable[[int], object], interval: float = 1e-5) -> None:
    """Runs `client(number)` in each of `count` threads, and waits for all. `interval`: seconds of a turn."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(interval)
    try:
        threads = [threading.Thread(target=client, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
