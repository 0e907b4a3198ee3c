"""Saffron search: decoding that a multifurcation reward model steers away from harm.

Names are imported when first used, so that `import saffron` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from saffron.lazy import attach

if TYPE_CHECKING:
    from saffron.adaptive import AdaptiveWidth, WidthSettings
    from saffron.errors import SaffronError
    from saffron.integrations.custom_generate import generate
    from saffron.integrations.guidance import RewardGuidance
    from saffron.models.bundled import load_bundled
    from saffron.models.guard import ProcessRewardModel
    from saffron.models.policy import Policy
    from saffron.models.reward_models import MultifurcationRewardModel
    from saffron.models.trie_model import TrieModel
    from saffron.search import (
        MCTS,
        METHODS,
        AdaptiveSearch,
        BeamSearch,
        BestOfN,
        DeAL,
        Engine,
        GreedyDecoding,
        Handle,
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

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "AdaptiveSearch": "search",
        "AdaptiveWidth": "adaptive",
        "BeamSearch": "search",
        "BestOfN": "search",
        "Cost": "search.result",
        "DeAL": "search",
        "Engine": "search",
        "GreedyDecoding": "search",
        "Handle": "search",
        "MCTS": "search",
        "METHODS": "search",
        "Method": "search",
        "MultifurcationRewardModel": "models.reward_models",
        "Policy": "models.policy",
        "ProcessRewardModel": "models.guard",
        "Rebase": "search",
        "Request": "search",
        "RewardGuidance": "integrations.guidance",
        "SaffronError": "errors",
        "SaffronSearch": "search",
        "Sampling": "search",
        "SearchConfig": "search.config",
        "SearchResult": "search.result",
        "TrieModel": "models.trie_model",
        "WidthSettings": "adaptive",
        "generate": "integrations.custom_generate",
        "load_bundled": "models.bundled",
        "parse_method": "search",
    },
)
