"""Ways to decode: Saffron search, and what it is compared with. All answer `generate(prompts, prefill)`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from saffron.lazy import attach

if TYPE_CHECKING:
    from saffron.search.adaptive import AdaptiveConfig, AdaptiveSearch
    from saffron.search.args import ARGS, ARGSConfig
    from saffron.search.beam import BeamConfig, BeamSearch
    from saffron.search.best_of_n import BestOfN, BestOfNConfig
    from saffron.search.cards import CARDS, CARDSConfig
    from saffron.search.config import Request
    from saffron.search.deal import DeAL, DeALConfig
    from saffron.search.engine import Engine
    from saffron.search.handle import Handle
    from saffron.search.mcts import MCTS, MCTSConfig
    from saffron.search.method import Candidate, Decoder, Method
    from saffron.search.methods import METHODS, Kind, parse_config, parse_method
    from saffron.search.model_pair import ModelPair
    from saffron.search.rebase import Rebase, RebaseConfig
    from saffron.search.saffron import SaffronSearch
    from saffron.search.undefended import GreedyConfig, GreedyDecoding, Sampling, SamplingConfig

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "ARGS": "args",
        "ARGSConfig": "args",
        "AdaptiveConfig": "adaptive",
        "AdaptiveSearch": "adaptive",
        "BeamConfig": "beam",
        "BeamSearch": "beam",
        "BestOfN": "best_of_n",
        "BestOfNConfig": "best_of_n",
        "CARDS": "cards",
        "CARDSConfig": "cards",
        "Candidate": "method",
        "DeAL": "deal",
        "DeALConfig": "deal",
        "Decoder": "method",
        "Engine": "engine",
        "GreedyConfig": "undefended",
        "GreedyDecoding": "undefended",
        "Handle": "handle",
        "Kind": "methods",
        "MCTS": "mcts",
        "MCTSConfig": "mcts",
        "METHODS": "methods",
        "Method": "method",
        "ModelPair": "model_pair",
        "Rebase": "rebase",
        "RebaseConfig": "rebase",
        "Request": "config",
        "SaffronSearch": "saffron",
        "Sampling": "undefended",
        "SamplingConfig": "undefended",
        "parse_config": "methods",
        "parse_method": "methods",
    },
)
