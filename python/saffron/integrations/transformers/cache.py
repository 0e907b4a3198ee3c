"""TrieCache: a `transformers.Cache` whose rows are prefixes in a trie.

A cache of transformers is told K and V, layer by layer, and no token ids; and `generate` repeats the prompt for every
beam before the model sees it. So the cache is not filled by the layers: constructing one gives its model a forward
pre-hook, which takes the ids of each call, finds what is cached, and lets the model run over every distinct new prefix
once, as one row with the keyword `trie_step`; a forward hook gives the caller one output a row. That recognises beams,
return sequences, system prompts and earlier turns alike, computes them once and stores them once. Comparing rows of K
and V in layer 0 would have saved memory alone, and would rest on equal bits.
"""

from __future__ import annotations

import functools
import threading
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Cache, PreTrainedModel

from saffron.errors import ConfigError, UnsupportedModelError
from saffron.integrations.transformers.call import Call, answer, by_name, check_output, read
from saffron.integrations.transformers.rows import Pass, Rows
from saffron.models.attention import ATTENTION, NO_GRADIENTS, TrieStep
from saffron.models.checks import expect
from saffron.models.trie_model import TrieModel
from saffron_kernels import TreeStep

if TYPE_CHECKING:
    from peft import PeftModel  # its import takes as long as that of transformers


class TrieCache(Cache):
    """The cache of one `generate` call (or several, on the same rows): `past_key_values=TrieCache(model)`.

    K and V of a prefix that rows have in common are stored and read once; `reorder_cache` moves indices. The rows end
    with the cache, with `reset`, or with a decode step that fails; what they held stays in the trie until its slots
    are needed. `copy.deepcopy` makes a cache that goes on from the same rows and shares their K and V.

    The model has to be loaded with `attn_implementation="saffron"`. Rows may be padded on the left, and between turns.
    Results are those of `DynamicCache` up to rounding: where prefixes are shared, matrix products have fewer rows. A
    cache is for one thread; caches of one model, or of one trie, may be in use in several. Not served, with a typed
    error: `inputs_embeds`, images and other inputs that are not token ids, `output_attentions`,
    `output_router_logits`, positions of one's own, dropout in training mode, gradients.

    Args:
        model: a decoder of transformers, or a PEFT model around one.
        capacity: slots (tokens) to begin with; `trie.kv.bytes_per_token` bytes each.
        grow: double the capacity when held tokens fill it; otherwise raise `CacheFullError`, nothing changed.
        static: decode steps whose shapes stay the same, for `compile_decode`: one query per row, `capacity` tokens.
        cache_dtype: of K and V, the model's or `torch.float8_e4m3fn` (see `TrieModel`).

    Raises:
        ConfigError: another attention implementation, or a cache_dtype that is not served.
        UnsupportedModelError: a model with a feature that the trie cannot serve.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        capacity: int = 256,
        grow: bool = True,
        static: bool = False,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        expect("model", model, nn.Module)
        base: Any = getattr(model, "get_base_model", lambda: model)()  # of a PEFT model
        expect("model", base, PreTrainedModel)
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise UnsupportedModelError(
                f"{type(model.active_peft_config).__name__}: adapters that stand before the text as embeddings or "
                "cached tokens (prefix tuning, prompt tuning, p-tuning) are not served by a TrieCache"
            )
        implementation = base.config._attn_implementation
        if implementation != ATTENTION:
            raise ConfigError(
                f'model: got attn_implementation="{implementation}", expected "{ATTENTION}"; load it so, or call '
                f'model.set_attn_implementation("{ATTENTION}")'
            )
        self._begin(TrieModel(base, capacity=capacity, grow=grow, cache_dtype=cache_dtype), static)

    @classmethod
    def from_trie(cls, trie: TrieModel, *, static: bool = False) -> Self:
        """A cache on a trie that outlives it, so that a call finds the prefixes of earlier ones and runs the rest.

            trie = TrieModel(model, capacity=32768, grow=False)   # this many tokens, the least recently used go first
            model.generate(**inputs, past_key_values=TrieCache.from_trie(trie))

        What was cached with other weights is never used: after `set_adapter`, `disable_adapter`, an optimizer's step or
        `model.to(...)` the trie is emptied with a warning, and rows that go on are run again; the same where buffers,
        forward hooks or numbers that modules hold (`scaling`) have changed. Changes through `parameter.data` cannot be
        noticed: make a new trie after them.

        Args:
            trie: a model with its trie; a `Policy` too, so that Saffron search and `generate` share prompts.
            static: as above.

        Raises:
            ConfigError: a trie without its model.
        """
        if not isinstance(trie, TrieModel):
            raise ConfigError(f"trie: got a {type(trie).__name__}, expected a TrieModel, such as TrieCache(model).trie")
        cache = cls.__new__(cls)
        cache._begin(trie, static)
        return cache

    def _begin(self, trie: TrieModel, static: bool) -> None:
        super().__init__(layers=[])
        model: Any = trie.model
        if not model._supports_logits_to_keep():
            raise UnsupportedModelError(f"{trie.model.config.model_type} model: its forward has no logits_to_keep")
        if trie.geometry.outputs:
            outputs = ", ".join(trie.geometry.outputs)
            raise UnsupportedModelError(f"{trie.model.config.model_type} model: it returns {outputs}, not served here")
        self.trie = trie
        self.static = static
        self._rows = Rows(trie)
        if all(hook is not _before_forward for hook in trie.model._forward_pre_hooks.values()):
            trie.model.register_forward_pre_hook(_before_forward, with_kwargs=True)
            trie.model.register_forward_hook(_after_forward, with_kwargs=True, always_call=True)

    def __repr__(self) -> str:
        rows, kv = self._rows, self.trie.kv
        return f"TrieCache({len(rows)} rows of {rows.columns} columns, {kv.num_nodes} of {kv.capacity} slots)"

    def __reduce__(self) -> Any:
        raise TypeError("a TrieCache cannot be pickled: its rows stand in the trie of a model; pickle their token ids")

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        other = type(self).from_trie(self.trie, static=self.static)
        other._rows = self._rows.fork()
        return other

    def __del__(self) -> None:
        if hasattr(self, "_rows"):  # its constructor went through
            self._rows.release()

    # --- what `generate` and decoding loops call ---------------------------------------------------------------------

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns so far, padding included."""
        return self._rows.columns

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._rows.columns + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that all rows together can have, -1 where the trie grows."""
        return -1 if self.trie.kv.grow else self.trie.kv.capacity

    @property
    def max_cache_len(self) -> int:
        raise UnsupportedModelError(
            "past_key_values: a TrieCache cannot be replaced by one that an adapter fills (prefix tuning)"
        )

    @property
    def batch_size(self) -> int:
        return len(self._rows) or -1

    @property
    def is_initialized(self) -> bool:
        return len(self._rows) > 0

    @property
    def is_compileable(self) -> bool:
        """False: `generate` would compile the trie's bookkeeping with the model. See `compile_decode`."""
        return False

    @property
    def is_croppable(self) -> bool:
        return True

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def reset(self) -> None:
        self._rows.release()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        last = len(self._rows) - 1
        if beam_idx.numel() and not 0 <= int(beam_idx.min()) <= int(beam_idx.max()) <= last:
            raise ConfigError(f"beam_idx: got {beam_idx.tolist()}, expected rows from 0 to {last}")
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows.select(torch.as_tensor(indices).cpu().numpy())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows.select(np.repeat(np.arange(len(self._rows)), repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last `-tokens_to_remove` columns away; the argument is negative, or 0 for none.

        Raises:
            ConfigError: a positive number, which used to mean the length to keep.
        """
        if tokens_to_remove > 0:
            raise ConfigError(f"tokens_to_remove: got {tokens_to_remove}, expected a negative number, or 0")
        self._rows.crop(-tokens_to_remove)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedModelError(
            f"this TrieCache belongs to a {type(self.trie.model).__name__} and is filled when that model is called as "
            "a whole; layers that fill it themselves are of another model, or were called without it"
        )


# --- the forward pass ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Running:
    """A call between its two hooks: what was asked, what runs, and where the answers will be."""

    cache: TrieCache
    call: Call
    planned: Pass
    step: TrieStep
    logits_of: Tensor
    hidden_of: Tensor


class _Calls(threading.local):
    """Of each thread: the calls of models that are between their two hooks, and the locks they hold."""

    def __init__(self) -> None:
        self.running: WeakKeyDictionary[nn.Module, tuple[_Running, ExitStack]] = WeakKeyDictionary()


_calls = _Calls()


def _before_forward(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Puts the pass over the trie in the place of a call with a TrieCache."""
    if interrupted := _calls.running.pop(model, None):  # from the keyboard, which hooks do not see
        interrupted[1].close()
    arguments = by_name(model, args, kwargs)
    cache = arguments.get("past_key_values")
    if not isinstance(cache, TrieCache):
        return None
    if cache.trie.model is not model:
        raise ConfigError(f"past_key_values: a TrieCache of another {type(cache.trie.model).__name__}")
    call = read(model, arguments)
    _check_mode(model)
    with ExitStack() as held:
        held.enter_context(cache.trie.kv.lock)  # until the pass has run: others would plan over what it writes
        running, changed = _plan(cache, call)
        _calls.running[model] = running, held.pop_all()
    return (), changed


def _plan(cache: TrieCache, call: Call) -> tuple[_Running, dict[str, Any]]:
    """The pass for a call, and the arguments that the model gets."""
    cache.trie.check_weights()
    planned = cache._rows.plan(call.ids, call.mask, call.positions, call.wanted)
    tokens, plan, queries = planned.tokens, planned.step, len(planned.tokens)
    static = cache.static and planned.decode
    if static:
        tokens, plan = _same_shapes(tokens, plan, len(call.ids), cache.trie.kv.capacity)
        queries = len(tokens)
    kept = planned.outputs[:, call.kept]
    distinct = np.unique(kept)
    everything = static or len(distinct) == queries
    logits_of = kept if everything else np.searchsorted(distinct, kept)
    step = TrieStep(cache.trie.kv, plan, static, cache.trie.geometry.windows)
    indices = [torch.from_numpy(x).to(tokens.device) for x in (logits_of, planned.outputs, distinct)]
    return _Running(cache, call, planned, step, logits_of=indices[0], hidden_of=indices[1]), {
        **call.others,
        "input_ids": tokens[None],
        "logits_to_keep": 0 if everything else indices[2],
        "return_dict": True,
        **step.arguments(),
    }


def _after_forward(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Gives every row its output. Called with None where the pass raised an exception."""
    if model not in _calls.running:
        return None
    running, held = _calls.running.pop(model)
    with held:
        if output is None:
            running.cache.trie.kv.abandon()
            return None
        try:
            running.step.finish()
            check_output(output, len(running.planned.tokens) if not running.step.static else None)
        except UnsupportedModelError:
            running.cache.trie.kv.abandon()
            raise
        running.planned.finish()
    return answer(running.call, output, running.logits_of, running.hidden_of, past_key_values=running.cache)


def _check_mode(model: PreTrainedModel) -> None:
    """Refuses what would be noise or gradients through shared prefixes, before anything changes."""
    dropouts = (m for m in model.modules() if isinstance(m, nn.Dropout)) if model.training else ()
    if any(dropout.p > 0 for dropout in dropouts):
        raise ConfigError(
            "model: it is in training mode and has dropout, and rows of a TrieCache share their prefixes; call "
            "model.eval()"
        )
    if torch.is_grad_enabled() and model.get_input_embeddings().weight.requires_grad:
        raise ConfigError(NO_GRADIENTS)


def _same_shapes(tokens: Tensor, plan: TreeStep, rows: int, capacity: int) -> tuple[Tensor, TreeStep]:
    """A decode step as one query per row and `capacity` tokens: queries that see nothing, tokens that nobody sees."""
    queries, seen = rows - len(tokens), capacity - len(plan.slot)
    return pad(tokens, (0, queries)), replace(
        plan,
        positions=pad(plan.positions, (0, queries)),
        write_slots=pad(plan.write_slots, (0, queries), value=-1),
        slot=pad(plan.slot, (0, seen)),
        begin=pad(plan.begin, (0, seen)),
        end=pad(plan.end, (0, seen)),
    )


def compile_decode(model: PreTrainedModel, **options: Any) -> None:
    """Compiles the decode steps of a model that runs on a `TrieCache` with `static=True`; everything else stays eager.

        compile_decode(model)   # del model.forward undoes it
        model.generate(**inputs, past_key_values=TrieCache(model, capacity=8192, grow=False, static=True))

    One graph serves all steps: its shapes are the number of rows and the capacity, not the length of the text. Another
    number of rows or another capacity (a trie that grows) is compiled again.

    Args:
        options: of `torch.compile`; `fullgraph=True, dynamic=False` unless they say otherwise.
    """
    eager = model.forward
    compiled = torch.compile(eager, **{"fullgraph": True, "dynamic": False, **options})

    @functools.wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        step = kwargs.get("trie_step")
        return (compiled if step is not None and step.static else eager)(*args, **kwargs)

    model.forward = forward
