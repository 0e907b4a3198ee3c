"""The specification of `block_plan`: the plan of a paged KV cache, in plain Python."""

from __future__ import annotations

import itertools

from torch import Tensor

from saffron_kernels.checks import expect


def block_plan(
    block_table: Tensor, seq_lens: Tensor, query_start: Tensor, block_size: int, queries: int, size: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    table, lengths, starts = block_table.tolist(), seq_lens.tolist(), query_start.tolist()
    check_requests(table, lengths, starts, block_size, queries)
    counts = [after - before for before, after in zip(starts, starts[1:], strict=False)]
    full = [table[r][: (lengths[r] - n) // block_size] for r, n in enumerate(counts)]  # blocks of earlier steps alone
    rows = sorted((r for r, n in enumerate(counts) if n), key=lambda r: full[r])
    first = [0, *itertools.accumulate(counts[r] for r in rows)]
    common = [0, *(_common(full[a], full[b]) for a, b in itertools.pairwise(rows)), 0]

    order: list[int] = []
    plan: list[tuple[int, int, int]] = []
    for i, r in enumerate(rows):
        order += range(starts[r], starts[r + 1])
        context = lengths[r] - counts[r]
        for p in range(common[i] * block_size, lengths[r]):
            column = p // block_size
            past = i + 1  # the first request that does not share the block
            while column < len(full[r]) and past < len(rows) and common[past] > column:
                past += 1
            place = table[r][column] * block_size + p % block_size
            plan.append((place, first[i] + max(0, p - context), first[past]))
    order += range(starts[-1], queries)  # of no request
    count = len(plan)
    if size is not None:
        expect(count <= size, "size", size, f"at least {count}, the tokens of the plan")
        plan += [(-1, 0, 0)] * (size - count)
    slot, begin, end = seq_lens.new_tensor(plan).view(-1, 3).unbind(1)
    return seq_lens.new_tensor(order), slot.clone(), begin.clone(), end.clone(), seq_lens.new_tensor([count])


def check_requests(
    table: list[list[int]], lengths: list[int], starts: list[int], block_size: int, queries: int
) -> None:
    """Raises ValueError for contents that are no requests."""
    expect(starts[0] == 0, "query_start", starts[0], "a first entry of 0")
    expect(starts[-1] <= queries, "query_start", starts[-1], f"a last entry of at most {queries}, the queries")
    for r, (before, after) in enumerate(itertools.pairwise(starts)):
        expect(after >= before, "query_start", f"{after - before} queries of request {r}", "at least 0")
        if after == before:
            continue
        used = -(-lengths[r] // block_size)
        tokens, blocks = f"{lengths[r]} tokens of request {r}", len(table[r])
        expect(lengths[r] >= after - before, "seq_lens", tokens, f"at least its {after - before} queries")
        expect(used <= blocks, "seq_lens", tokens, f"at most {blocks * block_size}, which {blocks} blocks hold")
        expect(min(table[r][:used]) >= 0, "block_table", f"a block below 0 in row {r}", "blocks of the cache")
        last, most = max(table[r][:used]), 2**31 // block_size - 1
        expect(last <= most, "block_table", f"{last} in row {r}", f"at most {most}, whose slots fit int32")


def _common(a: list[int], b: list[int]) -> int:
    """How many leading entries are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
