"""Whether the CUDA kernels are built: SAFFRON_CUDA, and what is said where nvcc is missing."""

from __future__ import annotations

import importlib.util
from types import ModuleType

import cuda_host
import pytest
from setuptools.errors import CompileError


@pytest.fixture
def setup_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for variable in ("SAFFRON_CUDA", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    spec = importlib.util.spec_from_file_location("setup_script", cuda_host.ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names(script: ModuleType) -> list[str]:
    return [extension.name.rpartition(".")[2] for extension in script.extensions()]


def test_built_where_nvcc_is_found(setup_script, monkeypatch) -> None:
    monkeypatch.setattr(setup_script, "find_nvcc", lambda: "/somewhere/nvcc")
    assert names(setup_script) == ["_native", "_cuda"]
    assert setup_script.extensions()[1].optional, "a build that fails must not take the rest with it"
    monkeypatch.setenv("SAFFRON_CUDA", "on")
    assert names(setup_script) == ["_native", "_cuda"] and not setup_script.extensions()[1].optional
    monkeypatch.setenv("SAFFRON_CUDA", "off")
    assert names(setup_script) == ["_native"]


def test_without_nvcc_everything_else_is_built(setup_script, monkeypatch) -> None:
    monkeypatch.setattr(setup_script, "find_nvcc", lambda: None)
    assert names(setup_script) == ["_native"]
    monkeypatch.setenv("SAFFRON_CUDA", "on")
    with pytest.raises(CompileError, match="SAFFRON_CUDA is on, but nvcc was not found"):
        setup_script.extensions()


def test_other_values_are_refused(setup_script, monkeypatch) -> None:
    monkeypatch.setenv("SAFFRON_CUDA", "yes")
    with pytest.raises(CompileError, match="SAFFRON_CUDA: got 'yes', expected auto, on or off"):
        setup_script.extensions()


def test_nvcc_that_variables_name(setup_script, monkeypatch, tmp_path) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup_script.find_nvcc() == str(nvcc)
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("CUDACXX", str(nvcc))
    assert setup_script.find_nvcc() == str(nvcc)
