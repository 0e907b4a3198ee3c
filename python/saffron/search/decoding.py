"""What every method but Saffron search can be told."""

from __future__ import annotations

from dataclasses import dataclass

from saffron.errors import ConfigError
from saffron.search.config import SearchConfig, check_number, check_top_p, check_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodingConfig:
    """What every method but Saffron search can be told; its values are those of Saffron search.

    Attributes:
        max_new_tokens: longest response, without the prefill.
        min_new_tokens: tokens before the response may end; from max_new_tokens on, it never ends by itself.
        temperature: divides the policy's logits before it proposes tokens, above 0.
        top_p: nucleus mass that it proposes tokens from, above 0 and at most 1.
    """

    max_new_tokens: int = 32
    min_new_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 0.8

    def __post_init__(self) -> None:
        check_whole(self, max_new_tokens=1, min_new_tokens=0)
        check_number(self, temperature=True)
        check_top_p(self.top_p)


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawingConfig(DecodingConfig):
    """What methods can be told that draw tokens at random.

    Attributes:
        seed: of all that is drawn. What is drawn for a prompt depends on this, the prompt and its prefill alone.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        DecodingConfig.__post_init__(self)
        check_whole(self, seed=0)


def check_lengths(config: SearchConfig | DecodingConfig) -> None:
    """Raises `ConfigError` where somebody asks for a longer answer than the longest.

    The default of `min_new_tokens` asks for nothing: with a smaller `max_new_tokens`, answers are that long.
    """
    default = type(config)().min_new_tokens
    if config.max_new_tokens < config.min_new_tokens != default:
        raise ConfigError(
            f"min_new_tokens: got {config.min_new_tokens}, expected at most max_new_tokens, {config.max_new_tokens}"
        )
