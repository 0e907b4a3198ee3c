"""The bits of `saffron_kernels.backends.faults`, as constants that kernels can use."""

from __future__ import annotations

import triton.language as tl

from saffron_kernels.backends import faults

SLOT = tl.constexpr(faults.SLOT)
LOGITS = tl.constexpr(faults.LOGITS)
CANDIDATE = tl.constexpr(faults.CANDIDATE)
REWARD = tl.constexpr(faults.REWARD)
GROUP = tl.constexpr(faults.GROUP)
PLAN = tl.constexpr(faults.PLAN)
BANNED = tl.constexpr(faults.BANNED)
WIDTH = tl.constexpr(faults.WIDTH)
TOP_P = tl.constexpr(faults.TOP_P)
PAGES = tl.constexpr(faults.PAGES)
