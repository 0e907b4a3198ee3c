"""Builds the module that executes the CUDA kernels on the CPU: `csrc/cuda` as C++, against the headers of `cuda/host`.

Built once for the same sources, into the temporary folder of the machine. Needs g++ or clang++; no CUDA.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "cuda"
HOST = ROOT / "tests" / "kernels" / "cuda" / "host"

# longjmp between stacks is what fibers do; glibc's fortified one takes it for an error.
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra", "-Werror")
AS_KERNEL = (
    "-x",
    "c++",
    "-include",
    str(HOST / "device.h"),
    f"-I{HOST}",
    f"-I{ROOT / 'csrc'}",
    "-Wno-unknown-pragmas",
)


def module() -> str:
    """Path of the built module; skips the test where there is no compiler.

    Raises:
        CalledProcessError: the sources do not compile; the compiler's messages went to stderr.
    """
    # torch carries the headers of pybind11; the package itself is needed only to build.
    python = (f"-I{Path(torch.__file__).parent / 'include'}", f"-I{sysconfig.get_paths()['include']}")
    kernels = {kernel: AS_KERNEL for kernel in sorted(KERNELS.rglob("*.cu"))}
    return build(kernels | {KERNELS / "bindings.cpp": (f"-I{ROOT / 'csrc'}", *python)})


def build(sources: dict[Path, tuple[str, ...]]) -> str:
    """Path of a shared library of these sources, each with its own options, and of the scheduler."""
    return _build(tuple(sources.items()))


@functools.cache
def _build(sources: tuple[tuple[Path, tuple[str, ...]], ...]) -> str:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("executing CUDA kernels on the CPU needs g++ or clang++")
    read = sorted(p for folder in (KERNELS, HOST) for p in folder.rglob("*") if p.is_file())
    digest = hashlib.sha256(repr((compiler, _FLAGS, sources, torch.__version__)).encode())
    for source in (*read, *(source for source, _ in sources), Path(__file__)):
        digest.update(source.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"saffron-cuda-host-{os.getuid()}-{digest.hexdigest()[:16]}"
    folder.mkdir(mode=0o700, exist_ok=True)
    built = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"

    def compile_one(job: tuple[Path, tuple[str, ...]]) -> str:
        made = folder / f"{job[0].stem}.o"
        subprocess.run((compiler, *_FLAGS, *job[1], "-c", str(job[0]), "-o", str(made)), check=True)
        return str(made)

    with open(folder / "lock", "w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of one test run wait for each other
        if not built.exists():
            made = list(pool.map(compile_one, (*sources, (HOST / "scheduler.cpp", ()))))
            unfinished = built.with_suffix(".unfinished")
            subprocess.run((compiler, "-shared", *made, "-o", str(unfinished)), check=True)
            unfinished.rename(built)
    return str(built)
