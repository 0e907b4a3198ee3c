"""How exact an op has to be: the one place where that is decided."""

from __future__ import annotations

import torch
from torch import Tensor

# Rounding allowed on top, in units of the last place of the numbers that are added up. The fp64 yardstick is itself
# only fp64, and exp costs fp32 a few units where PyTorch's own result can be exact by luck.
ULPS = {torch.float64: 64, torch.float32: 4, torch.bfloat16: 1, torch.float16: 1}


def assert_as_good_as_torch(name: str, actual: Tensor, exact: Tensor, own: Tensor, magnitude: float) -> None:
    """The largest error against `exact` (fp64) is at most twice that of PyTorch's `own` result for the same input.

    Args:
        name: of the output, for the message.
        actual, exact, own: one shape; infinities must agree, NaN is an error.
        magnitude: size of the terms that the result sums, whose rounding cannot be avoided.
    """
    actual_dtype = actual.dtype
    actual, exact, own = (x.detach().double().cpu() for x in (actual, exact, own))
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    finite = exact.isfinite()
    assert torch.equal(actual[~finite], exact[~finite]), f"{name}: infinities differ"
    assert bool(actual[finite].isfinite().all()), f"{name}: NaN or inf where {name} is finite"
    if not bool(finite.any()):
        return
    error = float((actual - exact)[finite].abs().max())
    usual = float((own - exact)[finite].abs().max())
    allowed = 2 * usual + ULPS[actual_dtype] * torch.finfo(actual_dtype).eps * magnitude
    assert error <= allowed, f"{name}: error {error:.3e}, PyTorch's own {usual:.3e}, allowed {allowed:.3e}"
