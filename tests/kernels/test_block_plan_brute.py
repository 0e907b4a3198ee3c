"""The plans of 100,000 random block tables, as the CPU backend makes them, against brute force."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(__file__).parent / "plans" / "main.cpp", ROOT / "csrc" / "cpu" / "block_plan.cpp"


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs g++ or clang++")
    built = tmp_path_factory.mktemp("plans") / "main"
    flags = "-std=c++17", "-O1", "-Wall", "-Wextra", f"-I{ROOT / 'csrc'}"
    subprocess.run([compiler, *flags, *map(str, SOURCES), "-o", str(built)], check=True)
    return built


def test_every_table_is_planned_right(program: Path) -> None:
    ran = subprocess.run([program, "100000"], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "")


def test_a_wrong_plan_is_seen(program: Path) -> None:
    """An interval that ends one query too early."""
    ran = subprocess.run([program, "50", "wrong"], capture_output=True, text=True)
    assert ran.returncode == 1 and "planned wrong" in ran.stdout
