"""Sliding windows over a trie: a plan over whole texts becomes one in which tokens leave the window."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from saffron_kernels import TreeStep


def windowed(plan: TreeStep, window: int) -> TreeStep:
    """The plan of layers in which a query at position `p` sees the positions above `p - window`.

    A token is seen by the queries of its subtree that are less than `window` below it. Those that are not lie in the
    subtrees of its descendants `window` below, each of which is an interval of queries: what is left between these
    intervals are intervals again, and for each the token stands in the plan once, with the same slot. So a plan of `n`
    tokens becomes one of at most `2 n` entries.

    Args:
        plan: every token with all its ancestors, as `KVTrie` makes it (`count` None).
        window: at least 1.
    """
    slot, begin, end, depth = _preorder(plan)
    tokens = torch.arange(len(slot), device=slot.device)
    # The ancestor at depth d is the last token of that depth before a token: sought in the order of (depth, place).
    width = len(slot) + 1
    key, order = (depth * width + tokens).sort()
    below = (depth >= window).nonzero()[:, 0]
    wanted = (depth[below] - window) * width + below
    above = order[torch.searchsorted(key, wanted, right=True) - 1]
    # Of each token: its interval without those of its descendants `window` below. Sorted by token, then by descendant,
    # pieces begin where the token's interval or a gap before it ends, and end at the next gap.
    start_of = torch.cat([tokens, above]) * width + torch.cat([torch.zeros_like(tokens), below + 1])
    stop_of = torch.cat([above, tokens]) * width + torch.cat([below, torch.full_like(tokens, len(slot))])
    by_start, by_stop = start_of.argsort(), stop_of.argsort()
    starts = torch.cat([begin, end[below]])[by_start]
    stops = torch.cat([begin[below], end])[by_stop]
    owner = torch.cat([tokens, above])[by_start]
    some = starts < stops
    return replace(plan, slot=slot[owner[some]], begin=starts[some], end=stops[some])


def _preorder(plan: TreeStep) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Slot, begin, end and depth of the tokens that somebody sees, ancestors first, subtree after subtree.

    Intervals are nested: among tokens of one interval ancestors stand first already.
    """
    seen = plan.begin < plan.end
    slot, begin, end = plan.slot[seen], plan.begin[seen], plan.end[seen]
    size = 1 + int(end.max()) if len(end) else 1
    order = (begin.long() * size + (size - end)).argsort(stable=True)
    slot, begin, end = slot[order], begin[order], end[order]
    # What stands before a token and does not end before it begins is its ancestor.
    ended = torch.searchsorted(end.sort().values, begin, right=True)
    depth = torch.arange(len(slot), device=slot.device) - ended
    return slot, begin, end, depth
