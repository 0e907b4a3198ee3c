"""What is recorded of a search that is traced: every candidate of every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saffron.search.handle import Handle
from saffron.search.model_pair import ModelPair
from saffron.search.selection import Rules, propose
from saffron.search.tree import Node


def trace_step(
    models: ModelPair, search: Handle, expanded: Sequence[Node], logits: Tensor, hidden: Tensor, all_unseen: bool
) -> dict[str, Any]:
    """Every candidate of one step of one search: what `multifurcate` chose from, by the ops it joins.

    Args:
        search: after the step.
        expanded: the nodes that it expanded. logits, hidden: `[nodes, ...]`, theirs.
    """
    config, tokenizer, head = search.config, models.policy.tokenizer, models.head(search.config.lm_head_bias)
    banned = None
    if expanded[0].depth < config.min_new_tokens:
        banned = torch.tensor(sorted(search.eos_token_id), dtype=torch.int32, device=logits.device)
    proposed = propose(logits, Rules.of([config] * len(expanded), logits.device), banned)
    rewards = proposed.rewards(hidden, head, config.unseen_reward).tolist()
    unseen = [False] * len(rewards) if head.unseen is None else head.unseen[proposed.tokens].tolist()
    child = {(n.parent.id, n.token): n.id for n in search.tree.beam if n.parent is not None}
    ids, bounds, probability = (x.tolist() for x in (proposed.tokens, proposed.offsets, proposed.probabilities))
    candidates = [
        [
            {
                "token": ids[c],
                "text": "" if tokenizer is None else str(tokenizer.decode([ids[c]])),
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
        for n in search.tree.beam
    ]  # fmt: skip
    return {
        "step": expanded[0].depth,
        "all_unseen": all_unseen,
        "expanded": [{"node": n.id, "candidates": c} for n, c in zip(expanded, candidates, strict=True)],
        "beam": beam,
    }
