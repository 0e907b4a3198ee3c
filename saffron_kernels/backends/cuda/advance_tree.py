"""The plan of a flattened trie, one step further."""

from __future__ import annotations

from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.cuda import native
from saffron_kernels.backends.cuda.arguments import TriePlan


def advance_tree(
    slot: Tensor,
    begin: Tensor,
    end: Tensor,
    parents: Tensor,
    new_slots: Tensor,
    queries: int,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, fresh = slot.shape[0], parents.shape[0]
    size = tokens + fresh if count is None else tokens
    held = faults.check_count(count, size - fresh)
    faults.check_ascending("parents", parents)
    faults.check_index("parents", parents, 1 << 31)
    faults.check_index("begin", begin[:held], queries + 1)
    faults.check_index("end", end[:held], queries + 1)
    slot, begin, end, parents, new_slots = (x.contiguous() for x in (slot, begin, end, parents, new_slots))
    plan = slot.new_empty(size), slot.new_empty(size), slot.new_empty(size)
    before = TriePlan(slot, begin, end, count)
    native.launch("advance_tree", slot, before, parents, new_slots, queries, TriePlan(*plan))
    return plan
