"""What a search can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from saffron.errors import ConfigError

Ranking = Literal["paper", "released"]
EosScore = Literal["parent", "mrm"]


@dataclass(frozen=True, slots=True)
class SearchConfig:
    """Hyperparameters of Saffron search. There is no seed: nothing in it is random.

    Attributes:
        width: beams kept, N in the paper. 1 is greedy in the reward.
        top_p: nucleus mass, above 0 and at most 1.
        max_new_tokens: longest response, without the prefill.
        min_new_tokens: tokens before the response may end.
        ranking: "paper": a node's score is its last token's MRM reward, and finished nodes compete with theirs.
            "released": as the published code; unfinished nodes carry no score and stand behind finished ones.
        eos_score: score of a child that ends the response: its "parent"'s (ending changes nothing about what was
            said), or the "mrm"'s reward of the end token.
        unseen_reward: reward of tokens the MRM was never trained on.
        lm_head_bias: apply the trained bias of the MRM's unembedding (the published code drops it).
    """

    width: int = 16
    top_p: float = 0.8
    max_new_tokens: int = 32
    min_new_tokens: int = 16
    ranking: Ranking = "paper"
    eos_score: EosScore = "parent"
    unseen_reward: float = -1024.0
    lm_head_bias: bool = True

    def __post_init__(self) -> None:
        for name, lowest in (("width", 1), ("max_new_tokens", 1), ("min_new_tokens", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise ConfigError(f"{name}: got {value!r}, expected a whole number of at least {lowest}")
        if isinstance(self.top_p, bool) or not isinstance(self.top_p, int | float) or not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: got {self.top_p!r}, expected a number above 0 and at most 1")
        for name, allowed in (("ranking", get_args(Ranking)), ("eos_score", get_args(EosScore))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(allowed)}")
        if not isinstance(self.unseen_reward, int | float) or not math.isfinite(self.unseen_reward):
            raise ConfigError(f"unseen_reward: got {self.unseen_reward!r}, expected a finite number")
        if not isinstance(self.lm_head_bias, bool):
            raise ConfigError(f"lm_head_bias: got {self.lm_head_bias!r}, expected True or False")
