"""Reward models: what they have in common, and the MRM, which scores all children of a prefix in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saffron.errors import CheckpointError, ConfigError, UnsupportedModelError
from saffron.models import attention, mrm_files
from saffron.models.chat import Conversation, Prompt
from saffron.models.shared_trunk import SharedTrunk
from saffron.models.text_model import TextModel
from saffron.models.trie_model import TrieModel

PREFIX, INFIX = "\n\nUser:", "\n\nAgent:"  # before a user's turn and before an agent's, as published


class HiddenModel(TextModel):
    """A model whose output is its last hidden state `[sequences, hidden]`; the head is read where it is needed.

    Args:
        options: of `TextModel` and `TrieModel`.

    Raises:
        UnsupportedModelError: an architecture that scales its logits.
    """

    owner = "reward model"

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
    ) -> None:
        super().__init__(model, tokenizer, **options)
        config = model.config.get_text_config()
        for name, neutral in (("final_logit_softcapping", None), ("logit_scale", 1), ("logits_scaling", 1)):
            if getattr(config, name, neutral) not in (neutral, None):
                raise UnsupportedModelError(f"{config.model_type} reward model: {name} is not supported")

    @property
    def head_weight(self) -> Tensor:
        """Unembedding `[vocab, hidden]`."""
        return self.model.get_output_embeddings().weight.detach()

    @property
    def head_bias(self) -> Tensor | None:
        """Bias of the unembedding `[vocab]`, None for most architectures."""
        bias = self.model.get_output_embeddings().bias
        return None if bias is None else bias.detach()

    def logits(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        return linear(super().logits(sequences), self.head_weight, self.head_bias)

    def output(self, input_ids: Tensor, step: attention.TrieStep, keep: Tensor) -> Tensor:
        result = self.model.base_model(input_ids=input_ids, **step.arguments())
        return result.last_hidden_state[0, keep]


class MultifurcationRewardModel(HiddenModel):
    """The MRM: `hidden @ head_weight.T + bias` is the reward of every next token. (SAFFRON-1, section 4.1.)

    Args:
        model: the PRM's architecture with the trained LoRA factors merged.
        bias: `[vocab]`, trained bias of the unembedding, or None.
        unseen: `[vocab]` bool, tokens the training corpus never had, or None.
        shared: what the MRM has of its own, where `model` shares the modules of a policy.
        prefix, infix: text before a user's turn (the first one after the begin token) and before an agent's.
        options: `split_special_tokens` and `check_weights` as for `TextModel`, and those of `TrieModel`.

    Raises:
        CheckpointError: a bias or mask that does not fit, weights or a bias that are not finite.
    """

    owner = "mrm"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        bias: Tensor | None = None,
        unseen: Tensor | None = None,
        shared: SharedTrunk | None = None,
        prefix: str = PREFIX,
        infix: str = INFIX,
        **options: Any,
    ) -> None:
        self.shared = shared
        super().__init__(model, tokenizer, **options)
        for name, text in (("prefix", prefix), ("infix", infix)):
            if not isinstance(text, str):
                raise ConfigError(f"{name}: got a value of type {type(text).__name__}, expected a text")
        if bias is not None:
            mrm_files.check_bias(bias, self.vocab_size)
        if unseen is not None:
            mrm_files.check_unseen(unseen, self.vocab_size)
        self.bias = None if bias is None else bias.detach().to(self.device, model.dtype)
        if self.bias is not None and not bool(self.bias.isfinite().all()):
            raise CheckpointError(f"lm_head_bias: its values exceed what the model's {model.dtype} holds")
        self.unseen = None if unseen is None else unseen.to(self.device)
        self.prefix, self.infix = prefix, infix

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        base: str | Path | PreTrainedModel | TrieModel | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Self:
        """Loads the published format, a PEFT adapter with `lm_head_bias.pt` and `unseen_mask.pt`, and merges the LoRA;
        or what `save_pretrained` wrote.

        Args:
            path: folder of the MRM, or the name of a repository on the hub.
            base: checkpoint the adapter was trained on, or that model, loaded (it is changed); None: the one the
                adapter names, a relative path being taken from `path`. A policy: the MRM is one that was trained on
                its checkpoint, and shares its modules (see `shared_trunk`); LoRA factors stay unmerged.
            dtype, device: as for `TrieModel.from_pretrained`.
            options: of the constructor.

        Raises:
            CheckpointError: a file that is missing, damaged, or does not fit the base model; a base with another
                tokenizer than the MRM was trained with; a policy of another checkpoint. UnsupportedModelError: an
            adapter that can only be merged.
        """
        model, stored = mrm_files.load(path, base, dtype, device, options)
        mrm = cls(model, **{**stored, **options})
        if mrm.shared is not None and isinstance(base, TrieModel):
            mrm.shared.check(base, mrm)
        return mrm

    @property
    def trunk(self) -> PreTrainedModel:
        return self.model if self.shared is None else self.shared.trunk

    def fingerprint(self) -> int:
        if self.shared is None:
            return super().fingerprint()
        self.model, weights = self.shared.refresh()
        return weights

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes what `from_pretrained` reads: the model with its adapter merged, tokenizer, bias and unseen mask.

        Args:
            folder: made if it is not there; files of the same names are replaced.

        Raises:
            ConfigError: an MRM on the trunk of a policy, which holds no merged weights.
        """
        if self.shared is not None:
            raise ConfigError(
                "save_pretrained: the MRM shares a policy's weights; load it without the policy to save it"
            )
        vectors = {"bias": self.bias, "unseen": self.unseen}
        mrm_files.save(folder, self.model, self.tokenizer, vectors, {"prefix": self.prefix, "infix": self.infix})

    def context_tokens(self, prompt: Prompt) -> list[int]:
        """Token ids of everything before the response.

        Args:
            prompt: what the user says, or messages: users' turns behind `prefix` and agents' behind `infix`, as the
                MRM was trained. A system message and a last assistant message (a prefill) are not shown to it.
        """
        turns = Conversation.of(prompt).turns
        begin = self.require_tokenizer().bos_token or ""
        before = [self.encode(self.prefix), self.encode(self.infix)]
        ids = self.encode(begin + self.prefix)
        for i, turn in enumerate(turns):
            ids += [*(before[i % 2] if i else ()), *self.encoder.text(turn)]
        return ids + before[1]

    def logits(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Rewards of every next token `[sequences, vocab]`, unseen tokens not marked; else as `TrieModel.logits`."""
        logits = super().logits(sequences)
        return logits if self.bias is None else logits + self.bias

    def full_bias(self, trained: bool) -> Tensor | None:
        """Bias to score with: the architecture's own, if any, and the trained one if `trained`."""
        parts = [b for b in (self.head_bias, self.bias if trained else None) if b is not None]
        return sum(parts[1:], parts[0]) if parts else None
