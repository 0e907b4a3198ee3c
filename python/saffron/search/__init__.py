"""Ways to decode: Saffron search, and what it is compared with. All answer `generate(prompts, prefill)`."""

from saffron.search.beam import BeamConfig, BeamSearch
from saffron.search.best_of_n import BestOfN, BestOfNConfig
from saffron.search.deal import DeAL, DeALConfig
from saffron.search.mcts import MCTS, MCTSConfig
from saffron.search.method import Answer, Decoder, Method, Request
from saffron.search.methods import METHODS, Kind, parse_config, parse_method
from saffron.search.rebase import Rebase, RebaseConfig
from saffron.search.saffron import SaffronSearch
from saffron.search.undefended import GreedyConfig, GreedyDecoding, Sampling, SamplingConfig

__all__ = [
    "MCTS",
    "METHODS",
    "Answer",
    "BeamConfig",
    "BeamSearch",
    "BestOfN",
    "BestOfNConfig",
    "DeAL",
    "DeALConfig",
    "Decoder",
    "GreedyConfig",
    "GreedyDecoding",
    "Kind",
    "MCTSConfig",
    "Method",
    "Rebase",
    "RebaseConfig",
    "Request",
    "SaffronSearch",
    "Sampling",
    "SamplingConfig",
    "parse_config",
    "parse_method",
]
