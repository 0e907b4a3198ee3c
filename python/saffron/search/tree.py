"""The search tree of one prompt, kept on the host: one small object per node of the beam."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from saffron.search.config import Ranking
from saffron.search.result import StepStatistics, Tally


@dataclass(slots=True, eq=False)
class Node:
    """A response prefix.

    Attributes:
        parent: None for the empty response.
        token: its last token, -1 for the empty response.
        score: what it competes with: its last token's reward, or what it inherited; see `SearchConfig` for others.
        finished: the token ended the response.
        depth: number of tokens.
        id: numbers the nodes of one tree in the order of their creation.
        reward: of the response (`SearchConfig.path_score`), capped.
        log_probability: of the response under the policy; 0 where the configuration does not ask for it.
        children: number of children in the cache.
        row: which row of the models' batch it is, while it is one.
    """

    parent: Node | None
    token: int
    score: float
    finished: bool
    depth: int
    id: int
    reward: float = 0.0
    log_probability: float = 0.0
    children: int = 0
    row: int = -1

    @property
    def rank(self) -> tuple[float, float]:
        """Greater is better: the score, and between equal scores the mean log-probability per token."""
        return self.score, self.log_probability / max(self.depth, 1)

    def tokens(self) -> list[int]:
        """The response, first token first."""
        path: list[int] = []
        node = self
        while node.parent is not None:
            path.append(node.token)
            node = node.parent
        return path[::-1]


@dataclass(slots=True, eq=False)
class Tree:
    """One search.

    Attributes:
        beam: its nodes, best first.
        cached: response prefixes that the live beams hold in the cache.
        next_id: nodes created so far.
        tallies: what it has cost the policy and the MRM.
        steps, trace: what is reported.
    """

    beam: list[Node] = field(default_factory=lambda: [Node(None, -1, 0.0, False, 0, 0)])
    cached: int = 0
    next_id: int = 1
    tallies: tuple[Tally, Tally] = field(default_factory=lambda: (Tally(), Tally()))
    steps: list[StepStatistics] = field(default_factory=list)
    trace: list[dict[str, Any]] | None = None

    def child(
        self, parent: Node, token: int, score: float, reward: float, log_probability: float, finished: bool
    ) -> Node:
        node = Node(parent, token, score, finished, parent.depth + 1, self.next_id, reward, log_probability)
        self.next_id += 1
        return node

    def expand(self, children: list[Node], kept: list[Node], ranking: Ranking, width: int) -> list[Node]:
        """Replaces the beam by its children and the finished nodes that were kept; returns the live ones, by parent.

        Args:
            children: ordered by parent, siblings by score.
        """
        old = self.live
        if ranking == "paper":
            self.beam = sorted([*kept, *children], key=lambda n: n.rank, reverse=True)
        else:  # As published: an unfinished node carries no score, and the order of the step stands between equals.
            best = sorted(children, key=lambda n: n.rank, reverse=True)
            finished = sorted([n for n in [*kept, *best] if n.finished], key=lambda n: n.rank, reverse=True)
            self.beam = [*finished, *(n for n in best if not n.finished)][:width]
        in_beam = set(self.beam)
        live = [node for node in children if node in in_beam and not node.finished]
        self._update_cached(old, live)
        return live

    def _update_cached(self, old: list[Node], new: list[Node]) -> None:
        """Counts the prefixes in the cache after the live beams `old` were replaced by their children `new`."""
        for node in new:
            if node.parent is not None:
                node.parent.children += 1
        self.cached += len(new)
        for node in old:
            while node.parent is not None and node.children == 0:
                self.cached -= 1
                node = node.parent
                node.children -= 1

    @property
    def live(self) -> list[Node]:
        return [node for node in self.beam if not node.finished]

    @property
    def answer(self) -> Node:
        """The node of the highest rank; of equals a finished one, then the first."""
        return max(self.beam, key=lambda node: (node.rank, node.finished))


def common_prefix(nodes: list[Node]) -> Node:
    """The longest response that all nodes begin with."""
    while len(nodes) > 1:
        deepest = max(node.depth for node in nodes)
        climbed = {
            id(n): n for n in (node.parent if node.depth == deepest else node for node in nodes) if n is not None
        }
        nodes = list(climbed.values())
    return nodes[0]
