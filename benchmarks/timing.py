"""The device that is measured: how long calls take on it, in turn, and what it can do at most."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAX_ROUNDS = 200
PRODUCT_SECONDS = 0.1  # a matrix product on a CPU that takes longer says enough


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each round, sorted."""

    seconds: list[float]

    def quantile(self, q: float) -> float:
        return self.seconds[min(len(self.seconds) - 1, int(q * len(self.seconds)))]

    @property
    def median(self) -> float:
        return self.quantile(0.5)


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def time_in_turn(calls: Mapping[str, Callable[[], object]], seconds: float, warm: bool = False) -> dict[str, Times]:
    """Times calls in turn, so that a disturbance of the machine falls on all of them; 3 rounds at least.

    On a CPU a call that takes longer than `seconds` by itself is timed once: it is not close to any other.

    `warm`: each call runs once before it is timed, and the cache of a GPU is left as that call left it.
    """
    on_gpu = DEVICE.type == "cuda"
    one_round = functools.partial(_round_on_gpu, warm=warm) if on_gpu else _round_on_host
    first = dict(zip(calls, _round_on_host(calls.values()), strict=True))
    synchronize()
    slow = {name: Times([taken]) for name, taken in first.items() if not on_gpu and taken > max(seconds, 0.1)}
    timed = {name: call for name, call in calls.items() if name not in slow}
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while timed and (len(rounds) < 3 or (time.perf_counter() < end and len(rounds) < MAX_ROUNDS)):
        rounds.append(one_round(timed.values()))
    found = {name: Times(sorted(taken)) for name, taken in zip(timed, zip(*rounds, strict=True), strict=False)}
    return {name: (slow | found)[name] for name in calls}


def _round_on_host(calls: Iterable[Callable[[], object]]) -> list[float]:
    taken = []
    for call in calls:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken


def _round_on_gpu(calls: Iterable[Callable[[], object]], warm: bool) -> list[float]:
    events = []
    for call in calls:
        if warm:
            call()
        else:
            _cache_filler().zero_()  # takes some 60 us, in which the host is already preparing the call
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        events.append((start, stop))
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in events]


@functools.cache
def _cache_filler() -> Tensor:
    """Several times the size of the chip's cache: writing it evicts what an earlier call has left there."""
    size = max(1 << 28, 4 * torch.cuda.get_device_properties(DEVICE).L2_cache_size)
    return torch.empty(size, dtype=torch.uint8, device=DEVICE)


@functools.cache
def copy_rate() -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.randn(1 << (26 if DEVICE.type == "cpu" else 28), device=DEVICE)
    target = torch.empty_like(source)
    best = time_in_turn({"copy": lambda: target.copy_(source)}, 1.0)["copy"].seconds[0]
    return 2 * source.nbytes / best


@functools.cache
def matmul_rate(dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product; in fp32 for dtypes of indices.

    On a CPU at least that of fp32: numbers that it cannot multiply as they are can be widened.
    """
    if DEVICE.type != "cpu" or not dtype.is_floating_point:
        return product_rate(dtype if dtype.is_floating_point else torch.float32)
    return max(product_rate(dtype), product_rate(torch.float32))


@functools.cache
def product_rate(dtype: torch.dtype) -> float:
    """Of a product in this dtype as PyTorch computes it, which may be by emulation."""
    for size in (256, 512, 1024, 2048) if DEVICE.type == "cpu" else (8192,):
        a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
        best = time_in_turn({"matmul": lambda a=a, b=b: a @ b}, 0.5)["matmul"].seconds[0]
        if DEVICE.type == "cpu" and best > PRODUCT_SECONDS:  # without instructions for this dtype
            break
    return 2 * size**3 / best
