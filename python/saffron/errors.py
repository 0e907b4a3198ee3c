"""Errors a user can cause or meet. All are `SaffronError`; the command line prints them on one line."""

from __future__ import annotations


class SaffronError(Exception):
    """Base class."""


class ConfigError(SaffronError, ValueError):
    """An argument or option that is not allowed; names it, what was given and what is allowed."""


class CheckpointError(SaffronError, ValueError):
    """Files that cannot be loaded, or that do not fit one another; names the file."""


class UnsupportedModelError(SaffronError, ValueError):
    """A model with a feature that the trie cache cannot serve; names the feature."""


class PromptTooLongError(SaffronError, ValueError):
    """Prompt, prefill and new tokens together exceed a model's context."""


class NumericalError(SaffronError, ArithmeticError):
    """A model returned logits or rewards that are not numbers."""


class EngineError(SaffronError, RuntimeError):
    """A search ended without an answer, through no fault of its own; the cause is chained."""


class CancelledError(EngineError):
    """The search was cancelled before it ended."""


class QueueFullError(EngineError):
    """An engine that has as many requests waiting as it may; try again later."""


class EngineClosedError(EngineError):
    """An engine that takes no more requests."""


class CapacityError(SaffronError, ValueError):
    """A search that could need more of the K/V cache than there is."""


class MissingDependencyError(SaffronError, ImportError):
    """A library that only some commands need is not installed; says how to get it."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed: pip install 'saffron-kernels[{extra}]'")
