"""Small searches for many tests: requests, what of two results must be equal, and captured steps on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from saffron.search import Request, SaffronSearch
from saffron.search import saffron as module
from saffron.search.captured_step import CapturedStep
from saffron.search.config import SearchConfig
from saffron.search.result import SearchResult

CONFIG = SearchConfig(width=5, top_p=0.8, max_new_tokens=12, min_new_tokens=3)
REQUESTS = [
    Request((0, 5, 6, 7), (0, 4, 6, 7)),
    Request((0, 5, 6), (0, 4, 6)),
    Request((0, 30, 31, 32, 33, 34, 35), (0, 4, 31, 32, 33, 34, 35)),
    Request((0, 30, 31, 32, 40), (0, 4, 31, 32, 33, 34, 35)),  # another prefill: the MRM reads the same text
]


def comparable(result: SearchResult) -> dict[str, object]:
    data = result.to_json()
    del data["score"], data["cost"]["seconds"]
    return data


def recorded(body: Callable[[], object]) -> Callable[[], object]:
    """What a CUDA graph is on the CPU: the ops of one run with the tensors they worked on, to be run again.

    Tracing fails where the host would have to know what a tensor holds. It runs the body, which a graph does not: the
    first replay has been had then.
    """

    def run(dummy: Tensor) -> Tensor:
        body()
        return dummy

    graph = make_fx(run)(torch.zeros(()))
    replays = iter([lambda: None])
    return lambda: next(replays, partial(graph, torch.zeros(())))()


def make(monkeypatch: pytest.MonkeyPatch, capture: object, policy, mrm, config=CONFIG) -> SaffronSearch:
    """A search in captured steps, on the CPU."""
    search = SaffronSearch(policy, mrm, config)
    search.capture = True
    monkeypatch.setattr(module, "CapturedStep", partial(CapturedStep, capture=capture))
    return search


def same(results, expected) -> None:
    for result, other in zip(results, expected, strict=True):
        assert comparable(result) == comparable(other)
        assert result.score == pytest.approx(other.score, abs=1e-4)
