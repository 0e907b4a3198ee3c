"""The CPU kernels with vectors as wide as AVX-512's, on any machine: what only such machines run is computed right."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAIN = Path(__file__).parent / "widths" / "main.cpp"
FLAGS = ("-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", "-DSAFFRON_ISA=generic", "-DSAFFRON_LANES=16", "-Wno-psabi")


def test_attention_with_sixteen_lanes(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs g++ or clang++")
    kernels, built = ROOT / "csrc" / "cpu", tmp_path / "main"
    names = ("flat_trie", "strips", "threads", "tree_attention", "simd/dispatch", "simd/kernels")
    sources = [str(kernels / f"{name}.cpp") for name in names]
    made = subprocess.run(
        [compiler, *FLAGS, *sources, str(MAIN), "-o", str(built), "-ldl", "-pthread"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    ran = subprocess.run([built], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, "")
