"""multifurcate, and its reward head, against the dense head and a sort of the vocabulary."""

from __future__ import annotations

import pytest
import torch
from bench_nucleus import VOCAB
from harness import Case, on_backend
from timing import DEVICE
from torch import Tensor
from workloads import peaked_logits

from saffron_kernels import multifurcate, multifurcation_head, nucleus

ROWS, HIDDEN, TOP_P = 32, 2048, 0.8


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Policy logits with nuclei of 32 tokens on average, and the reward model's hidden states and head."""
    generator = torch.Generator().manual_seed(0)
    logits = peaked_logits(ROWS, VOCAB, size=32, top_p=TOP_P, dtype=torch.bfloat16)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator).bfloat16().to(DEVICE)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).bfloat16().to(DEVICE)
    return logits, hidden, weight


def test_multifurcate(race, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, hidden, weight = inputs
    groups = torch.zeros(ROWS, dtype=torch.int32, device=DEVICE)

    def ours() -> tuple[Tensor, ...]:
        return multifurcate(logits, hidden, weight, None, None, -1024.0, groups, 1, ROWS, TOP_P)

    def dense() -> tuple[Tensor, Tensor, Tensor]:
        rewards = hidden @ weight.T
        ordered, token = logits.float().sort(dim=1, descending=True, stable=True)
        p = ordered.softmax(1)
        row, place = ((p.cumsum(1) - p < TOP_P) & (p > 0)).nonzero(as_tuple=True)
        token = token[row, place]
        best, which = rewards[row, token].float().topk(ROWS)
        return row[which], token[which], best

    def chosen(rows: Tensor, tokens: Tensor) -> set[tuple[int, int]]:
        return set(zip(rows.tolist(), tokens.tolist(), strict=True))

    def check(result: object) -> None:
        """Sums in another order may exchange two rewards that all but agree."""
        parent, token, reward, *_ = result  # type: ignore[misc]
        torch.testing.assert_close(reward.sort().values, expected[2].sort().values, rtol=1e-3, atol=1e-2)
        assert len(chosen(parent, token) & chosen(*expected[:2])) >= ROWS - 1, "other children"

    expected = on_backend("reference", ours)()
    check(ours())
    rows, tokens, best = dense()  # rounds rewards to bf16, so that some at the edge change places
    torch.testing.assert_close(best.sort().values, expected[2].sort().values, rtol=1e-2, atol=1.0)
    assert len(chosen(rows, tokens) & chosen(*expected[:2])) >= ROWS - 4, "other children of the dense head"
    counts = expected[3]
    size = float(counts.float().mean())
    named = len(nucleus(logits, TOP_P)[0].unique())
    case = Case(
        op="multifurcate",
        shape={"rows": ROWS, "vocab": VOCAB, "hidden": HIDDEN, "nucleus": round(size, 1)},
        dtype=torch.bfloat16,
        work=2.0 * ROWS * size * HIDDEN,
        bytes=logits.nbytes + named * HIDDEN * 2,
        ours=ours,
        contenders={"dense head, sort, gather, topk": dense},
        capture=("",),
        check=check,
    )
    race(case, seconds=4.0)


def test_multifurcation_head(race, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, hidden, weight = inputs
    tokens, _, offsets = nucleus(logits, TOP_P)
    row = torch.arange(ROWS, device=DEVICE).repeat_interleave(offsets.diff())

    def ours() -> Tensor:
        return multifurcation_head(hidden, weight, None, None, -1024.0, tokens, offsets)

    def dense() -> Tensor:
        return (hidden @ weight.T)[row, tokens.long()]

    def check(result: object) -> None:
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-2)

    expected = on_backend("reference", ours)()
    check(ours())
    torch.testing.assert_close(dense().float(), expected, rtol=1e-2, atol=1.0)  # rounded to bf16
    named = len(tokens.unique())
    case = Case(
        op="multifurcation_head",
        shape={"rows": ROWS, "vocab": VOCAB, "hidden": HIDDEN, "candidates": len(tokens)},
        dtype=torch.bfloat16,
        work=2.0 * len(tokens) * HIDDEN,
        bytes=named * HIDDEN * 2 + hidden.nbytes,
        ours=ours,
        contenders={"dense head": dense},
        capture=("", "dense head"),
        check=check,
    )
    race(case, seconds=2.0)
