"""The plan of a paged KV cache: requests in the order in which equal blocks are neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

from saffron_kernels.backends import faults
from saffron_kernels.backends.cuda import native
from saffron_kernels.backends.cuda.arguments import BlockTable, TriePlan


def block_plan(
    block_table: Tensor, seq_lens: Tensor, query_start: Tensor, block_size: int, queries: int, size: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    faults.check_requests(block_table, seq_lens, query_start, block_size, queries)
    workspace = native.module(block_table).block_plan_workspace(block_table.shape[0])
    laid, count = seq_lens.new_empty(workspace, dtype=torch.int64), seq_lens.new_empty(1)
    table = BlockTable(block_table, seq_lens, query_start, block_size)
    room = (1 << 31) - 1 if size is None else size
    native.launch("sort_pages", block_table, table, laid, count, queries, room)
    faults.raise_if_eager(count)
    tokens = int(count) if size is None else size  # where no room is given: the one synchronisation
    order, slot, begin, end = (seq_lens.new_empty(n) for n in (queries, tokens, tokens, tokens))
    native.launch("block_plan", block_table, table, laid, order, TriePlan(slot, begin, end, count))
    return order, slot, begin, end, count
