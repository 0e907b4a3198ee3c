"""The checkpoints a command was given: checked before anything is loaded, loaded, tried, told apart."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saffron.errors import CheckpointError, ConfigError, UnsupportedModelError, outside
from saffron.models import mrm_files
from saffron.models.bundled import FOLDER, Models
from saffron.models.devices import find_device
from saffron.models.policy import Policy
from saffron.models.provenance import digest, fingerprint
from saffron.models.reward_models import MultifurcationRewardModel
from saffron.models.text_rewards import RewardSource, TextReward, check_reward, load_reward, reward_fingerprint
from saffron.models.trie_model import TrieModel
from saffron.storage.paths import check_checkpoint

VARIANTS = ("", "no unseen mask", "no trie cache")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Checkpoints to load; None: the bundled one.

    Attributes:
        policy, mrm, base, prm: the policy, the MRM, the checkpoint its adapter belongs to, the guard or another process
            reward (see `load_reward`).
        device: None: the GPU if there is one.
        variant: one of `VARIANTS`. "no unseen mask": the MRM scores tokens that its corpus never had; "no trie cache":
            every read runs whole sequences, each for itself.
        policy_class: loads the policy: `Policy`, or what another engine runs (`VllmPolicy`).
        policy_options: names and values for its `from_pretrained`.
    """

    policy: str | None = None
    mrm: str | None = None
    base: str | None = None
    prm: str | None = None
    device: str | None = None
    variant: str = ""
    policy_class: type[Policy] = Policy
    policy_options: tuple[tuple[str, Any], ...] = ()

    def check(self) -> None:
        """Raises `ConfigError` or `CheckpointError` for what cannot be loaded, before anything is."""
        if self.variant not in VARIANTS:
            raise ConfigError(f"variant: got {self.variant!r}, expected one of {VARIANTS}")
        for name in ("policy", "mrm", "base"):
            check_checkpoint(name, getattr(self, name))
        if self.variant and self.policy_class is not Policy:
            raise ConfigError(f"variant: got {self.variant!r}, which {self.policy_class.__name__} does not serve")
        check_reward("prm", self.prm)
        find_device(self.device)

    def fingerprint(self, guard: bool = True) -> str:
        """Of what is in the checkpoints: results of other weights are other results."""
        named = [fingerprint(self.policy or FOLDER / "policy"), fingerprint(self.mrm or FOLDER / "mrm")]
        named += [reward_fingerprint(self.prm or FOLDER / "guard")] if guard else []
        return digest([*named, *([fingerprint(self.base)] if self.base else [])])

    def load(self) -> Models:
        policy = self.load_policy()
        return Models(policy, self.load_mrm(policy), self.load_guard())

    def load_policy(self) -> Policy:
        """Raises `CheckpointError` if it cannot be loaded or does not run."""
        path = self.policy or FOLDER / "policy"
        with outside(f"{path}: cannot be used as a policy", CheckpointError):
            policy = self.policy_class.from_pretrained(path, **self._options(), **dict(self.policy_options))
            size = policy.vocab_size
            if not all(isinstance(token, int) and 0 <= token < size for token in policy.eos_token_id):
                raise CheckpointError(
                    f"{path}: eos_token_id is {policy.eos_token_id}, expected ids from 0 to {size - 1}"
                )
            _try(policy, policy.chat("x") if policy.tokenizer is not None else [0])
        return policy

    def load_mrm(self, policy: Policy | None = None) -> MultifurcationRewardModel:
        """Raises `CheckpointError` if it cannot be loaded or does not run.

        Args:
            policy: an MRM that was trained on its checkpoint shares its modules, unless `base` is named.
        """
        path = self.mrm or FOLDER / "mrm"
        with outside(f"{path}: cannot be used as an MRM", CheckpointError):
            mrm = self._on_trunk(path, policy) if self.base is None and type(policy) is Policy else None
            if mrm is None:
                mrm = MultifurcationRewardModel.from_pretrained(path, base=self.base, **self._options())
            _try(mrm, mrm.context_tokens("x") if mrm.tokenizer is not None else [0])
        if self.variant == "no unseen mask":
            mrm = copy.copy(mrm)
            mrm.unseen = None
        return mrm

    def _on_trunk(self, path: str | Path, policy: Policy) -> MultifurcationRewardModel | None:
        """The MRM on the policy's modules, None if it was trained on another checkpoint, or has to be merged."""
        if not mrm_files.is_on(path, policy.model.name_or_path or ""):
            return None
        try:
            return MultifurcationRewardModel.from_pretrained(path, base=policy, **self._options() | {"device": None})
        except (CheckpointError, UnsupportedModelError):  # what is damaged is named by the other way of loading
            return None

    def load_guard(self) -> RewardSource:
        """Raises `CheckpointError` if it cannot be loaded or does not run."""
        path = self.prm or FOLDER / "guard"
        with outside(f"{path}: cannot be used as a guard", CheckpointError):
            guard = load_reward(path, **self._options())
            if isinstance(guard, TextReward):
                guard.score([("x", "y")])
            else:
                _try(guard, guard.sequence("x", "y"))
        return guard

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"device": self.device}
        if self.variant == "no trie cache":
            options["share_prefixes"] = False
        return options


def _try(model: TrieModel, tokens: Sequence[int]) -> None:
    """One forward pass: some configurations fail only there."""
    rows, _ = model.prefill([tokens])
    model.release(rows)
