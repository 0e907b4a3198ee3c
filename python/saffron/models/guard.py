"""The PRM: a guard model, which scores one sequence per call. MRMs are trained from its rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saffron.errors import CheckpointError, ConfigError, NumericalError, shown
from saffron.models.chat import Conversation, Prompt, check_template_options, check_text
from saffron.models.checks import expect_list
from saffron.models.reward_models import HiddenModel
from saffron_kernels import multifurcation_head


class ProcessRewardModel(HiddenModel):
    """The PRM: a guard model read at one position, `logit(safe) - logit(unsafe)` after its moderation template.

    Args:
        model, tokenizer: the guard; the tokenizer's chat template is the moderation template.
        safe, unsafe: the verdicts, one token each.
        chat_template_kwargs: options of the moderation template.
        options: `split_special_tokens` and `check_weights` as for `TextModel`, and those of `TrieModel`.

    Raises:
        CheckpointError: verdicts of several tokens, or weights that are not finite.
    """

    owner = "guard"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        safe: str = "safe",
        unsafe: str = "unsafe",
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        self.chat_template_kwargs = check_template_options(chat_template_kwargs)
        self._templates: dict[tuple[int, str], list[str]] = {}  # rendering one takes longer than a small guard
        verdicts = [self.encode(word) for word in (safe, unsafe)]
        for word, ids in zip((safe, unsafe), verdicts, strict=True):
            if len(ids) != 1:
                raise CheckpointError(f"guard: {word!r} must be one token of its tokenizer, it is {len(ids)}")
        self.verdicts = torch.tensor([ids[0] for ids in verdicts], dtype=torch.int32, device=self.device)

    def sequence(self, prompt: Prompt, response: str | Sequence[int]) -> list[int]:
        """Token ids of the moderation template around one exchange.

        The pieces are encoded one by one, so that all responses to a prompt share everything before the response.

        Args:
            prompt: as for `context_tokens`.
            response: text, or ids of a tokenizer equal to the guard's.
        """
        if isinstance(response, str):
            ids = self.encoder.text(check_text("response", response))
        else:
            expect_list("response", response, "token ids, or a text")
            ids = list(response)
        return [*self.context_tokens(prompt), *ids, *self.suffix_tokens()]

    def context_tokens(self, prompt: Prompt) -> list[int]:
        """Token ids of everything before the response.

        Args:
            prompt: what the user says, or messages. A system message and a last assistant message (a prefill) are not
                shown to the guard.
        """
        turns = Conversation.of(prompt).turns
        ids = []
        for before, turn in zip(self.template(len(turns) + 1), turns, strict=False):
            ids += [*self.encode(before), *self.encoder.text(turn)]
        return ids + self.encode(self.template(len(turns) + 1)[-2])

    def suffix_tokens(self) -> list[int]:
        """Token ids of everything after the response: what every call has to run again."""
        return self.encode(self.template()[2])

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[Prompt, str | Sequence[int]]]) -> Tensor:
        """Rewards `[pairs]` of (prompt, response) pairs, fp32: positive is safe. One forward pass for all."""
        expect_list("pairs", pairs, "pairs (prompt, response)")
        for i, pair in enumerate(pairs):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ConfigError(f"pairs[{i}]: got {shown(pair)}, expected a pair (prompt, response)")
        return self.score_tokens([self.sequence(prompt, response) for prompt, response in pairs])

    @torch.inference_mode()
    def score_tokens(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Rewards `[sequences]`, fp32, of token ids that stand in the moderation template already, as `sequence` does.

        One forward pass over every distinct prefix.

        Raises:
            NumericalError: a reward is not finite.
        """
        expect_list("sequences", sequences, "token sequences")
        if not sequences:
            return torch.empty(0)
        rows, hidden = self.prefill(sequences)
        self.release(rows)
        rewards = self.verdict(hidden)
        if not bool(rewards.isfinite().all()):
            raise NumericalError("guard: a reward is not finite (NaN or infinity); are its weights?")
        return rewards

    def verdict(self, hidden: Tensor) -> Tensor:
        """Rewards `[sequences]`, fp32, of hidden states `[sequences, hidden]` at the end of the moderation template."""
        offsets = torch.arange(len(hidden) + 1, dtype=torch.int32, device=hidden.device) * 2
        tokens = self.verdicts.repeat(len(hidden))
        logits = multifurcation_head(hidden, self.head_weight, self.head_bias, None, 0.0, tokens, offsets)
        safe, unsafe = logits.view(-1, 2).unbind(1)
        return safe - unsafe

    def template(self, turns: int = 2) -> list[str]:
        """The moderation template rendered for a conversation, cut around its turns: `turns + 1` pieces of text.

        Args:
            turns: even; users and agents take turns, and an agent has the last word.
        """
        if turns == 0:
            return [""]
        key = turns, f"{self.require_tokenizer().chat_template} {self.chat_template_kwargs}"
        if key not in self._templates:
            self._templates[key] = self._cut_template(turns)
        return self._templates[key]

    def _cut_template(self, turns: int) -> list[str]:
        marks = [f"<<turn {i}>>" for i in range(turns)]
        for parts in (False, True):  # some templates want content in typed parts (Llama-Guard-3-1B's does)
            messages = [
                {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": mark}] if parts else mark}
                for i, mark in enumerate(marks)
            ]
            try:
                rest = self.encoder.render(messages, **self.chat_template_kwargs)
            except ConfigError:  # where the template cannot take messages of this form
                continue
            pieces: list[str] = []
            for mark in marks:
                piece, found, rest = rest.partition(mark)
                if not found:
                    break
                pieces.append(piece)
            else:
                return [*pieces, rest]
        raise CheckpointError(f"guard: its chat template does not show every turn of a conversation of {turns}")
