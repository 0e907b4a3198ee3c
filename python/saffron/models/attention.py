"""The trie cache as an attention implementation of `transformers`: `attn_implementation="saffron"`.

A model is called with all new tokens of all sequences as one row, `input_ids [1, queries]`, and with the keyword
`trie_step`, which every layer hands on to `trie_attention`. `TrieModel` calls it so, and so does `TrieCache` under the
`generate` of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from saffron.errors import UnsupportedModelError
from saffron_kernels import KVTrie, TreeStep, append_kv, tree_attention

ATTENTION = "saffron"


class Caches(Protocol):
    """What attention reads and writes: the caches of a `KVTrie`, or buffers of the same form."""

    @property
    def k(self) -> Tensor: ...
    @property
    def v(self) -> Tensor: ...
    @property
    def k_scale(self) -> Tensor | None: ...
    @property
    def v_scale(self) -> Tensor | None: ...


@dataclass(frozen=True, slots=True)
class TrieStep:
    """The cache and the plan of one forward pass, as the layers of a model see it.

    `static`: a decode step whose shapes are those of the step before (see `TrieCache`).
    """

    kv: Caches
    plan: TreeStep
    static: bool = False


def trie_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    trie_step: TrieStep | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Caches K and V of the new tokens of this layer and attends over the trie.

    Args:
        query: `[1, heads, queries, head_dim]`; key, value: `[1, kv_heads, queries, head_dim]`, after RoPE.
        trie_step: required; what `TrieModel` passes to the model's forward.

    Returns:
        `[1, queries, heads, head_dim]` and None (no attention weights).
    """
    if trie_step is None:
        raise UnsupportedModelError(
            f'attn_implementation="{ATTENTION}" works through saffron.TrieModel, or in generate with past_key_values='
            "saffron.integrations.transformers.TrieCache(model): this model was called without trie_step, or its "
            "layers do not hand keyword arguments on to the attention function"
        )
    plan, layer = trie_step.plan, int(module.layer_idx)  # type: ignore[arg-type]
    # Compiled, `plan.length` would be a guard that fails at every step: the caller checks it then.
    if sliding_window is not None and not torch.compiler.is_compiling():
        check_window(plan.length, sliding_window)
    if softcap is not None:
        raise UnsupportedModelError("attention soft-capping is not served by the trie cache")
    if s_aux is not None:
        raise UnsupportedModelError("attention sinks are not served by the trie cache")
    kv = trie_step.kv
    caches = kv.k[layer], kv.v[layer]
    k_scale, v_scale = (None if scales is None else scales[layer] for scales in (kv.k_scale, kv.v_scale))
    new = key[0].transpose(0, 1), value[0].transpose(0, 1)
    append_kv(*new, plan.write_slots, *caches, k_scale=k_scale, v_scale=v_scale)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out, _lse = tree_attention(
        query[0].transpose(0, 1), *caches, plan.slot, plan.begin, plan.end, scale,
        count=plan.count, k_scale=k_scale, v_scale=v_scale,
    )  # fmt: skip
    return out[None], None


AttentionInterface.register(ATTENTION, trie_attention)


def check_window(length: int, window: int | None) -> None:
    """Refuses texts that outgrow an attention window: the trie serves attention over the whole text alone."""
    if window is not None and length > window:
        raise UnsupportedModelError(f"sliding-window attention: the text has {length} tokens and the window {window}")


def attention_window(config: PretrainedConfig) -> int | None:
    """The window of a model's sliding layers, None if it has none: read as `transformers` reads a configuration."""
    text = config.get_text_config()
    types = getattr(text, "layer_types", None)
    return getattr(text, "sliding_window", None) if types is None or "sliding_attention" in types else None


def check_supported(config: PretrainedConfig, model_class: type[PreTrainedModel] | None = None) -> None:
    """Refuses, by name, what the trie cache cannot serve.

    Raises:
        UnsupportedModelError: encoder-decoder models, ALiBi, attention soft-capping, layers that are not attention over
            the whole text, or a model class that does not use the standard attention interface.
    """
    text = config.get_text_config()
    name = f"{config.model_type} model"
    if config.is_encoder_decoder:
        raise UnsupportedModelError(f"{name}: encoder-decoder models are not served by the trie cache")
    alibi = getattr(text, "alibi", False) or getattr(text, "position_embedding_type", None) == "alibi"
    if alibi or config.model_type in ("bloom", "mpt"):
        raise UnsupportedModelError(f"{name}: ALiBi position biases are not served by the trie cache")
    if getattr(text, "attn_logit_softcapping", None) is not None:
        raise UnsupportedModelError(f"{name}: attention soft-capping is not served by the trie cache")
    served = {"full_attention", "sliding_attention"}  # a window is refused only once a text outgrows it
    unserved = set(getattr(text, "layer_types", None) or ()) - served
    if unserved:
        raise UnsupportedModelError(f"{name}: {', '.join(sorted(unserved))} layers are not served by the trie cache")
    if model_class is not None and not getattr(model_class, "_supports_attention_backend", False):
        raise UnsupportedModelError(f"{name}: it does not use the standard attention interface of transformers")


def new_cache(config: PretrainedConfig, dtype: torch.dtype, device: torch.device, **options: Any) -> KVTrie:
    """An empty `KVTrie` of a model's geometry; `options` are `capacity`, `grow`, `k_scale` and `v_scale`."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return KVTrie(text.num_hidden_layers, kv_heads, head_dim, dtype=dtype, device=device, **options)
