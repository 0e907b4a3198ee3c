"""What the attention of a model is, found out by running it over four tokens.

Name lists cannot say which of some 200 architectures a trie serves. So a model runs over the texts `a b c` and `a b d`
as one row, in the order `a b c d` and then `a b d c`, and every call of the attention function is looked at. The order
must not matter: so layers are found that look at their neighbours (convolutions, recurrences) or count positions
themselves. The second run stands at later positions, which tells whether the model reads differences alone (RoPE).
A third run, over the text `a b c d` without positions, tells whether those of the model begin at 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from saffron.errors import UnsupportedModelError, reason
from saffron.models.attention import ATTENTION, Call, Geometry, MaskFunction, evaluating, mask_recorder

_POSITIONS = (0, 1, 2, 2)
# Who sees whom, in both orders: the branches do not see each other.
_BRANCHES = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 1]], dtype=torch.bool)
_CHAIN = torch.ones(4, 4, dtype=torch.bool).tril()
_SWAPPED = [0, 1, 3, 2]
# Keyword arguments of layers that the attention function may leave aside.
_HARMLESS = {"position_ids", "is_causal", "position_embeddings", "cache_position", "max_length_q", "max_length_k",
             "output_attentions", "output_hidden_states", "output_router_logits"}  # fmt: skip
SERVED_OUTPUTS = ("logits", "hidden_states", "past_key_values")  # by a TrieCache
_FAR = 1 << 20  # a position beyond every window


@dataclass(frozen=True, slots=True)
class _Layer:
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    window: int | None


class Inspection:
    """Stands in the place of a `TrieStep`: looks at every call of the attention function, and attends."""

    static = False

    def __init__(self, seen: Tensor) -> None:
        self.seen = seen  # [queries, tokens]
        self.layers: dict[int, _Layer] = {}
        self._masks: list[tuple[Tensor, int | None | str]] = []  # masks that were made, with their windows

    def make_mask(self, mask_function: MaskFunction, options: dict[str, Any]) -> Tensor:
        """In the place of the mask function: a tensor that says which mask it is by being itself."""
        mask = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=options.get("device"))
        self._masks.append((mask, window_of(mask_function, mask.device)))
        return mask

    def attend(self, call: Call) -> Tensor:
        layer = getattr(call.module, "layer_idx", None)
        if not isinstance(layer, int):
            raise UnsupportedModelError("its attention layers have no layer_idx")
        where = f"layer {layer}"
        if layer in self.layers:
            raise UnsupportedModelError(f"{where} runs attention twice in one step: the trie caches one K and V")
        q, k, v = call.query, call.key, call.value
        tokens = len(_POSITIONS)
        shapes = [list(x.shape) for x in (q, k, v)]
        standard = all(x.dim() == 4 and len(x) == 1 and x.shape[2] == tokens for x in (q, k, v))
        if not standard or q.shape[1] % k.shape[1] or k.shape[1] != v.shape[1] or q.shape[3] != k.shape[3]:
            raise UnsupportedModelError(f"{where} has queries, K and V of shapes {shapes}, which the trie cannot cache")
        unknown = sorted(set(call.others) - _HARMLESS)
        if unknown:
            raise UnsupportedModelError(
                f"{where} gives its attention {', '.join(unknown)}, which the trie cannot serve"
            )
        window = self._window(where, call)
        self.layers[layer] = _Layer(q.shape[1], k.shape[1], k.shape[3], v.shape[3], k.dtype, window)
        return self._attention(call)

    def _window(self, where: str, call: Call) -> int | None:
        if call.mask is None:
            causal = call.others.get("is_causal", getattr(call.module, "is_causal", True))
            if not causal:
                raise UnsupportedModelError(f"{where} is bidirectional; the trie serves causal attention")
            return None
        for mask, window in self._masks:
            if call.mask is mask:
                if isinstance(window, str):
                    raise UnsupportedModelError(f"{where} has {window}; the trie serves causal attention")
                return window
        raise UnsupportedModelError(
            f"{where} has an attention mask of its own, {list(call.mask.shape)} in {call.mask.dtype}, which the trie "
            "cannot serve"
        )

    def _attention(self, call: Call) -> Tensor:
        """Softmax attention in fp32, `[1, queries, heads, value_dim]`."""
        repeats = call.query.shape[1] // call.key.shape[1]
        k, v = (x.float().repeat_interleave(repeats, 1) for x in (call.key, call.value))
        scores = call.query.float() @ k.mT * call.scale
        if call.softcap is not None:
            scores = call.softcap * (scores / call.softcap).tanh()
        scores = scores.masked_fill(~self.seen.to(scores.device), -torch.inf)
        if call.sinks is not None:
            sinks = call.sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], -1)
        out = scores.softmax(-1)[..., : len(_POSITIONS)] @ v
        return out.transpose(1, 2).to(call.value.dtype).contiguous()


def window_of(mask_function: MaskFunction, device: torch.device) -> int | None | str:
    """What a mask function of `transformers` allows: the window of causal attention, None for none, or what else."""
    zero = torch.zeros((), dtype=torch.long, device=device)

    def seen(query: int, key: Tensor) -> Tensor:
        given = mask_function(zero, zero, torch.tensor(query, device=device), key)
        return torch.as_tensor(given, device=device).expand(key.shape)

    def see(query: int, key: int) -> bool:
        return bool(seen(query, torch.tensor([key], device=device)))

    try:
        if see(1, 2) or see(_FAR, _FAR + 1):
            return "a bidirectional mask"
        window: int | None = None
        if not see(_FAR, 0):
            low, high = 0, _FAR  # the query sees the token `low` before it, and not the one `high` before it
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if see(_FAR, _FAR - middle) else (low, middle)
            window = high
        # Chunks, blocks and the like look like a window from one query, and differ from it elsewhere.
        for query in (
            0,
            1,
            2,
            3,
            5,
            7,
            100,
            1001,
            4097,
            _FAR - 3,
            *(() if window is None else (window, 3 * window // 2)),
        ):
            keys = torch.arange(max(0, query - 4 * (window or 64)), query + 3, device=device)
            expected = (keys <= query) & (keys > query - (window or _FAR + 1))
            if not torch.equal(seen(query, keys), expected):
                return "a mask that is neither causal nor a window"
    except (IndexError, RuntimeError, TypeError):
        return "a mask that depends on the text"
    return window


def refuse(config: PretrainedConfig, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{config.model_type} model: {why}")


def check_supported(config: PretrainedConfig, model_class: type[PreTrainedModel] | None = None) -> None:
    """Refuses, by name, what a configuration alone shows; what a model does shows `inspect_model`.

    Raises:
        UnsupportedModelError: encoder-decoder models, ALiBi, layers that are not attention, or a model class that does
            not use the standard attention interface.
    """
    text = config.get_text_config()
    if config.is_encoder_decoder:
        raise refuse(config, "encoder-decoder models are not served by the trie cache")
    alibi = getattr(text, "alibi", False) or getattr(text, "position_embedding_type", None) == "alibi"
    if alibi or config.model_type in ("bloom", "mpt"):
        raise refuse(config, "ALiBi position biases are not served by the trie cache")
    served = {"full_attention", "sliding_attention"}
    unserved = set(getattr(text, "layer_types", None) or ()) - served
    if unserved:
        raise refuse(config, f"{', '.join(sorted(unserved))} layers are not served by the trie cache")
    if model_class is not None and not model_class._can_set_attn_implementation():
        raise refuse(config, "it does not use the standard attention interface of transformers")


_transformers_choice = PreTrainedModel.get_correct_attn_implementation


def _choose_implementation(self: PreTrainedModel, requested_attention: str | None, is_init_check: bool = False) -> str:
    """A model class without the attention interface would otherwise fail with a KeyError in a layer's constructor."""
    if requested_attention == ATTENTION and not self._can_set_attn_implementation():
        raise refuse(self.config, "it does not use the standard attention interface of transformers")
    return _transformers_choice(self, requested_attention, is_init_check)


PreTrainedModel.get_correct_attn_implementation = _choose_implementation  # type: ignore[method-assign]


_inspected: WeakKeyDictionary[nn.Module, tuple[object, Geometry]] = WeakKeyDictionary()


def inspect_model(model: PreTrainedModel) -> Geometry:
    """The attention of a model that the trie cache serves. Sets its attention implementation.

    Raises:
        UnsupportedModelError: a model that it does not serve, with the reason. The model is then as it was.
    """
    key = model.dtype, model.device, model.config.get_text_config().num_hidden_layers
    before = model.config._attn_implementation
    if before == ATTENTION and model in _inspected and _inspected[model][0] == key:
        return _inspected[model][1]
    check_supported(model.config, type(model))
    try:
        if before != ATTENTION:
            model.set_attn_implementation(ATTENTION)
        with evaluating(model), torch.autocast(model.device.type, enabled=False):
            geometry = _inspect(model)
    except BaseException as error:
        if model.config._attn_implementation != before:
            model.set_attn_implementation(before)
        if not isinstance(error, Exception) or isinstance(error, torch.OutOfMemoryError):
            raise
        raise refuse(model.config, reason(error)) from error
    _inspected[model] = key, geometry
    return geometry


@torch.no_grad()
def _inspect(model: PreTrainedModel) -> Geometry:
    embeddings: Any = model.get_input_embeddings()
    special = model.config.get_text_config().pad_token_id
    ids = torch.tensor([i for i in range(3, 8) if i != special][:4], device=model.device) % len(embeddings.weight)
    positions = torch.tensor([_POSITIONS], device=model.device)
    first, output = _run(model, ids, positions, _BRANCHES)
    longest = _longest(model.config)
    room = min(longest or _FAR, getattr(model.config.get_text_config(), "max_position_embeddings", None) or _FAR)
    shift = max(0, min(32, room - 4))
    _, other_order = _run(model, ids[_SWAPPED], positions + shift, _BRANCHES)
    _, alone = _run(model, ids, None, _CHAIN)
    layers = [first[i] for i in sorted(first)]
    if not layers:
        raise UnsupportedModelError("its layers do not hand keyword arguments on to the attention function")
    expected = model.config.get_text_config().num_hidden_layers
    if sorted(first) != list(range(len(layers))) or len(layers) != expected:
        raise UnsupportedModelError(f"{expected} layers, of which {sorted(first)} run attention once")
    forms = {(x.heads, x.kv_heads, x.head_dim, x.value_dim, x.dtype) for x in layers}
    if len(forms) > 1:
        raise UnsupportedModelError(f"its layers have K and V of different forms: {sorted(map(str, forms))}")
    logits, swapped, chain = (x["logits"][0].float() for x in (output, other_order, alone))
    tolerance = logits.abs().max() * (1e-4 if model.dtype.itemsize > 2 else 0.05)
    # Comparisons with NaN are false: it is looked for elsewhere.
    if bool((logits[:3] - chain[:3]).abs().max() > tolerance):
        raise UnsupportedModelError("the positions that it counts by itself do not begin at 0, as those of a trie do")
    relative = not bool((logits - swapped[_SWAPPED]).abs().max() > tolerance)
    if not relative:  # the order of tokens, or where they stand?
        swapped = _run(model, ids[_SWAPPED], positions, _BRANCHES)[1]["logits"][0].float()
    if bool((logits - swapped[_SWAPPED]).abs().max() > tolerance):
        raise UnsupportedModelError(
            "its outputs depend on the order of tokens in a row: it counts positions itself, or looks beyond attention"
        )
    others = [name for name, value in output.items() if value is not None and name not in SERVED_OUTPUTS]
    windows = tuple(x.window for x in layers)
    return Geometry(len(layers), *forms.pop(), windows, tuple(others), longest, relative and shift > 0)


def _longest(config: PretrainedConfig) -> int | None:
    """The text beyond which rotary embeddings would turn tokens otherwise that are cached already."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    limits = []
    for rope in (parameters, *(x for x in parameters.values() if isinstance(x, dict))):
        if rope.get("rope_type") in ("dynamic", "longrope"):
            own = rope.get("original_max_position_embeddings")
            own = own or getattr(text, "original_max_position_embeddings", None)
            limits.append(own or text.max_position_embeddings)
    return min(limits, default=None)


def _run(
    model: PreTrainedModel, ids: Tensor, positions: Tensor | None, seen: Tensor
) -> tuple[dict[int, _Layer], ModelOutput]:
    """The layers, and the model's output."""
    inspection = Inspection(seen)
    token = mask_recorder.set(inspection.make_mask)
    try:
        output = model(
            input_ids=ids[None],
            **({} if positions is None else {"position_ids": positions}),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=ids.device),
            use_cache=False,
            return_dict=True,
            trie_step=inspection,
        )
    finally:
        mask_recorder.reset(token)
    return inspection.layers, output
