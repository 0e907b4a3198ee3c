"""Compiles every CUDA kernel for GPUs that need not be here, each source once for an architecture.

Needs only the standard library, so that CI can start it (`python tests/support/cuda_cubins.py`) while packages are
installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "cuda"

# As csrc/cuda/CMakeLists.txt has it: all but Hopper's own from the PTX for 8.0, and so compiled by nvcc's front once.
PTX_OF = {"80": "80", "86": "80", "89": "80", "90a": "90a", "100": "80", "120": "80"}
ARCHS = tuple(PTX_OF)
FLAGS = ("-std=c++17", "-Werror", "all-warnings")
# Every warning is an error. How much local memory a kernel uses (spills, arrays that are not in registers) is printed.
PTXAS_FLAGS = ("-Werror", "all-warnings", "-Xptxas", "-v")


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def compile_sources(arch: str) -> dict[str, str]:
    """Machine code for one architecture: cubin file -> what `ptxas -v` said. Compiled once for the same sources.

    Raises:
        CalledProcessError: a warning or an error; the compiler's messages went to stderr.
    """
    nvcc = find_nvcc()
    assert nvcc, "nvcc is not installed"
    files = sorted(KERNELS.rglob("*.cu*"))
    digest = hashlib.sha256(repr((nvcc, FLAGS, PTXAS_FLAGS)).encode() + (KERNELS / "ops.h").read_bytes())
    for file in files:
        digest.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"saffron-cubin-{os.getuid()}-{digest.hexdigest()[:16]}"
    folder.mkdir(mode=0o700, exist_ok=True)
    virtual = PTX_OF[arch]

    def compile_one(source: Path) -> tuple[str, str]:
        ptx, cubin = folder / f"{source.stem}.{virtual}.ptx", folder / f"{source.stem}.{arch}.cubin"
        log = cubin.with_suffix(".log")
        if not ptx.exists():
            target = ("-gencode", f"arch=compute_{virtual},code=compute_{virtual}", "-ptx")
            _run((nvcc, *FLAGS, f"-I{ROOT / 'csrc'}", *target, str(source)), ptx)
        if not log.exists():
            said = _run((nvcc, *PTXAS_FLAGS, f"-arch=sm_{arch}", "-cubin", str(ptx)), cubin)
            unfinished = log.with_suffix(".unfinished")
            unfinished.write_text(said)
            unfinished.rename(log)
        return str(cubin), log.read_text()

    largest_first = sorted((f for f in files if f.suffix == ".cu"), key=_size_of_code, reverse=True)
    with open(folder / "lock", "w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of one test run wait for each other
        return dict(pool.map(compile_one, largest_first))


def _size_of_code(source: Path) -> int:
    """Roughly: most of tree_attention is in its headers."""
    return source.stat().st_size + (100_000 if source.stem.startswith("mma_") else 0)


def _run(command: tuple[str, ...], output: Path) -> str:
    """Runs a compiler that writes `output`, which then is whole if it is there; returns what it said."""
    unfinished = output.with_name(f"unfinished-{output.name}")
    result = subprocess.run((*command, "-o", str(unfinished)), capture_output=True, text=True)
    said = result.stdout + result.stderr
    if result.returncode:
        print("\n".join(x for x in said.splitlines() if "error" in x or "warning" in x), file=sys.stderr)
        result.check_returncode()
    unfinished.rename(output)
    return said


if __name__ == "__main__":
    if find_nvcc() is None:
        sys.exit("nvcc is not installed")
    for each in ARCHS:
        print(f"sm_{each}: {len(compile_sources(each))} files")
