"""The models that come with the package (see MODELS.md): small enough for two cores, real enough to attack."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from saffron.models.guard import ProcessRewardModel
from saffron.models.policy import Policy
from saffron.models.reward_models import MultifurcationRewardModel

FOLDER = Path(__file__).parents[1] / "checkpoints"


class Models(NamedTuple):
    """A policy, the MRM that defends it, and the guard the MRM was trained from, or another process reward."""

    policy: Policy
    mrm: MultifurcationRewardModel
    guard: Any  # a ProcessRewardModel or a TextReward


def load_bundled(folder: str | Path = FOLDER, **options: Any) -> Models:
    """Loads the three models; `options` as for `TrieModel.from_pretrained`."""
    folder = Path(folder)
    return Models(
        Policy.from_pretrained(folder / "policy", **options),
        MultifurcationRewardModel.from_pretrained(folder / "mrm", **options),
        ProcessRewardModel.from_pretrained(folder / "guard", **options),
    )
