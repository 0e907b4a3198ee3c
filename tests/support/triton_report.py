"""Compiles every kernel for GPUs that need not be there, and reports what each uses.

The launchers of the ops run on CPU tensors of real sizes, but each launch only compiles: so what is compiled is what a
GPU would run, specialised as Triton specialises it. Registers and local memory are read from the machine code.

    python tests/support/triton_report.py --markdown docs/triton-kernels.md
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from saffron_kernels.backends import triton as ops
from saffron_kernels.backends.triton.launch import INTERPRETED, DeviceProperties, compile_only
from saffron_kernels.backends.triton.nucleus import find_members
from saffron_kernels.backends.triton.ordering import emit_in_order, sort_blocks

# Multiprocessors of an A100, H200 and B200; bytes of shared memory that one program can have.
CHIPS = {80: DeviceProperties(80, 108), 90: DeviceProperties(90, 132), 100: DeviceProperties(100, 148)}
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Four registers. Three kernels spill as few with Triton 3.6, none but `_mend_kernel` with 3.9.
FEW_BYTES = 16
# Of `_mend_kernel`, which does something only where V holds NaN or infinity: 200 bytes in one configuration for sm_80.
MENDED_BYTES = 200
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Usage(NamedTuple):
    """What one compiled kernel needs.

    Attributes:
        arch: compute capability times ten.
        case: the arguments it was compiled for.
        kernel, options: its name, and its tile sizes and launch options.
        registers: a thread's.
        local_bytes: a thread's local memory: spilled registers, or arrays that are not in registers.
        shared_bytes: a program's shared memory.
        ptx: the code, one step before machine code.
    """

    arch: int
    case: str
    kernel: str
    options: str
    registers: int
    local_bytes: int
    shared_bytes: int
    ptx: str = ""

    @property
    def fits(self) -> bool:
        """At most a few values spill, more where V holds NaN; and shared memory suffices."""
        allowed = MENDED_BYTES if self.kernel == "_mend_kernel" else FEW_BYTES
        return self.local_bytes <= allowed and self.shared_bytes <= SHARED_LIMIT[self.arch]


def _attention(head_dim: int, dtype: torch.dtype, queries: int, counted: bool = False) -> Callable[[], object]:
    """32 query heads, 8 KV heads, 4096 tokens; how many of them there are is on the device, or known."""
    q = torch.empty(queries, 32, head_dim, dtype=dtype)
    cache = torch.empty(1024, 8, head_dim, dtype=dtype)
    index = torch.zeros(4096, dtype=torch.int32)
    count = index[:1] if counted else None
    return lambda: ops.tree_attention(q, cache, cache, index, index, index, 0.1, count)


def _copies(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    rows, cache = torch.empty(64, 8, 128, dtype=dtype), torch.empty(1024, 8, 128, dtype=dtype)
    slots = torch.zeros(64, dtype=torch.int32)
    yield "append_kv", lambda: ops.append_kv(rows, rows, slots, cache, cache)
    rotary = torch.empty(64, 128, dtype=dtype)
    yield "append_kv with RoPE", lambda: ops.append_kv(rows, rows, slots, cache, cache, rotary, rotary)
    yield "gather_kv", lambda: ops.gather_kv(cache, cache, slots.view(2, 32))
    out, lse = torch.empty(64, 32, 128, dtype=dtype), torch.empty(64, 32)
    yield "merge_attention", lambda: ops.merge_attention(out, lse, out, lse)


def _nucleus(dtype: torch.dtype) -> None:
    """The launches of `nucleus`, whose last one needs a size that only a real run knows."""
    logits = torch.empty(32, 128256, dtype=dtype)
    members = find_members(logits, 0.8, None)
    lists = members.lists()
    composites = sort_blocks(members.values, lists)
    size = torch.zeros(logits.shape[0] + 1, dtype=torch.int32)
    emit_in_order(
        composites, lists, members.tokens, members.values, size, members.tokens, members.values, stats=members.stats
    )


def _step(dtype: torch.dtype, everything: bool) -> None:
    """`multifurcate` for two searches of 16 beams, on a vocabulary and a head of the size of Llama 3.2's."""
    rows, vocab, hidden = 32, 128256, 2048
    index = torch.zeros(rows, dtype=torch.int32)
    fixed = (
        torch.empty(rows, vocab, dtype=dtype),
        torch.empty(rows, hidden, dtype=dtype),
        torch.empty(vocab, hidden, dtype=dtype),  # never touched, so it takes no memory
    )
    bias, unseen = torch.empty(vocab, dtype=dtype), torch.zeros(vocab, dtype=torch.bool)
    few = torch.zeros(2, dtype=torch.int32)
    each = torch.zeros(rows, 2, dtype=torch.int32)
    optional = (each, torch.zeros(rows), each, torch.zeros(2), few, few + 1) if everything else (None,) * 6
    head = (bias, unseen, -1024.0) if everything else (None, None, 0.0)
    ops.multifurcate(*fixed, *head, index, 2, 16, torch.ones(rows) if everything else 0.8, *optional)


def _candidates() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and offsets of 1024 candidates of 32 rows."""
    return torch.zeros(1024, dtype=torch.int32), torch.arange(0, 1025, 32, dtype=torch.int32)


def _head(dtype: torch.dtype) -> None:
    hidden, weight = torch.empty(32, 2048, dtype=dtype), torch.empty(128256, 2048, dtype=dtype)
    ops.multifurcation_head(hidden, weight, None, None, 0.0, *_candidates())


def _select() -> None:
    ops.select_beam(torch.zeros(1024), *_candidates(), torch.zeros(32, dtype=torch.int32), 2, 16, None)


def _plan_of_pages(requests: int) -> None:
    """Up to 4,096 blocks of 16 tokens a request; nobody has queries here."""
    table = torch.zeros(requests, 4096, dtype=torch.int32)
    lengths, starts = table[:, 0].contiguous(), torch.zeros(requests + 1, dtype=torch.int32)
    ops.block_plan(table, lengths, starts, 16, 256, 1 << 18)


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kernel in every configuration: what it is compiled for, and the op that launches it."""
    bf16 = torch.bfloat16
    for head_dim in (64, 128, 256):
        for queries in (4, 8, 32, 512):
            yield f"tree_attention bf16 d{head_dim} n{queries}", _attention(head_dim, bf16, queries)
        yield f"tree_attention fp32 d{head_dim}", _attention(head_dim, torch.float32, 32)
    for head_dim in (80, 96):
        yield f"tree_attention bf16 d{head_dim} n32", _attention(head_dim, bf16, 32)
    yield "tree_attention fp16 d128 n32", _attention(128, torch.float16, 32)
    for head_dim in (64, 128):
        for dtype, name in ((bf16, "bf16"), (torch.float32, "fp32")):
            yield f"tree_attention {name} d{head_dim} n32 counted", _attention(head_dim, dtype, 32, counted=True)
    for dtype, name in ((bf16, "bf16"), (torch.float32, "fp32")):
        for op, run in _copies(dtype):
            yield f"{op} {name}", run
        yield f"nucleus {name}", partial(_nucleus, dtype)
        yield f"multifurcation_head {name}", partial(_head, dtype)
        yield f"multifurcate {name}", partial(_step, dtype, everything=False)
        yield f"multifurcate {name}, everything", partial(_step, dtype, everything=True)
    yield "select_beam", _select
    index = torch.zeros(4096, dtype=torch.int32)
    yield "advance_tree", lambda: ops.advance_tree(index, index, index, index[:64], index[:64], 64)
    yield "block_plan", partial(_plan_of_pages, 64)
    yield "block_plan of one request", partial(_plan_of_pages, 1)


class _NoGPU:
    """A driver for a chip that is not there: Triton asks it what to compile for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> str:
        return f"sm_{self.arch}"  # kernels are cached by this: no real device has such a number

    def get_current_stream(self, device: object) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def compile_case(arch: int, name: str, run: Callable[[], object]) -> list[Usage]:
    """Compiles all launches of one case for one chip.

    Raises:
        RuntimeError: kernels are interpreted in this process, so they cannot be compiled.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: kernels that are interpreted cannot be compiled")
    usages = []

    def compile_kernel(kernel: Any, grid: tuple[int, ...], *args: object, **meta: object) -> None:
        compiled = kernel.warmup(*args, grid=grid, **meta)
        options = ", ".join(f"{k}={v}" for k, v in meta.items() if k != "enable_fp_fusion")
        registers, local = _resources(compiled.asm["cubin"])
        shared, ptx = compiled.metadata.shared, compiled.asm["ptx"]
        usages.append(Usage(arch, name, compiled.metadata.name, options, registers, local, shared, ptx))

    drivers: Any = driver
    active = drivers._active
    drivers.set_active(_NoGPU(arch))
    try:
        with compile_only(compile_kernel, CHIPS[arch]):
            run()
    finally:
        drivers.set_active(active)
    return usages


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_CUOBJDUMP), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{what}:(\d+)", text)[1]) for what in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    return registers, stack + local


def markdown(usages: list[Usage]) -> str:
    """The report as a document: one row per kernel and configuration, columns by chip."""
    archs = sorted({u.arch for u in usages})
    rows: dict[tuple[str, str], dict[int, list[Usage]]] = {}
    for usage in usages:
        rows.setdefault((usage.kernel, usage.options), {}).setdefault(usage.arch, []).append(usage)
    lines = [
        "# Triton kernels: what they use",
        "",
        f"Written by `python tests/support/triton_report.py --markdown FILE` with Triton {triton.__version__}, "
        "without a GPU.",
        f"Each cell: registers of a thread / bytes of local memory of a thread (spills; at most {FEW_BYTES}) / "
        "shared memory of a program in KiB",
        "(at most " + ", ".join(f"{SHARED_LIMIT[a] // 1024} on sm_{a}" for a in archs) + ").",
        "Of several dtypes the one that needs most. A cell is empty where the chip has another configuration.",
        "",
        "| kernel | configuration | " + " | ".join(f"sm_{a}" for a in archs) + " |",
        "|" + "---|" * (2 + len(archs)),
    ]
    for (kernel, options), found in sorted(rows.items()):
        cells = [_worst(found[arch]) if arch in found else "" for arch in archs]
        lines.append(f"| `{kernel}` | {options} | " + " | ".join(cells) + " |")
    lines += ["", "## Launches of a call", "", "The same on every chip and for every dtype. Only `nucleus` and"]
    lines += ["`raise_faults` run anything else on the device.", "", "| op | launches |", "|---|---|"]
    for op, kernels in launches(usages).items():
        lines.append(f"| {op} | {len(kernels)}: " + ", ".join(f"`{k}`" for k in kernels) + " |")
    return "\n".join(lines) + "\n"


def launches(usages: list[Usage]) -> dict[str, list[str]]:
    """The kernels that one call of each op launches, in order; `multifurcate` also with all options."""
    arch = usages[0].arch
    found: dict[str, list[str]] = {}
    for case in dict.fromkeys(usage.case for usage in usages):
        op = case.split()[0] + (" with all options" if case.endswith("everything") else "")
        found.setdefault(op, [u.kernel for u in usages if u.case == case and u.arch == arch])
    return found


def _worst(usages: list[Usage]) -> str:
    """The most that one configuration needs for any dtype."""
    shared = max(u.shared_bytes for u in usages) / 1024
    return f"{max(u.registers for u in usages)} / {max(u.local_bytes for u in usages)} / {shared:.1f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", type=Path, help="file for the report")
    parser.add_argument("--arch", type=int, nargs="+", default=sorted(CHIPS), choices=sorted(CHIPS))
    arguments = parser.parse_args()
    usages = [usage for arch in arguments.arch for case in cases() for usage in compile_case(arch, *case)]
    if arguments.markdown:
        arguments.markdown.write_text(markdown(usages))
    bad = [usage for usage in usages if not usage.fits]
    for usage in bad:
        print(usage._replace(ptx=""), file=sys.stderr)
    print(f"{len(usages)} launches compiled, {len(bad)} do not fit")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
