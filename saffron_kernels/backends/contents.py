"""What the specification requires of the contents of tensors, with messages as in `saffron_kernels.checks`."""

from __future__ import annotations

from torch import Tensor


def check_index(name: str, index: Tensor, size: int, lowest: int = 0) -> None:
    """PyTorch lets negative indices wrap around; here they are errors (or, where `lowest` is -1, padding)."""
    if index.numel():
        smallest, largest = (int(x) for x in index.aminmax())
        if smallest < lowest or largest >= size:
            raise ValueError(f"{name}: holds values from {smallest} to {largest}, allowed are {lowest} to {size - 1}")


def check_no_nan(name: str, scores: Tensor, used: Tensor) -> None:
    """Of `scores` those that `used` names are numbers."""
    bad = used[scores[used].isnan()]
    if bad.numel():
        raise ValueError(f"{name} {int(bad[0])} has NaN; scores must be numbers")


def check_top_ps(top_p: Tensor) -> None:
    """Raises ValueError if the `top_p` of a row is NaN or out of range."""
    bad = ((top_p > 0) & (top_p <= 1)).logical_not()
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"top_p: row {row} holds {float(top_p[row])}, expected a number above 0 and at most 1")


def checked_count(count: Tensor, most: int) -> int:
    """The number of tokens that `count` holds. Raises ValueError where it is not from 0 to `most`."""
    held = int(count)
    if not 0 <= held <= most:
        raise ValueError(f"count: holds {held}, allowed are 0 to {most}")
    return held


def check_offsets(offsets: Tensor, count: int) -> None:
    """Row after row owns the next candidates, and all of them have a row."""
    if int(offsets[0]) != 0 or int(offsets[-1]) != count or bool((offsets.diff() < 0).any()):
        raise ValueError(f"offsets: must ascend from 0 to {count}, the number of candidates")
