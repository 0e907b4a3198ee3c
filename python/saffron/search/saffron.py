"""Saffron search: beam search by the rewards of all children at once. (SAFFRON-1, section 4, Algorithm 1.)"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from saffron.errors import ConfigError, NumericalError
from saffron.models.chat import Prompt, as_conversations
from saffron.models.checks import expect
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.search.captured import StaticStep, why_not_captured
from saffron.search.config import SearchConfig
from saffron.search.hand_over import Reader, ReadText, ReadTokens, head_for, same_tokens
from saffron.search.method import Progress, Request
from saffron.search.result import Cost, SearchResult, StepStatistics
from saffron.search.tree import Node, Tree, common_prefix
from saffron_kernels import multifurcate, multifurcation_head, nucleus


@dataclass(slots=True)
class _Frontier:
    """The live beams of all searches, a row each: the search it belongs to, its node, and what the models said.

    Where the steps are captured, the outputs are those of the prefill.
    """

    groups: list[int]
    nodes: list[Node]
    logits: Tensor
    hidden: Tensor


@dataclass(frozen=True, slots=True)
class _Choice:
    """What `multifurcate` chose for one search: children of rows as (row, token, score), and carried nodes kept."""

    children: list[tuple[int, int, float]]
    kept: list[Node]


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What one step chose: by search, the nucleus size of each row, and which searches were blind."""

    choices: list[_Choice]
    counts: list[int]
    blind: list[bool]


class SaffronSearch:
    """Searches for the response that the MRM finds safest among those the policy finds likely.

    Args:
        policy, mrm: loaded models. With different tokenizers the response reaches the MRM through text.
        config: hyperparameters.
        end_tokens: ids that end a response; None: the policy's own.
        capture: run the steps as one CUDA graph that is replayed, with buffers of fixed size (`search.captured`): the
            same answers for less work of the host. Not for traced searches, which run step by step.

    Raises:
        ConfigError: models that do not fit each other, or a search that cannot be captured.
    """

    def __init__(
        self,
        policy: Policy,
        mrm: MultifurcationRewardModel,
        config: SearchConfig | None = None,
        *,
        end_tokens: Sequence[int] | None = None,
        capture: bool = False,
    ) -> None:
        expect("policy", policy, Policy)
        expect("mrm", mrm, MultifurcationRewardModel)
        self.policy, self.mrm = policy, mrm
        self.config = SearchConfig() if config is None else config
        expect("config", self.config, SearchConfig)
        self.end_tokens = frozenset(policy.end_tokens if end_tokens is None else end_tokens)
        self.head = head_for(policy, mrm, self.config.lm_head_bias)
        self._ends = torch.tensor(sorted(self.end_tokens), dtype=torch.int32, device=policy.device)
        self.capture = capture
        self._static: StaticStep | None = None
        reason = why_not_captured(policy, mrm, self.config) if capture else None
        if reason is not None:
            raise ConfigError(f"capture: {reason}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config})"

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        prefill: str | Sequence[str] = "",
        *,
        trace: bool = False,
        progress: Progress | None = None,
    ) -> list[SearchResult]:
        """Answers prompts, all in one forest of tries.

        Args:
            prompts: one text, one conversation (messages with "role" and "content", see `Conversation.of`), or a list
                of texts and conversations.
            prefill: how the answers are forced to begin: one text for all prompts, or one each. A conversation that
                ends with an assistant message brings its own.
            trace: record every candidate of every step.
            progress: called with (steps done, steps at most) after each step.

        Raises:
            ConfigError, PromptTooLongError: before anything is run. NumericalError: a model returned NaN.
        """
        conversations = as_conversations(prompts, prefill)
        results = self.search([self._request(c) for c in conversations], trace=trace, progress=progress)
        return [replace(r, prompt=c.prompt, prefill=c.prefill) for r, c in zip(results, conversations, strict=True)]

    def search(
        self, requests: Sequence[Request], *, trace: bool = False, progress: Progress | None = None
    ) -> list[SearchResult]:
        """`generate` for token ids. Equal requests are searched once."""
        started = time.perf_counter()
        distinct = list(dict.fromkeys(requests))
        trees: list[Tree] = []
        for trees in self.steps(distinct, trace=trace):  # noqa: B007 (the trees of the last step are the answer)
            if progress is not None:
                progress(max(len(tree.steps) for tree in trees), self.config.max_new_tokens)
        seconds = (time.perf_counter() - started) / max(len(requests), 1)
        found = {
            request: self._result(tree, Cost.of(*tree.tallies, seconds))
            for request, tree in zip(distinct, trees, strict=True)
        }
        return [found[request] for request in requests]

    def stream(self, prompt: Prompt, prefill: str = "") -> Iterator[str]:
        """Yields the answer in pieces, each as soon as no live beam can change it any more."""
        said = ""
        tree = Tree()
        for (tree,) in self.steps([self._request(prompt, prefill)]):
            text = self.policy.decode(common_prefix(tree.beam).tokens())
            if text.startswith(said) and len(text) > len(said) and not text.endswith("\ufffd"):  # a character in parts
                yield text[len(said) :]
                said = text
        rest = self.policy.decode(tree.answer.tokens())[len(said) :]
        if rest:
            yield rest

    @torch.inference_mode()
    def steps(self, requests: Sequence[Request], *, trace: bool = False) -> Iterator[list[Tree]]:
        """The search itself: yields the trees, one a request, after every step.

        Closing the iterator, or an error in a step, gives the cache back.
        """
        self._check(requests)
        if not requests:
            return
        trees = [Tree(trace=[] if trace else None) for _ in requests]
        same = same_tokens(self.policy, self.mrm)
        policy: Reader = ReadTokens(self.policy)
        mrm: Reader = ReadTokens(self.mrm) if same else ReadText(self.policy, self.mrm)
        try:
            logits = policy.start([request.policy for request in requests])
            hidden = mrm.start([request.reward for request in requests])
            for tree, *tallies in zip(trees, policy.tallies, mrm.tallies, strict=True):
                tree.tallies = (tallies[0], tallies[1])
            at = _Frontier(list(range(len(trees))), [tree.beam[0] for tree in trees], logits, hidden)
            if self.capture and not trace and isinstance(mrm, ReadTokens) and isinstance(policy, ReadTokens):
                yield from self._captured(policy, mrm, requests, trees, at)
                return
            for step in range(self.config.max_new_tokens):
                parents, groups, nodes = self._expand(step, requests, trees, at, self._choose(step, trees, at))
                yield trees
                if not nodes or step + 1 == self.config.max_new_tokens:
                    return
                at.logits = policy.step(parents, groups, nodes)
                at.hidden = mrm.step(parents, groups, nodes)
                at.groups, at.nodes = groups, nodes
        finally:
            mrm.release()
            policy.release()

    def _captured(
        self, policy: ReadTokens, mrm: ReadTokens, requests: Sequence[Request], trees: list[Tree], at: _Frontier
    ) -> Iterator[list[Tree]]:
        """The steps after the prefill, run by the device on its own: the trees follow what it recorded."""
        assert policy.rows is not None and mrm.rows is not None
        contexts = [r.policy for r in requests], [r.reward for r in requests]
        static = self._static_step(contexts)
        length = max(map(len, [*contexts[0], *contexts[1]])) + self.config.max_new_tokens
        carried: list[tuple[int, Node]] = []  # in the order of the device
        for step, record in enumerate(static.search(policy.rows, mrm.rows, at.logits, at.hidden, length)):
            rows = static.rows
            choices = [_Choice([], []) for _ in trees]
            kept = []
            for p, t, r in zip(record.parent, record.token, record.reward, strict=True):
                if p < rows:
                    choices[at.groups[p]].children.append((p, t, r))
                elif p < 2 * rows:
                    kept.append(carried[p - rows])
                    choices[kept[-1][0]].kept.append(kept[-1][1])
            if step > 0:
                policy.tally(at.groups, at.nodes)
                mrm.tally(at.groups, at.nodes)
            chosen = _Chosen(choices, record.counts, record.blind)
            searching = sorted(set(at.groups))
            _, at.groups, at.nodes = self._expand(step, requests, trees, at, chosen)
            new = [(g, n) for g in searching for n in sorted(trees[g].beam, key=lambda n: n.id) if n.depth == step + 1]
            carried = [*kept, *((g, n) for g, n in new if n.finished)]
            yield trees

    def _static_step(self, contexts: tuple[list[tuple[int, ...]], list[tuple[int, ...]]]) -> StaticStep:
        """Buffers for a forest: those of the search before if they do, else new ones with some room."""
        groups = len(contexts[0])
        new = groups * self.config.width * self.config.max_new_tokens
        policy, mrm = (sum(map(len, tokens)) + new for tokens in contexts)
        if self._static is None or not self._static.fits(groups, policy, mrm):
            self._static = None  # before the next one takes its memory
            room = 1 << (policy - 1).bit_length(), 1 << (mrm - 1).bit_length()
            self._static = StaticStep(self.policy, self.mrm, self.head, self._ends, self.config, groups, *room)
        return self._static

    def _expand(
        self, step: int, requests: Sequence[Request], trees: list[Tree], at: _Frontier, chosen: _Chosen
    ) -> tuple[list[int], list[int], list[Node]]:
        """One step: replaces every tree's beam; returns parent row, search and node of each live child."""
        rows_of: dict[int, list[int]] = {}
        for row, g in enumerate(at.groups):
            rows_of.setdefault(g, []).append(row)
        parents, groups, nodes = [], [], []
        for g, mine in rows_of.items():  # searches that have finished have no rows: the rest changes nothing
            tree, choice = trees[g], chosen.choices[g]
            expanded = [at.nodes[row] for row in mine]
            children = {
                tree.child(at.nodes[row], token, score, token in self.end_tokens): row
                for row, token, score in choice.children
            }
            tree.beam = self._rank(list(children), choice.kept)
            in_beam = set(tree.beam)
            live = [node for node in children if node in in_beam and not node.finished]  # still ordered by parent
            tree.update_cached(expanded, live)
            sizes = [chosen.counts[row] for row in mine]
            tree.steps.append(self._statistics(step, requests[g], tree, expanded, sizes, chosen.blind[g]))
            if tree.trace is not None:
                tree.trace.append(self._trace_step(step, tree, at, mine, chosen.blind[g]))
            parents += [children[node] for node in live]
            groups += [g] * len(live)
            nodes += live
        return parents, groups, nodes

    def _choose(self, step: int, trees: list[Tree], at: _Frontier) -> _Chosen:
        """Calls `multifurcate`, and brings its answer to the host: the one synchronisation of a step."""
        config, device = self.config, at.logits.device
        carried = [[n for n in tree.beam if n.finished] for tree in trees]
        _check_finite("policy", at.logits.amax(1))
        _check_finite("mrm", at.hidden)
        competing = [(g, node) for g in sorted(set(at.groups)) for node in carried[g] if config.ranking == "paper"]
        parent, token, reward, counts, blind = multifurcate(
            at.logits,
            at.hidden,
            self.head.weight,
            self.head.bias,
            self.head.unseen,
            config.unseen_reward,
            _int32(at.groups, device),
            len(trees),
            config.width,
            config.top_p,
            banned=self._ends if step < config.min_new_tokens else None,
            scores=_float32([n.score for n in at.nodes], device) if config.eos_score == "parent" else None,
            end_tokens=self._ends if config.eos_score == "parent" else None,
            carried_scores=_float32([n.score for _, n in competing], device),
            carried_groups=_int32([g for g, _ in competing], device),
        )
        rows = len(at.nodes)
        choices = [_Choice([], [] if config.ranking == "paper" else carried[g]) for g in range(len(trees))]
        for p, t, r in zip(parent.tolist(), token.tolist(), reward.tolist(), strict=True):
            if p < rows:
                choices[at.groups[p]].children.append((p, t, r))
            elif p < rows + len(competing):
                g, node = competing[p - rows]
                choices[g].kept.append(node)
        return _Chosen(choices, counts.tolist(), blind.tolist())

    def _rank(self, children: list[Node], kept: list[Node]) -> list[Node]:
        """The new beam, best first. Children come ordered by parent, siblings by score."""
        if self.config.ranking == "paper":
            return sorted([*kept, *children], key=lambda n: -n.score)
        # As published: an unfinished node carries no score, and the order of the step stands between equals.
        children = sorted(children, key=lambda n: -n.score)
        finished = sorted([n for n in [*kept, *children] if n.finished], key=lambda n: -n.score)
        return [*finished, *(n for n in children if not n.finished)][: self.config.width]

    def _statistics(
        self, step: int, request: Request, tree: Tree, expanded: list[Node], sizes: list[int], blind: bool
    ) -> StepStatistics:
        live = len(tree.live)
        policy, reward = tree.tallies
        policy.flops += len(expanded) * self.policy.vocab_size * self.policy.flops.per_head_row
        reward.flops += sum(sizes) * self.mrm.flops.per_head_row
        return StepStatistics(
            step=step,
            live=live,
            finished=len(tree.beam) - live,
            nucleus_sizes=sizes,
            candidates=sum(sizes),
            trie_nodes=len(request.policy) + tree.cached,
            reward_model_calls=len(expanded),
            policy_flops=policy.flops - sum(s.policy_flops for s in tree.steps),
            reward_flops=reward.flops - sum(s.reward_flops for s in tree.steps),
            blind=blind,
        )

    def _trace_step(self, step: int, tree: Tree, at: _Frontier, mine: list[int], blind: bool) -> dict[str, Any]:
        """Every candidate of one step of one search: what `multifurcate` chose from, by the ops it joins."""
        logits, hidden = at.logits[mine], at.hidden[mine]
        banned = self._ends if step < self.config.min_new_tokens else None
        tokens, probabilities, offsets = nucleus(logits, self.config.top_p, banned)
        head = (self.head.weight, self.head.bias, self.head.unseen)
        rewards = multifurcation_head(hidden, *head, self.config.unseen_reward, tokens, offsets).tolist()
        unseen = [False] * len(rewards) if self.head.unseen is None else self.head.unseen[tokens].tolist()
        child = {(n.parent.id, n.token): n.id for n in tree.beam if n.parent is not None}
        ids, bounds, chances = tokens.tolist(), offsets.tolist(), probabilities.tolist()
        expanded = []
        for i, row in enumerate(mine):
            node = at.nodes[row]
            candidates = [
                {
                    "token": ids[c],
                    "text": self._token_text(ids[c]),
                    "probability": chances[c],
                    "reward": rewards[c],
                    "unseen": unseen[c],
                    "child": child.get((node.id, ids[c])),
                }
                for c in range(bounds[i], bounds[i + 1])
            ]
            expanded.append({"node": node.id, "candidates": candidates})
        beam = [
            {"node": n.id, "parent": n.parent.id if n.parent else None, "token": n.token, "score": n.score,
             "finished": n.finished}
            for n in tree.beam
        ]  # fmt: skip
        return {"step": step, "blind": blind, "expanded": expanded, "beam": beam}

    def _token_text(self, token: int) -> str:
        return "" if self.policy.tokenizer is None else str(self.policy.tokenizer.decode([token]))

    def _result(self, tree: Tree, cost: Cost) -> SearchResult:
        answer = tree.answer if self.config.ranking == "paper" else tree.beam[0]
        tokens = answer.tokens()
        text = "" if self.policy.tokenizer is None else self.policy.decode(tokens)
        stop = "eos" if answer.finished else "length"
        return SearchResult(text, tokens, answer.score, stop, cost, tree.steps, trace=tree.trace)  # type: ignore[arg-type]

    def _request(self, prompt: Prompt, prefill: str = "") -> Request:
        return Request(tuple(self.policy.chat(prompt, prefill)), tuple(self.mrm.context_tokens(prompt)))

    def _check(self, requests: Sequence[Request]) -> None:
        for i, request in enumerate(requests):
            for model, tokens in ((self.policy, request.policy), (self.mrm, request.reward)):
                model.check_tokens(f"requests[{i}]", tokens)
                model.check_length(f"prompt {i}", len(tokens), self.config.max_new_tokens)


def _check_finite(model: str, values: Tensor) -> None:
    if not bool(values.isfinite().all()):
        raise NumericalError(f"{model}: its output is not finite (NaN or infinity); the search was stopped")


def _int32(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def _float32(values: list[float], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)
