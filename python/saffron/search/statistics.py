"""What is reported about the steps of a search: its cost, its statistics and, if it is traced, every candidate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from saffron.search.handle import Handle
from saffron.search.model_pair import ModelPair
from saffron.search.readers import Row
from saffron.search.result import StepStatistics
from saffron.search.tree import Node
from saffron_kernels import multifurcation_head, nucleus


def charge(models: ModelPair, rows: Sequence[Row]) -> None:
    """Counts what running the rows has cost, each search as if alone; what reads text keeps its own account."""
    for side, model in enumerate((models.policy, models.mrm)):
        if side and not models.same:
            return
        flops, shared = model.flops, model.share_prefixes
        for search, node in rows:
            request = search.request
            length = len(request.reward if side else request.policy) + node.depth
            tally = search.tree.tallies[side]
            if node.depth and shared:
                tally.add(flops.token(length - 1), 1)
            else:
                tally.add(flops.prompt(length), length)


def count_step(models: ModelPair, search: Handle, expanded: int, sizes: list[int], all_unseen: bool) -> None:
    """Appends the statistics of the step that the tree has just made, from so many beams with nuclei of these sizes."""
    tree = search.tree
    policy, reward = tree.tallies
    policy.flops += expanded * models.vocab_size * models.policy.flops.per_head_row
    reward.flops += sum(sizes) * models.mrm.flops.per_head_row
    live, steps = len(tree.live), tree.steps
    steps.append(
        StepStatistics(
            step=len(steps),
            live=live,
            finished=len(tree.beam) - live,
            nucleus_sizes=sizes,
            candidates=sum(sizes),
            trie_nodes=len(search.request.policy) + tree.cached,
            reward_model_calls=expanded,
            policy_flops=policy.flops - sum(s.policy_flops for s in steps),
            reward_flops=reward.flops - sum(s.reward_flops for s in steps),
            all_unseen=all_unseen,
        )
    )


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
    tokens, probabilities, offsets = nucleus(logits, config.top_p, banned)
    rewards = multifurcation_head(
        hidden, head.weight, head.bias, head.unseen, config.unseen_reward, tokens, offsets
    ).tolist()
    unseen = [False] * len(rewards) if head.unseen is None else head.unseen[tokens].tolist()
    child = {(n.parent.id, n.token): n.id for n in search.tree.beam if n.parent is not None}
    ids, bounds, probability = tokens.tolist(), offsets.tolist(), probabilities.tolist()
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
