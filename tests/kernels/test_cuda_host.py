"""Executing CUDA kernels on the CPU finds the mistakes that it is there to find."""

from __future__ import annotations

import ctypes

import cuda_host
import pytest
import torch

THREADS = 64
BROKEN = cuda_host.ROOT / "tests" / "kernels" / "cuda" / "broken.cu"
# What the executor says, or None: results that depend on the order of threads.
MISTAKES = {
    "missing_barrier": None,
    "lost_update": None,
    "missing_wait": None,
    "uneven_barrier": "different collectives|do not come",
    "missing_lanes": "do not come",
    "crooked_copy": "not 16-byte aligned",
}


def run(kernel: str, right: bool) -> list[int] | str:
    """What the kernel wrote, or the error of the executor."""
    library = ctypes.CDLL(cuda_host.build({BROKEN: cuda_host.AS_KERNEL}))
    library.run.restype = ctypes.c_bool
    out, message = (ctypes.c_int * THREADS)(), ctypes.create_string_buffer(200)
    storage = (ctypes.c_int * (THREADS + 8))(*range(1, THREADS + 9))
    skip = -ctypes.addressof(storage) % 16  # the input has to be aligned
    source = ctypes.byref(storage, skip)
    ok = library.run(list(MISTAKES).index(kernel), out, source, right, message)
    return list(out) if ok else message.value.decode()


@pytest.mark.parametrize("kernel", MISTAKES)
def test_right_kernels_give_the_same_under_every_seed(kernel, monkeypatch) -> None:
    results = []
    for seed in range(4):
        monkeypatch.setenv("SAFFRON_CUDA_HOST_SEED", str(seed))
        results.append(run(kernel, right=True))
    assert isinstance(results[0], list) and all(result == results[0] for result in results)


@pytest.mark.parametrize("kernel", MISTAKES)
def test_mistakes_are_found(kernel, monkeypatch) -> None:
    monkeypatch.setenv("SAFFRON_CUDA_HOST_SEED", "0")
    expected, found = run(kernel, right=True), []
    for seed in range(4):
        monkeypatch.setenv("SAFFRON_CUDA_HOST_SEED", str(seed))
        found.append(run(kernel, right=False))
    if MISTAKES[kernel] is None:
        assert any(result != expected for result in found)
    else:
        pattern = MISTAKES[kernel].split("|")
        assert all(isinstance(result, str) and any(p in result for p in pattern) for result in found), found


HOPPER = cuda_host.ROOT / "tests" / "kernels" / "cuda" / "broken_hopper.cu"
# As above, of boxes and products of a warpgroup.
HOPPER_MISTAKES = {
    "init_not_fenced": "initialisation was not fenced",
    "copies_not_fenced": "without a proxy fence",
    "stores_not_fenced": "without a proxy fence",
    "too_few_bytes": "more bytes come than the barrier expects",
    "too_many_arrive": "only some have arrived|before its copies",
    "one_does_not_arrive": "do not come",
    "not_awaited": "before its copies",
    "not_swizzled": None,
    "wrong_stride": None,
    "wrong_leading": None,
    "no_register_fence": "without a fence",
    "product_not_awaited": "before its products",
    "overwritten": "B is written while a product is under way",
    "three_warps": "different products",
    "crooked_box": "128 bytes",
}


def run_hopper(number: int, matrix: torch.Tensor) -> list[float] | str:
    library = ctypes.CDLL(cuda_host.build({HOPPER: cuda_host.AS_KERNEL}))
    library.run.restype = ctypes.c_bool
    out, message = (ctypes.c_float * 128)(), ctypes.create_string_buffer(200)
    ok = library.run(number, out, ctypes.c_void_p(matrix.data_ptr()), message)
    return list(out) if ok else message.value.decode()


@pytest.fixture
def matrix() -> torch.Tensor:
    """`[64, 64]` of small integers, no two rows or columns alike, at a multiple of 16 bytes."""
    values = torch.arange(64)[:, None] * 3 % 17 + torch.arange(64) * 5 % 13
    return values.to(torch.bfloat16).contiguous()


def test_products_of_a_warpgroup(matrix, monkeypatch) -> None:
    """What the right kernel has to give, by the fragments that PTX defines."""
    row = torch.tensor([[1.0, 2.0], [2.0, 1.0]]).repeat(1, 4), torch.tensor([[1.0, 1.0], [2.0, 2.0]]).repeat(1, 4)
    a = torch.cat(row, 1).repeat(1, 4)  # rows g and g + 8: columns of 16, then the same again
    as_it_lies = a @ matrix.float().T  # rows of B are columns of the product
    transposed = (a @ matrix.float()).repeat(1, 2)  # two boxes side by side
    expected = []
    for thread in range(128):
        columns = [i // 4 * 8 + thread % 4 * 2 + i % 2 for i in range(64)]
        weights = torch.arange(1, 65)
        product = [sum(float(x[i // 2 % 2, columns[i]] * weights[i]) for i in range(n))
                   for x, n in ((as_it_lies, 32), (transposed, 64))]  # fmt: skip
        expected.append(sum(product))
    for seed in range(4):
        monkeypatch.setenv("SAFFRON_CUDA_HOST_SEED", str(seed))
        assert run_hopper(len(HOPPER_MISTAKES), matrix) == expected


@pytest.mark.parametrize("mistake", HOPPER_MISTAKES)
def test_mistakes_on_hopper_are_found(mistake, matrix, monkeypatch) -> None:
    monkeypatch.setenv("SAFFRON_CUDA_HOST_SEED", "0")
    expected, said = run_hopper(len(HOPPER_MISTAKES), matrix), HOPPER_MISTAKES[mistake]
    for seed in range(4):
        monkeypatch.setenv("SAFFRON_CUDA_HOST_SEED", str(seed))
        found = run_hopper(list(HOPPER_MISTAKES).index(mistake), matrix)
        if said is None:
            assert isinstance(found, list) and found != expected
        else:
            assert isinstance(found, str) and any(part in found for part in said.split("|")), found


def test_tensor_maps_that_the_driver_refuses() -> None:
    accepted = ctypes.CDLL(cuda_host.build({HOPPER: cuda_host.AS_KERNEL})).accepted
    accepted.restype = ctypes.c_bool
    accepted.argtypes = (ctypes.c_size_t, ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_int)
    assert accepted(4096, 128, 512, 64, 256)
    for refused in (
        (4104, 128, 512, 64, 64),  # address
        (4096, 136, 544, 64, 64),  # strides: multiples of 16, of each other, below 2^40
        (4096, 128, 520, 64, 64),
        (4096, 128, 592, 64, 64),
        (4096, 128, 1 << 40, 64, 64),
        (4096, 128, 512, 64, 257),  # boxes: up to 256, a row of 128 bytes
        (4096, 128, 512, 128, 64),
        (4096, 128, 512, 4, 64),
    ):
        assert not accepted(*refused), refused
