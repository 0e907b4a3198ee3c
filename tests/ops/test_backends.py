"""Which backend runs: the first of the table that can, or the one that was asked for and no other."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
import torch

import saffron_kernels
from saffron_kernels import BackendError, backends
from saffron_kernels import backend as use_backend
from saffron_kernels.backends import reference

ADDED = "a_backend_of_this_test"


def plan(device: str = "cpu") -> list[torch.Tensor]:
    return [torch.tensor(x, dtype=torch.int32, device=device) for x in ([0], [0], [1], [0], [1])]


def make_backend() -> types.ModuleType:
    """A backend that serves one op, on fp32 and int32, and counts its calls."""
    module = types.ModuleType(ADDED)
    module.calls = 0

    def advance_tree(slot, begin, end, parents, new_slots, queries, count):
        module.calls += 1
        return reference.advance_tree(slot, begin, end, parents, new_slots, queries, count)

    def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
        return None if dtype in (torch.float32, torch.int32) else f"no {dtype} here"

    module.advance_tree, module.why_not = advance_tree, why_not
    return module


sys.modules[ADDED] = make_backend()


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """That backend, in the table for the time of one test."""
    monkeypatch.setitem(backends.MODULES, ADDED, ADDED)
    sys.modules[ADDED].calls = 0
    return sys.modules[ADDED]


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs code in a fresh process."""
    variables = {k: v for k, v in os.environ.items() if k != "SAFFRON_BACKEND"} | environment
    return subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=120)


def test_forced_backend_runs(added) -> None:
    with use_backend(ADDED):
        saffron_kernels.advance_tree(*plan(), 1)
    assert added.calls == 1
    saffron_kernels.advance_tree(*plan(), 1)
    assert added.calls == 1, "still forced after the block"


def test_first_that_can_is_chosen(added, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.PREFERENCE, "cpu", (ADDED, "reference"))
    saffron_kernels.advance_tree(*plan(), 1)
    assert added.calls == 1
    tokens, _, _ = saffron_kernels.nucleus(torch.zeros(1, 4), 0.5)  # an op it does not serve
    assert tokens.tolist() == [0, 1]


def test_forced_backend_does_not_fall_back(added) -> None:
    with use_backend(ADDED):
        with pytest.raises(BackendError, match=f"{ADDED}.*nucleus.*does not serve this op"):
            saffron_kernels.nucleus(torch.zeros(1, 4), 0.5)
        with pytest.raises(BackendError, match="nucleus on cpu in torch.float64: no torch.float64 here"):
            saffron_kernels.nucleus(torch.zeros(1, 4, dtype=torch.float64), 0.5)


def test_backend_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.MODULES, "broken", "saffron_kernels.backends.there_is_none")
    monkeypatch.setitem(backends.PREFERENCE, "cpu", ("broken", "reference"))
    saffron_kernels.nucleus(torch.zeros(1, 4), 0.5)  # chosen by the table: the next one runs
    with use_backend("broken"), pytest.raises(BackendError, match="cannot be imported"):
        saffron_kernels.nucleus(torch.zeros(1, 4), 0.5)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="'nosuch'.*reference"), use_backend("nosuch"):
        pass
    saffron_kernels.nucleus(torch.zeros(1, 4), 0.5)


def test_blocks_nest_and_end_with_errors(added) -> None:
    with use_backend("reference"):
        with pytest.raises(RuntimeError, match="stop"), use_backend(ADDED):
            saffron_kernels.advance_tree(*plan(), 1)
            raise RuntimeError("stop")
        saffron_kernels.advance_tree(*plan(), 1)
    assert added.calls == 1


def test_block_wins_over_the_environment(added, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFFRON_BACKEND", "nosuch")
    with use_backend(ADDED):
        saffron_kernels.advance_tree(*plan(), 1)
    assert added.calls == 1


def test_environment_forces_a_fresh_process() -> None:
    """And importing the package imports no backend: each comes in when it is first considered."""
    code = """
import sys, torch, saffron_kernels
from saffron_kernels.backends import MODULES
print([m for m in MODULES.values() if m in sys.modules])
print(saffron_kernels.nucleus(torch.zeros(1, 4), 0.5)[0].tolist())
print([n for n, m in MODULES.items() if m in sys.modules])
"""
    result = run(code, SAFFRON_BACKEND="reference")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["[]", "[0, 1]", "['reference']"]
    result = run(code, SAFFRON_BACKEND="nosuch")
    assert result.returncode != 0 and "ValueError: SAFFRON_BACKEND: got 'nosuch'" in result.stderr


def test_environment_does_not_fall_back(added, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFFRON_BACKEND", ADDED)
    with pytest.raises(BackendError, match="does not serve this op"):
        saffron_kernels.nucleus(torch.zeros(1, 4), 0.5)


@pytest.mark.parametrize("name", list(backends.MODULES))
def test_every_backend_of_the_table(name) -> None:
    """It can be imported, or says why not; and every op it serves is one of ours."""
    reason = backends.why_not(name, "advance_tree", torch.device("cpu"), torch.int32)
    assert reason is None or isinstance(reason, str)
    for order in (*backends.PREFERENCE.values(), backends.FALLBACK):
        assert set(order) <= set(backends.MODULES) and order[-1] == "reference"


def test_threads_choose_for_themselves(added) -> None:
    import threading

    with use_backend(ADDED):
        thread = threading.Thread(target=lambda: saffron_kernels.advance_tree(*plan(), 1))
        thread.start()
        thread.join()
    assert added.calls == 0


def test_every_storage_dtype_counts() -> None:
    """A backend that serves the first argument but not the third is not chosen, and fails where it is forced."""
    rows = torch.arange(2, dtype=torch.int32)
    logits, hidden = torch.randn(2, 5), torch.randn(2, 3, dtype=torch.float64)
    arguments = (logits, hidden, torch.randn(5, 3, dtype=torch.float64), None, None, 0.0, rows, 2, 1, 0.5)
    expected = saffron_kernels.multifurcate(logits.double(), *arguments[1:])
    for ours, theirs in zip(saffron_kernels.multifurcate(*arguments), expected, strict=True):
        assert torch.equal(ours, theirs)
    with backends.backend("cpu"), pytest.raises(backends.BackendError, match="float64"):
        saffron_kernels.multifurcate(*arguments)
