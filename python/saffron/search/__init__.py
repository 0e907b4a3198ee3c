"""Ways to decode: Saffron search, and what it is compared with. All answer `generate(prompts, prefill)`."""

from saffron.search.beam import BeamConfig, BeamSearch
from saffron.search.best_of_n import BestOfN, BestOfNConfig
from saffron.search.config import Request
from saffron.search.deal import DeAL, DeALConfig
from saffron.search.engine import Engine
from saffron.search.handle import Handle
from saffron.search.mcts import MCTS, MCTSConfig
from saffron.search.method import Candidate, Decoder, Method
from saffron.search.methods import METHODS, GreedyConfig, Kind, parse_config, parse_method
from saffron.search.model_pair import ModelPair
from saffron.search.rebase import Rebase, RebaseConfig
from saffron.search.saffron import SaffronSearch
from saffron.search.undefended import GreedyDecoding, Sampling, SamplingConfig

__all__ = [
    "MCTS",
    "METHODS",
    "Candidate",
    "BeamConfig",
    "BeamSearch",
    "BestOfN",
    "BestOfNConfig",
    "DeAL",
    "DeALConfig",
    "Decoder",
    "Engine",
    "GreedyConfig",
    "GreedyDecoding",
    "Handle",
    "Kind",
    "MCTSConfig",
    "Method",
    "ModelPair",
    "Rebase",
    "RebaseConfig",
    "Request",
    "SaffronSearch",
    "Sampling",
    "SamplingConfig",
    "parse_config",
    "parse_method",
]
