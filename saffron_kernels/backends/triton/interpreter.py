"""Makes Triton's interpreter several times faster, so that tests can run every kernel on the CPU.

The interpreter redirects `triton.language` to itself for every launch again, and for every device function a kernel
calls (`tl.sum` is one), which costs more than what small kernels compute. Where all kernels are interpreted, once per
process is enough.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_redirect = interpreter._patch_lang
_done: set[frozenset[str]] = set()


class _Kept:
    """Stands for what was redirected and is to stay so."""

    def restore(self) -> None:
        pass


def _redirect_once(fn: Any) -> _Kept:
    """Redirects the language modules that `fn` sees."""
    modules = frozenset(m.__name__ for m in (tl, tl.core) if any(value is m for value in fn.__globals__.values()))
    if modules not in _done:
        _redirect(fn)
        # Triton 3.6 converts arrays of one element, which NumPy 2.4 no longer does.
        tl.tensor.__index__ = lambda self: int(self.handle.data.squeeze())
        _done.add(modules)
    return _Kept()


def install() -> None:
    """From here on for the whole process."""
    interpreter._patch_lang = _redirect_once
