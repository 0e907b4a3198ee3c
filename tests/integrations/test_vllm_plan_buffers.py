"""Plans of a fixed size, as CUDA graphs need them: made on the device, found again, equal to those of exact size."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from cases import i32, randn

from saffron.integrations.vllm.plan_buffers import PlanBuffers
from saffron_kernels import block_plan, tree_attention

CPU = torch.device("cpu")
# Of two steps the table, the tokens and where the queries begin; requests and queries are padded to four and six.
STEPS = [
    ([[4, 2, 9], [8, 1, 0], [4, 2, 7], [0, 0, 0]], [5, 3, 6, 0], [0, 1, 3, 4, 4]),
    ([[4, 2, 9], [3, 1, 0], [0, 0, 0], [0, 0, 0]], [6, 4, 0, 0], [0, 4, 5, 5, 5]),
]
QUERIES = 6


def step(number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    table, lengths, starts = STEPS[number]
    return i32([x for row in table for x in row]).view(4, 3), i32(lengths), i32(starts)


def test_equals_the_exact_plan() -> None:
    """In the same memory at every step; attention sees no more of it than there is."""
    buffers = PlanBuffers(2, 10, 4, 6, 8, CPU)
    q, cache = randn(1, QUERIES, 2, 16), randn(2, 20, 1, 16)
    addresses = []
    for number in range(len(STEPS)):
        table, lengths, starts = step(number)
        order, *plan, count = buffers.fill(table, lengths, starts, QUERIES, lengths)
        addresses.append([x.data_ptr() for x in (order, *plan, count)])
        owned = int(starts[-1])
        exact_order, *exact, _ = block_plan(table, lengths, starts, 2, owned)
        assert order[:owned].tolist() == exact_order.tolist() and order[owned:].tolist() == list(range(owned, QUERIES))
        assert all(torch.equal(x[: int(count)], y) for x, y in zip(plan, exact, strict=True))
        out, _ = tree_attention(q[order], cache, cache, *plan, 0.25, count=count)
        expected, _ = tree_attention(q[exact_order], cache, cache, *exact, 0.25)
        assert torch.equal(out[:owned], expected) and not out[owned:].any()
    assert addresses[0] == addresses[1]


def test_nothing_waits_for_the_device() -> None:
    """Tensors without content: whoever asked for a value of one would raise."""
    meta = torch.device("meta")
    buffers = PlanBuffers(16, 1000, 64, 4096, 512, meta)
    table, starts = (
        torch.zeros(64, 256, dtype=torch.int32, device=meta),
        torch.zeros(65, dtype=torch.int32, device=meta),
    )
    held = buffers.fill(table, table[:, 0], starts, 64, torch.zeros(64))
    assert [tuple(x.shape) for x in held] == [(64,), *[(32_000,)] * 3, (1,)]
    with pytest.raises(RuntimeError, match="meta"):
        buffers.fill(table, table[:, 0], starts, 64, torch.full((64,), 4096))


def test_room() -> None:
    """Twice the cache, or all that requests can hold; where more might come, and does, it is said."""
    assert PlanBuffers(16, 1000, 4, 100, 8, CPU).size == 4 * 112
    buffers = PlanBuffers(2, 1, 4, 6, 8, CPU)
    assert buffers.size == 4
    table, lengths, starts = step(0)
    with pytest.raises((RuntimeError, ValueError), match="size|more than 4 tokens"):
        buffers.fill(table, lengths, starts, QUERIES, lengths)
    buffers.count.zero_()
    with pytest.raises(RuntimeError, match=r"more than 4 tokens.*max_num_seqs"):
        buffers._look()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_what_vllm_is_told() -> None:
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backend import AttentionCGSupport

    from saffron.integrations.vllm.backend import SaffronAttentionBackend as Backend
    from saffron.integrations.vllm.backend import SaffronMetadataBuilder as Builder

    assert Builder._cudagraph_support is AttentionCGSupport.ALWAYS
    served = [Backend.supports_compute_capability(DeviceCapability(*x)) for x in ((7, 5), (8, 0), (8, 9), (9, 0))]
    assert served == [False, True, True, True]
