"""What is reported about the steps of a search: its cost and its statistics."""

from __future__ import annotations

from collections.abc import Sequence

from saffron.search.handle import Handle
from saffron.search.model_pair import ModelPair
from saffron.search.readers import Row
from saffron.search.result import StepStatistics


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
