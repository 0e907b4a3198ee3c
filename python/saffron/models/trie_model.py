"""TrieModel: a Hugging Face decoder that runs over the trie cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from saffron.errors import ConfigError, PromptTooLongError
from saffron.models import attention
from saffron.models.checks import expect, expect_list
from saffron.models.fingerprint import check_adapters, fingerprint
from saffron.models.flops import ModelFlops
from saffron.models.inspection import inspect_model
from saffron.models.loading import load_model, load_tokenizer
from saffron_kernels import Beams, CacheFullError, KVTrie, TreeStep

Index = NDArray[np.int32]
_NONE: Index = np.empty(0, dtype=np.int32)
# In a thread that runs two models as one: what takes the place of their forward passes (`shared_trunk.together`).
instead: ContextVar[Mapping[TrieModel, Callable[..., Tensor]] | None] = ContextVar("instead", default=None)


@dataclass(slots=True)
class Rows:
    """Sequences in the caller's order, on beams that the trie numbers depth first. `TrieModel.step` moves them on.

    Attributes:
        beams: the state of the cache; None: nothing is shared, so nothing is cached.
        beam_of_row: `[rows]` the beam of each row; before the first step several rows may stand on one beam.
        sequences: the rows' tokens, where nothing is cached.
    """

    beams: Beams | None
    beam_of_row: Index
    sequences: list[list[int]] = field(default_factory=list)


class Dependent(Protocol):
    """Somebody whose rows stand on nodes of a trie."""

    def detach(self) -> None:
        """Gives the nodes up, whose K and V are of other weights."""
        ...


class TrieModel:
    """A decoder-only model whose K/V cache is a trie.

    What was cached with other weights is not used: when parameters, buffers, their dtype or device, forward hooks, or
    the adapters of PEFT have changed since the last call (`fingerprint`), the cache is emptied, with a warning. The
    model stays in the mode, training or evaluation, that it is in; calls of this class run in evaluation mode. Copies
    and pickles hold the model and an empty cache.

    Args:
        model: loaded with `attn_implementation="saffron"`.
        tokenizer: its tokenizer, or None where only token ids are used.
        capacity, grow: of the cache (see `KVTrie`).
        cache_dtype: of K and V in the cache; None: the model's. `torch.float8_e4m3fn` halves what bf16 takes and rounds
            K and V to 4 significant bits; scales that fit the model better than 1 may be written into `kv.k_scale` and
            `kv.v_scale` before the first call.
        keep_prefixes: leave prompts in the cache for later calls that begin alike. They then start faster, and
            their results may differ from those of an empty cache in the last bits.
        share_prefixes: run every prefix once and remember it. Off, every call runs all tokens of all its sequences,
            each on its own: what decoding costs without the trie cache, for comparison.

    Raises:
        UnsupportedModelError: a feature that the trie cannot serve. ConfigError: a cache_dtype that is not served.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        capacity: int = 256,
        grow: bool = True,
        cache_dtype: torch.dtype | None = None,
        keep_prefixes: bool = False,
        share_prefixes: bool = True,
    ) -> None:
        expect("model", model, PreTrainedModel)
        check_adapters(model)
        self.geometry = inspect_model(model)
        self.model = model
        self.tokenizer = tokenizer
        self.keep_prefixes, self.share_prefixes = keep_prefixes, share_prefixes
        self.cache_dtype = cache_dtype
        self.kv = self._new_cache(capacity, grow)
        self.dependents: WeakSet[Dependent] = WeakSet()
        self._weights = self.fingerprint()
        self.flops = ModelFlops.of(model)
        embeddings: Any = model.get_input_embeddings()
        self._input_size = int(embeddings.weight.shape[0])

    def __repr__(self) -> str:
        name = self.model.name_or_path or type(self.model).__name__
        return f"{type(self).__name__}({name!r}, {str(self.model.dtype).removeprefix('torch.')}, {self.device})"

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> Self:
        """Loads a Hugging Face checkpoint, a folder or a hub name.

        Args:
            path: the checkpoint; its tokenizer is used if it holds one.
            dtype: of weights and cache; None: fp32 on a CPU, the checkpoint's own elsewhere.
            device: None: the GPU if there is one.
            options: of the constructor.

        Raises:
            CheckpointError: nothing loadable there. UnsupportedModelError: a feature the trie cannot serve.
        """
        return cls(load_model(path, dtype, device), load_tokenizer(path), **options)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def vocab_size(self) -> int:
        """Rows of the unembedding: the token ids the model can score."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    @property
    def context(self) -> int | None:
        """The longest text the model was made for, None if its configuration does not say."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise ConfigError(f"{type(self).__name__}: text needs a tokenizer, and this checkpoint has none; pass ids")
        return self.tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of a piece of text; special tokens written in it count, none are added."""
        return self.require_tokenizer().encode(text, add_special_tokens=False)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        as_said = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self.require_tokenizer().decode(list(tokens), **as_said))

    def check_length(self, name: str, tokens: int, new_tokens: int = 0) -> None:
        """Raises `PromptTooLongError` where `tokens + new_tokens` exceed the model's context."""
        if self.context is not None and tokens + new_tokens > self.context:
            raise PromptTooLongError(
                f"{name}: {tokens} tokens and {new_tokens} new ones exceed the context of {self.context} of the "
                f"{type(self).__name__}"
            )

    def check_tokens(self, name: str, tokens: Sequence[int]) -> None:
        """Raises `ConfigError` for what is not a token id of the vocabulary."""
        size = self._input_size
        expect_list(name, tokens, "token ids")
        for token in tokens:
            if not isinstance(token, int | np.integer) or isinstance(token, bool):
                raise ConfigError(f"{name}: got {token!r} among the ids, expected whole numbers")
        if len(tokens) == 0 or min(tokens) < 0 or max(tokens) >= size:
            given = f"ids from {min(tokens)} to {max(tokens)}" if tokens else "no tokens"
            raise ConfigError(f"{name}: got {given}, expected at least one id from 0 to {size - 1}")

    def _new_cache(self, capacity: int, grow: bool, **scales: Tensor | None) -> KVTrie:
        dtype = attention.cache_dtype(self.cache_dtype, self.geometry.dtype)
        return self.geometry.cache(dtype, self.model.device, capacity=capacity, grow=grow, **scales)

    def scratch(self, capacity: int) -> KVTrie:
        """Another cache of the model's form, with the scales of `kv`; it does not grow."""
        return self._new_cache(capacity, False, k_scale=self.kv.k_scale, v_scale=self.kv.v_scale)

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in ("kv", "dependents", "_weights")}
        kv = self.kv
        state["cache_options"] = {name: getattr(kv, name) for name in ("capacity", "grow", "k_scale", "v_scale")}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        options = state.pop("cache_options")
        self.__dict__.update(state)
        self.kv, self.dependents, self._weights = self._new_cache(**options), WeakSet(), self.fingerprint()

    @property
    def trunk(self) -> PreTrainedModel:
        """Whose modules run: those of another model than `model` where that shares them."""
        return self.model

    def fingerprint(self) -> int:
        """Changes with the weights (see `fingerprint.fingerprint`)."""
        return fingerprint(self.model)

    def check_weights(self) -> None:
        """Empties the cache if the weights are no longer those that it was filled with.

        Raises:
            ConfigError: a search, guidance or other rows still stand on cached tokens.
            UnsupportedModelError: adapters that are not served.
        """
        weights = self.fingerprint()
        if weights == self._weights:
            return
        check_adapters(self.model)
        kv = self.kv
        kv.abandon()
        cached = kv.num_nodes
        for dependent in list(self.dependents):
            dependent.detach()
        if kv.index.num_held:
            raise ConfigError(
                f"{type(self).__name__}: the weights of its model changed while {kv.index.num_held} tokens that were "
                "cached with the old ones are in use; end the searches, guidance or rows that hold them first"
            )
        kv.index.clear()
        geometry = inspect_model(self.model)
        if geometry != self.geometry or self.device != kv.k.device:
            self.geometry = geometry
            k_scale, v_scale = (None if x is None else x.to(self.device) for x in (kv.k_scale, kv.v_scale))
            self.kv = self._new_cache(kv.capacity, kv.grow, k_scale=k_scale, v_scale=v_scale)
            self.kv.lock, self.kv.reserved = kv.lock, kv.reserved  # by searches that were admitted and did not begin
        self._weights = weights
        if cached:
            warnings.warn(
                f"{type(self).__name__}: the weights of its model changed; {cached} cached tokens were forgotten",
                stacklevel=3,
            )

    @torch.inference_mode()
    def prefill(self, sequences: Sequence[Sequence[int]]) -> tuple[Rows, Tensor]:
        """Runs whatever is not cached of the sequences in one forward pass, every distinct prefix once.

        Returns:
            the rows, one per sequence, and the output `[sequences, ...]` at each last token. Give the rows back with
            `release`, or hand them to `step`.
        """
        leaves, output = self.read(sequences)
        rows = self.new_rows()
        self.regroup(rows, [], sequences, leaves)
        return rows, output

    def new_rows(self) -> Rows:
        """No rows yet: `regroup` adds some."""
        return Rows(self.kv.beams(_NONE)[0] if self.share_prefixes else None, _NONE)

    @torch.inference_mode()
    def regroup(
        self, rows: Rows, keep: Sequence[int], sequences: Sequence[Sequence[int]] = (), leaves: Index = _NONE
    ) -> None:
        """Rows leave and join between two steps: the rows `keep` stay, in that order, and new ones stand behind them.

        Args:
            rows: updated. Tokens that only the other rows hold leave the cache unless `keep_prefixes` is set.
            sequences, leaves: what was read by `read`, one new row each; their holds pass to the rows.
        """
        if rows.beams is None:
            rows.sequences = [*(rows.sequences[row] for row in keep), *(list(s) for s in sequences)]
            return
        with self.kv.lock:
            beam = rows.beam_of_row[np.asarray(keep, dtype=np.int64)]
            kept = np.unique(beam)
            old = rows.beams.nodes
            rows.beams, number = self.kv.beams(np.concatenate([old[kept], leaves]))
            rows.beam_of_row = np.concatenate([number[np.searchsorted(kept, beam)], number[len(kept) :]])
            self.forget(np.delete(old, kept))

    @torch.inference_mode()
    def read(self, sequences: Sequence[Sequence[int]]) -> tuple[Index, Tensor]:
        """`prefill` for sequences that do not move on by single steps.

        Returns:
            the trie node of each sequence's last token, held once for each sequence until `forget`, so that longer
            sequences find their K and V (none where `share_prefixes` is off); and the output `[sequences, ...]`.
        """
        expect_list("sequences", sequences, "token sequences")
        for i, sequence in enumerate(sequences):
            self.check_tokens(f"sequences[{i}]", sequence)
        if not self.share_prefixes:
            self.check_weights()
            return _NONE, self.run_alone(sequences)
        with self.kv.lock:
            self.check_weights()
            self.geometry.check_length(max(map(len, sequences), default=0))
            fill = self.kv.insert(sequences)
            try:
                # Sequences that end in the same prefix share its output.
                last, row_of_last = np.unique(fill.last, return_inverse=True)
                output = self._forward(fill.tokens, fill.step, torch.from_numpy(last).long())
                return fill.leaves, output[torch.from_numpy(row_of_last).to(output.device)]
            except BaseException:
                self.kv.release(fill.leaves, discard=True)  # nodes without K and V must not be found again
                raise

    def forget(self, leaves: Index) -> None:
        """Ends what `read` held. Tokens that nobody else holds leave the cache unless `keep_prefixes` is set."""
        self.kv.release(leaves, discard=not self.keep_prefixes)

    @torch.no_grad()
    def logits(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Next-token logits of token sequences, for decoders that keep no cache of their own.

        Every distinct prefix is run once and stays in the cache until its room is needed; what was asked for longest
        ago then goes first. The cache grows only for a single call that does not fit. A decoder that asks for its beams
        in several calls wants a `capacity` for all of them together, or it runs again what the last call pushed out.

        Returns:
            `[sequences, vocab]`, equal to a forward pass over each whole sequence but for rounding.

        Raises:
            ConfigError: no sequences, an empty one, or ids outside the vocabulary.
        """
        expect_list("sequences", sequences, "token sequences")
        if len(sequences) == 0:
            raise ConfigError("sequences: got none, expected at least one")
        leaves, output = self.read(sequences)
        self.kv.release(leaves)
        return output.clone()  # an ordinary tensor: one made in inference mode could not be changed in place

    @torch.inference_mode()
    def step(self, rows: Rows, parents: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """One token further: new row `j` continues row `parents[j]` with `tokens[j]`. Rows without children end.

        Updates `rows`, which stay good for `release` whatever happens.

        Returns:
            the output `[new rows, ...]` at the new tokens.

        Raises:
            ConfigError: what is no token id, or the weights changed since the rows began.
        """
        if len(tokens):
            self.check_tokens("tokens", tokens)
        self.check_weights()
        if rows.beams is None:
            rows.sequences = [[*rows.sequences[p], t] for p, t in zip(parents, tokens, strict=True)]
            return self.run_alone(rows.sequences)
        self.geometry.check_length(int(rows.beams.positions.max(initial=-1)) + 2)
        beam = rows.beam_of_row[np.asarray(parents, dtype=np.int64)]
        order = np.argsort(beam, kind="stable")  # the trie numbers new beams by parent
        ids = np.asarray(tokens, dtype=np.int32)[order]
        row = np.empty(len(order), dtype=np.int32)
        row[order] = np.arange(len(order), dtype=np.int32)
        with self.kv.lock:
            before, rows.beams = rows.beams, replace(rows.beams, nodes=_NONE)
            try:
                beams, plan = self.kv.advance(before, beam[order], ids)
            except (CacheFullError, ValueError):
                rows.beams = before
                raise
            try:
                output = self._forward(torch.from_numpy(ids).to(self.device).long(), plan, torch.arange(len(ids)))
            except BaseException:
                self.kv.release(beams.nodes, discard=True)  # as in `read`
                raise
            rows.beams, rows.beam_of_row = beams, row
        return output[torch.from_numpy(row).long().to(output.device)]

    def release(self, rows: Rows) -> None:
        """Ends the rows. Their tokens leave the cache unless `keep_prefixes` is set."""
        if rows.beams is not None:
            self.forget(rows.beams.nodes)

    def run_alone(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """The output `[sequences, ...]` at each last token, by one forward pass in which nothing is shared."""
        lengths = np.array([len(s) for s in sequences])
        ends = np.cumsum(lengths)
        queries = torch.arange(int(ends[-1]), dtype=torch.int32, device=self.device)
        positions = torch.from_numpy(np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)).to(self.device)
        end = torch.from_numpy(np.repeat(ends, lengths).astype(np.int32)).to(self.device)
        tokens = torch.tensor([t for s in sequences for t in s], device=self.device)
        # One chain of slots a sequence: token t is seen by itself and by what follows it there.
        plan = TreeStep(positions, queries, queries, queries, end, int(lengths.max()))
        return self._forward(tokens, plan, torch.from_numpy(ends - 1), self.scratch(len(queries)))

    def _forward(self, tokens: Tensor, plan: TreeStep, keep: Tensor, kv: KVTrie | None = None) -> Tensor:
        """Runs the model on `tokens [queries]`; returns its output at the queries `keep`."""
        step = attention.TrieStep(self.kv if kv is None else kv, plan, windows=self.geometry.windows)
        if self in (others := instead.get() or {}):
            return others[self](tokens, step, keep.to(self.device))
        with attention.evaluating(self.trunk):
            output = self.output(tokens[None], step, keep.to(self.device))
        step.finish()
        return output

    def output(self, input_ids: Tensor, step: attention.TrieStep, keep: Tensor) -> Tensor:
        """One forward pass: next-token logits `[keep, vocab]`; reward models return hidden states instead."""
        return self.model(input_ids=input_ids, logits_to_keep=keep, **step.arguments()).logits[0]
