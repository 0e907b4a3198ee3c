"""One interface for what guides a search: a PRM, one call per response, or an MRM, one per prefix.

A PRM is a guard model, or anything else that scores text (`TextReward`).

(SAFFRON-1, sections 3 and 4: an MRM takes the place of the PRM in any tree search.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from saffron.models.checks import expect, not_finite
from saffron.models.guard import ProcessRewardModel
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.models.text_rewards import TextReward
from saffron.models.vocabulary import Head, head_for, same_tokens
from saffron.search.prefix_scorer import PrefixScorer, Tokens
from saffron.search.result import Tally
from saffron_kernels import multifurcation_head

RewardModel = ProcessRewardModel | TextReward | MultifurcationRewardModel
SearchPrefix = tuple[int, Tokens]  # a response of the search with that number


class Reward(Protocol):
    """Scores responses of many searches; remembers scores, so that nothing is scored twice."""

    @property
    def tallies(self) -> Mapping[Any, Tally]:
        """Cost, for each search."""

    def score(self, owners: Sequence[int], responses: Sequence[Tokens]) -> list[float]:
        """The reward of each response, in the policy's tokens, of the search `owners[i]`. A token that ends the
        response is left out: ending changes nothing about what was said.

        Raises:
            NumericalError: a reward that is not finite.
        """

    def retain(self, wanted: Callable[[int, Tokens], bool]) -> None:
        """As `PrefixScorer.retain`, over responses in the policy's tokens."""

    def close(self) -> None:
        """Gives the cache back."""


class _Responses:
    """What both rewards share: responses in the policy's tokens, as the reward model reads them, and their cache.

    Equal texts are one sequence to the model, whatever the policy's tokens, so that their rewards are equal.
    """

    def __init__(
        self,
        policy: Policy,
        model: ProcessRewardModel | MultifurcationRewardModel,
        contexts: Sequence[Tokens],
        eos_token_id: frozenset[int],
        head_rows: int,
    ) -> None:
        self._policy, self._model, self._eos_token_id = policy, model, eos_token_id
        self._same = same_tokens(policy, model)
        self._reading = PrefixScorer(model, dict(enumerate(contexts)), head_rows)

    @property
    def tallies(self) -> Mapping[Any, Tally]:
        return self._reading.tallies

    def close(self) -> None:
        self._reading.close()

    def _said(self, response: Tokens) -> Tokens:
        return _said(response, self._eos_token_id)

    def _read(self, response: Tokens) -> Tokens:
        """In the reward model's tokens."""
        return (
            response if self._same or not response else tuple(self._model.encoder.text(self._policy.decode(response)))
        )


class ProcessReward(_Responses):
    """A PRM: one call scores one response. Prompt and response are shared between calls, so that a call runs the
    response's new tokens and the end of the moderation template."""

    def __init__(
        self, policy: Policy, prm: ProcessRewardModel, contexts: Sequence[Tokens], eos_token_id: frozenset[int]
    ) -> None:
        super().__init__(policy, prm, contexts, eos_token_id, head_rows=2)
        self._prm, self._suffix = prm, prm.suffix_tokens()
        self._sequence: dict[SearchPrefix, SearchPrefix] = {}  # response in the policy's tokens: in the reward model's
        self._known: dict[SearchPrefix, float] = {}  # by the latter

    def score(self, owners: Sequence[int], responses: Sequence[Tokens]) -> list[float]:
        said = [(g, self._said(r)) for g, r in zip(owners, responses, strict=True)]
        for g, response in said:
            if (g, response) not in self._sequence:
                self._sequence[g, response] = g, self._read(response)
        keys = [self._sequence[response] for response in said]
        fresh = list(dict.fromkeys(key for key in keys if key not in self._known))
        if fresh:
            hidden = self._reading.read([g for g, _ in fresh], [r for _, r in fresh], self._suffix)
            self._known.update(zip(fresh, _finite("prm", self._prm.verdict(hidden)), strict=True))
        return [self._known[key] for key in keys]

    def retain(self, wanted: Callable[[int, Tokens], bool]) -> None:
        self._sequence = {response: key for response, key in self._sequence.items() if wanted(*response)}
        kept = set(self._sequence.values())
        self._known = {key: reward for key, reward in self._known.items() if key in kept}
        self._reading.retain(lambda g, sequence: (g, sequence) in kept)


class TextProcessReward:
    """A PRM that reads text: one call scores one response. Equal texts have equal rewards and are scored once; a call
    costs what the reward declares, and no tokens."""

    def __init__(
        self, policy: Policy, prm: TextReward, contexts: Sequence[Tokens], eos_token_id: frozenset[int]
    ) -> None:
        self._policy, self._prm, self._eos_token_id = policy, prm, eos_token_id
        self._conversations = [prm.conversation(context) for context in contexts]
        self.tallies = {search: Tally() for search in range(len(contexts))}
        self._text: dict[SearchPrefix, str] = {}
        self._known: dict[tuple[int, str], float] = {}

    def score(self, owners: Sequence[int], responses: Sequence[Tokens]) -> list[float]:
        said = [(g, _said(r, self._eos_token_id)) for g, r in zip(owners, responses, strict=True)]
        for owned in said:
            if owned not in self._text:
                self._text[owned] = self._policy.decode(owned[1]) if owned[1] else ""
        keys = [(owned[0], self._text[owned]) for owned in said]
        fresh = list(dict.fromkeys(key for key in keys if key not in self._known))
        rewards = self._prm.score([(self._conversations[g], text) for g, text in fresh])
        for key, reward in zip(fresh, rewards.tolist(), strict=True):
            self._known[key] = reward
            self.tallies[key[0]].add(self._prm.flops, 0)
        return [self._known[key] for key in keys]

    def retain(self, wanted: Callable[[int, Tokens], bool]) -> None:
        self._text = {response: text for response, text in self._text.items() if wanted(*response)}
        kept = {(g, text) for (g, _), text in self._text.items()}
        self._known = {key: reward for key, reward in self._known.items() if key in kept}

    def close(self) -> None:
        self._text, self._known = {}, {}


class MultifurcationReward(_Responses):
    """An MRM: the reward of a response is read at the prefix before its last token, so that one call scores all that
    a prefix can go on with. Conservative exploration as in Saffron search; the empty response scores 0."""

    def __init__(
        self,
        policy: Policy,
        mrm: MultifurcationRewardModel,
        contexts: Sequence[Tokens],
        eos_token_id: frozenset[int],
        head: Head,
        unseen_reward: float,
    ) -> None:
        super().__init__(policy, mrm, contexts, eos_token_id, head_rows=0)
        self._head, self._unseen_reward = head, unseen_reward
        self._prefix: dict[
            SearchPrefix, SearchPrefix
        ] = {}  # response in the policy's tokens: what is before its last, in the MRM's
        self._hidden: dict[SearchPrefix, Tensor] = {}  # by the latter
        self._known: dict[SearchPrefix, float] = {}  # by the former

    def score(self, owners: Sequence[int], responses: Sequence[Tokens]) -> list[float]:
        said = [(g, self._said(r)) for g, r in zip(owners, responses, strict=True)]
        fresh = list(dict.fromkeys(key for key in said if key not in self._known and key[1]))
        if fresh:
            hidden = self._states(fresh)
            for owner, _ in fresh:
                self._reading.charge_head(owner, 1)
            tokens = torch.tensor([r[-1] for _, r in fresh], dtype=torch.int32, device=hidden.device)
            offsets = torch.arange(len(fresh) + 1, dtype=torch.int32, device=hidden.device)
            head = (self._head.weight, self._head.bias, self._head.unseen)
            rewards = multifurcation_head(hidden, *head, self._unseen_reward, tokens, offsets)
            self._known.update(zip(fresh, _finite("mrm", rewards), strict=True))
        return [self._known[key] if key[1] else 0.0 for key in said]

    def retain(self, wanted: Callable[[int, Tokens], bool]) -> None:
        self._known = {response: reward for response, reward in self._known.items() if wanted(*response)}
        self._prefix = {response: key for response, key in self._prefix.items() if response in self._known}
        kept = set(self._prefix.values())
        self._hidden = {key: hidden for key, hidden in self._hidden.items() if key in kept}
        self._reading.retain(lambda g, sequence: (g, sequence) in kept)

    def _states(self, responses: Sequence[SearchPrefix]) -> Tensor:
        """Hidden states `[responses, hidden]` before each last token; siblings share one."""
        for g, response in responses:
            self._prefix[g, response] = g, self._read(response[:-1])
        keys = [self._prefix[response] for response in responses]
        fresh = list(dict.fromkeys(key for key in keys if key not in self._hidden))
        if fresh:
            hidden = self._reading.read([g for g, _ in fresh], [r for _, r in fresh])
            self._hidden.update(zip(fresh, hidden, strict=True))
        return torch.stack([self._hidden[key] for key in keys])


class RewardScorer:
    """A reward model and how it is asked: what a method is given. `open` makes the `Reward` of one batch.

    Args:
        policy: whose responses it scores.
        model: a PRM (a guard or a reward of text) or an MRM.
        unseen_reward: an MRM's reward of tokens it was never trained on.
    """

    def __init__(self, policy: Policy, model: RewardModel, unseen_reward: float = -1024.0) -> None:
        expect("policy", policy, Policy)
        expect("reward_model", model, ProcessRewardModel, TextReward, MultifurcationRewardModel)
        self.policy, self.model, self.unseen_reward = policy, model, unseen_reward
        if isinstance(model, MultifurcationRewardModel):
            head_for(policy, model, True)  # vocabularies that do not fit are refused here

    @property
    def longest_suffix(self) -> int:
        """Tokens that it reads behind a response."""
        return len(self.model.suffix_tokens()) if isinstance(self.model, ProcessRewardModel) else 0

    def open(self, contexts: Sequence[Tokens], eos_token_id: frozenset[int]) -> Reward:
        if isinstance(self.model, ProcessRewardModel):
            return ProcessReward(self.policy, self.model, contexts, eos_token_id)
        if isinstance(self.model, TextReward):
            return TextProcessReward(self.policy, self.model, contexts, eos_token_id)
        head = head_for(self.policy, self.model, True)  # with the weights that it has now
        return MultifurcationReward(self.policy, self.model, contexts, eos_token_id, head, self.unseen_reward)


def _said(response: Tokens, eos_token_id: frozenset[int]) -> Tokens:
    """Without the end token."""
    return response[:-1] if response and response[-1] in eos_token_id else response


def _finite(model: str, rewards: Tensor) -> list[float]:
    if not bool(rewards.isfinite().all()):
        raise not_finite(model, "reward")
    return [float(reward) for reward in rewards.tolist()]
