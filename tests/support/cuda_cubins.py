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

ARCHS = ("80", "90a")
# Spills and arrays that are not in registers are errors, as is every warning.
FLAGS = ("-std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v,--warn-on-spills,--warn-on-local-memory-usage")


def find_nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def compile_sources(arch: str) -> dict[str, str]:
    """Machine code for one architecture: cubin file -> what `ptxas -v` said. Compiled once for the same sources.

    Raises:
        CalledProcessError: a warning, a spill or an error; the compiler's messages went to stderr.
    """
    nvcc = find_nvcc()
    assert nvcc, "nvcc is not installed"
    files = sorted(KERNELS.rglob("*.cu*"))
    digest = hashlib.sha256(repr((nvcc, FLAGS)).encode() + (KERNELS / "ops.h").read_bytes())
    for file in files:
        digest.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"saffron-cubin-{os.getuid()}-{arch}-{digest.hexdigest()[:16]}"
    folder.mkdir(mode=0o700, exist_ok=True)

    def compile_one(source: Path) -> tuple[str, str]:
        cubin, log = folder / f"{source.stem}.cubin", folder / f"{source.stem}.log"
        if not log.exists():
            target = ("-gencode", f"arch=compute_{arch},code=sm_{arch}", "-cubin", "-o", str(cubin))
            command = (nvcc, *FLAGS, f"-I{ROOT / 'csrc'}", *target, str(source))
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                said = (result.stdout + result.stderr).splitlines()
                print("\n".join(x for x in said if "error" in x or "warning" in x), file=sys.stderr)
                result.check_returncode()
            unfinished = log.with_suffix(".unfinished")
            unfinished.write_text(result.stdout + result.stderr)
            unfinished.rename(log)
        return str(cubin), log.read_text()

    largest_first = sorted((f for f in files if f.suffix == ".cu"), key=lambda f: f.stat().st_size, reverse=True)
    with open(folder / "lock", "w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of one test run wait for each other
        return dict(pool.map(compile_one, largest_first))


if __name__ == "__main__":
    if find_nvcc() is None:
        sys.exit("nvcc is not installed")
    for each in ARCHS:
        print(f"sm_{each}: {len(compile_sources(each))} files")
