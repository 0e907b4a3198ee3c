"""The CPU backend under ThreadSanitizer: all ops on several threads, called by two threads at once."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAIN = Path(__file__).parent / "sanitizer" / "main.cpp"
# PyTorch's OpenMP is not instrumented: it would look like a race wherever it makes threads wait.
FLAGS = ("-std=c++17", "-O1", "-g", "-fsanitize=thread", f"-I{ROOT / 'csrc'}", "-DSAFFRON_ISA=generic", "-Wno-psabi")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs g++ or clang++")
    kernels = ROOT / "csrc" / "cpu"
    sources = [file for file in (*kernels.glob("*.cpp"), *kernels.glob("simd/*.cpp")) if file.name != "bindings.cpp"]
    built = tmp_path_factory.mktemp("sanitizer") / "main"
    command = [compiler, *FLAGS, *map(str, sources), str(MAIN), "-o", str(built), "-ldl", "-pthread"]
    made = subprocess.run(command, capture_output=True, text=True)
    if "cannot find" in made.stderr and "tsan" in made.stderr:
        pytest.skip("the compiler comes without ThreadSanitizer")
    assert made.returncode == 0, made.stderr
    return built


def test_no_op_races(program: Path) -> None:
    """And the bits do not depend on the number of threads, or on who else runs."""
    ran = subprocess.run([program], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_race_is_seen(program: Path) -> None:
    ran = subprocess.run([program, "race"], capture_output=True, text=True)
    assert ran.returncode != 0 and "WARNING: ThreadSanitizer: data race" in ran.stderr
