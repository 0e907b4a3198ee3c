"""Compiles every CUDA kernel for GPUs that need not be here, and reports what each uses: docs/cuda-kernels.md.

python tests/support/cuda_report.py            compare the report with the build
python tests/support/cuda_report.py --write    write it again
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cuda_host
import torch
from cases import i32
from cuda_cubins import ARCHS, compile_sources, find_nvcc

from saffron_kernels.backends.cuda import native
from saffron_kernels.checks import FP8

REPORT = cuda_host.ROOT / "docs" / "cuda-kernels.md"
BEGIN, END = "<!-- begin of the table -->", "<!-- end of the table -->"
FLOORS_BEGIN, FLOORS_END = "<!-- begin of the floors -->", "<!-- end of the floors -->"

REGISTERS = 65536  # of a multiprocessor of any of them


class Processor(NamedTuple):
    """What a multiprocessor holds: KiB of shared memory (a block may have one less), threads, blocks."""

    shared: int
    threads: int
    blocks: int


# Source: NVIDIA, "CUDA C++ Programming Guide", technical specifications per compute capability.
PROCESSOR = {
    "80": Processor(164, 2048, 32),
    "86": Processor(100, 1536, 16),
    "89": Processor(100, 1536, 24),
    "90a": Processor(228, 2048, 32),
    "100": Processor(228, 2048, 32),
    "120": Processor(100, 1536, 24),
}
# Kernels that are for one architecture alone: empty, and never launched, on the others.
ONE_ARCH = {"wide_attention_kernel": "90a"}
_RESERVED = 1024  # bytes of shared memory that every block costs besides its own


class Compiled(NamedTuple):
    """One kernel in the machine code for one architecture."""

    name: str
    registers: int
    stack: int


class Launch(NamedTuple):
    """What a kernel is launched with: threads of a block, bytes of its shared memory."""

    threads: int
    shared: int


def nvcc_version() -> str:
    """As in `nvcc 13.0.88`."""
    text = subprocess.run((str(find_nvcc()), "--version"), capture_output=True, text=True, check=True).stdout
    version = re.search(r", V([\d.]+)", text)
    assert version, text
    return f"nvcc {version[1]}"


def find_nvdisasm() -> str | None:
    """The disassembler: CUDA's own, Triton's, or that of the package nvidia-cuda-nvdisasm."""
    if found := shutil.which("nvdisasm") or shutil.which("/usr/local/cuda/bin/nvdisasm"):
        return found
    for package, place in (("triton", "backends/nvidia/bin"), ("nvidia", "cu13/bin")):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if found := shutil.which(str(Path(folder, place, "nvdisasm"))):
                return found
    return None


@functools.cache
def compile_kernels(arch: str) -> dict[str, tuple[Compiled, ...]]:
    """Machine code for one architecture: cubin file -> its kernels. Compiled once for the same sources.

    Raises:
        CalledProcessError: a warning or an error; the compiler's messages went to stderr.
    """
    return {cubin: tuple(kernels_of(log)) for cubin, log in compile_sources(arch).items()}


def kernels_of(log: str) -> Iterator[Compiled]:
    """What `ptxas -v` says."""
    for entry in log.split("Compiling entry function ")[1:]:
        says = re.search(r"'(\w+)'.*?(\d+) bytes stack frame.*?Used (\d+) registers", entry, re.S)
        assert says, entry
        symbol, stack, registers = says.groups()
        yield Compiled(short_name(demangle(symbol)), int(registers), int(stack))


def demangle(symbol: str) -> str:
    return subprocess.run(("c++filt", symbol), capture_output=True, text=True, check=True).stdout


def short_name(name: str) -> str:
    """`attention_kernel<Tile<BFloat16, 64, 1, 4>>` of what compilers make of it."""
    name = re.sub(r"\{anonymous\}::|\(anonymous namespace\)::|\w+::", "", name)
    kernel = re.search(r"\w+_kernel(<.*>)?(?=\(|;|\]|\s*$)", name)
    assert kernel, name
    name = re.sub(r"\s+>", ">", kernel[0])
    for spelled, meant in (
        ("short unsigned int", "uint16_t"),
        ("unsigned short", "uint16_t"),
        ("unsigned int", "uint32_t"),
    ):
        name = name.replace(spelled, meant)
    return name


# --- launches, on the CPU --------------------------------------------------------------------------------------------


@contextmanager
def _executed(**variables: str) -> Iterator[None]:
    """Within the block kernels run on the CPU, under these environment variables."""
    variables["SAFFRON_CUDA_HOST"] = cuda_host.module()
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@functools.cache
def launches(arch: str) -> dict[str, Launch]:
    """What every kernel is launched with there: ops run on the CPU in every configuration that there is."""
    library = ctypes.CDLL(cuda_host.module())
    library.saffron_launches.restype = ctypes.c_char_p
    library.saffron_forget_launches()
    with _executed(SAFFRON_CUDA_HOST_CAPABILITY=arch.removesuffix("a"), SAFFRON_CUDA_ATTENTION="mma"):
        for launch_all in CASES:
            launch_all()
        if arch == ONE_ARCH["wide_attention_kernel"]:
            _wide_attention()
    found: dict[str, Launch] = {}
    for line in library.saffron_launches().decode().splitlines():
        function, threads, shared = line.split("\t")
        name = re.search(r"kKernel = (.*?)(; Arguments|; <template|\]$)", function)
        assert name, function
        launch = Launch(int(threads), int(shared))
        most = found.setdefault(short_name(name[1]), launch)
        found[short_name(name[1])] = max(most, launch)
    return found


def _rows(dtype: torch.dtype, head_dim: int) -> None:
    from saffron_kernels.backends import cuda

    rows, slots = torch.zeros(4, 2, head_dim, dtype=dtype), i32([1, 2])
    for stored in (dtype, FP8):
        cache = torch.zeros(4, 2, head_dim, dtype=stored)
        cuda.append_kv(rows[:2], rows[2:], slots, cache, cache.clone())
        cuda.gather_kv(cache, cache, slots.view(1, 2))
    lse = torch.zeros(4, 2)
    cuda.merge_attention(rows, lse, rows, lse)


def _copies() -> None:
    for dtype in native.COMPUTED:
        for head_dim in (16, 3):
            _rows(dtype, head_dim)


def _plan() -> None:
    from saffron_kernels.backends import cuda

    cuda.advance_tree(*map(i32, ([0], [0], [1], [0], [1])), 1)
    for requests in (1, 5):
        table, starts = torch.zeros(requests, 1, dtype=torch.int32), i32(range(requests + 1))
        cuda.block_plan(table, torch.ones_like(table[:, 0]), starts, 1, requests, requests)


def _nuclei() -> None:
    from saffron_kernels.backends import cuda

    for dtype in native.COMPUTED:
        cuda.nucleus(torch.zeros(1, 4, dtype=dtype), 1.0, None)
    cuda.nucleus(torch.zeros(1, 16385), 1.0, None)  # more than are sorted together, and than are joined at once


def _steps() -> None:
    """64 beams of a search."""
    from saffron_kernels.backends import cuda

    rows, vocab, width = 64, 4, 64
    groups, offsets = torch.zeros(rows, dtype=torch.int32), torch.arange(rows + 1, dtype=torch.int32)
    tokens = torch.zeros(rows, dtype=torch.int32)
    for dtype in native.COMPUTED:
        for size in (16, 3):
            hidden, weight = torch.zeros(rows, size, dtype=dtype), torch.zeros(vocab, size, dtype=dtype)
            head = hidden, weight, None, None, 0.0
            rewards = cuda.multifurcation_head(*head, tokens, offsets)
            cuda.select_beam(rewards, tokens, offsets, groups, 1, width, None)
            logits = torch.zeros(rows, vocab, dtype=dtype)
            cuda.multifurcate(logits, *head, groups, 1, width, 0.5, *[None] * 6)


def _attention() -> None:
    from saffron_kernels.backends import cuda

    plan = i32([0]), i32([0]), i32([200])
    for dtype in (torch.bfloat16, torch.float16):
        for head_dim in (64, 96, 128, 256):
            for queries in (1, 17, 65):
                q = torch.zeros(queries, 1, head_dim, dtype=dtype)
                for cache in (q[:1], q[:1].to(FP8)):
                    cuda.tree_attention(q, cache, cache, *plan, 1.0)
    # Several blocks of rows and more tokens than each looks through by itself; none of them is counted.
    q, many = torch.zeros(129, 1, 64, dtype=torch.bfloat16), torch.zeros(8193, dtype=torch.int32)
    cuda.tree_attention(q, q[:1], q[:1], many, many, many, 1.0, i32([0]))


def _wide_attention() -> None:
    from saffron_kernels.backends import cuda

    plan = i32([0]), i32([0]), i32([200])
    with _executed(SAFFRON_CUDA_ATTENTION="wgmma"):
        for dtype in (torch.bfloat16, torch.float16):
            for head_dim in (64, 128):
                for queries in (64, 65):
                    q = torch.zeros(queries, 1, head_dim, dtype=dtype)
                    cuda.tree_attention(q, q[:1], q[:1], *plan, 1.0)


CASES = [_copies, _plan, _attention, _nuclei, _steps]


# --- the report ------------------------------------------------------------------------------------------------------


def blocks_resident(arch: str, registers: int, launch: Launch) -> int:
    """Blocks that fit a multiprocessor at once: registers come in units of 8 a thread, warps four at a time."""
    warps = -(-launch.threads // 32)
    by_registers = REGISTERS // (-(-registers // 8) * 8 * 32) // 4 * 4 // warps
    processor = PROCESSOR[arch]
    by_shared = processor.shared * 1024 // (launch.shared + _RESERVED)
    return min(by_registers, by_shared, processor.threads // launch.threads, processor.blocks)


def table() -> str:
    """Markdown: one row per kernel, columns by architecture."""
    by_arch = {arch: {k.name: k for ks in compile_kernels(arch).values() for k in ks} for arch in ARCHS}
    launched = {arch: launches(arch) for arch in ARCHS}
    lines = [
        f"Compiled by {nvcc_version()}.",
        "",
        "| kernel | threads | shared memory | " + " | ".join(f"sm_{arch}" for arch in ARCHS) + " |",
        "|" + "---|" * (3 + len(ARCHS)),
    ]
    for name in sorted(by_arch[ARCHS[0]]):
        cells = []
        for arch in ARCHS:
            if (launch := launched[arch].get(name)) is None:
                cells.append("")
                continue
            kernel = by_arch[arch][name]
            blocks = blocks_resident(arch, kernel.registers, launch)
            cells.append(
                f"{kernel.registers} / {blocks} / {100 * blocks * launch.threads // PROCESSOR[arch].threads} %"
            )
        launch = next(launched[arch][name] for arch in ARCHS if name in launched[arch])
        lines.append(f"| `{name}` | {launch.threads} | {launch.shared / 1024:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# Of an H200: bytes per second of a device-to-device copy, read and written; bf16 operations per second (datasheet),
# of which mma.sync is taken to reach 60 %; multiprocessors.
COPY, DENSE, MMA, PROCESSORS = 4.3e12, 989e12, 0.6, 132


def floors() -> str:
    """Markdown: what a launch of tree_attention cannot be faster than, computed from its bytes and operations."""
    lines = [
        "| model | beams | tokens | unique K and V, MB | memory, µs | tensor cores, µs | partials, MB |",
        "|" + "---|" * 7,
    ]
    kv_heads, group = 8, 4
    with _executed(SAFFRON_CUDA_HOST_PROCESSORS=str(PROCESSORS)):
        launchers, stored = native.module(torch.empty(0)), native.CODE[torch.bfloat16]
        for head_dim, model in ((128, "8B: 32/8 heads of 128"), (64, "1B: 32/8 heads of 64")):
            for beams, tokens in ((16, 1200), (32, 1200), (32, 4096), (32, 32768), (64, 4096), (64, 32768)):
                unique = tokens * kv_heads * head_dim * 2 * 2
                operations = 4 * beams * group * kv_heads * head_dim * tokens
                sizes = beams, kv_heads * group, kv_heads, head_dim, tokens
                partials = launchers.tree_attention_workspace(*sizes, stored)
                cells = (
                    f"{unique / 1e6:.1f}",
                    f"{unique / COPY * 1e6:.2f}",
                    f"{operations / (DENSE * MMA) * 1e6:.2f}",
                    f"{2 * 4 * partials / 1e6:.1f}",
                )
                lines.append(f"| {model} | {beams} | {tokens} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def written() -> str:
    """The table in the report as it is."""
    return REPORT.read_text().partition(BEGIN)[2].partition(END)[0].strip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the table into the report")
    arguments = parser.parse_args()
    now = table()
    if arguments.write:
        before, _, rest = REPORT.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        if FLOORS_BEGIN in after:
            start, _, rest = after.partition(FLOORS_BEGIN)
            after = f"{start}{FLOORS_BEGIN}\n\n{floors()}\n{FLOORS_END}{rest.partition(FLOORS_END)[2]}"
        REPORT.write_text(f"{before}{BEGIN}\n\n{now}\n{END}{after}")
    elif now != written():
        print(now)
        print(f"{REPORT} says otherwise: write it again with --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
