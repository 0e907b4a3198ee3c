"""Reward models: the MRM, which scores all children of a prefix in one call, and the PRM, which scores one sequence."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saffron.errors import CheckpointError, UnsupportedModelError
from saffron.models import attention
from saffron.models.trie_model import TrieModel, load_model, load_tokenizer
from saffron_kernels import multifurcation_head


class _HiddenModel(TrieModel):
    """A model whose output is its last hidden state `[sequences, hidden]`; the head is read where it is needed."""

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

    def _output(self, input_ids: Tensor, position_ids: Tensor, step: attention.TrieStep, keep: Tensor) -> Tensor:
        result = self.model.base_model(input_ids=input_ids, **{**step.arguments(), "position_ids": position_ids})
        return result.last_hidden_state[0, keep]


class MultifurcationRewardModel(_HiddenModel):
    """The MRM: `hidden @ head_weight.T + bias` is the reward of every next token. (SAFFRON-1, section 4.1.)

    Args:
        model: the PRM's architecture with the trained LoRA factors merged.
        bias: `[vocab]`, trained bias of the unembedding, or None.
        unseen: `[vocab]` bool, tokens the training corpus never had, or None.
        prefix, infix: text before the prompt (after the begin token) and between prompt and response.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        bias: Tensor | None = None,
        unseen: Tensor | None = None,
        prefix: str = "\n\nUser:",
        infix: str = "\n\nAgent:",
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        for name, vector in (("lm_head_bias", bias), ("unseen_mask", unseen)):
            if vector is not None and vector.shape != (self.vocab_size,):
                raise CheckpointError(f"{name}: got shape {list(vector.shape)}, the base model has [{self.vocab_size}]")
        if unseen is not None and unseen.dtype is not torch.bool:
            raise CheckpointError(f"unseen_mask: got {unseen.dtype}, expected torch.bool")
        self.bias = None if bias is None else bias.detach().to(self.device, model.dtype)
        self.unseen = None if unseen is None else unseen.to(self.device)
        self.prefix, self.infix = prefix, infix

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        base: str | Path | PreTrainedModel | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Self:
        """Loads the published format: a PEFT adapter with `lm_head_bias.pt` and `unseen_mask.pt`; merges the LoRA.

        Args:
            path: folder of the adapter.
            base: checkpoint the adapter was trained on, or that model, loaded (it is changed); None: the one the
                adapter names, a relative path being taken from `path`.
            dtype, device: as for `TrieModel.from_pretrained`.
            options: of the constructor.

        Raises:
            CheckpointError: a file that is missing, damaged, or does not fit the base model.
        """
        folder = Path(path)
        base = _adapter_base(folder) if base is None else base
        bias, unseen = _load_vector(folder / "lm_head_bias.pt"), _load_vector(folder / "unseen_mask.pt")
        if isinstance(base, PreTrainedModel):
            return cls(_merge_adapter(base, folder), bias=bias, unseen=unseen, **options)
        model = _merge_adapter(load_model(base, dtype, device), folder)
        return cls(model, load_tokenizer(base), bias=bias, unseen=unseen, **options)

    def context_tokens(self, prompt: str) -> list[int]:
        """Token ids of everything before the response."""
        begin = self.require_tokenizer().bos_token or ""
        return [*self.encode(begin + self.prefix), *self.encode(prompt), *self.encode(self.infix)]

    def logits(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Rewards of every next token `[sequences, vocab]`, unseen tokens not marked; else as `TrieModel.logits`."""
        logits = super().logits(sequences)
        return logits if self.bias is None else logits + self.bias

    def full_bias(self, trained: bool) -> Tensor | None:
        """Bias to score with: the architecture's own, if any, and the trained one if `trained`."""
        parts = [b for b in (self.head_bias, self.bias if trained else None) if b is not None]
        return sum(parts[1:], parts[0]) if parts else None


class ProcessRewardModel(_HiddenModel):
    """The PRM: a guard model read at one position, `logit(safe) - logit(unsafe)` after its moderation template.

    Args:
        model, tokenizer: the guard; the tokenizer's chat template is the moderation template.
        safe, unsafe: the verdicts, one token each.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        safe: str = "safe",
        unsafe: str = "unsafe",
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        self._templates: dict[tuple[int, str], list[str]] = {}  # rendering one takes longer than a small guard
        verdicts = [self.encode(word) for word in (safe, unsafe)]
        for word, ids in zip((safe, unsafe), verdicts, strict=True):
            if len(ids) != 1:
                raise CheckpointError(f"guard: {word!r} must be one token of its tokenizer, it is {len(ids)}")
        self.verdicts = torch.tensor([ids[0] for ids in verdicts], dtype=torch.int32, device=self.device)

    def sequence(self, prompt: str, response: str | Sequence[int]) -> list[int]:
        """Token ids of the moderation template around one exchange.

        The pieces are encoded one by one, so that all responses to a prompt share everything before the response.

        Args:
            response: text, or ids of a tokenizer equal to the guard's.
        """
        ids = self.encode(response) if isinstance(response, str) else list(response)
        return [*self.context_tokens(prompt), *ids, *self.suffix_tokens()]

    def context_tokens(self, prompt: str) -> list[int]:
        """Token ids of everything before the response."""
        before, between, _ = self.template()
        return [*self.encode(before), *self.encode(prompt), *self.encode(between)]

    def suffix_tokens(self) -> list[int]:
        """Token ids of everything after the response: what every call has to run anew."""
        return self.encode(self.template()[2])

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[str, str | Sequence[int]]]) -> Tensor:
        """Rewards `[pairs]` of (prompt, response) pairs, fp32: positive is safe. One forward pass for all."""
        return self.score_tokens([self.sequence(prompt, response) for prompt, response in pairs])

    @torch.inference_mode()
    def score_tokens(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Rewards `[sequences]`, fp32, of token ids that stand in the moderation template already, as `sequence` does.

        One forward pass over every distinct prefix.
        """
        if not sequences:
            return torch.empty(0)
        rows, hidden = self.prefill(sequences)
        self.release(rows)
        return self.verdict(hidden)

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
        key = turns, str(self.require_tokenizer().chat_template)
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
            rest, pieces = self._render(messages), []
            for mark in marks:
                piece, found, rest = rest.partition(mark)
                if not found:
                    break
                pieces.append(piece)
            else:
                return [*pieces, rest]
        raise CheckpointError(f"guard: its chat template does not show every turn of a conversation of {turns}")

    def _render(self, messages: list[dict[str, Any]]) -> str:
        """The chat template's text; empty where the template cannot take messages of this form."""
        try:
            text = self.require_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError):
            return ""
        return str(text)


def _adapter_base(folder: Path) -> str | Path:
    file = folder / "adapter_config.json"
    try:
        named = json.loads(file.read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: not an adapter configuration ({error})") from error
    if not named:
        raise CheckpointError(f"{file}: names no base model; say which with base=")
    beside = folder / named
    return beside if beside.is_dir() else named


def _merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    from peft import PeftModel  # its import takes as long as that of transformers; a policy alone does not need it

    try:
        return PeftModel.from_pretrained(model, str(folder)).merge_and_unload()
    except Exception as error:  # peft, safetensors and torch each raise types of their own for a damaged adapter
        raise CheckpointError(f"{folder}: its adapter cannot be applied to the base model ({error})") from error


def _load_vector(file: Path) -> Tensor:
    try:
        vector = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{file}: cannot be loaded ({str(error).splitlines()[0]})") from error
    if not isinstance(vector, Tensor) or vector.dim() != 1:
        raise CheckpointError(f"{file}: expected one vector")
    return vector.detach()
