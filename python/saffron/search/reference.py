"""Algorithm 1 of SAFFRON-1 on one screen: dense, without a cache, one sequence at a time. The specification."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from saffron.search.config import SearchConfig

Model = Callable[[list[int]], Tensor]  # [vocab] after a response: the policy's logits, or the MRM's rewards


class Response(NamedTuple):
    tokens: tuple[int, ...] = ()
    score: float = 0.0
    finished: bool = False
    reward: float = 0.0
    log_probability: float = 0.0

    @property
    def rank(self) -> tuple[float, float]:
        return self.score, self.log_probability / max(len(self.tokens), 1)

    def child(self, token: int, reward: float, chance: float, ends: bool, config: SearchConfig) -> Response:
        """With one more token, of this reward and log-probability. In the paper its score is its reward."""
        length, reward = len(self.tokens) + 1, min(reward, math.inf if config.reward_cap is None else config.reward_cap)
        if length > 1 and config.path_score == "minimum":
            reward = min(reward, self.reward)
        elif length > 1 and config.path_score != "last":
            share = 1 / length if config.path_score == "mean" else 1 - config.discount
            reward = self.reward + share * (reward - self.reward) if share < 1 else reward
        log_probability = self.log_probability + chance if config.asks_policy else 0.0
        said = chance if config.policy_score == "token" else log_probability / length
        step = config.reward_tolerance
        score = (math.floor(reward / step) * step if step else reward) + (
            config.policy_weight and said * config.policy_weight
        )
        return Response((*self.tokens, token), score, ends, reward, log_probability)


def search(policy: Model, mrm: Model, unseen: Tensor, eos_token_id: set[int], config: SearchConfig) -> list[Response]:
    """The last beam, the answer first. `unseen`: `[vocab]` bool, tokens that the MRM was never trained on."""
    live, finished = [Response()], list[Response]()
    beam = live
    for step in range(config.max_new_tokens):
        width = 1 if config.commit_every and (step + 1) % config.commit_every == 0 else config.width
        found: list[
            tuple[int, int, float | None, float]
        ] = []  # row, token, reward (None: its parent's), log-probability
        all_unseen = True
        for row, node in enumerate(live):
            logits, rewards = policy(list(node.tokens)).double() / config.temperature, mrm(list(node.tokens))
            if step < config.min_new_tokens:
                logits[list(eos_token_id)] = -float("inf")
            probability, order = logits.softmax(-1).sort(descending=True, stable=True)
            before = probability.cumsum(0) - probability
            keep = (before < config.top_p) & (probability > 0) & (probability >= config.min_p * probability[0])
            for token in order[keep][: config.top_k or None].tolist():
                reward = None
                if token not in eos_token_id or config.eos_score != "parent":  # ending changes nothing of what was said
                    reward = config.unseen_reward if unseen[token] else float(rewards[token])
                    all_unseen &= bool(unseen[token])
                found.append((row, token, reward, float(logits.log_softmax(-1)[token])))
        inherit = all_unseen and config.eos_score == "parent"  # the MRM knows nothing: the policy's order decides
        children = [
            (r, live[r].child(t, live[r].reward if x is None or inherit else x, chance, t in eos_token_id, config))
            for r, t, x, chance in found
        ]
        children.sort(key=lambda c: c[1].rank, reverse=True)
        children.sort(key=lambda c: c[0])  # between equal ranks the earlier row wins
        # As published ("released") finished responses do not compete with the children for places in the beam.
        competing = [*(c for _, c in children), *(finished if config.ranking == "paper" else [])]
        best = sorted(competing, key=lambda node: node.rank, reverse=True)[:width]
        new = [child for _, child in children if child in best]
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
