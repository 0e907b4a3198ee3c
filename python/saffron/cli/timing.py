"""Where the time of a search goes: the last line of `saffron generate`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from saffron.models.trie_model import TrieModel


class Clock:
    """Measures what runs inside it: forward passes of the policy and of the MRM; the rest is selection.

    On a GPU, which works on its own, and of an engine whose layers are its own, only the whole is measured.

    Args:
        policy, mrm: whose forward passes are timed.
    """

    def __init__(self, policy: TrieModel, mrm: TrieModel) -> None:
        self.tokens, self.seconds = 0, {"policy": 0.0, "MRM": 0.0}
        self._models = {"policy": policy, "MRM": mrm} if policy.model.device.type == mrm.device.type == "cpu" else {}
        self._hooks: list[Any] = []
        self._whole = 0.0

    def __enter__(self) -> Self:
        for name, model in self._models.items():
            base = model.model.base_model
            head: Any = model.model.get_output_embeddings()
            for module in (base, head):  # neither runs inside the other
                self._hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self._add(name, -1)))
                self._hooks.append(module.register_forward_hook(lambda *_, name=name: self._add(name, 1)))
        self._whole = -time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self._whole += time.perf_counter()
        for hook in self._hooks:
            hook.remove()

    def _add(self, name: str, sign: int) -> None:
        self.seconds[name] += sign * time.perf_counter()

    def report(self, width: int) -> None:
        """One line on stderr."""
        line = f"{self.tokens} tokens in {self._whole:.2f} s, {self.tokens / self._whole:.1f} tokens/s, width {width}"
        if self._models:
            shares = self.seconds | {"selection": self._whole - sum(self.seconds.values())}
            line += "; " + ", ".join(f"{name} {seconds / self._whole:.0%}" for name, seconds in shares.items())
        print(line, file=sys.stderr)
