"""How good an MRM is, on annotated conversations: agreement with the PRM, and what its unseen mask excludes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

from saffron.errors import ConfigError
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.models.vocabulary import head_for, same_tokens
from saffron.training.agreement import Agreement, by_depth
from saffron.training.layout import AGENT, USER
from saffron.training.shards import AnnotatedConversation
from saffron_kernels import nucleus

Turns = Literal["responses", "all"]


@dataclass(frozen=True, slots=True)
class Predictions:
    """Rewards of next tokens, all `[tokens]`: the MRM's before a token is read, the PRM's after it.

    Attributes:
        predicted, true: the MRM's (fp64) and the PRM's.
        depth: how many tokens into its turn a token stands, from 1.
        unseen: bool; what the MRM's mask excludes, whose predictions a search does not use.
    """

    predicted: np.ndarray
    true: np.ndarray
    depth: np.ndarray
    unseen: np.ndarray

    def __getitem__(self, chosen: np.ndarray) -> Predictions:
        """Those that a bool array `[tokens]` marks."""
        return Predictions(*(getattr(self, name)[chosen] for name in ("predicted", "true", "depth", "unseen")))

    @property
    def known(self) -> Predictions:
        return self[~self.unseen]


@dataclass(frozen=True, slots=True)
class NucleusOnUnseen:
    """What a policy would say next and the unseen mask keeps a search from judging; means over the positions.

    Attributes:
        positions: in the first answers of the conversations.
        top_p: mass of the nucleus.
        mass: of the nucleus' probability, the share on unseen tokens.
        tokens: of the nucleus' tokens, the share that is unseen.
        some, only: share of the positions whose nucleus has an unseen token, or no other.
    """

    positions: int
    top_p: float
    mass: float
    tokens: float
    some: float
    only: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Figures of one MRM.

    Attributes:
        known, unseen: agreement on the tokens that the unseen mask leaves, and on those it excludes.
        by_depth: (first, last token of the turn) -> agreement on known tokens.
        vocabulary, vocabulary_unseen: token ids, and how many of them the mask excludes.
        nucleus: None without a policy.
    """

    known: Agreement
    unseen: Agreement
    by_depth: dict[tuple[int, int], Agreement]
    vocabulary: int
    vocabulary_unseen: int
    nucleus: NucleusOnUnseen | None

    def to_json(self) -> dict[str, Any]:
        table = [{"first": first, "last": last, **one.to_json()} for (first, last), one in self.by_depth.items()]
        return {
            "known": self.known.to_json(),
            "unseen": self.unseen.to_json(),
            "by_depth": table,
            "vocabulary": self.vocabulary,
            "vocabulary_unseen": self.vocabulary_unseen,
            "nucleus": self.nucleus and asdict(self.nucleus),
        }


def predict(
    mrm: MultifurcationRewardModel,
    rows: Sequence[AnnotatedConversation],
    turns: Turns = "responses",
    progress: Callable[[int], None] = lambda conversations: None,
) -> Predictions:
    """The MRM's rewards wherever there are the PRM's; one forward pass per conversation.

    Args:
        turns: "responses": of tokens of agents, all that a search asks for; "all": of users' too.
        progress: called with the number of conversations done since the last call.

    Raises:
        ConfigError: token ids that the MRM lacks; nothing to compare.
        PromptTooLongError: a conversation exceeds the MRM's context.
    """
    if turns not in get_args(Turns):
        raise ConfigError(f"turns: got {turns!r}, expected one of {', '.join(get_args(Turns))}")
    roles = {AGENT} if turns == "responses" else {USER, AGENT}
    found = []
    for row in rows:
        wanted = [j for j in range(1, len(row.input_ids)) if row.roles[j] in roles and not np.isnan(row.rewards[j])]
        if wanted:
            found.append(_predict(mrm, row, wanted))
        progress(1)
    if not found:
        raise ConfigError(f"turns: got {turns!r}, and the annotated data hold no rewards of such tokens")
    names = ("predicted", "true", "depth", "unseen")
    return Predictions(*(np.concatenate([getattr(part, name) for part in found]) for name in names))


def _predict(mrm: MultifurcationRewardModel, row: AnnotatedConversation, wanted: Sequence[int]) -> Predictions:
    """Of the tokens `wanted`, none of them the first."""
    ids = row.input_ids.tolist()
    mrm.check_tokens("annotated conversation", ids)
    mrm.check_length("annotated conversation", len(ids))
    held, hidden = mrm.prefill([ids[:j] for j in wanted])
    mrm.release(held)
    tokens = torch.tensor([ids[j] for j in wanted], device=hidden.device)
    rewards, bias = (hidden.float() * mrm.head_weight[tokens].float()).sum(-1), mrm.full_bias(trained=True)
    if bias is not None:
        rewards = rewards + bias[tokens].float()
    unseen = torch.zeros_like(tokens, dtype=torch.bool) if mrm.unseen is None else mrm.unseen[tokens]
    begins = np.flatnonzero(np.diff(row.roles, prepend=-1))  # where a turn, or what stands between two, begins
    start = begins[np.searchsorted(begins, wanted, side="right") - 1]
    return Predictions(
        rewards.double().cpu().numpy(), row.rewards[wanted], np.array(wanted) - start + 1, unseen.cpu().numpy()
    )


def nucleus_on_unseen(
    policy: Policy,
    mrm: MultifurcationRewardModel,
    rows: Sequence[AnnotatedConversation],
    top_p: float = 0.8,
    progress: Callable[[int], None] = lambda conversations: None,
) -> NucleusOnUnseen:
    """How much of what the policy would say next is unseen, before every token of each conversation's first answer.

    Unseen is what a search with these models takes as such (`head_for`), but for the policy's end tokens: a search
    scores them by their parent.

    Raises:
        ConfigError: top_p not in (0, 1]; the policy's tokens and the MRM's cannot be matched; no answers.
    """
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p: got {top_p}, expected more than 0 and at most 1")
    mask = head_for(policy, mrm, True).unseen
    mask = torch.zeros(policy.vocab_size, dtype=torch.bool) if mask is None else mask[: policy.vocab_size].cpu().clone()
    mask[list(policy.eos_token_id)] = False
    shares: list[tuple[float, float]] = []
    for row in rows:
        prompt, answer = _first_exchange(row)
        said = answer if same_tokens(policy, mrm) else policy.encoder.text(mrm.decode(answer))
        asked = mrm.decode(prompt)
        if said and asked:
            context = policy.chat(asked)
            policy.check_length("prompt and answer", len(context) + len(said))
            logits = policy.logits([context + said[:n] for n in range(len(said))])
            tokens, probabilities, offsets = (part.cpu() for part in nucleus(logits.float(), top_p))
            for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
                here, mass = mask[tokens[begin:end].long()], probabilities[begin:end].double()
                shares.append(((mass[here].sum() / mass.sum()).item(), here.double().mean().item()))
        progress(1)
    if not shares:
        raise ConfigError("policy: the annotated conversations hold no answers to follow it along")
    mass, number = np.array(shares).T
    return NucleusOnUnseen(
        len(shares),
        top_p,
        float(mass.mean()),
        float(number.mean()),
        float((number > 0).mean()),
        float((number == 1).mean()),
    )


def _first_exchange(row: AnnotatedConversation) -> tuple[list[int], list[int]]:
    """Token ids of the first user's turn and of the answer."""
    begins = np.flatnonzero(np.diff(row.roles, prepend=-1))
    runs = np.split(row.input_ids, begins[1:])
    found: dict[int, list[int]] = {USER: [], AGENT: []}
    for begin, run in zip(begins, runs, strict=True):
        role = int(row.roles[begin])
        if role in found and not found[role]:
            found[role] = run.tolist()
    return found[USER], found[AGENT]


def evaluate(predictions: Predictions, mrm: MultifurcationRewardModel, nucleus: NucleusOnUnseen | None) -> Evaluation:
    """The figures; `nucleus` is taken along."""
    known, unseen = predictions.known, predictions[predictions.unseen]
    return Evaluation(
        known=Agreement.of(known.predicted, known.true),
        unseen=Agreement.of(unseen.predicted, unseen.true),
        by_depth=by_depth(known.predicted, known.true, known.depth),
        vocabulary=mrm.vocab_size,
        vocabulary_unseen=0 if mrm.unseen is None else int(mrm.unseen.sum()),
        nucleus=nucleus,
    )
