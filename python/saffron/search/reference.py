"""Algorithm 1 of SAFFRON-1 on one screen: dense, without a cache, one sequence at a time. The specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from saffron.search.config import SearchConfig

Model = Callable[[list[int]], Tensor]  # [vocab] after a response: the policy's logits, or the MRM's rewards


class Response(NamedTuple):
    tokens: tuple[int, ...]
    score: float
    finished: bool


def search(policy: Model, mrm: Model, unseen: Tensor, end_tokens: set[int], config: SearchConfig) -> list[Response]:
    """The last beam, the answer first. `unseen`: `[vocab]` bool, tokens that the MRM was never trained on."""
    live, finished = [Response((), 0.0, False)], list[Response]()
    beam = live
    for step in range(config.max_new_tokens):
        children: list[tuple[int, Response]] = []
        all_unseen = True
        for row, node in enumerate(live):
            logits, rewards = policy(list(node.tokens)).double().clone(), mrm(list(node.tokens))
            if step < config.min_new_tokens:
                logits[list(end_tokens)] = -float("inf")
            probability, order = logits.softmax(-1).sort(descending=True, stable=True)
            before = probability.cumsum(0) - probability
            for token in order[(before < config.top_p) & (probability > 0)].tolist():
                ends = token in end_tokens
                if ends and config.eos_score == "parent":
                    score = node.score  # ending changes nothing about what was said
                else:
                    score = config.unseen_reward if unseen[token] else float(rewards[token])
                    all_unseen &= bool(unseen[token])
                children.append((row, Response((*node.tokens, token), score, ends)))
        if all_unseen and config.eos_score == "parent":  # the MRM knows nothing: the policy's order decides
            children = [(row, child._replace(score=live[row].score)) for row, child in children]
        children.sort(key=lambda c: (c[0], -c[1].score))  # between equal scores the earlier row wins
        # As published ("released") finished responses do not compete with the children for places in the beam.
        competing = [*(c for _, c in children), *(finished if config.ranking == "paper" else [])]
        best = sorted(competing, key=lambda node: -node.score)[: config.width]
        new = [child for _, child in children if child in best]
        kept = [node for node in finished if node in best or config.ranking == "released"]
        finished = [*kept, *(node for node in new if node.finished)]
        if config.ranking == "paper":
            beam = sorted([*kept, *new], key=lambda node: -node.score)
        else:  # an unfinished response carries no score, and stands behind the finished ones
            going_on = [node for node in best if not node.finished]
            beam = [*sorted(finished, key=lambda node: -node.score), *going_on][: config.width]
        live, finished = [n for n in new if n in beam and not n.finished], [n for n in finished if n in beam]
        if not live:
            break
    answer = max(beam, key=lambda node: (node.score, node.finished)) if config.ranking == "paper" else beam[0]
    return [answer, *(node for node in beam if node is not answer)]
