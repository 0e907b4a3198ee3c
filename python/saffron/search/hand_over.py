"""Vocabulary mapping: the MRM's head by the policy's token ids, also where their tokenizers differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saffron.errors import ConfigError
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.models.trie_model import TrieModel


@dataclass(frozen=True, slots=True)
class Head:
    """The MRM's unembedding by the policy's token ids: weight `[vocab, hidden]`, bias and unseen mask `[vocab]`."""

    weight: Tensor
    bias: Tensor | None
    unseen: Tensor | None


def same_tokens(policy: Policy, model: TrieModel) -> bool:
    """Whether token ids mean the same to both. Without tokenizers, equal vocabularies are taken to."""
    if policy.tokenizer is None or model.tokenizer is None:
        return True
    return policy.tokenizer.get_vocab() == model.tokenizer.get_vocab()


def head_for(policy: Policy, mrm: MultifurcationRewardModel, trained_bias: bool) -> Head:
    """The MRM's head by the policy's token ids.

    With tokenizers that differ, a policy token is scored as the MRM token its text begins with; a token that has no
    such counterpart counts as unseen.

    Raises:
        ConfigError: ids are handed over and the MRM's vocabulary is smaller than the policy's.
    """
    weight, bias = mrm.head_weight, mrm.full_bias(trained_bias)
    if same_tokens(policy, mrm):
        if mrm.vocab_size < policy.vocab_size:
            raise ConfigError(
                f"mrm: its vocabulary has {mrm.vocab_size} entries and the policy's {policy.vocab_size}; "
                "they must share a tokenizer, or both must bring one"
            )
        return Head(weight, bias, mrm.unseen)
    counterpart = _counterparts(policy, mrm)
    missing, index = counterpart < 0, counterpart.clamp(min=0)
    unseen = missing if mrm.unseen is None else missing | mrm.unseen[index]
    return Head(weight[index], None if bias is None else bias[index], unseen)


def _counterparts(policy: Policy, mrm: MultifurcationRewardModel) -> Tensor:
    """For each policy token the MRM token that its text begins with, -1 for none."""
    ours, theirs = policy.require_tokenizer(), mrm.require_tokenizer()
    special = set(ours.all_special_ids)
    # Decoded behind an anchor: some tokenizers drop a leading space at the beginning of a text.
    anchor = policy.encode("a")[-1]
    skip = len(ours.decode([anchor]))
    texts = ["" if t in special else ours.decode([anchor, t])[skip:] for t in range(policy.vocab_size)]
    encoded = theirs([text or "a" for text in texts], add_special_tokens=False)["input_ids"]
    first = [ids[0] if text and ids else -1 for text, ids in zip(texts, encoded, strict=True)]
    if theirs.eos_token_id is not None:
        for token in policy.end_tokens:
            first[token] = theirs.eos_token_id
    return torch.tensor(first, device=mrm.device)
