"""What the CUDA backend does on a GPU alone: graphs, streams, more than one launch under way."""

from __future__ import annotations

import pytest
import torch
from cases import beams, caches, example, flatten, i32, randn
from every_op import multifurcation

from saffron_kernels import backends
from saffron_kernels.backends import cuda, faults

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that wait for the device are off: they cannot be captured."""
    reason = backends.why_not("cuda", "tree_attention", DEVICE, torch.bfloat16)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(faults, "_EAGER", False)


def decode_step(seed: int, width: int = 16) -> tuple[object, ...]:
    forest = flatten(beams(seed, 1, width, 700, 20), seed=seed).to(DEVICE)
    k_cache, v_cache = caches(seed, forest, 2, 128, torch.bfloat16, DEVICE)
    q = randn(seed + 9, forest.queries, 8, 128, dtype=torch.bfloat16, device=DEVICE)
    return q, k_cache, v_cache, forest.slot, forest.begin, forest.end, 0.1


def test_captured_in_a_graph_with_the_count_on_the_device() -> None:
    """Replayed with another Q and fewer tokens than it was captured with; several layers in one graph."""
    q, k_cache, v_cache, slot, begin, end, scale = decode_step(1)
    count = i32([slot.shape[0]], DEVICE)
    cuda.tree_attention(q, k_cache, v_cache, slot, begin, end, scale, count)  # warm up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [cuda.tree_attention(q, k_cache, v_cache, slot, begin, end, scale, count) for _ in range(3)]
    for held in (slot.shape[0], 300, 0):
        q.copy_(randn(held, *q.shape, dtype=q.dtype, device=DEVICE))
        count.fill_(held)
        graph.replay()
        expected = cuda.tree_attention(q, k_cache, v_cache, slot, begin, end, scale, count)
        for result in captured:
            assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])


@pytest.mark.parametrize("vocab", [11, 128_256])
def test_step_captured_in_a_graph(vocab) -> None:
    """Replayed with other logits, and with the same nuclei twice in one graph, which share counters."""
    plain = example("multifurcate", torch.bfloat16, DEVICE)
    arguments = plain if vocab == 11 else {**plain, **multifurcation(torch.bfloat16, DEVICE, flat=False)}
    cuda.multifurcate(**arguments)  # warm up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [cuda.multifurcate(**arguments) for _ in range(2)]
    for seed in range(5):
        arguments["logits"].copy_(4 * randn(seed, 4, vocab, dtype=torch.bfloat16, device=DEVICE))
        graph.replay()
        expected = cuda.multifurcate(**arguments)
        for result in captured:
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(result, expected, strict=True))
    cuda.raise_faults(DEVICE)


def test_launches_on_several_streams_do_not_disturb_each_other() -> None:
    arguments = [decode_step(seed) for seed in (2, 3)]
    expected = [cuda.tree_attention(*a) for a in arguments]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in arguments]
    results: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[], []]
    for _ in range(50):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[i].append(cuda.tree_attention(*arguments[i]))
    torch.cuda.synchronize()
    for found, (out, lse) in zip(results, expected, strict=True):
        assert all(torch.equal(out, o) and torch.equal(lse, x) for o, x in found)
