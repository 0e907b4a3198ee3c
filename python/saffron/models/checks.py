"""Objects that callers hand in by mistake, named before anything is run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from saffron.errors import ConfigError, NumericalError
from saffron.models.weights import bad_weight


def kind(value: object) -> str:
    """What a value is, for a message."""
    return "None" if value is None else f"a value of type {type(value).__name__}"


def expect(name: str, value: object, *kinds: type) -> None:
    """Raises `ConfigError` that names the argument, unless the value is of one of these types."""
    if not isinstance(value, kinds):
        raise ConfigError(f"{name}: got {kind(value)}, expected {' or '.join(k.__name__ for k in kinds)}")


def expect_list(name: str, value: object, of: str) -> None:
    """Raises `ConfigError` unless it is a list, tuple or array (a text is none of them)."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray | Tensor):
        given = repr(value) if isinstance(value, int | str) else kind(value)
        raise ConfigError(f"{name}: got {given}, expected a list of {of}")


def expect_limits(**limits: object) -> None:
    """Raises `ConfigError` unless each is None or a whole number of at least 1."""
    for name, limit in limits.items():
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise ConfigError(f"{name}: got {limit!r}, expected None or a whole number of at least 1")


def not_finite(name: str, what: str = "output", model: nn.Module | None = None) -> NumericalError:
    """The error of a model that returned NaN or infinity; names the weight that did it, if one did."""
    weight = None if model is None else bad_weight(model)
    cause = f", nor is its weight {weight}" if weight else ""
    return NumericalError(f"{name}: its {what} is not finite (NaN or infinity){cause}; the search was stopped")
