"""One call of a Hugging Face decoder: what a caller asks for, and its answer in the caller's shape."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from saffron.errors import ConfigError, UnsupportedModelError
from saffron.models.attention import ATTENTION
from saffron.models.inspection import SERVED_OUTPUTS

_READ = (
    "input_ids", "attention_mask", "position_ids", "past_key_values", "logits_to_keep", "use_cache", "return_dict",
    "cache_position",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of a forward call.

    Attributes:
        ids: `[rows, new]` int64.
        mask: `[rows, earlier and new columns]` bool, what is no padding, None: all.
        positions: `[rows or 1, new]` int64, or None.
        wanted: ascending new columns whose outputs are wanted.
        kept: of these, the indices of those whose logits are wanted.
        return_dict: False: the caller wants a tuple.
        others: arguments that go to the model as they are.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.bool_] | None
    positions: NDArray[np.int64] | None
    wanted: NDArray[np.int64]
    kept: NDArray[np.int64]
    return_dict: bool
    others: Mapping[str, Any]


def by_name(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of `model(*args, **kwargs)` by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def read(model: PreTrainedModel, arguments: Mapping[str, Any]) -> Call:
    """Reads the arguments of a call, and refuses those that a trie of token ids cannot serve.

    Raises:
        ConfigError, UnsupportedModelError: by name.
    """
    others = {name: value for name, value in arguments.items() if name not in _READ}
    _refuse(model, others)
    if arguments.get("use_cache") is False:  # callers then pass the whole text at every step
        raise ConfigError("use_cache: got False, expected True with a TrieCache")
    ids = arguments.get("input_ids")
    if ids is None or ids.dim() != 2 or ids.shape[1] == 0:
        given = "None" if ids is None else f"shape {list(ids.shape)}"
        raise ConfigError(f"input_ids: got {given}, expected [rows, new tokens]; prefixes are found by token ids")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ConfigError(f"input_ids: got {ids.dtype}, expected whole numbers")
    new = ids.shape[1]
    mask = _two_dimensional("attention_mask", arguments.get("attention_mask"), new)
    positions = _two_dimensional("position_ids", arguments.get("position_ids"), new)
    if positions is not None and positions.is_floating_point():
        raise ConfigError(f"position_ids: got {positions.dtype}, expected whole numbers")
    kept = _columns(arguments.get("logits_to_keep", 0), new)
    hidden = others.get("output_hidden_states")
    wanted = np.arange(new) if (model.config.output_hidden_states if hidden is None else hidden) else np.unique(kept)
    return_dict = arguments.get("return_dict")
    return Call(
        ids=_host(ids),
        mask=None if mask is None else _host(mask) != 0,
        positions=None if positions is None else _host(positions)[:, -new:],
        wanted=wanted,
        kept=np.searchsorted(wanted, kept),
        return_dict=bool(model.config.return_dict if return_dict is None else return_dict),
        others=others,
    )


def _refuse(model: PreTrainedModel, others: Mapping[str, Any]) -> None:
    implementation = model.config._attn_implementation
    if implementation != ATTENTION:
        raise ConfigError(
            f'attn_implementation: got "{implementation}", expected "{ATTENTION}" for a TrieCache; load the model with '
            f'attn_implementation="{ATTENTION}" or call model.set_attn_implementation("{ATTENTION}")'
        )
    if others.get("inputs_embeds") is not None:
        raise ConfigError("inputs_embeds: not served by a TrieCache, whose prefixes are found by token ids: input_ids")
    attentions = others.get("output_attentions")
    if model.config.output_attentions if attentions is None else attentions:
        raise UnsupportedModelError("output_attentions: attention over a trie has no weights to return")
    router = others.get("output_router_logits")
    if getattr(model.config.get_text_config(), "output_router_logits", False) if router is None else router:
        raise UnsupportedModelError(
            "output_router_logits: not served by a TrieCache, whose passes run every distinct prefix once: router "
            "logits and their loss would be those of other tokens"
        )
    tensors = [name for name, value in others.items() if isinstance(value, Tensor)]
    if tensors:
        raise UnsupportedModelError(
            f"{', '.join(tensors)}: not served by a TrieCache, where token ids alone say what K and V are"
        )


def _two_dimensional(name: str, tensor: Tensor | None, new: int) -> Tensor | None:
    """A `[rows, columns]` tensor, checked."""
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor) or tensor.dim() != 2 or tensor.shape[1] < new:
        given = f"shape {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ConfigError(f"{name}: got {given}, expected [rows, at least {new} columns] for a TrieCache")
    return tensor


def _columns(keep: int | Tensor, new: int) -> NDArray[np.int64]:
    """The columns that `logits_to_keep` names: the last so many, all for 0, or those of a tensor."""
    if isinstance(keep, Tensor):
        return np.arange(new)[_host(keep)]
    return np.arange(new)[slice(-keep, None)]


def _host(tensor: Tensor) -> NDArray[Any]:
    return tensor.to("cpu", torch.int64).numpy()


def check_output(output: ModelOutput, queries: int | None) -> None:
    """Refuses outputs that `answer` cannot give a row for every row of the caller.

    Args:
        queries: of the pass, None for not known.
    """
    for name, value in output.items():
        if value is not None and name not in SERVED_OUTPUTS:
            raise UnsupportedModelError(f"{name}: an output of the model that a TrieCache does not serve")
    for state in output.get("hidden_states") or ():
        if state.dim() != 3 or len(state) != 1 or queries not in (None, state.shape[1]):
            raise UnsupportedModelError(
                f"hidden_states: of shape {list(state.shape)}, which a TrieCache does not serve"
            )


def answer(call: Call, output: ModelOutput, logits_of: Tensor, hidden_of: Tensor, **fields: object) -> Any:
    """The model's output with a row for every row that was asked for.

    Args:
        output: of the pass over the trie, `[1, queries, ...]`.
        logits_of: `[rows, kept]` index into the logits. hidden_of: `[rows, wanted]` index into hidden states.
        fields: of the output, set as they are.
    """
    states = output.get("hidden_states")
    if states is not None:
        fields["hidden_states"] = tuple(state[0][hidden_of] for state in states)
    result = replace(output, logits=output.logits[0][logits_of], **fields)  # type: ignore[attr-defined, type-var]
    return result if call.return_dict else result.to_tuple()
