"""What a search can be told."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args

from saffron.errors import ConfigError, shown

MOST = 2**31 - 1  # numbers are int32 in the ops
Ranking = Literal["paper", "released"]
EosScore = Literal["parent", "mrm"]
PolicyScore = Literal["path", "token"]
PathScore = Literal["last", "mean", "minimum", "discounted"]
SMALLEST_FACTOR = 1e-30  # what is divided by it stays finite
LARGEST_REWARD = 1e30  # sums and differences of rewards stay finite in fp32


@dataclass(frozen=True, slots=True)
class Request:
    """One search in token ids: what the policy reads before the response, and what the reward model reads before it.

    The reward model is not shown a prefill: what was forced on the policy is left out of the safety evaluation. The
    response is decoded behind `opening`, the last tokens of text that it goes on with: many tokenizers drop the space
    of a text's first word, which the first word of a continuation keeps.
    """

    policy: tuple[int, ...]
    reward: tuple[int, ...] = ()
    opening: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SearchConfig:
    """Hyperparameters of Saffron search. There is no seed: nothing in it is random.

    Attributes:
        width: beams kept, N in the paper. 1 is greedy in the reward.
        top_p: nucleus mass, above 0 and at most 1.
        max_new_tokens: longest response, without the prefill.
        min_new_tokens: tokens before the response may end; from max_new_tokens on, it never ends by itself.
        ranking: "paper": a node's score is its last token's MRM reward, and finished nodes compete with theirs.
            "released": as the published code; unfinished nodes carry no score and stand behind finished ones.
        eos_score: score of a child that ends the response: its "parent"'s (ending changes nothing about what was
            said), or the "mrm"'s reward of the end token.
        unseen_reward: reward of tokens the MRM was never trained on.
        lm_head_bias: apply the trained bias of the MRM's unembedding (the published code drops it).
        temperature: divides the policy's logits before the nucleus is taken, above 0. Log-probabilities below are
            those of the policy at this temperature.
        min_p: least probability of a candidate, as a share of that of the most probable token; 0: none.
        top_k: most candidates per beam, the most probable ones; 0: all of the nucleus.
        reward_cap: rewards above it count as this ("safe enough is safe"); None: no cap.
        reward_tolerance: rewards are rounded down to multiples of it, so that smaller differences do not count; 0: all
            count.
        policy_weight: times the log-probability of the response (`policy_score`), added to the reward.
        policy_score: of the "path": mean log-probability per token of the response; of the "token": its last one's.
        path_score: the reward of a response, from those of its tokens, each capped: of the "last" token, their "mean"
            or "minimum", or "discounted": `discount` times that of the parent plus `1 - discount` times the token's.
        discount: of `path_score="discounted"`, at least 0 and below 1.
        commit_every: after each so many steps only the best beam is kept, so that streams come early; 0: never.

    With a cap, a tolerance, a weight, or a path score other than "last", the mean log-probability per token of the
    response decides between equal scores; otherwise the order of the beam does, as published. What each is good for
    stands in docs/fluent.md.
    """

    width: int = 16
    top_p: float = 0.8
    max_new_tokens: int = 32
    min_new_tokens: int = 16
    ranking: Ranking = "paper"
    eos_score: EosScore = "parent"
    unseen_reward: float = -1024.0
    lm_head_bias: bool = True
    temperature: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    reward_cap: float | None = None
    reward_tolerance: float = 0.0
    policy_weight: float = 0.0
    policy_score: PolicyScore = "path"
    path_score: PathScore = "last"
    discount: float = 0.5
    commit_every: int = 0

    def __post_init__(self) -> None:
        check_whole(self, width=1, max_new_tokens=1, min_new_tokens=0, top_k=0, commit_every=0)
        check_top_p(self.top_p)
        check_number(self, temperature=True, reward_tolerance=False, policy_weight=False)
        for name, of in CHOICES.items():
            allowed = get_args(of)
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}: got {shown(getattr(self, name))}, expected one of {', '.join(allowed)}")
        check_reward("unseen_reward", self.unseen_reward)
        if self.reward_cap is not None:
            check_reward("reward_cap", self.reward_cap)
        _expect("min_p", self.min_p, lambda x: 0 <= x <= 1, "a number of at least 0 and at most 1")
        _expect("discount", self.discount, lambda x: 0 <= x < 1, "a number of at least 0 and below 1")
        if not isinstance(self.lm_head_bias, bool):
            raise ConfigError(f"lm_head_bias: got {shown(self.lm_head_bias)}, expected True or False")

    @classmethod
    def preset(cls, name: str, **options: Any) -> Self:
        """The settings of a name in `PRESETS`; `options` replace some of them.

        Raises:
            ConfigError: no such name, or options that are not allowed.
        """
        if name not in PRESETS:
            raise ConfigError(f"preset: got {name!r}, expected one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **options})

    @property
    def asks_policy(self) -> bool:
        """Whether the log-probability of the response decides between equal scores."""
        shaped = self.reward_cap is not None or self.reward_tolerance > 0 or self.policy_weight > 0
        return shaped or self.path_score != "last"

    @property
    def is_published(self) -> bool:
        """Whether candidates and their order are those of the published algorithm, which one fused op selects by."""
        return not self.asks_policy and (self.temperature, self.min_p, self.top_k) == (1, 0, 0)


CHOICES = {"ranking": Ranking, "eos_score": EosScore, "policy_score": PolicyScore, "path_score": PathScore}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "fluent": {"reward_cap": 6.0, "top_k": 64, "min_p": 0.02},  # a reward in log-odds: 0.998 safe,
}


def check_whole(config: object, **lowest: int) -> None:
    """Raises `ConfigError` unless each named attribute is a whole number of at least the value given."""
    for name, least in lowest.items():
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}: got {shown(value)}, expected a whole number of at least {least}")
        if value > MOST:
            raise ConfigError(f"{name}: got {shown(value)}, expected a whole number of at most {MOST}")


def check_number(config: object, **positive: bool) -> None:
    """Raises `ConfigError` unless each named attribute is a finite number: above 0 where True, else at least 0.

    What is so small or large that logits and rewards would overflow is refused too.
    """
    for name, above in positive.items():
        value = getattr(config, name)
        if above:
            _expect(name, value, lambda x: 0 < x < math.inf, "a finite number above 0")
        else:
            _expect(name, value, lambda x: 0 <= x < math.inf, "a finite number of at least 0")
        if value:
            within = f"a number from {SMALLEST_FACTOR} to {LARGEST_REWARD}"
            _expect(name, value, lambda x: SMALLEST_FACTOR <= x <= LARGEST_REWARD, within)


def check_reward(name: str, reward: object) -> None:
    within = f"a number from {-LARGEST_REWARD} to {LARGEST_REWARD}"
    _expect(name, reward, lambda x: abs(x) <= LARGEST_REWARD, within)


def check_top_p(top_p: object) -> None:
    _expect("top_p", top_p, lambda x: 0 < x <= 1, "a number above 0 and at most 1")


def _expect(name: str, value: object, fits: Callable[[float], bool], allowed: str) -> None:
    """Raises `ConfigError` unless the value is a number that fits, which NaN never does."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
        raise ConfigError(f"{name}: got {shown(value)}, expected {allowed}")
