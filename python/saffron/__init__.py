"""Saffron search: decoding that a multifurcation reward model steers away from harm.

Names are imported when first used, so that `import saffron` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saffron.errors import SaffronError
    from saffron.integrations.custom_generate import generate
    from saffron.integrations.guidance import RewardGuidance
    from saffron.models.bundled import load_bundled
    from saffron.models.policy import Policy
    from saffron.models.reward_models import MultifurcationRewardModel, ProcessRewardModel
    from saffron.models.trie_model import TrieModel
    from saffron.search import (
        MCTS,
        METHODS,
        BeamSearch,
        BestOfN,
        DeAL,
        GreedyDecoding,
        Method,
        Rebase,
        Request,
        SaffronSearch,
        Sampling,
        parse_method,
    )
    from saffron.search.config import SearchConfig
    from saffron.search.result import Cost, SearchResult

__version__ = "0.1.0"

_HOME = {
    "BeamSearch": "search",
    "BestOfN": "search",
    "Cost": "search.result",
    "DeAL": "search",
    "GreedyDecoding": "search",
    "MCTS": "search",
    "METHODS": "search",
    "Method": "search",
    "MultifurcationRewardModel": "models.reward_models",
    "Policy": "models.policy",
    "ProcessRewardModel": "models.reward_models",
    "Rebase": "search",
    "Request": "search",
    "RewardGuidance": "integrations.guidance",
    "SaffronError": "errors",
    "SaffronSearch": "search",
    "Sampling": "search",
    "SearchConfig": "search.config",
    "SearchResult": "search.result",
    "TrieModel": "models.trie_model",
    "generate": "integrations.custom_generate",
    "load_bundled": "models.bundled",
    "parse_method": "search",
}

__all__ = [
    "BeamSearch",
    "BestOfN",
    "Cost",
    "DeAL",
    "GreedyDecoding",
    "MCTS",
    "METHODS",
    "Method",
    "MultifurcationRewardModel",
    "Policy",
    "ProcessRewardModel",
    "Rebase",
    "Request",
    "RewardGuidance",
    "SaffronError",
    "SaffronSearch",
    "Sampling",
    "SearchConfig",
    "SearchResult",
    "TrieModel",
    "generate",
    "load_bundled",
    "parse_method",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'saffron' has no attribute {name!r}")
    return getattr(importlib.import_module(f"saffron.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
