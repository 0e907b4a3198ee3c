"""Reward models: the MRM, which scores all children of a prefix in one call, and the PRM, which scores one sequence."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saffron.errors import CheckpointError, ConfigError, UnsupportedModelError
from saffron.models import adapter, attention, loading
from saffron.models.chat import Conversation, ConversationEncoder, Prompt, check_template_options, check_text
from saffron.models.trie_model import TrieModel
from saffron_kernels import multifurcation_head

PREFIX, INFIX = "\n\nUser:", "\n\nAgent:"  # before a user's turn and before an agent's, as published
LAYOUT = "mrm_config.json"  # prefix and infix, where they are not the published ones


class _HiddenModel(TrieModel):
    """A model whose output is its last hidden state `[sequences, hidden]`; the head is read where it is needed.

    Args:
        split_special_tokens: names of control tokens that people wrote are plain text (see `Policy`).
        check_weights: refuse weights that are NaN or infinite; costs one reading of the weights.
        options: as for `TrieModel`.
    """

    _owner = "reward model"  # what it is called in messages of errors

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        split_special_tokens: bool = True,
        check_weights: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        config = model.config.get_text_config()
        for name, neutral in (("final_logit_softcapping", None), ("logit_scale", 1), ("logits_scaling", 1)):
            if getattr(config, name, neutral) not in (neutral, None):
                raise UnsupportedModelError(f"{config.model_type} reward model: {name} is not supported")
        self.split_special_tokens = split_special_tokens
        self._encoder: ConversationEncoder | None = None
        if check_weights:
            loading.check_weights(model, self._owner)

    @property
    def encoder(self) -> ConversationEncoder:
        """How text becomes token ids of this model."""
        tokenizer = self.require_tokenizer()
        if self._encoder is None or self._encoder.tokenizer is not tokenizer:
            self._encoder = ConversationEncoder(tokenizer, self._owner, self.split_special_tokens)
        return self._encoder

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
        prefix, infix: text before a user's turn (the first one after the begin token) and before an agent's.
        options: `split_special_tokens` and `check_weights` as for `Policy`, and those of `TrieModel`.

    Raises:
        CheckpointError: a bias or mask that does not fit, weights or a bias that are not finite.
    """

    _owner = "mrm"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        bias: Tensor | None = None,
        unseen: Tensor | None = None,
        prefix: str = PREFIX,
        infix: str = INFIX,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        for name, text in (("prefix", prefix), ("infix", infix)):
            if not isinstance(text, str):
                raise ConfigError(f"{name}: got a value of type {type(text).__name__}, expected a text")
        if bias is not None:
            _check_bias(bias, self.vocab_size)
        if unseen is not None:
            _check_unseen(unseen, self.vocab_size)
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
        base: str | Path | PreTrainedModel | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Self:
        """Loads the published format, a PEFT adapter with `lm_head_bias.pt` and `unseen_mask.pt`, and merges the LoRA;
        or what `save_pretrained` wrote.

        Args:
            path: folder of the MRM, or the name of a repository on the hub.
            base: checkpoint the adapter was trained on, or that model, loaded (it is changed); None: the one the
                adapter names, a relative path being taken from `path`.
            dtype, device: as for `TrieModel.from_pretrained`.
            options: of the constructor.

        Raises:
            CheckpointError: a file that is missing, damaged, or does not fit the base model.
        """
        folder = loading.fetch(path)
        merged = (folder / "config.json").is_file() and not (folder / adapter.CONFIG).exists()
        if merged and base is not None:
            raise CheckpointError(f"{path}: holds a whole model and no adapter, so base= has nothing to say")
        options = {**_stored_layout(folder), **options}
        for name, file in (("bias", "lm_head_bias.pt"), ("unseen", "unseen_mask.pt")):
            if not merged or (folder / file).exists():
                options.setdefault(name, _load_vector(folder / file))
        if isinstance(base, PreTrainedModel):
            return cls(adapter.merge_adapter(base, folder), **options)
        if base is None:
            base = folder if merged else adapter.adapter_base(folder)
        model = loading.load_model(base, dtype, device)
        model = model if merged else adapter.merge_adapter(model, folder)
        return cls(model, loading.load_tokenizer(base), **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes what `from_pretrained` reads: the model with its adapter merged, tokenizer, bias and unseen mask.

        Args:
            folder: made if it is not there; files of the same names are replaced.
        """
        folder = Path(folder)
        with loading.quiet():
            self.model.save_pretrained(folder)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
        for vector, file in ((self.bias, "lm_head_bias.pt"), (self.unseen, "unseen_mask.pt")):
            (folder / file).unlink(missing_ok=True)
            if vector is not None:
                torch.save(vector.cpu().clone(), folder / file)
        text = json.dumps({"prefix": self.prefix, "infix": self.infix}, indent=2)
        (folder / LAYOUT).write_text(text + "\n", encoding="utf-8")

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


class ProcessRewardModel(_HiddenModel):
    """The PRM: a guard model read at one position, `logit(safe) - logit(unsafe)` after its moderation template.

    Args:
        model, tokenizer: the guard; the tokenizer's chat template is the moderation template.
        safe, unsafe: the verdicts, one token each.
        chat_template_kwargs: options of the moderation template.
        options: `split_special_tokens` and `check_weights` as for `Policy`, and those of `TrieModel`.

    Raises:
        CheckpointError: verdicts of several tokens, or weights that are not finite.
    """

    _owner = "guard"

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
        ids = self.encoder.text(check_text("response", response)) if isinstance(response, str) else list(response)
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
        """Token ids of everything after the response: what every call has to run anew."""
        return self.encode(self.template()[2])

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[Prompt, str | Sequence[int]]]) -> Tensor:
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


def _stored_layout(folder: Path) -> dict[str, str]:
    """Prefix and infix, where the folder says them."""
    file = folder / LAYOUT
    if not file.exists():
        return {}
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        return {name: stored[name] for name in ("prefix", "infix") if name in stored}
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: cannot be read") from error


def _load_vector(file: Path) -> Tensor:
    try:
        vector = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: no such file") from error
    except Exception as error:  # torch's reader raises what the bytes lead it to, and advises to trust the file
        raise CheckpointError(f"{file}: cannot be loaded: damaged, or more than a tensor") from error
    if not isinstance(vector, Tensor) or vector.layout is not torch.strided or vector.dim() != 1:
        raise CheckpointError(f"{file}: expected one vector")
    return vector.detach()


def _check_bias(bias: Tensor, vocab_size: int) -> None:
    if bias.shape != (vocab_size,):
        raise CheckpointError(f"lm_head_bias: got shape {list(bias.shape)}, the base model has [{vocab_size}]")
    if not bias.is_floating_point():
        raise CheckpointError(f"lm_head_bias: got {bias.dtype}, expected a floating point dtype")
    if not bool(bias.isfinite().all()):
        raise CheckpointError("lm_head_bias: holds NaN or infinity")


def _check_unseen(unseen: Tensor, vocab_size: int) -> None:
    if unseen.shape != (vocab_size,):
        raise CheckpointError(f"unseen_mask: got shape {list(unseen.shape)}, the base model has [{vocab_size}]")
    if unseen.dtype is not torch.bool:
        raise CheckpointError(f"unseen_mask: got {unseen.dtype}, expected torch.bool")
    if bool(unseen.all()):
        warnings.warn(
            "unseen_mask: marks every token, so the MRM says nothing and the policy's own order decides", stacklevel=3
        )
