"""Errors a user can cause or meet. All are `SaffronError`; the command line prints them on one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 240  # characters of what somebody else's error says
# What other libraries advise does not hold here: other commands, other options, unsafe ways to load a file.
_ADVICE = re.compile(
    r"weights_only|allow_pickle|ignore_mismatched_sizes|look at the above|"
    r"trust_remote_code|hf auth|huggingface-cli|huggingface\.co|pass a token|private repository|"
    r"please (open|report|file|check|install|upgrade|make sure)|https?://",
    re.IGNORECASE,
)


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
        self._given = library, extra

    def __reduce__(self) -> tuple[type, tuple[str, str]]:  # errors of worker processes come back pickled
        return type(self), self._given


@contextmanager
def outside(what: str, kind: type[SaffronError] = ConfigError) -> Iterator[None]:
    """Around calls of the system and of other libraries: whatever they raise becomes one of our errors.

    Args:
        what: what failed, with the file, line or option; the reason follows in parentheses.
        kind: the class of the error.

    Raises:
        SaffronError: of that class; those raised inside pass unchanged.
    """
    try:
        yield
    except SaffronError:
        raise
    except Exception as error:  # transformers, safetensors, torch, pyarrow and hubs each raise types of their own
        raise kind(f"{what} ({reason(error)})") from error


def reason(error: BaseException) -> str:
    """What an error says, on one line, without its advice."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without number and file, which the caller names
    if isinstance(error, MemoryError):
        return "not enough memory"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    text = re.sub(r"; use sys\.set_int_max_str_digits\(\).*", "", str(error))
    first, *rest = [line.strip() for line in text.split("\n") if line.strip()] or [type(error).__name__]
    if first.endswith(":") and rest:
        first = f"{first} {rest[0]}"
    sentences = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+", first)]
    said = " ".join(part for part in sentences if part and not _ADVICE.search(part))
    if not said:
        offline = re.search(
            r"connect|offline|resolve|network|internet", f"{type(error).__name__} {text}", re.IGNORECASE
        )
        said = "the hub cannot be reached" if offline else type(error).__name__
    return said if len(said) <= _LONGEST else said[: _LONGEST - 1] + "…"


def shown(value: object) -> str:
    """A value as a message shows it: its repr, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python does not write out whole numbers of more than 4300 digits
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 80 else text[:79] + "…"
