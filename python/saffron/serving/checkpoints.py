"""The checkpoints of a server."""

from __future__ import annotations

from saffron.models.bundled import Models
from saffron.models.files import ModelFiles


def load_models(files: ModelFiles, guard: bool = True) -> Models:
    """Policy and MRM, and a guard if there is to be one.

    The guard that comes with the package judges its own world: with other models only one that is named is loaded.
    """
    wanted = guard and (files.prm or not (files.policy or files.mrm))
    policy = files.load_policy()
    return Models(policy, files.load_mrm(policy), files.load_guard() if wanted else None)
