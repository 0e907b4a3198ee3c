"""Every CUDA kernel compiled for GPUs that are not here: nothing spills, everything fits, the right instructions."""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
import sys

import cuda_cubins
import cuda_host
import cuda_report
import pytest
from cuda_report import ARCHS, compile_kernels

needs_nvcc = pytest.mark.skipif(cuda_report.find_nvcc() is None, reason="nvcc is not installed")
needs_nvdisasm = pytest.mark.skipif(
    cuda_report.find_nvdisasm() is None, reason="nvdisasm is not installed (CUDA toolkit, triton, nvidia-cuda-nvdisasm)"
)


TILES, DTYPES = ("Tile", "Float8Tile"), ("BFloat16", "Float16")
# Bytes of local memory of a thread: the smallest tile of head size 256 keeps one register there since V is checked for
# what is not finite.
LOCAL_MEMORY = {f"attention_kernel<{tile}<{dtype}, 256, 1, 4>>": 8 for tile in TILES for dtype in DTYPES}


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_no_warning_and_no_local_memory(arch) -> None:
    kernels = [kernel for found in compile_kernels(arch).values() for kernel in found]
    assert kernels and [kernel for kernel in kernels if kernel.stack > LOCAL_MEMORY.get(kernel.name, 0)] == []


@needs_nvcc
def test_local_memory_is_seen(tmp_path) -> None:
    """The figure that the test above looks at does count an array that is not in registers."""
    source = tmp_path / "kernel.cu"
    source.write_text("""
__global__ void kernel(float* x, int n) {
  float held[500];
  for (int i = 0; i < 500; ++i) held[i] = x[i * n];
  x[threadIdx.x] = held[n % 500];
}
""")
    target = ("-arch=sm_80", "-cubin", "-o", str(tmp_path / "cubin"), str(source))
    options = *cuda_cubins.FLAGS, *cuda_cubins.PTXAS_FLAGS
    result = subprocess.run((cuda_report.find_nvcc(), *options, *target), capture_output=True, text=True, check=True)
    stack = re.search(r"(\d+) bytes stack frame", result.stdout + result.stderr)
    assert stack and int(stack[1]) >= 2000


def compiled(arch: str) -> dict[str, cuda_report.Compiled]:
    return {kernel.name: kernel for found in compile_kernels(arch).values() for kernel in found}


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHS)
def test_every_kernel_fits_as_it_is_launched(arch) -> None:
    """Shared memory of a block, and registers, by what the compiler says; no op launches what is not compiled."""
    kernels, launched = compiled(arch), cuda_report.launches(arch)
    assert launched and set(launched) <= set(kernels)
    for name, launch in launched.items():
        assert launch.shared <= (cuda_report.PROCESSOR[arch].shared - 1) * 1024, name
        assert cuda_report.blocks_resident(arch, kernels[name].registers, launch) >= 1, name
        assert kernels[name].registers * launch.threads <= cuda_report.REGISTERS, name
    for name, kernel in kernels.items():
        only = cuda_report.ONE_ARCH.get(name.partition("<")[0], arch)
        assert only == arch or (kernel.registers < 16 and name not in launched), f"{name} is empty, and not launched"


@needs_nvcc
def test_no_kernel_is_left_out() -> None:
    """Every kernel of the sources is compiled, and launched by an op on some chip."""
    sources = "".join(file.read_text() for file in cuda_host.KERNELS.rglob("*.cu*"))
    bounds = r"(?: __launch_bounds__\((?:[^()]|\([^)]*\))*\))?"
    in_sources = set(re.findall(rf"__global__ void{bounds}\s+(\w+)\(", sources))
    assert in_sources == {name.partition("<")[0] for name in compiled(ARCHS[0])}
    launched = set().union(*map(cuda_report.launches, ARCHS))
    assert launched == set(compiled(ARCHS[0]))


@needs_nvcc
def test_report_is_of_this_build() -> None:
    version = cuda_report.nvcc_version()
    if version not in cuda_report.REPORT.read_text():
        pytest.skip(f"the report is of another nvcc than {version}")
    assert cuda_report.table() == cuda_report.written()


@functools.cache
def disassembled(cubin: str) -> dict[str, set[str]]:
    """The instructions of every kernel of one file."""
    command = (str(cuda_report.find_nvdisasm()), "-c", cubin)
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for section in listing.split("\t.section\t.text.")[1:]:
        kernel = cuda_report.short_name(cuda_report.demangle(section.partition(",")[0]))
        found[kernel] = set(re.findall(r"\s([A-Z][A-Z0-9]+(?:\.\w+)*)\s", section))
    return found


def instructions(arch: str, kernel: str) -> set[str]:
    """The instructions of one kernel of the machine code."""
    (cubin,) = (c for c, found in compile_kernels(arch).items() if kernel in {k.name for k in found})
    return disassembled(cubin)[kernel]


def some(found: set[str], pattern: str) -> bool:
    return any(re.fullmatch(pattern, instruction) for instruction in found)


@needs_nvcc
@needs_nvdisasm
@pytest.mark.parametrize("arch", ARCHS)
def test_attention_multiplies_on_tensor_cores(arch) -> None:
    """And K and V go to shared memory 16 bytes at a time, past the registers."""
    products = {"BFloat16": r"HMMA\.16816\.F32\.BF16", "Float16": r"HMMA\.16816\.F32"}
    sizes = ("128, 1, 4", "128, 4, 1", "128, 8, 1", "256, 4, 1")
    if cuda_cubins.PTX_OF[arch] != arch:  # from the same PTX as 8.0, whose kernels are all looked at
        del products["Float16"]
    for tile, dtype, size in itertools.product(("Tile", "Float8Tile"), products, sizes):
        found = instructions(arch, f"attention_kernel<{tile}<{dtype}, {size}>>")
        assert some(found, products[dtype])
        assert some(found, r"LDGSTS\.E\.BYPASS\.128(\..*)?") and some(found, r"LDSM\.16\.MT88\.4")
        assert size == "256, 1, 4" or not some(found, r"(LDL|STL)(\..*)?")


@needs_nvcc
@needs_nvdisasm
@pytest.mark.parametrize("head_dim, warpgroups", [(64, 1), (64, 2), (128, 1)])
@pytest.mark.parametrize("dtype", ["BFloat16", "Float16"])
def test_wide_attention_uses_what_hopper_has(dtype, head_dim, warpgroups) -> None:
    """Products of warpgroups, bulk copies, barriers that count, registers handed over; nothing of it elsewhere."""
    kernel = f"wide_attention_kernel<Wide<{dtype}, {head_dim}, {warpgroups}>>"
    found, suffix = instructions("90a", kernel), r"\.BF16" if dtype == "BFloat16" else ""
    for columns in (64, head_dim):  # of Q K^T, of P V
        assert some(found, rf"HGMMA\.64x{columns}x16\.F32{suffix}")
    assert not some(found, r"HMMA\..*|(LDL|STL)(\..*)?")
    for expected in (
        r"UTMALDG\.3D",  # a box
        r"LDGSTS\.E\.BYPASS\.128",  # 16 bytes of a row
        r"ARRIVES\.LDGSTSBAR\..*",  # which a barrier waits for
        r"SYNCS\.PHASECHK\..*TRYWAIT",
        r"FENCE\.VIEW\.ASYNC.*",
        r"USETMAXREG\.DEALLOC.*",
        r"USETMAXREG\.TRY_ALLOC.*",
    ):
        assert some(found, expected), expected
    assert instructions("80", kernel) <= {"EXIT", "BRA", "NOP", "MOV", "LDC", "IMAD.MOV.U32"}


@needs_nvcc
@needs_nvdisasm
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "kernel",
    [
        "append_kernel<BFloat16, BFloat16, 8>",
        "gather_kernel<uint4>",
        "merge_kernel<BFloat16, Vector>",
    ],
)
def test_rows_move_16_bytes_at_a_time(kernel, arch) -> None:
    found = instructions(arch, kernel)
    assert some(found, r"LDG\.E\.128(\..*)?") and some(found, r"STG\.E\.128(\..*)?")
    assert not some(found, r"LDG\.E\.U16(\..*)?")


@needs_nvcc
@needs_nvdisasm
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["float", "BFloat16", "Float16"])
@pytest.mark.parametrize("kernel", ["head_kernel", "multifurcate_kernel"])
def test_rows_of_the_head_are_read_16_bytes_at_a_time(kernel, dtype, arch) -> None:
    """Where the layout allows it: the kernel for other layouts has no such load at all."""
    load = r"LDG\.E\.128(\..*)?"
    assert some(instructions(arch, f"{kernel}<HeadRows<{dtype}, Vector>>"), load)
    assert not some(instructions(arch, f"{kernel}<HeadRows<{dtype}, Scalar>>"), load)


@needs_nvcc
@needs_nvdisasm
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", ["float", "BFloat16", "Float16"])
def test_logits_are_read_16_bytes_at_a_time(dtype, arch) -> None:
    """Into shared memory; and the mass of bins is added by atomics that shared memory has, without a loop."""
    found = instructions(arch, f"nucleus_kernel<{dtype}>")
    assert some(found, r"LDGSTS\.E\.BYPASS\.128(\..*)?") and some(found, r"ATOMS\.ADD(\..*)?")
    assert not some(found, r"(LDL|STL|ATOMS\.CAST?)(\..*)?")


def test_names_of_both_compilers_agree() -> None:
    for spelled in (
        "void saffron::cuda::_GLOBAL__N__c190af2e_9_x_cu_47c02c76::a_kernel<saffron::cuda::T, 64>(int)",
        "saffron::cuda::{anonymous}::a_kernel<saffron::cuda::T, 64>",
    ):
        assert cuda_report.short_name(spelled) == "a_kernel<T, 64>"
    assert cuda_report.short_name("x::b_kernel<short unsigned int>") == "b_kernel<uint16_t>"


def test_built_module_imports_without_a_driver() -> None:
    """It is linked against neither the driver nor a shared runtime."""
    code = """
from saffron_kernels import _cuda
print("append_kv" in dir(_cuda), [m for m in open("/proc/self/maps") if "libcuda" in m])
"""
    result = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True)
    if "cannot import name '_cuda'" in result.stderr:
        pytest.skip("saffron_kernels._cuda is not built here")
    assert result.returncode == 0, result.stderr
