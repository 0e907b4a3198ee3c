"""What the selection of beams needs: room for what is chosen, a workspace, and sizes that fit."""

from __future__ import annotations

import torch
from torch import Tensor

from saffron_kernels.backends.cuda import native
from saffron_kernels.backends.cuda.arguments import Beam, Scratch
from saffron_kernels.backends.cuda.counters import counters
from saffron_kernels.checks import expect


def new_beam(size: int, dtype: torch.dtype, device: torch.device) -> Beam:
    parent = torch.empty(size, dtype=torch.int32, device=device)
    return Beam(parent, torch.empty_like(parent), torch.empty(size, dtype=dtype, device=device))


def scratch(needed: int, like: Tensor) -> Scratch:
    """A workspace of so many bytes, and counters."""
    return Scratch(torch.empty(needed, dtype=torch.uint8, device=like.device), counters(like))


def check_sizes(tensor: Tensor, name: str, rows: int, num_groups: int, width: int) -> None:
    """What the shared memory of a block and the counters have room for, on the device of `tensor`."""
    launchers = native.module(tensor)
    expect(rows <= launchers.MAX_ROWS, name, f"{rows} rows", f"at most {launchers.MAX_ROWS}")
    expect(num_groups <= launchers.MAX_GROUPS, "num_groups", num_groups, f"at most {launchers.MAX_GROUPS}")
    expect(width <= launchers.MAX_WIDTH, "width", width, f"at most {launchers.MAX_WIDTH}")
    with torch.cuda.device_of(tensor):
        fits = launchers.beam_fits(rows, width)
    expect(fits, "width", f"{width} of {rows} rows", "fewer: both have to fit the shared memory of a block of this GPU")


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
