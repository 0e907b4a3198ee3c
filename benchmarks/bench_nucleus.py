"""nucleus against a sort of the vocabulary."""

from __future__ import annotations

import pytest
import torch
from harness import Case
from timing import DEVICE
from torch import Tensor
from workloads import peaked_logits

from saffron_kernels import nucleus

VOCAB = 128_256


def by_sort(logits: Tensor, top_p: float, sums: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and probabilities row after row, and how many each row has."""
    ordered, token = logits.float().sort(dim=1, descending=True, stable=True)
    p = ordered.softmax(1, dtype=sums)
    keep = (p.cumsum(1) - p < top_p) & (p > 0)
    return token[keep], p[keep], keep.sum(1)


def within(sizes: Tensor, others: Tensor) -> Tensor:
    """Of rows laid one after the other, the first entries of each: as many as both have."""
    place = torch.arange(int(sizes.sum()), device=sizes.device)
    row = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
    return place - (sizes.cumsum(0) - sizes)[row] < torch.minimum(sizes, others)[row]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind, rows", [("peaked", 32), ("peaked", 1), ("normal", 32)])
def test_nucleus(race, kind: str, rows: int, dtype: torch.dtype) -> None:
    top_p = 0.8
    if kind == "peaked":
        logits = peaked_logits(rows, VOCAB, size=32, top_p=top_p, dtype=dtype)
    else:
        logits = torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(0)).to(dtype).to(DEVICE)
    expected, p, counts = by_sort(logits, top_p, torch.float64)

    def check(result: object) -> None:
        """A sum in another order may round to the other side of top_p: one token per row, at its edge."""
        tokens, probabilities, offsets = result  # type: ignore[misc]
        sizes = offsets.diff()
        assert bool(((sizes - counts).abs() <= 1).all()), "nuclei of other sizes"
        ours, theirs = within(sizes, counts), within(counts, sizes)
        assert torch.equal(tokens[ours].long(), expected[theirs]), "other tokens, or in another order"
        torch.testing.assert_close(probabilities[ours], p[theirs].float(), rtol=1e-4, atol=0)

    check(nucleus(logits, top_p))
    size = len(expected) / rows
    case = Case(
        op="nucleus",
        shape={"logits": kind, "rows": rows, "vocab": VOCAB, "top_p": top_p, "nucleus": round(size, 1)},
        dtype=dtype,
        work=0,
        bytes=logits.nbytes + 8 * len(expected),
        ours=lambda: nucleus(logits, top_p),
        check=check,
        contenders={"sort": lambda: by_sort(logits, top_p)},
    )
    race(case, seconds=2.0)
