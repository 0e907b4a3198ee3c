"""What every test of an op is run over: devices, dtypes, backends; and how large a case a backend is given."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import cuda_host
import pytest
import torch
from hypothesis import HealthCheck, settings

from saffron_kernels import backends, schemas
from saffron_kernels.backends import faults

DEVICES = ["cpu"] + ([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# The most work (queries x heads x tokens, rows x vocabulary, ...) in a case for a backend that is slow on a device.
INTERPRETED = 20_000  # Triton on CPU tensors: its interpreter runs the kernels in Python
UNLIMITED = 1 << 40

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# Triton runs on GPUs and in its interpreter; with that the others are not tested again: nothing of them changes.
BACKENDS = ["triton"] if INTERPRETING else [b for b in backends.MODULES if b != "triton" or len(DEVICES) > 1]

_why_not = functools.cache(backends.why_not)  # an import that fails is tried again every time

# Fixtures that choose a backend hold for all examples of a test, which is what the suppressed check warns of.
settings.register_profile("saffron", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("saffron")


def pytest_report_header() -> str:
    more = "" if "triton" in BACKENDS else " (TRITON_INTERPRET=1: on Triton)"
    return f"ops are tested on: {', '.join(BACKENDS)}{more}"


@pytest.fixture(autouse=True)
def eager_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad content of tensors is an error at once on GPUs too; tests of deferred errors turn this off again."""
    monkeypatch.setattr(faults, "_EAGER", True)


@pytest.fixture(autouse=True)
def choices_made_again() -> Iterator[None]:
    """Tests change the environment and the tables that backends are chosen by."""
    schemas.forget_choices()
    yield
    schemas.forget_choices()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """The storage dtype that the backend must serve."""
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test on one backend by name, or skips it where the backend says that it cannot.

    The op is the one that the test is parametrized with, or `OP` of its file; the dtype is that of the `dtype` fixture.
    """
    name = request.param
    if name == "cuda" and device.type == "cpu":
        monkeypatch.setenv("SAFFRON_CUDA_HOST", cuda_host.module())
    op = request.node.callspec.params.get("op") or request.module.OP
    storage = request.getfixturevalue("dtype") if "dtype" in request.fixturenames else torch.float32
    reason = _why_not(name, op, device, storage)
    if reason is not None:
        pytest.skip(f"{name}: {op} on {device} in {storage}: {reason}")
    interpreted = name == "triton" and device.type == "cpu"
    if interpreted and not request.node.originalname.startswith("test_random"):
        if storage == torch.float16:
            pytest.skip("interpreted: no kernel asks whether 16 bits are float16; random inputs and GPUs have both")
        if storage == torch.bfloat16 and not request.module.__name__.endswith("test_tree_attention"):
            pytest.skip("interpreted: all but attention turns 16 bits into fp32 as it loads; its own tests have them")
    with backends.backend(name):
        yield name


@pytest.fixture
def limit(backend: str, device: torch.device) -> int:
    """The most work that a case may hold for this backend here."""
    return INTERPRETED if backend == "triton" and device.type == "cpu" else UNLIMITED


@pytest.fixture
def examples(backend: str, limit: int, device: torch.device) -> settings:
    """How many random inputs hypothesis tries on this backend: fewer where the CPU plays the GPU."""
    host = 12 if backend == "cuda" and device.type == "cpu" else 40
    return settings(max_examples=host if limit == UNLIMITED else 3)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a backend asks for uninitialised holds NaN (or nonsense indices): reading it before writing shows."""

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point():
            return tensor.fill_(torch.nan)
        return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max - 7)

    def wrap(allocate):
        return lambda *args, **kwargs: poison(allocate(*args, **kwargs))

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, wrap(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, wrap(getattr(torch.Tensor, name)))
