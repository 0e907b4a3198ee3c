"""Two vocabularies: whether a policy and a reward model share one, and what to do where they do not.

Where they do, the reward model reads the policy's token ids. Else it reads what its own tokenizer makes of the text,
and its head is brought into the order of the policy's ids.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from saffron.errors import ConfigError
from saffron.models.guard import ProcessRewardModel
from saffron.models.plain_text import control_tokens
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.models.trie_model import TrieModel

# Patterns that cut a text into words, of Llama 3, Qwen 2 and GPT-4. In each of them a space between two letters or
# digits begins a word, and no word before it depends on what follows it. ByteLevel's own pattern is GPT-2's.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD_PATTERNS = {
    _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST,
    _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST,
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
}

# What has been found out about pairs of tokenizers, and about MRMs; it goes with them.
_same: WeakKeyDictionary[Any, WeakKeyDictionary[Any, tuple[tuple[int, int], bool]]] = WeakKeyDictionary()
_heads: WeakKeyDictionary[MultifurcationRewardModel, WeakKeyDictionary[Any, tuple[Any, Head]]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Head:
    """The MRM's unembedding by the policy's token ids: weight `[vocab, hidden]`, bias and unseen mask `[vocab]`."""

    weight: Tensor
    bias: Tensor | None
    unseen: Tensor | None


def same_tokens(policy: Policy, model: TrieModel) -> bool:
    """Whether token ids mean the same to both. Without tokenizers, equal vocabularies are taken to.

    The vocabularies of two tokenizers are compared once, and again when one of them has grown.
    """
    ours, theirs = policy.tokenizer, model.tokenizer
    if ours is None or theirs is None or ours is theirs:
        return True
    sizes = len(ours), len(theirs)
    known = _same.setdefault(ours, WeakKeyDictionary())
    if theirs not in known or known[theirs][0] != sizes:
        known[theirs] = sizes, sizes[0] == sizes[1] and ours.get_vocab() == theirs.get_vocab()
    return known[theirs][1]


def head_for(policy: Policy, mrm: MultifurcationRewardModel, trained_bias: bool) -> Head:
    """The MRM's head by the policy's token ids.

    With tokenizers that differ, a policy token is scored as the MRM token its text begins with; a token that has no
    such counterpart counts as unseen. That head is made once for a pair of models whose weights stay as they are.

    Raises:
        ConfigError: token ids are shared and the MRM's vocabulary is smaller than the policy's.
    """
    weight, bias = mrm.head_weight, mrm.full_bias(trained_bias)
    if same_tokens(policy, mrm):
        if mrm.vocab_size < policy.vocab_size:
            raise ConfigError(
                f"mrm: its vocabulary has {mrm.vocab_size} entries and the policy's {policy.vocab_size}; "
                "they must share a tokenizer, or both must bring one"
            )
        return Head(weight, bias, mrm.unseen)
    tokenizer = policy.require_tokenizer()
    tensors = map(_state, (weight, mrm.head_bias, mrm.bias, mrm.unseen))
    sizes = policy.vocab_size, len(tokenizer), len(mrm.tokenizer or ())
    state = *tensors, trained_bias, policy.eos_token_id, mrm.tokenizer, *sizes
    known = _heads.setdefault(mrm, WeakKeyDictionary())
    if tokenizer not in known or known[tokenizer][0] != state:
        known[tokenizer] = state, _mapped_head(policy, mrm, weight, bias)
    return known[tokenizer][1]


class TextMapper:
    """Responses in a policy's tokens as the ids that a reward model's tokenizer gives their whole text.

    A response that has grown is encoded from the last place where that gives the same ids as encoding all of it. Only
    tokenizers that cut words in ways known to be local have such places; for others every text is encoded whole.
    """

    def __init__(self, policy: Policy, model: MultifurcationRewardModel | ProcessRewardModel) -> None:
        self.policy, self.model = policy, model

    def extend(self, parents: Sequence[Mapped], responses: Sequence[Sequence[int]]) -> list[Mapped]:
        """Maps responses.

        Args:
            parents: for each what `extend` returned for a response that it begins with, or `EMPTY`.
            responses: in the policy's token ids.
        """
        pieces: list[str] = []
        starts = []
        for parent, response in zip(parents, responses, strict=True):
            text = self.policy.decode(response)
            # The text of a response may change at its end when it grows: half a character, or a space before a dot.
            end = len(parent.text)
            start = parent if text.startswith(parent.text) and _is_boundary(text, end) else EMPTY
            end = max(len(start.text), _last_boundary(text) if self._local else 0)
            pieces += [text[len(start.text) : end], text[end:]]
            starts.append((start, text[:end]))
        encoded = self.model.encoder.texts(pieces)
        mapped = []
        for i, (start, text) in enumerate(starts):
            stable = (*start.stable, *encoded[2 * i])
            mapped.append(Mapped((*stable, *encoded[2 * i + 1]), text, stable))
        return mapped

    @cached_property
    def _local(self) -> bool:
        """Whether `_last_boundary` is a place where the reward model's tokenizer may start again."""
        tokenizer = self.model.require_tokenizer()
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not self.model.encoder.split_special_tokens:
            return False
        data = json.loads(backend.to_str())
        control = control_tokens(tokenizer)
        added = [token for token in data["added_tokens"] if token["content"] not in control]
        if any(" " in token["content"] or token["lstrip"] or token["rstrip"] for token in added):
            return False
        byte_bpe = data["model"]["type"] == "BPE" and not data["model"].get("dropout") and not data["normalizer"]
        return byte_bpe and _cuts_locally(data["pre_tokenizer"])


@dataclass(frozen=True, slots=True)
class Mapped:
    """One response.

    Attributes:
        ids: in the reward model's tokens.
        text, stable: the part of the text whose ids stay whatever follows, and these ids.
    """

    ids: tuple[int, ...]
    text: str
    stable: tuple[int, ...]


EMPTY = Mapped((), "", ())


def _cuts_locally(pre_tokenizer: dict[str, Any] | None) -> bool:
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {"type": None}])
    *splits, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return False
    if not splits:
        return last["use_regex"]
    return (
        len(splits) == 1
        and splits[0]["type"] == "Split"
        and splits[0]["pattern"].get("Regex") in WORD_PATTERNS
        and splits[0]["behavior"] == "Isolated"
        and not splits[0]["invert"]
        and not last["use_regex"]
    )


def _last_boundary(text: str) -> int:
    """Where the last space between two letters or digits is, 0 if there is none."""
    end = len(text)
    while (end := text.rfind(" ", 1, end)) > 0:
        if _is_boundary(text, end):
            return end
    return 0


def _is_boundary(text: str, place: int) -> bool:
    around = text[max(place - 1, 0) : place + 2]
    return len(around) == 3 and around[0].isalnum() and around[1] == " " and around[2].isalnum()


def _state(tensor: Tensor | None) -> tuple[int, int] | None:
    """Changes when a tensor is replaced or written to."""
    return None if tensor is None else (tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version)


def _mapped_head(policy: Policy, mrm: MultifurcationRewardModel, weight: Tensor, bias: Tensor | None) -> Head:
    counterpart = _counterparts(policy, mrm)
    missing, index = counterpart < 0, counterpart.clamp(min=0)
    unseen = missing if mrm.unseen is None else missing | mrm.unseen[index]
    if bool(unseen.all()) and not (mrm.unseen is not None and bool(mrm.unseen.all())):  # which has been warned of
        warnings.warn("mrm: no token of the policy has a counterpart it was trained on; it says nothing", stacklevel=4)
    return Head(weight[index], None if bias is None else bias[index], unseen)


def _counterparts(policy: Policy, mrm: MultifurcationRewardModel) -> Tensor:
    """For each policy token the MRM token that its text begins with, -1 for none."""
    ours, theirs = policy.require_tokenizer(), mrm.require_tokenizer()
    special = set(ours.all_special_ids)
    # Decoded behind an anchor: some tokenizers drop a leading space at the beginning of a text.
    anchor = policy.encode("a")[-1]
    skip = len(policy.decode([anchor]))
    texts = ["" if t in special else policy.decode([anchor, t])[skip:] for t in range(policy.vocab_size)]
    encoded = mrm.encoder.texts([text or "a" for text in texts])
    first = [ids[0] if text and ids else -1 for text, ids in zip(texts, encoded, strict=True)]
    if theirs.eos_token_id is not None:
        for token in policy.eos_token_id:
            first[token] = theirs.eos_token_id
    return torch.tensor(first, device=mrm.device)
