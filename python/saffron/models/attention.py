"""The trie cache as an attention implementation of `transformers`: `attn_implementation="saffron"`.

A model is called with all new tokens of all sequences as one row, `input_ids [1, queries]`, and with the arguments of a
`TrieStep`, which every layer hands on to `trie_attention`. `TrieModel` calls it so, and so does `TrieCache` under the
`generate` of transformers. Called without a `TrieStep`, the implementation is `sdpa`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from saffron.errors import ConfigError, UnsupportedModelError
from saffron.models.windows import windowed
from saffron_kernels import KVTrie, TreeStep, append_kv, tree_attention
from saffron_kernels.checks import FP8

ATTENTION = "saffron"
NO_GRADIENTS = (
    "TrieCache: no gradients flow through a trie cache; call the model under torch.no_grad(), or train without "
    "past_key_values or with transformers.DynamicCache"
)

MaskFunction = Callable[..., Any]
# While a model is inspected: what makes its masks, from the function that says who sees whom.
mask_recorder: ContextVar[Callable[[MaskFunction, dict[str, Any]], Tensor | None] | None] = ContextVar(
    "mask_recorder", default=None
)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the attention function by a layer of a model.

    Attributes:
        query: `[1, heads, queries, head_dim]`. key: `[1, kv_heads, queries, head_dim]`, after RoPE.
        value: `[1, kv_heads, queries, value_dim]`.
        mask: what the layer got as its attention mask.
        others: keyword arguments that the attention function does not know, except None and False.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float | None
    dropout: float
    sliding_window: int | None
    softcap: float | None
    sinks: Tensor | None
    others: dict[str, Any]

    @property
    def scale(self) -> float:
        return float(self.query.shape[-1] ** -0.5 if self.scaling is None else self.scaling)


class Step(Protocol):
    """What a model is called with as `trie_step`."""

    def attend(self, call: Call) -> Tensor:
        """Attention of one layer: `[1, queries, heads, value_dim]`."""
        ...


def trie_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    trie_step: Step | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Caches K and V of the new tokens of this layer and attends over the trie; `sdpa` where there is no `trie_step`.

    Args:
        query, key, value: as in `Call`.
        trie_step: what `TrieModel` and `TrieCache` pass to the model's forward.

    Returns:
        `[1, queries, heads, value_dim]` and None (no attention weights).
    """
    if trie_step is None:
        for name, feature in (("soft-capping", softcap), ("sinks", s_aux)):
            if feature is not None:
                raise UnsupportedModelError(
                    f'attention {name}: attn_implementation="{ATTENTION}" serves it through saffron.TrieModel, or in '
                    "generate with past_key_values=saffron.integrations.transformers.TrieCache(model); this model was "
                    'called without; call model.set_attn_implementation("eager") for other uses'
                )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **others,
        )  # fmt: skip
    given = {name: other for name, other in others.items() if other is not None and other is not False}
    call = Call(
        module, query, key, value, attention_mask, scaling, dropout, sliding_window, softcap, s_aux, given
    )  # fmt: skip
    return trie_step.attend(call), None


def trie_mask(*args: Any, mask_function: MaskFunction = causal_mask_function, **options: Any) -> Tensor | None:
    """The masks of a model called without a `TrieStep`, those of `sdpa`."""
    record = mask_recorder.get()
    if record is not None:
        return record(mask_function, options)
    return sdpa_mask(*args, **{**options, "mask_function": mask_function})


AttentionInterface.register(ATTENTION, trie_attention)
AttentionMaskInterface.register(ATTENTION, trie_mask)


@dataclass(slots=True)
class TrieStep:
    """The cache and the plan of one forward pass, as the layers of a model see it.

    Attributes:
        kv: the caches. plan: the forward pass, over whole texts.
        static: a decode step whose shapes are those of the step before (see `TrieCache`).
        windows: per layer the window of its attention, None for whole texts; None: no layer has one that a text of
            this plan outgrows, or an error is raised.
        mask: stands for the attention mask on the way to the layers, so that they hand it on as it is.
        done: layers that have run. Not kept in compiled steps, whose models were inspected when they were made.
        plans: per window, the plan of its layers.
    """

    kv: KVTrie
    plan: TreeStep
    static: bool = False
    windows: tuple[int | None, ...] | None = None
    mask: Tensor = field(init=False)
    done: set[int] = field(init=False, default_factory=set)
    plans: dict[int, TreeStep] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.mask = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=self.plan.positions.device)
        for window in set(self.windows or ()) - {None}:
            assert window is not None
            if self.static:
                self.plans[window] = _of_size(windowed(self.plan, window), len(self.plan.slot))
            elif window < self.plan.length:
                self.plans[window] = windowed(self.plan, window)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the model's forward, in addition to `input_ids [1, queries]`."""
        return {
            "position_ids": self.plan.positions[None],
            "attention_mask": self.mask,
            "use_cache": False,
            "trie_step": self,
        }

    def attend(self, call: Call) -> Tensor:
        layer = int(call.module.layer_idx)  # type: ignore[arg-type]
        plan = self._plan(layer, call.sliding_window)
        # Compiled, these would be guards; the models of compiled steps ran as they are before.
        if not torch.compiler.is_compiling():
            self._check(layer, call)
        k_cache, v_cache = self.kv.k[layer], self.kv.v[layer]
        k_scale, v_scale = (None if s is None else s[layer] for s in (self.kv.k_scale, self.kv.v_scale))
        # Under autocast layers hand over what they like; the cache has one dtype.
        dtype = call.query.dtype if k_cache.dtype == FP8 else k_cache.dtype
        q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (call.query, call.key, call.value))
        append_kv(k, v, plan.write_slots, k_cache, v_cache, k_scale=k_scale, v_scale=v_scale)
        out, _lse = tree_attention(
            q, k_cache, v_cache, plan.slot, plan.begin, plan.end, call.scale,
            count=plan.count, k_scale=k_scale, v_scale=v_scale, softcap=call.softcap, sinks=call.sinks,
        )  # fmt: skip
        return out[None].to(call.value.dtype)

    def _plan(self, layer: int, sliding_window: int | None) -> TreeStep:
        if self.windows is not None:
            window = self.windows[layer]
            return self.plan if window is None else self.plans.get(window, self.plan)
        # Compiled, `plan.length` would be a guard that fails at every step: the caller checks it then.
        if sliding_window is not None and not torch.compiler.is_compiling() and self.plan.length > sliding_window:
            raise UnsupportedModelError(
                f"sliding-window attention: the text has {self.plan.length} tokens and the window {sliding_window}"
            )
        return self.plan

    def _check(self, layer: int, call: Call) -> None:
        """Refuses what would be computed wrongly, before anything is written."""
        if layer in self.done:
            raise UnsupportedModelError(f"layer {layer} runs attention twice in one step: the trie caches one K and V")
        if call.mask is not None and call.mask is not self.mask:
            raise UnsupportedModelError(
                f"layer {layer}: got an attention mask of its own, {list(call.mask.shape)}; the trie serves causal "
                "attention; call the model with TrieStep.arguments()"
            )
        if call.dropout:
            raise ConfigError(
                f"layer {layer}: attention dropout {call.dropout} is not served by the trie cache; call model.eval()"
            )
        inputs = call.query, call.key, call.value
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            raise ConfigError(NO_GRADIENTS)
        self.done.add(layer)

    def finish(self) -> None:
        """To be called when the model has run.

        Raises:
            UnsupportedModelError: layers of the cache that have not run, so that their K and V are missing.
        """
        layers = len(self.kv.k)
        if len(self.done) < layers and not (self.static and not self.done):
            missing = sorted(set(range(layers)) - self.done)
            raise UnsupportedModelError(
                f"layers {', '.join(map(str, missing))} of {layers} ran without attention over the trie: their K and V "
                "are missing"
            )


def _of_size(plan: TreeStep, tokens: int) -> TreeStep:
    """The plan with so many entries: those that are added nobody sees."""
    more = tokens - len(plan.slot)
    if more < 0:
        raise UnsupportedModelError(
            f"static=True: the windows of this step are {len(plan.slot)} intervals, more than the capacity of {tokens}"
        )
    return replace(plan, slot=pad(plan.slot, (0, more)), begin=pad(plan.begin, (0, more)), end=pad(plan.end, (0, more)))


@contextmanager
def evaluating(model: nn.Module) -> Any:
    """Runs a model in evaluation mode, and leaves every module in the mode that it was in."""
    training = [module for module in model.modules() if module.training] if model.training else []
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@dataclass(frozen=True, slots=True)
class Geometry:
    """The attention of a model.

    Attributes:
        layers, heads, kv_heads: numbers. head_dim: of Q and K. value_dim: of V.
        dtype: of K and V.
        windows: per layer, how many tokens a query sees (itself included), None for all.
        outputs: what the model returns besides logits.
        longest: the longest text whose rotary embeddings do not depend on its length, None for any.
        relative: a text says the same wherever its positions begin (RoPE).
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    windows: tuple[int | None, ...]
    outputs: tuple[str, ...] = ()
    longest: int | None = None
    relative: bool = False

    def check_length(self, tokens: int) -> None:
        """Raises `UnsupportedModelError` for texts of other rotary embeddings than those of their cached prefixes."""
        if self.longest is not None and tokens > self.longest:
            raise UnsupportedModelError(
                f"rotary embeddings (dynamic or longrope) that change with the text's length beyond {self.longest} "
                f"tokens are not served by the trie cache, whose prefixes are shared; the text has {tokens}"
            )

    def cache(self, dtype: torch.dtype, device: torch.device, **options: Any) -> KVTrie:
        """An empty `KVTrie`; `options` are `capacity`, `grow`, `k_scale` and `v_scale`."""
        with torch.inference_mode(False):  # caches made in inference mode could not be written outside of it
            return KVTrie(
                self.layers, self.kv_heads, self.head_dim, v_dim=self.value_dim, dtype=dtype, device=device, **options
            )


def cache_dtype(wanted: torch.dtype | None, own: torch.dtype) -> torch.dtype:
    """The dtype of the cache of a model in dtype `own`."""
    served = (own,) if own == torch.float64 else (own, FP8)
    if wanted is not None and wanted not in served:
        allowed = " or ".join(map(str, served))
        raise ConfigError(f"cache_dtype: got {wanted}, expected {allowed} for a model in {own}")
    return wanted or own
