"""Every method written from its paper: plain lists, one sequence at a time, no cache and no batches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import tiny
import torch

from saffron.models.bundled import Models
from saffron.models.trie_model import TrieModel
from saffron.search import Decoder, Request
from saffron.search.method import seed_of
from saffron.search.rebase import allocate

Tokens = tuple[int, ...]
END = 1


@cache
def dense_copy(model: TrieModel) -> torch.nn.Module:
    dense = tiny.model(attention="eager", **{name: getattr(model.model.config, name) for name in tiny.SHAPE})
    dense.load_state_dict(model.model.state_dict())
    return dense


class Dense:
    """The models without the trie, asked about one response at a time."""

    def __init__(self, models: Models, method: Decoder, prompt: str, prefill: str) -> None:
        self.models, self.config, self.prompt = models, method.config, prompt
        self.with_mrm = method.scorer is not None and method.scorer.model is models.mrm
        self.context = models.policy.chat(prompt, prefill)
        self.seed = seed_of(getattr(self.config, "seed", 0), Request(tuple(self.context)))
        self.rng = np.random.default_rng(self.seed)
        self.policy, self.mrm = (dense_copy(model) for model in (models.policy, models.mrm))
        # What was said about a response before: a reference may be slow, but not that slow.
        self.logits, self.nucleus, self.reward = cache(self._logits), cache(self._nucleus), cache(self._reward)

    def _logits(self, response: Tokens) -> torch.Tensor:
        with torch.no_grad():
            logits = self.policy(torch.tensor([[*self.context, *response]])).logits[0, -1].double()
        if len(response) < self.config.min_new_tokens:
            logits[END] = -torch.inf
        return logits

    def _nucleus(self, response: Tokens) -> tuple[list[int], np.ndarray]:
        logits = self.logits(response) / self.config.temperature
        probabilities, order = logits.softmax(-1).sort(descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        keep = (before < self.config.top_p) & (probabilities > 0)
        return order[keep].tolist(), probabilities[keep].numpy()

    def log_probability(self, response: Tokens) -> float:
        """Log-probability of the last token."""
        return float(self.logits(response[:-1]).log_softmax(-1)[response[-1]])

    def draw(self, response: Tokens, uniform: float) -> Tokens:
        tokens, probabilities = self.nucleus(response)
        at = int(np.searchsorted(np.cumsum(probabilities), uniform * probabilities.sum(), side="right"))
        return (*response, tokens[min(at, len(tokens) - 1)])

    def goes_on(self, response: Tokens) -> bool:
        return len(response) < self.config.max_new_tokens and response[-1:] != (END,)

    def sample(self, response: Tokens, steps: int, rng: np.random.Generator) -> Tokens:
        for _ in range(steps):
            if self.goes_on(response):
                response = self.draw(response, rng.random())
        return response

    def look_ahead(self, response: Tokens, steps: int) -> Tokens:
        for _ in range(steps):
            if self.goes_on(response):
                response = (*response, self.nucleus(response)[0][0])
        return response

    def _reward(self, response: Tokens) -> float:
        said = response[:-1] if response[-1:] == (END,) else response
        if not self.with_mrm:
            return float(self.models.guard.score([(self.prompt, said)]))
        if not said:
            return 0.0
        mrm = self.models.mrm
        assert mrm.unseen is not None
        if bool(mrm.unseen[said[-1]]):
            return -1024.0
        with torch.no_grad():
            rewards = self.mrm(torch.tensor([[*mrm.context_tokens(self.prompt), *said[:-1]]])).logits[0, -1] + mrm.bias
        return float(rewards[said[-1]])


Found = tuple[Tokens, float]


def best(dense: Dense, found: Sequence[Found]) -> Found:
    return max(found, key=lambda f: (f[1], f[0][-1:] == (END,)))


def sample(dense: Dense) -> Found:
    response = dense.sample((), dense.config.max_new_tokens, np.random.default_rng([*dense.seed, 0]))
    return response, sum(dense.log_probability(response[:i]) for i in range(1, len(response) + 1))


def best_of_n(dense: Dense) -> Found:
    streams = [np.random.default_rng([*dense.seed, i]) for i in range(dense.config.n)]
    drawn = [dense.sample((), dense.config.max_new_tokens, stream) for stream in streams]
    return max(((response, dense.reward(response)) for response in drawn), key=lambda found: found[1])


def beam(dense: Dense) -> Found:
    config, rng = dense.config, dense.rng
    beams: list[Found] = [((), 0.0)]
    while any(dense.goes_on(response) for response, _ in beams):
        children: list[Tokens] = []
        for response, _ in beams:
            if dense.goes_on(response):
                tokens, probabilities = dense.nucleus(response)
                keys = np.log(probabilities) + rng.gumbel(size=len(tokens))
                children += [(*response, tokens[i]) for i in np.argsort(-keys, kind="stable")[: config.children]]
        for _ in range(config.step_tokens - 1):
            children = [dense.sample(child, 1, rng) for child in children]
        pool = [found for found in beams if not dense.goes_on(found[0])]
        pool += [(child, dense.reward(child)) for child in dict.fromkeys(children)]
        beams = sorted(pool, key=lambda found: -found[1])[: config.width]
    return best(dense, beams)


def rebase(dense: Dense) -> Found:
    config = dense.config
    live: list[Found] = [((), 0.0)]
    leaves: list[Found] = []
    while live:
        shares = allocate([reward for _, reward in live], config.width - len(leaves), config.balance)
        children = [response for (response, _), share in zip(live, shares, strict=True) for _ in range(share)]
        for _ in range(config.step_tokens):
            children = [dense.sample(child, 1, dense.rng) for child in children]
        scored = [(child, dense.reward(child)) for child in children]
        live = [found for found in scored if dense.goes_on(found[0])]
        leaves += [found for found in scored if not dense.goes_on(found[0])]
    assert len(leaves) == config.width
    return best(dense, leaves)


def deal(dense: Dense) -> Found:
    config = dense.config
    beams: list[Found] = [((), 0.0)]
    while any(dense.goes_on(response) for response, _ in beams):
        pool = [found for found in beams if not dense.goes_on(found[0])]
        for response, _ in beams:
            if dense.goes_on(response):
                for token in dense.nucleus(response)[0][: config.children]:
                    child = (*response, token)
                    value = sum(dense.log_probability(child[:i]) for i in range(1, len(child) + 1))
                    reward = dense.reward(dense.look_ahead(child, config.lookahead))
                    pool.append((child, config.policy_weight * value + reward))
        beams = sorted(pool, key=lambda found: -found[1])[: config.width]
    return best(dense, beams)


def monte_carlo(dense: Dense) -> Found:
    config = dense.config
    visits: Counter[Tokens] = Counter()
    value: Counter[Tokens] = Counter()
    expanded: set[Tokens] = set()

    def children(node: Tokens) -> list[Tokens]:
        return [(*node, token) for token in dense.nucleus(node)[0][: config.children]]

    def urgency(node: Tokens) -> float:
        if not visits[node]:
            return math.inf
        spread = math.sqrt(math.log(visits[node[:-1]]) / visits[node])
        return value[node] / visits[node] + config.exploration * spread

    root: Tokens = ()
    while dense.goes_on(root):
        expanded.add(root)
        while len(children(root)) > 1 and visits[root] < config.simulations:
            path = [root]
            while path[-1] in expanded:
                path.append(max(children(path[-1]), key=urgency))
            if visits[path[-1]] and dense.goes_on(path[-1]):
                expanded.add(path[-1])
                path.append(children(path[-1])[0])
            reward = dense.reward(dense.look_ahead(path[-1], config.lookahead))
            for node in path:
                visits[node] += 1
                value[node] += 1 / (1 + math.exp(-reward)) if reward > -700 else 0.0
        root = max(children(root), key=lambda node: (visits[node], value[node] / max(visits[node], 1)))
    return root, dense.reward(root)


def args(dense: Dense) -> Found:
    config, reward = dense.config, 0.0
    response: Tokens = ()
    while dense.goes_on(response):
        children = [(*response, token) for token in dense.nucleus(response)[0][: config.children]]
        scores = [dense.log_probability(child) + config.reward_weight * dense.reward(child) for child in children]
        if config.choice_temperature:
            weights = np.exp((np.array(scores) - max(scores)) / config.choice_temperature)
            at = int(np.searchsorted(weights.cumsum() / weights.sum(), dense.rng.random(), side="right"))
        else:
            at = scores.index(max(scores))
        response, reward = children[at], dense.reward(children[at])
    return response, reward


def cards(dense: Dense) -> Found:
    config = dense.config

    def segment(response: Tokens) -> Tokens:
        start = len(response)
        while dense.goes_on(response) and len(response) - start < config.longest:
            probabilities = dense.logits(response).softmax(-1)
            entropy = -sum(p * math.log(p) for p in probabilities.tolist() if p > 0)
            if len(response) - start >= config.shortest and entropy >= config.entropy_threshold:
                break
            response = dense.draw(response, dense.rng.random())
        return response

    first = (1 - config.alpha) * dense.reward(()) + config.alpha * config.reward_threshold
    accepted: Found = ((), 0.0)
    while dense.goes_on(accepted[0]):
        drawn: list[Found] = []
        while True:
            candidate = segment(accepted[0])
            drawn.append((candidate, dense.reward(candidate)))
            if len(drawn) == config.attempts:
                accepted = max(drawn, key=lambda found: found[1])
                break
            threshold = first + len(candidate) * (config.reward_threshold - first) / config.max_new_tokens
            if dense.rng.random() < min(1.0, math.exp(min(0.0, (drawn[-1][1] - threshold) / config.beta))):
                accepted = drawn[-1]
                break
    return accepted


REFERENCES: dict[str, Callable[[Dense], Found]] = {
    "sample": sample, "best-of-n": best_of_n, "beam": beam, "rebase": rebase, "deal": deal, "mcts": monte_carlo,
    "args": args, "cards": cards,
}  # fmt: skip
