"""Algorithm 1 of SAFFRON-1 on one screen: dense, without a cache, one sequence at a time. The specification.

`nucleus` and `child` say what candidates and their scores are; in the paper, the top-p set and the MRM's rewards.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from saffron.search.config import SearchConfig
from saffron.search.reference_rules import Response, child, nucleus

Model = Callable[[list[int]], Tensor]  # [vocab] after a response: the policy's logits, or the MRM's rewards


def search(policy: Model, mrm: Model, unseen: Tensor, eos_token_id: set[int], config: SearchConfig) -> list[Response]:
    """The last beam, the answer first. `unseen`: `[vocab]` bool, tokens that the MRM was never trained on."""
    inherits = eos_token_id if config.eos_score == "parent" else set()  # ending changes nothing of what was said
    live, finished = [Response()], list[Response]()
    beam = live
    for step in range(config.max_new_tokens):
        width = 1 if config.commit_every and (step + 1) % config.commit_every == 0 else config.width
        found = list[tuple[Response, int, float, float]]()  # parent, token, reward, log-probability
        for node in live:
            logits, rewards = policy(list(node.tokens)).double(), mrm(list(node.tokens))
            if step < config.min_new_tokens:
                logits[list(eos_token_id)] = -float("inf")
            for token, log_probability in nucleus(logits, config):
                reward = config.unseen_reward if unseen[token] else float(rewards[token])
                found.append((node, token, node.reward if token in inherits else reward, log_probability))
        if config.eos_score == "parent" and all(unseen[token] for _, token, *_ in found if token not in inherits):
            found = [(n, t, n.reward, p) for n, t, _, p in found]  # the MRM knows nothing: the policy's order decides
        children = [child(n, t, reward, p, t in eos_token_id, config) for n, t, reward, p in found]
        # Siblings stand by rank, and between equal ranks the earlier parent wins.
        row = {node.tokens: i for i, node in enumerate(live)}
        children.sort(key=lambda c: c.rank, reverse=True)
        children.sort(key=lambda c: row[c.tokens[:-1]])
        # As published ("released") finished responses do not compete with the children for places in the beam.
        competing = [*children, *(finished if config.ranking == "paper" else [])]
        best = sorted(competing, key=lambda node: node.rank, reverse=True)[:width]
        new = [node for node in children if node in best]
        kept = [node for node in finished if node in best or config.ranking == "released"]
        finished = [*kept, *(node for node in new if node.finished)]
        if config.ranking == "paper":
            beam = sorted([*kept, *new], key=lambda node: node.rank, reverse=True)
        else:  # an unfinished response carries no score, and stands behind the finished ones
            going_on = [node for node in best if not node.finished]
            beam = [*sorted(finished, key=lambda node: node.rank, reverse=True), *going_on][:width]
        live, finished = [n for n in new if n in beam and not n.finished], [n for n in finished if n in beam]
        if not live:
            break
    answer = max(beam, key=lambda node: (node.rank, node.finished)) if config.ranking == "paper" else beam[0]
    return [answer, *(node for node in beam if node is not answer)]
