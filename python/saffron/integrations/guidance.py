"""MRM guidance for samplers: logits processors that re-rank the nucleus by reward. This one is for `transformers`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from saffron.errors import ConfigError, shown
from saffron.integrations.mrm_prompt import MRMPrompt, mrm_contexts
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.search.config import check_top_p
from saffron_kernels import multifurcation_head, nucleus

MOST_BETA = 1e30  # rewards are multiplied in fp32, where infinity times 0 is no number
_NONE = np.empty(0, dtype=np.int32)
Text = tuple[tuple[int, ...], list[int]]  # what the MRM reads before a response, and the response so far


class Guide:
    """The rule of `RewardGuidance`, for rows of responses.

    Args:
        mrm: the reward model.
        eos_token_id: ids that end a response, one or several.
    """

    def __init__(self, mrm: MultifurcationRewardModel, eos_token_id: int | Sequence[int]) -> None:
        self.mrm = mrm
        ends = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
        self.ends = torch.tensor(ends, dtype=torch.int32, device=mrm.device)
        self._leaves = _NONE

    @torch.no_grad()
    def guided(self, texts: list[Text], scores: Tensor, beta: float | Tensor, top_p: float | Tensor) -> Tensor:
        """Guided scores `[rows, vocab]`, fp32.

        Args:
            scores: `[rows, vocab]`, of the next token of each text.
            beta, top_p: of all rows, or `[rows]`, the latter in fp64.
        """
        chosen = scores.float()
        tokens, _, offsets = nucleus(chosen, top_p)
        row = torch.repeat_interleave(torch.arange(len(texts), device=scores.device), offsets.diff())
        rewards, kept = self._rewards(texts, *(t.to(self.mrm.device) for t in (tokens, offsets, row)))
        kept = kept.to(scores.device)
        at = row[kept], tokens[kept].long()
        weight = beta[at[0]] if isinstance(beta, Tensor) else beta
        result = torch.full_like(chosen, -torch.inf)
        result[at] = chosen[at] + weight * rewards.to(scores.device)[kept]
        return result

    def close(self) -> None:
        """Gives the MRM's cache back."""
        leaves, self._leaves = self._leaves, _NONE
        self.mrm.forget(leaves)

    def __del__(self) -> None:
        if getattr(self, "_leaves", _NONE).size:  # nothing is held where the constructor failed
            self.close()

    def _rewards(self, texts: list[Text], tokens: Tensor, offsets: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards `[candidates]`, fp32, of the nuclei of (context, response) rows, and which candidates stay."""
        mrm = self.mrm
        unseen = torch.zeros_like(tokens, dtype=torch.bool) if mrm.unseen is None else mrm.unseen[tokens]
        end = torch.isin(tokens, self.ends)
        informed = torch.zeros(len(texts), dtype=torch.bool, device=row.device)
        informed[row[~unseen & ~end]] = True
        inherits = row[end & informed[row]].unique().tolist()
        said = [self._last_known(texts[r][1]) for r in inherits]
        asked = [(r, known) for r, known in zip(inherits, said, strict=True) if known >= 0]

        hidden = self._read([*texts, *((texts[r][0], texts[r][1][:known]) for r, known in asked)])
        rewards = self._head(hidden[: len(texts)], tokens, offsets)
        spoken = torch.tensor([texts[r][1][known] for r, known in asked], dtype=torch.int32, device=row.device)
        inherited = rewards.new_zeros(len(texts))
        if asked:
            one_each = torch.arange(len(asked) + 1, dtype=torch.int32, device=row.device)
            inherited[[r for r, _ in asked]] = self._head(hidden[len(texts) :], spoken, one_each)
        rewards = torch.where(end, inherited[row], rewards)
        return torch.where(informed[row], rewards, 0.0), end | ~unseen | ~informed[row]

    def _last_known(self, response: list[int]) -> int:
        """Where the last token stands that the MRM knows, -1 for nowhere."""
        if self.mrm.unseen is None or not response:
            return len(response) - 1
        known = (~self.mrm.unseen[response]).nonzero()
        return int(known[-1]) if len(known) else -1

    def _read(self, texts: Sequence[Text]) -> Tensor:
        """The MRM's hidden states `[texts, hidden]` at the end of (context, response) pairs."""
        sequences = [[*context, *response] for context, response in texts]
        self.mrm.check_length("input_ids", max(map(len, sequences)))
        leaves, hidden = self.mrm.read(sequences)
        self.close()  # after the reading, so that what old and new rows share was found
        self._leaves = leaves
        return hidden

    def _head(self, hidden: Tensor, tokens: Tensor, offsets: Tensor) -> Tensor:
        return multifurcation_head(
            hidden, self.mrm.head_weight, self.mrm.full_bias(True), None, 0.0, tokens, offsets
        ).float()


def check_guidance(beta: object, top_p: object) -> None:
    """Raises `ConfigError` for values that are not allowed."""
    check_top_p(top_p)
    if not isinstance(beta, int | float) or isinstance(beta, bool) or not 0 <= beta <= MOST_BETA:
        raise ConfigError(f"beta: got {shown(beta)}, expected a number from 0 to {MOST_BETA:g}")


class RewardGuidance(Guide, LogitsProcessor):
    """Tokens of the nucleus get `score + beta * reward`, all others -inf::

        guidance = RewardGuidance(mrm, inputs["input_ids"], eos_token_id=model.generation_config.eos_token_id, beta=2.0)
        model.generate(**inputs, do_sample=True, logits_processor=[guidance])

    A sampler then draws from `p(x) exp(beta r(x))` over the nucleus of p: of all distributions equally far from the
    policy's (KL divergence) the one of the highest expected reward. `beta=0` is nucleus sampling; greedy decoding with
    a large beta is Saffron search of width 1, and no beta has the breadth that a wider search defends with. It serves
    whatever calls logits processors with the ids so far: greedy decoding, sampling, beams, assisted decoding.

    As in the search, tokens unseen by the MRM are excluded unless the nucleus holds nothing it knows (an all-unseen
    step: the policy's own scores stand), and an end token inherits the reward of the last token before it that the MRM
    knows (0 if there is none): ending changes nothing about what was said.

    Each row is looked up by its ids in the MRM's trie, so rows may fork, end and come in any order; only tokens that no
    row of the last call began with are run. The last call's rows stay cached until `close`. The MRM must share the
    policy's tokenizer.

    Args:
        mrm: the reward model.
        input_ids: `[batch, length]`, the very ids given to `generate`, padding included.
        eos_token_id: ids that end a response: `eos_token_id` of the generation configuration, one or several.
        mrm_prompt: what the MRM is shown as the prompt, for each row of `input_ids`: a text, or the token ids of its
            whole context. None: the text of the row without special tokens.
        beta: weight of the reward, at least 0.
        top_p: nucleus mass, above 0 and at most 1.

    Raises:
        ConfigError: an argument that is not allowed; in a call, rows that continue none of `input_ids`, or more logits
            than the MRM's vocabulary has entries. PromptTooLongError: a row outgrew the MRM's context.
    """

    def __init__(
        self,
        mrm: MultifurcationRewardModel,
        input_ids: Tensor,
        *,
        eos_token_id: int | Sequence[int],
        mrm_prompt: MRMPrompt | None = None,
        beta: float = 1.0,
        top_p: float = 0.8,
    ) -> None:
        check_guidance(beta, top_p)
        if input_ids.dim() != 2:
            raise ConfigError(f"input_ids: got shape {list(input_ids.shape)}, expected [batch, length]")
        super().__init__(mrm, eos_token_id)
        self.beta, self.top_p, self.length = beta, top_p, input_ids.shape[1]
        rows = [tuple(row) for row in input_ids.tolist()]
        self._contexts: dict[tuple[int, ...], tuple[int, ...]] = {}
        for row, context in zip(rows, mrm_contexts(mrm, rows, mrm_prompt), strict=True):
            if self._contexts.setdefault(row, context) != context:
                raise ConfigError("mrm_prompt: rows of equal input_ids must have equal prompts")

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Guided scores `[rows, vocab]` of rows of ids `[rows, length]`; rows that have ended keep their scores."""
        if scores.shape[1] > self.mrm.vocab_size:
            raise ConfigError(f"scores: got {scores.shape[1]} tokens, the MRM's vocabulary has {self.mrm.vocab_size}")
        rows = [(tuple(row[: self.length]), row[self.length :]) for row in input_ids.tolist()]
        ends = set(self.ends.tolist())
        live = [i for i, (_, response) in enumerate(rows) if ends.isdisjoint(response)]
        if not live:
            return scores
        for i in live:
            if rows[i][0] not in self._contexts:
                raise ConfigError(f"input_ids: row {i} continues none of the rows this guidance was made for")
        texts = [(self._contexts[rows[i][0]], rows[i][1]) for i in live]
        result = scores.clone()
        result[live] = self.guided(texts, scores[live], self.beta, self.top_p).to(scores.dtype)
        return result
