"""Replicas of a server by Ray Serve: `serve run saffron.serving.ray:app`.

Each replica loads the models and is a whole server; Ray Serve balances, streams through it, and scales with requests
in progress. `SAFFRON_SERVE` says in JSON what `saffron serve` is told by options: checkpoints (`policy`, `mrm`, `base`,
`prm`, `device`), `replicas` (`[1, 4]`: the least and the most), `config` (fields of `SearchConfig`) and the fields of
`Settings`.
"""

from __future__ import annotations

import json
import os
from typing import Any

from starlette.applications import Starlette

from saffron.errors import ConfigError, MissingDependencyError, outside
from saffron.models.files import ModelFiles
from saffron.search.config import SearchConfig
from saffron.serving.app import create_app
from saffron.serving.checkpoints import load_models
from saffron.serving.settings import Settings

FILES = ("policy", "mrm", "base", "prm", "device")


def application(options: str) -> Any:
    """An application of Ray Serve.

    Args:
        options: JSON, see above; "" serves the bundled models.

    Raises:
        ConfigError: options that are not allowed. MissingDependencyError: without Ray Serve.
    """
    files, settings, replicas = read_options(options)
    try:
        from ray import serve
    except ImportError as error:
        raise MissingDependencyError("ray[serve]", "ray") from error

    def build() -> Starlette:
        return create_app(load_models(files), settings)

    class Replica:
        """One process; its requests go to the application that `build` makes in it."""

    scaling = {"min_replicas": replicas[0], "max_replicas": replicas[1], "target_ongoing_requests": settings.max_batch}
    most = settings.max_batch + settings.queue
    deployment = serve.deployment(name="saffron", autoscaling_config=scaling, max_ongoing_requests=most)
    return deployment(serve.ingress(build)(Replica)).bind()


def read_options(options: str) -> tuple[ModelFiles, Settings, list[int]]:
    """Checkpoints, settings and numbers of replicas."""
    with outside("SAFFRON_SERVE"):
        given = json.loads(options or "{}")
        if not isinstance(given, dict):
            raise ConfigError("SAFFRON_SERVE: expected a JSON object")
        files = ModelFiles(**{name: given.pop(name) for name in FILES if name in given})
        replicas = given.pop("replicas", [1, 1])
        whole = isinstance(replicas, list) and len(replicas) == 2 and all(isinstance(x, int) for x in replicas)
        if not whole or not 1 <= replicas[0] <= replicas[1]:
            raise ConfigError(f"replicas: got {replicas!r}, expected the least and the most, [1, 4]")
        config = SearchConfig(**{"max_new_tokens": 128, **given.pop("config", {})})
        given["api_keys"] = tuple(given.get("api_keys", ()))
        settings = Settings(config=config, **given)
        files.check()
    return files, settings, replicas


def __getattr__(name: str) -> Any:
    if name == "app":  # made when it is asked for: the rest of this module needs no Ray
        return application(os.environ.get("SAFFRON_SERVE", ""))
    raise AttributeError(name)
