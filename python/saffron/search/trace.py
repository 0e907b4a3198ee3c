"""The record of one step of a traced search."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from saffron.models.vocabulary import Head
from saffron.search.tree import Node, Tree
from saffron_kernels import multifurcation_head, nucleus


def trace_step(
    tree: Tree, expanded: Sequence[Node], logits: Tensor, hidden: Tensor, head: Head, unseen_reward: float,
    top_p: float, banned: Tensor | None, all_unseen: bool, token_text: Callable[[int], str],
) -> dict[str, Any]:  # fmt: skip
    """Every candidate of one step of one search: what `multifurcate` chose from, by the ops it joins.

    Args:
        tree: after the step.
        expanded: the nodes that it expanded. logits, hidden: `[nodes, ...]`, theirs.
        unseen_reward, top_p, banned: as `multifurcate` was given them.
    """
    tokens, probabilities, offsets = nucleus(logits, top_p, banned)
    rewards = multifurcation_head(hidden, head.weight, head.bias, head.unseen, unseen_reward, tokens, offsets).tolist()
    unseen = [False] * len(rewards) if head.unseen is None else head.unseen[tokens].tolist()
    child = {(n.parent.id, n.token): n.id for n in tree.beam if n.parent is not None}
    ids, bounds, probability = tokens.tolist(), offsets.tolist(), probabilities.tolist()
    candidates = [
        [
            {
                "token": ids[c],
                "text": token_text(ids[c]),
                "probability": probability[c],
                "reward": rewards[c],
                "unseen": unseen[c],
                "child": child.get((node.id, ids[c])),
            }
            for c in range(bounds[i], bounds[i + 1])
        ]
        for i, node in enumerate(expanded)
    ]
    beam = [
        {"node": n.id, "parent": n.parent.id if n.parent else None, "token": n.token, "score": n.score,
         "finished": n.finished}
        for n in tree.beam
    ]  # fmt: skip
    return {
        "step": expanded[0].depth,
        "blind": all_unseen,
        "expanded": [{"node": n.id, "candidates": c} for n, c in zip(expanded, candidates, strict=True)],
        "beam": beam,
    }
