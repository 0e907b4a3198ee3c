"""What the operator of a server decides."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from saffron.errors import ConfigError
from saffron.models.checks import expect, expect_limits
from saffron.search.config import SearchConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Hyperparameters and limits of a server.

    Attributes:
        name: of the defended model.
        config: the search of requests that say nothing; `max_new_tokens` is what a request without `max_tokens` gets at
            most, and `min_new_tokens` shrinks to the `max_tokens` of a request.
        undefended: also serve the policy alone, as `NAME-undefended` (greedy decoding).
        best_of_n: also serve Best-of-N with so many samples, as `NAME-best-of-n`.
        adaptive: also serve Saffron search with the widths of this file of `AdaptiveWidth.save`, as `NAME-adaptive`. It
            needs a guard, learns from its verdicts, and writes the file again; servers that share it add their counts.
        prefill: let clients force how an answer begins (`continue_final_message`), which is the attack.
        max_width, max_tokens, max_beam_tokens: the largest width, `max_tokens`, and product of both in one request.
        max_batch: requests that run at once. queue: requests that may wait.
        cache_tokens, prefill_tokens: as for `Engine`.
        timeout: seconds after which a request that has no answer yet is given up, waiting included.
        keep_alive: seconds after which a silent stream says that it is alive.
        max_body: bytes of a request.
        api_keys: any of them opens the server; without any it is open.
    """

    name: str = "saffron"
    config: SearchConfig = field(default_factory=lambda: SearchConfig(max_new_tokens=128))
    undefended: bool = False
    best_of_n: int | None = None
    adaptive: Path | None = None
    prefill: bool = True
    max_width: int = 64
    max_tokens: int = 1024
    max_beam_tokens: int = 16384
    max_batch: int = 32
    queue: int = 256
    cache_tokens: int | None = None
    prefill_tokens: int | None = 512
    timeout: float = 600.0
    keep_alive: float = 10.0
    max_body: int = 1 << 20
    api_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        expect("config", self.config, SearchConfig)
        expect_limits(
            max_width=self.max_width, max_tokens=self.max_tokens, max_beam_tokens=self.max_beam_tokens,
            max_batch=self.max_batch, queue=self.queue, max_body=self.max_body, best_of_n=self.best_of_n,
            cache_tokens=self.cache_tokens, prefill_tokens=self.prefill_tokens,
        )  # fmt: skip
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w.:/@-]{1,200}", self.name):
            raise ConfigError(f"name: got {self.name!r}, expected letters, digits and . : / @ _ - without spaces")
        for name in ("timeout", "keep_alive"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ConfigError(f"{name}: got {value!r}, expected a number of seconds above 0")
        for name, value, most in (
            ("width", self.config.width, self.max_width),
            ("best_of_n", self.best_of_n or 1, self.max_width),
            ("max_new_tokens", self.config.max_new_tokens, self.max_tokens),
        ):
            if value > most:
                raise ConfigError(f"{name}: got {value}, which exceeds what a request may ask for ({most})")
        for key in self.api_keys:
            if not key.isascii() or not key.isprintable() or not key.strip() or key != key.strip():
                raise ConfigError("api_keys: a key must be printable ASCII without spaces around it, and not empty")
