"""Monte Carlo tree search over tokens, guided by a reward model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from saffron.models.policy import Policy
from saffron.search.config import check_number, check_whole
from saffron.search.decoding import DecodingConfig
from saffron.search.method import Candidate, Decoder, SearchBatch, Steps
from saffron.search.prefix_scorer import Tokens
from saffron.search.proposals import Proposer
from saffron.search.rewards import RewardModel, RewardScorer


@dataclass(frozen=True, slots=True, kw_only=True)
class MCTSConfig(DecodingConfig):
    """Hyperparameters of `MCTS`.

    Attributes:
        simulations: visits of the root before each token is chosen.
        children: children of a node, the most probable tokens of its nucleus.
        lookahead: tokens of the greedy rollout that a new node is judged by.
        exploration: weight of what has been visited rarely, at least 0.
    """

    simulations: int = 8
    children: int = 8
    lookahead: int = 4
    exploration: float = 1.0

    def __post_init__(self) -> None:
        DecodingConfig.__post_init__(self)
        check_whole(self, simulations=1, children=1, lookahead=0)
        check_number(self, exploration=False)


@dataclass(slots=True, eq=False)
class TreeNode:
    """A response prefix.

    Attributes:
        response: its tokens.
        visits, value: simulations that went through it, and the sum of their values.
        children: None until it is expanded.
    """

    response: Tokens
    visits: int = 0
    value: float = 0.0
    children: list[TreeNode] | None = field(default=None, repr=False)

    @property
    def mean(self) -> float:
        return self.value / self.visits if self.visits else 0.0


class MCTS(Decoder[MCTSConfig]):
    """Monte Carlo tree search by UCT (Kocsis and Szepesvari, 2006), with a reward model for the value of a response.

    For each token of the answer, simulations are run until the root has been visited `simulations` times: *selection*
    goes down to the child of the greatest `mean + exploration * sqrt(log(visits of the parent) / visits)`, unvisited
    ones first, the more probable first; *expansion* gives the node that is reached its children, and goes to the
    first; the *rollout* lets the policy go on greedily for `lookahead` tokens; *backup* adds the value to all nodes on
    the way. Then the root moves to its most visited child (of equals the one of the higher mean, then the more
    probable), whose subtree and visits are kept.

    Choices: the value is `sigmoid(reward)`, which for a guard read at two tokens is the probability of "safe" among
    them, and lies in [0, 1] as UCT wants. Greedy rollouts need no seed, and are as in DeAL. What policy and reward
    model said about a response is remembered. A root with one child needs no simulation. All prompts of a call run
    their simulations side by side, one each at a time: simulations of one tree depend on each other.

    The score of the answer is its reward.
    """

    config_type = MCTSConfig

    def __init__(self, policy: Policy, reward_model: RewardModel, config: MCTSConfig | None = None) -> None:
        super().__init__(policy, RewardScorer(policy, reward_model), MCTSConfig() if config is None else config)

    def _decode(self, batch: SearchBatch) -> Steps[list[Candidate]]:
        config = self.config
        proposer = Proposer(batch, config.children)
        roots = [TreeNode(()) for _ in range(batch.size)]
        for step in range(config.max_new_tokens):
            live = [g for g, root in enumerate(roots) if batch.goes_on(root.response)]
            if not live:
                break
            self._expand(proposer, [(g, roots[g]) for g in live])
            while searching := [g for g in live if self._undecided(roots[g])]:
                self.simulate(batch, proposer, [(g, roots[g]) for g in searching])
                yield None
            for g in live:
                roots[g] = chosen(roots[g])
            at = {(g, root.response) for g, root in enumerate(roots)}
            parents = {(g, response[:-1]) for g, response in at}
            proposer.retain(lambda g, r, d=step + 1, at=at, up=parents: (g, r[:d]) in at or (g, r) in up)  # type: ignore[misc]
            yield step + 1, config.max_new_tokens
        responses = [root.response for root in roots]
        rewards = batch.score(list(enumerate(responses)))
        return [Candidate(response, reward) for response, reward in zip(responses, rewards, strict=True)]

    def simulate(self, batch: SearchBatch, proposer: Proposer, roots: list[tuple[int, TreeNode]]) -> None:
        """One simulation in each tree: selection, expansion, rollout, backup."""
        config = self.config
        paths = [self._select(root) for _, root in roots]
        reached = [(g, path[-1]) for (g, _), path in zip(roots, paths, strict=True)]
        # The first visit of a node is its own rollout; the second goes on to its first child.
        inner = [node.visits > 0 and batch.goes_on(node.response) for _, node in reached]
        self._expand(proposer, [at for at, expands in zip(reached, inner, strict=True) if expands])
        for path, expands in zip(paths, inner, strict=True):
            if expands:
                assert path[-1].children
                path.append(path[-1].children[0])
        ends = proposer.look_ahead([(g, path[-1].response) for (g, _), path in zip(roots, paths, strict=True)],
                                   config.lookahead)  # fmt: skip
        for path, reward in zip(paths, batch.score(ends), strict=True):
            value = 1 / (1 + math.exp(-reward)) if reward > -700 else 0.0
            for node in path:
                node.visits += 1
                node.value += value

    def _undecided(self, root: TreeNode) -> bool:
        assert root.children
        return len(root.children) > 1 and root.visits < self.config.simulations

    def _select(self, root: TreeNode) -> list[TreeNode]:
        """From the root down to a node without children."""
        path = [root]
        while path[-1].children:
            path.append(max(path[-1].children, key=lambda child, parent=path[-1]: self._urgency(parent, child)))  # type: ignore[misc]
        return path

    def _urgency(self, parent: TreeNode, child: TreeNode) -> float:
        if child.visits == 0:
            return math.inf
        return child.mean + self.config.exploration * math.sqrt(math.log(parent.visits) / child.visits)

    @staticmethod
    def _expand(proposer: Proposer, nodes: list[tuple[int, TreeNode]]) -> None:
        """Gives each node that has none its children."""
        nodes = [(g, node) for g, node in nodes if node.children is None]
        for (_, node), proposal in zip(nodes, proposer.propose([(g, n.response) for g, n in nodes]), strict=True):
            node.children = [TreeNode((*node.response, token)) for token in proposal.tokens]


def chosen(root: TreeNode) -> TreeNode:
    """The child that the root moves to."""
    assert root.children
    return max(root.children, key=lambda child: (child.visits, child.mean))
