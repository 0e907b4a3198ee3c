"""Several methods or attacks in one text."""

from __future__ import annotations

import itertools
import re

_CHOICE = re.compile(r"[=:]([\w.-]+(?:/[\w.-]+)+)")


def expand(text: str) -> list[str]:
    """ "a:x=1/2,y=3/4" is four texts: every choice of what stands between slashes after "=" or ":"."""
    found = [match.span(1) for match in _CHOICE.finditer(text)]
    choices = [text[begin:end].split("/") for begin, end in found]
    texts = []
    for chosen in itertools.product(*choices):
        made = text
        for (begin, end), value in reversed(list(zip(found, chosen, strict=True))):
            made = made[:begin] + value + made[end:]
        texts.append(made)
    return texts
