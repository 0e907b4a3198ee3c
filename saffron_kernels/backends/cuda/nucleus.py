"""The exact top-p set of every row: found in one launch, then put in order."""

from __future__ import annotations

import torch
from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.contents import check_top_ps
from saffron_kernels.backends.cuda import native
from saffron_kernels.backends.cuda.arguments import Candidates, Limits, Nuclei, Scratch
from saffron_kernels.backends.cuda.counters import counters
from saffron_kernels.checks import expect


def limits(top_p: float | Tensor, banned: Tensor | None, rows: int) -> Limits:
    banned = native.of_each_row(banned, rows)
    return Limits(0.0, top_p, banned) if isinstance(top_p, Tensor) else Limits(top_p, None, banned)


def nucleus(logits: Tensor, top_p: float | Tensor, banned: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The op. Its workspace is 16 bytes per logit and some more; of a vocabulary of 128,256 2.1 MB per row."""
    rows, vocab = logits.shape
    launchers = native.module(logits)
    expect(vocab <= launchers.MAX_VOCAB, "logits", f"a vocabulary of {vocab}", f"at most {launchers.MAX_VOCAB}")
    expect(rows <= launchers.COUNTERS, "logits", f"{rows} rows", f"at most {launchers.COUNTERS}")
    faults.check_parameters(vocab, top_p, banned)

    def new(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=logits.device)

    tokens, values, counts = new(rows, vocab), new(rows, vocab, dtype=torch.float32), new(rows)
    stats = new(rows, 2, dtype=torch.float32)
    workspace = new(launchers.nucleus_workspace(rows, vocab), dtype=torch.int64)
    nuclei, scratch = Nuclei(tokens, values, counts, stats), Scratch(workspace, counters(logits))
    native.launch("nucleus", logits, logits, limits(top_p, banned, rows), nuclei, scratch)
    sizes = counts.tolist()  # the one synchronisation: how large the result is
    if 0 in sizes:
        faults.clear(logits.device)
        if isinstance(top_p, Tensor):
            check_top_ps(top_p)
        raise ValueError(
            f"logits: row {sizes.index(0)} has no finite maximum; every row needs finite logits (no NaN, no +inf) "
            "and one token that is neither -inf nor banned"
        )
    offsets = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    found, probability = new(sum(sizes)), new(sum(sizes), dtype=torch.float32)
    largest = max(sizes, default=0)
    native.launch("sort_nuclei", logits, nuclei, Candidates(found, offsets), probability, largest, scratch)
    return found, probability, offsets
