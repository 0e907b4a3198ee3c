"""A conversation as the two reward models read it, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from saffron.errors import ConfigError
from saffron.models.chat import ConversationEncoder
from saffron.models.guard import ProcessRewardModel
from saffron.training.conversations import Conversation, Turn

FORMAT, USER, AGENT = 0, 1, 2  # who wrote a token; FORMAT: the words around the turns
BEFORE_TURN = ("\n\nUser:", "\n\nAgent:")  # prefix and infix of `MultifurcationRewardModel`
Prefixes = Literal["conversation", "response"]


@dataclass(frozen=True, slots=True)
class Layout:
    """One conversation, cut.

    Attributes:
        input_ids: as the MRM reads it.
        roles: who wrote each of them.
        rewarded: which of them end a prefix that gets a reward, as indices.
        trunk: the conversation in the PRM's template, without what follows the last turn.
        ends: for each of `rewarded`, how long the trunk is up to that token.
        after: what the template has after the last turn.
    """

    input_ids: list[int]
    roles: list[int]
    rewarded: list[int]
    trunk: list[int]
    ends: list[int]
    after: list[int]

    def prefixes(self) -> list[list[int]]:
        """What the PRM judges: every prefix in its template, one for each of `rewarded`."""
        return [self.trunk[:end] + self.after for end in self.ends]

    def turns(self) -> list[list[int]]:
        """What users and agents say, in turn, as far as it was not cut off."""
        found: list[list[int]] = []
        before = FORMAT
        for token, role in zip(self.input_ids, self.roles, strict=True):
            if role != FORMAT and before == FORMAT:
                found += [[]] * (len(found) % 2 != role - USER)  # a turn without words
                found.append([])
            if role != FORMAT:
                found[-1].append(token)
            before = role
        return found


class ConversationLayout:
    """Lays conversations out for a PRM and an MRM with its tokenizer.

    Args:
        prm: a guard, or the encoder of the MRM's tokenizer where the reward judges text: then the trunk is the turns'
            tokens and nothing else.
        max_tokens: conversations are cut to so many tokens, as the MRM reads them (the paper: 128).
        prefixes: which ones get a reward. "conversation": all that end in a word of a user or an agent, as the paper's
            loss sums over every prefix of a sequence. "response": those that end in an agent's word; a search asks
            the MRM for no others.
    """

    def __init__(
        self, prm: ProcessRewardModel | ConversationEncoder, max_tokens: int = 128, prefixes: Prefixes = "conversation"
    ) -> None:
        if max_tokens < 2:
            raise ConfigError(f"max_tokens: got {max_tokens}, expected at least 2")
        if prefixes not in get_args(Prefixes):
            raise ConfigError(f"prefixes: got {prefixes!r}, expected one of {', '.join(get_args(Prefixes))}")
        self.prm, self.max_tokens = prm, max_tokens
        self.encoder = prm if isinstance(prm, ConversationEncoder) else prm.encoder
        self.rewarded_roles = {AGENT} if prefixes == "response" else {USER, AGENT}
        begin, encode = self.encoder.tokenizer.bos_token or "", self.encoder.template_text
        self._first, self._before_turn = encode(begin + BEFORE_TURN[0]), [encode(text) for text in BEFORE_TURN]
        self._template = cache(self._encoded_template)

    def __call__(self, conversation: Conversation) -> Layout:
        """Raises `ConfigError` for token ids that the PRM's vocabulary lacks."""
        turns = self._cut(conversation.turns)
        *befores, after = self._template(len(turns) + len(turns) % 2)
        laid = Layout([], [], [], [], [], after)
        for number, turn in enumerate(turns):
            before, role = self._before(number), (USER, AGENT)[number % 2]
            laid.input_ids.extend(before)
            laid.roles.extend([FORMAT] * len(before))
            laid.trunk.extend(befores[number])
            if role in self.rewarded_roles:
                laid.rewarded.extend(range(len(laid.input_ids), len(laid.input_ids) + len(turn)))
                laid.ends.extend(range(len(laid.trunk) + 1, len(laid.trunk) + len(turn) + 1))
            laid.input_ids.extend(turn)
            laid.roles.extend([role] * len(turn))
            laid.trunk.extend(turn)
        return laid

    def _before(self, number: int) -> list[int]:
        return self._first if number == 0 else self._before_turn[number % 2]

    def _cut(self, turns: Sequence[Turn]) -> list[list[int]]:
        """The turns as ids, as many as fit."""
        left, found = self.max_tokens, []
        for number, turn in enumerate(turns):
            left -= len(self._before(number))
            if left <= 0:
                break
            ids = self.encoder.text(turn) if isinstance(turn, str) else list(turn)
            if ids:
                self._check_tokens(f"turn {number}", ids)
            found.append(ids[:left])
            left -= len(ids)
        return found

    def _check_tokens(self, name: str, ids: list[int]) -> None:
        if isinstance(self.prm, ProcessRewardModel):
            self.prm.check_tokens(name, ids)
        elif max(ids) >= (size := len(self.encoder.tokenizer)):
            raise ConfigError(f"{name}: got the id {max(ids)}, expected ids from 0 to {size - 1}")

    def _encoded_template(self, turns: int) -> list[list[int]]:
        if isinstance(self.prm, ConversationEncoder):
            return [[] for _ in range(turns + 1)]
        return [self.prm.encode(piece) for piece in self.prm.template(turns)]
