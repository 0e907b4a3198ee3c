"""Saffron search on the CUDA kernels, which the CPU executes: each op against the reference, on its own input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import cuda_host
import pytest
import tiny
import torch
from searches import CONFIG, REQUESTS, comparable, make
from torch import Tensor

from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.search import SaffronSearch
from saffron_kernels import backend as use_backend
from saffron_kernels import backends, schemas
from saffron_kernels.backends import cuda, reference


@pytest.fixture(autouse=True)
def executed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run on the CPU."""
    monkeypatch.setenv("SAFFRON_CUDA_HOST", cuda_host.module())


def models() -> tuple[Policy, MultifurcationRewardModel]:
    """In bf16, which attention on tensor cores needs."""
    small = tiny.model(seed=1, hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    unseen = torch.arange(tiny.SHAPE["vocab_size"]) % 5 == 0
    return Policy(tiny.model().bfloat16()), MultifurcationRewardModel(small.bfloat16(), unseen=unseen)


def assert_close(op: str, ours: object, theirs: object) -> None:
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        tolerance = 0.02 if ours.dtype == torch.bfloat16 else 1e-5
        assert torch.allclose(ours.double(), theirs.double(), tolerance, tolerance), op
    elif isinstance(ours, tuple) and isinstance(theirs, tuple):
        for x, y in zip(ours, theirs, strict=True):
            assert_close(op, x, y)
    else:
        assert ours is None and theirs is None


@pytest.mark.parametrize("capturable", [False, True])
def test_every_op_of_a_search_against_the_reference(capturable, monkeypatch) -> None:
    """With static buffers too: places and groups that are unused, a count of tokens on the device."""
    called: set[str] = set()

    def both(name: str, *_: object) -> Callable[..., object]:
        def run(*arguments: object) -> object:
            called.add(name)
            copies = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
            theirs, ours = getattr(reference, name)(*copies), getattr(cuda, name)(*arguments)
            assert_close(name, ours, theirs)
            for written, copy in zip(arguments, copies, strict=True):
                if isinstance(written, Tensor):
                    assert torch.allclose(written.double(), copy.double(), equal_nan=True), name
            return ours

        return run

    monkeypatch.setattr(schemas, "implementation", both)
    config, pair = replace(CONFIG, width=4, max_new_tokens=6), models()
    search = make(monkeypatch, None, *pair, config) if capturable else SaffronSearch(*pair, config)
    results = search.search(REQUESTS[:2])
    assert all(result.tokens for result in results)
    assert {"append_kv", "tree_attention", "multifurcate", "advance_tree"} <= called


def test_search_is_the_same_with_its_steps_on_the_kernels(monkeypatch) -> None:
    """Models in fp32 on the usual backends, so that nothing but `multifurcate` is another."""
    policy, mrm = tiny.pair(3)
    config = replace(CONFIG, width=6)
    expected = SaffronSearch(policy, mrm, config).search(REQUESTS)
    usual, steps = backends.implementation, []

    def mixed(op: str, *given: object) -> Callable[..., object]:
        if op != "multifurcate":
            return usual(op, *given)  # type: ignore[arg-type]
        with use_backend("cuda"):
            chosen = usual(op, *given)  # type: ignore[arg-type]

        def step(*arguments: object) -> object:
            steps.append(op)
            return chosen(*arguments)

        return step

    monkeypatch.setattr(schemas, "implementation", mixed)
    schemas.forget_choices()
    for result, other in zip(SaffronSearch(policy, mrm, config).search(REQUESTS), expected, strict=True):
        assert comparable(result) == comparable(other)
        assert result.score == pytest.approx(other.score, abs=1e-4)
    assert len(steps) == config.max_new_tokens


def test_search_with_the_backend_asked_for_by_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("SAFFRON_BACKEND", "cuda")
    config = replace(CONFIG, width=3, max_new_tokens=4)
    first, second = (SaffronSearch(*models(), config).search(REQUESTS[:2]) for _ in range(2))
    assert [comparable(x) for x in first] == [comparable(x) for x in second]
    assert [x.score for x in first] == [x.score for x in second]
