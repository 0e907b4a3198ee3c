"""On a GPU: a whole search step captured in one CUDA graph, and compiled; the memory checker over every op."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import example
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from saffron_kernels import advance_tree, append_kv, backends, multifurcate, tree_attention
from saffron_kernels.backends import faults
from saffron_kernels.backends.faults import raise_faults
from saffron_kernels.backends.triton.launch import INTERPRETED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET is set"),
]


@pytest.fixture(autouse=True)
def deferred_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says: checks that synchronise cannot be captured."""
    monkeypatch.setattr(faults, "_EAGER", False)


WIDTH, STEPS, PROMPT = 8, 6, 50
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB = 8, 2, 64, 64, 1000
CAPACITY = PROMPT + WIDTH * (STEPS + 1)


class Step:
    """One search step of a model without weights: all state in tensors of fixed size, as a graph needs it.

    The plan has `CAPACITY` entries. A step adds one per beam; as many dead ones, which stand at its front, drop out.
    """

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(1)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(torch.bfloat16)

        def i32(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        self.embedding, self.unembedding, self.head = randn(VOCAB, HIDDEN), randn(VOCAB, HIDDEN), randn(VOCAB, HIDDEN)
        self.project = randn(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD_DIM) * HIDDEN**-0.5
        self.out = randn(HEADS * HEAD_DIM, HIDDEN)
        self.k, self.v = randn(CAPACITY, KV_HEADS, HEAD_DIM), randn(CAPACITY, KV_HEADS, HEAD_DIM)
        pads = CAPACITY - PROMPT - WIDTH
        # Padding, the prompt that all beams see, and each beam's first own token.
        first = list(range(PROMPT, PROMPT + WIDTH))
        beams = list(range(WIDTH))
        self.slot = i32([-1] * pads + list(range(PROMPT)) + first)
        self.begin = i32([0] * pads + [0] * PROMPT + beams)
        self.end = i32([0] * pads + [WIDTH] * PROMPT + [b + 1 for b in beams])
        self.tokens = i32(beams)
        self.free = i32([PROMPT + WIDTH])  # the next free slot; slots are not used again here
        self.groups = i32([0] * WIDTH)
        self.lanes = i32(beams)
        self.parent, self.reward = i32([0] * WIDTH), torch.zeros(WIDTH, device=device)

    def run(self) -> None:
        hidden = self.embedding[self.tokens.long()]
        qkv = (hidden @ self.project).view(WIDTH, HEADS + 2 * KV_HEADS, HEAD_DIM)
        q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], 1)
        append_kv(k, v, self.slot[-WIDTH:], self.k, self.v)
        attended, _ = tree_attention(q, self.k, self.v, self.slot, self.begin, self.end, HEAD_DIM**-0.5)
        hidden = attended.flatten(1) @ self.out
        logits = hidden @ self.unembedding.T
        parent, token, reward, _, _ = multifurcate(
            logits, hidden, self.head, None, None, 0.0, self.groups, 1, WIDTH, 0.9
        )
        new_slots = self.free + self.lanes
        plan = advance_tree(self.slot, self.begin, self.end, parent, new_slots, WIDTH)
        for state, new in zip((self.slot, self.begin, self.end), plan, strict=True):
            state.copy_(new[WIDTH:])
        self.tokens.copy_(token.clamp(min=0))
        self.parent.copy_(parent)
        self.reward.copy_(reward)
        self.free.add_(WIDTH)

    def state(self) -> list[Tensor]:
        return [x.clone() for x in vars(self).values()]


def warmed_up(device: torch.device) -> None:
    """Compiles the kernels, outside any capture."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        Step(device).run()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)


def test_a_graph_serves_a_whole_search() -> None:
    device = torch.device("cuda")
    with backends.backend("triton"):
        warmed_up(device)
        eager, replayed = Step(device), Step(device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed.run()
        for step in range(STEPS - 1):
            eager.run()
            graph.replay()
            for name, one, other in zip(vars(eager), eager.state(), replayed.state(), strict=True):
                assert torch.equal(one, other), f"step {step}: {name}"
    raise_faults(device)


def test_step_agrees_with_the_reference() -> None:
    """In fp32 storage, so that both choose the same tokens."""
    device = torch.device("cuda")
    steps = []
    for name in ("triton", "reference"):
        step = Step(device)
        for key, value in vars(step).items():
            if value.dtype == torch.bfloat16:
                setattr(step, key, value.float())
        with backends.backend(name):
            step.run()
        steps.append(step)
    ours, theirs = steps
    for key in ("parent", "tokens", "slot", "begin", "end"):
        assert torch.equal(getattr(ours, key), getattr(theirs, key)), key
    assert torch.allclose(ours.reward, theirs.reward, rtol=1e-4, atol=1e-3)


def test_compiles_whole() -> None:
    """`torch.compile(fullgraph=True)` of the ops of a step, one after the other."""
    step = Step(torch.device("cuda"))

    def ops(q: Tensor, k: Tensor, v: Tensor, slot: Tensor, begin: Tensor, end: Tensor, head: Tensor, groups: Tensor):
        out, lse = tree_attention(q, k, v, slot, begin, end, 0.1)
        hidden = out.flatten(1)[:, :HIDDEN]
        parent, token, reward, sizes, all_unseen = multifurcate(
            out.flatten(1), hidden, head, None, None, 0.0, groups, 1, WIDTH, 0.9
        )
        return (
            out,
            lse,
            parent,
            token,
            reward,
            sizes,
            all_unseen,
            *advance_tree(slot, begin, end, parent, parent, WIDTH),
        )

    q = torch.randn(WIDTH, HEADS, HEAD_DIM, device="cuda").to(torch.bfloat16)
    arguments = (q, step.k, step.v, step.slot, step.begin, step.end, step.head, step.groups)
    with backends.backend("triton"):
        expected = ops(*arguments)
        result = torch.compile(ops, fullgraph=True)(*arguments)
    for one, other in zip(expected, result, strict=True):
        assert torch.equal(one, other)


def test_faults_stay_recorded_until_asked_for() -> None:
    device = torch.device("cuda")
    arguments = example("multifurcate", torch.float32, device)
    arguments["logits"].fill_(torch.nan)
    with backends.backend("triton"):
        sizes = multifurcate(**arguments)[3]
    assert not sizes.any()
    with pytest.raises(ValueError, match="logits"):
        raise_faults(device)
    raise_faults(device)  # once


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer(tool: str) -> None:
    """Over every op; `benchmarks/gpu.sh` does the same."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [sanitizer, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9", sys.executable]
    # Every tensor in an allocation of its own, so that a step outside is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    script = Path(__file__).parents[1] / "support" / "every_op.py"
    result = subprocess.run([*command, script], env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
