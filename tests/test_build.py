"""The build: what it needs, what it says when that is missing, what it packs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent.parent
INSTALL_HINT = "apt install g++"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.fixture
def setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_import_needs_neither_triton_nor_cuda() -> None:
    program = """
import sys
sys.modules["triton"] = None  # any import of it fails
import saffron_kernels
from saffron_kernels._native import Trie
assert Trie(3).capacity == 3
import torch
assert not torch.cuda.is_initialized()
"""
    result = run(sys.executable, "-c", program, CUDA_VISIBLE_DEVICES="")
    assert result.returncode == 0, result.stderr


def test_setup_is_short() -> None:
    assert len((ROOT / "setup.py").read_text().splitlines()) <= 120


def test_native_code_includes_no_torch_header() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    assert len(sources) > 3
    for source in sources:
        assert not any(
            line.lstrip().startswith("#include") and any(name in line for name in ("torch/", "ATen/", "c10/"))
            for line in source.read_text().splitlines()
        ), source


def test_compiler_is_found_or_named(setup_script, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    compiler = tmp_path / "clang++"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_script.find_compiler() == str(compiler)
    monkeypatch.setenv("CXX", "icpx -O3")
    with pytest.raises(CompileError, match="found CXX=icpx -O3, which is not on PATH"):
        setup_script.find_compiler()
    monkeypatch.setenv("CXX", f"{compiler} -O3")
    assert setup_script.find_compiler() == str(compiler)


def test_without_a_compiler_the_build_says_in_one_line_what_to_install(setup_script, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompileError, match="C\\+\\+17 compiler") as caught:
        setup_script.find_compiler()
    assert INSTALL_HINT in str(caught.value) and "\n" not in str(caught.value)
    build = ("build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    result = run(sys.executable, "setup.py", "-q", *build, PATH=str(tmp_path), CXX="", SAFFRON_CUDA="auto")
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: saffron-kernels needs a C++17 compiler")


def test_source_distribution_has_what_the_build_needs(tmp_path) -> None:
    command = ("egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path))
    result = run(sys.executable, "setup.py", "-q", *command)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("saffron_kernels-*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    native = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")}
    files = {"CMakeLists.txt", "setup.py", "pyproject.toml", "constraints.txt", "LICENSE", "tests/ops/test_trie.py"}
    assert native | files <= names
    assert not [name for name in names if name.endswith(".so")]


def test_packages_carry_every_file_of_theirs(tmp_path) -> None:
    command = ("egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(tmp_path))
    result = run(sys.executable, "setup.py", "-q", *command)
    assert result.returncode == 0, result.stderr
    packed = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")}
    assert {"saffron_kernels/py.typed", "saffron_kernels/_native.pyi", "saffron/py.typed"} <= packed
    for source in (ROOT / "saffron_kernels", ROOT / "python/saffron"):
        files = [p for p in source.rglob("*") if p.is_file() and p.suffix not in (".pyc", ".so")]
        assert {str(p.relative_to(source.parent)) for p in files} <= packed


@pytest.mark.skipif(not shutil.which("awk"), reason="needs awk")
def test_ci_refuses_a_readme_without_the_one_test_command(tmp_path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    fence = "```"
    for section in ("", f"## Set up\n{fence}\npytest\npytest -q\n{fence}\n", f"## Other\n{fence}\npytest\n{fence}\n"):
        (tmp_path / "README.md").write_text(f"# Name\n{section}")
        result = run("bash", str(tmp_path / ".ci/run"), PYTHON="false")
        assert result.returncode == 1 and "need exactly one fenced line with pytest" in result.stderr
