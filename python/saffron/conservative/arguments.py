"""What arguments have to be; every message names the argument, what was given and what is allowed."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from saffron.errors import ConfigError, shown


def refused(name: str, given: object, allowed: str) -> ConfigError:
    return ConfigError(f"{name}: got {shown(given)}, expected {allowed}")


def whole(name: str, given: Any, least: int, most: int | None = None, what: str = "a whole number") -> int:
    """An int from least to most. NumPy's integers are, booleans and floats are not."""
    allowed = f"{what} of at least {least}" if most is None else f"{what} from {least} to {most}"
    try:
        if isinstance(given, (bool, np.bool_)):
            raise TypeError
        number = operator.index(given)
    except TypeError:
        raise refused(name, given, allowed) from None
    if number < least or (most is not None and number > most):
        raise refused(name, given, allowed)
    return number


def index(given: Any) -> int:
    """Raises `TypeError` unless it is a whole number: for checks with a message of their own."""
    if given is True or given is False:
        raise TypeError
    return operator.index(given)


def reward(given: Any) -> float:
    """Raises `TypeError`, `ValueError` or `OverflowError` unless it is a number; True is a success."""
    if isinstance(given, (str, bytes)):
        raise TypeError
    return float(given)


def real(name: str, given: Any, allowed: str, *, finite: bool = True) -> float:
    """A float. NumPy's numbers are, booleans and text are not. finite: neither NaN nor infinity."""
    try:
        if isinstance(given, (bool, np.bool_, str, bytes)) or np.ndim(given):
            raise TypeError
        number = float(given)
    except (TypeError, ValueError, OverflowError):
        raise refused(name, given, allowed) from None
    if finite and not math.isfinite(number):
        raise refused(name, given, allowed)
    return number


def within(name: str, given: Any, allowed: str, low: float, high: float, *, open_low: bool = False,
           open_high: bool = False) -> float:  # fmt: skip
    """A number from low to high, the ends excluded if they are open."""
    number = real(name, given, allowed)
    if number < low or number > high or (open_low and number == low) or (open_high and number == high):
        raise refused(name, given, allowed)
    return number


def flag(name: str, given: Any) -> bool:
    if not isinstance(given, (bool, np.bool_)):
        raise refused(name, given, "True or False")
    return bool(given)


def one_of(name: str, given: Any, allowed: Iterable[str]) -> str:
    allowed = list(allowed)
    if not (isinstance(given, str) and given in allowed):
        raise refused(name, given, f"one of {', '.join(allowed)}")
    return given


def instance(name: str, given: Any, kind: type, *, or_none: bool = False) -> None:
    if not (isinstance(given, kind) or (or_none and given is None)):
        raise refused(name, given, f"a {kind.__name__}{' or None' if or_none else ''}")


def listed(name: str, given: Any, what: str) -> list[Any]:
    """The elements of a sequence or an iterator; text is none."""
    if isinstance(given, (str, bytes, dict)):
        raise refused(name, given, what)
    try:
        return list(given)
    except TypeError:
        raise refused(name, given, what) from None


def floats(name: str, given: Any, what: str = "an array of numbers") -> np.ndarray:
    """float64, of any shape."""
    array = _array(name, given, what)
    if array.dtype.kind not in "biuf":
        raise refused(name, given, what)
    return array.astype(np.float64, copy=False)


def integers(name: str, given: Any, what: str = "an array of whole numbers") -> np.ndarray:
    """intp, of any shape; an empty list is one."""
    array = _array(name, given, what)
    if array.size and (array.dtype.kind not in "iu" or array.max() > np.iinfo(np.intp).max):
        raise refused(name, given, what)
    return array.astype(np.intp, copy=False)


def path(given: Any) -> Path:
    if not isinstance(given, (str, os.PathLike)) or "\0" in str(given):
        raise refused("path", given, "a path")
    return Path(given)


def _array(name: str, given: Any, what: str) -> np.ndarray:
    try:
        return np.asarray(given)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # ragged lists; a tensor that needs a gradient
        raise refused(name, given, what) from None
