"""Reading requests: JSON of a bounded size, and its keys by name. What is wrong is a 400 that names the key."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from saffron.errors import shown
from saffron.serving.errors import ApiError, Gone, bad

NUMBERS = (int, float)
# Values by which clients say that they do not want what is refused here.
NOTHING: tuple[Any, ...] = (None, False, [], {}, "none", {"type": "text"})
DEEPEST = 32  # levels of a request: a message's parts stand in the fourth


async def read_json(request: Request, most: int) -> dict[str, Any]:
    """The body of a request.

    Raises:
        Gone: the client went away.
        ApiError: 413 for more bytes than `most`, 415 for another type of content (a page of another origin can send
            only those without asking), 400 for what is no JSON object.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, f"content-type: got {shown(kind)}, expected application/json", code="unsupported_media_type"
        )
    data = bytearray()
    try:
        async for piece in request.stream():
            data += piece
            if len(data) > most:
                raise ApiError(413, f"the request exceeds {most} bytes", code="request_too_large")
    except ClientDisconnect:
        raise Gone from None
    try:
        body = json.loads(data.decode(), parse_constant=_no_constant)
    except RecursionError:
        raise bad(None, "the body is nested too deeply") from None
    except ValueError:  # also of text that is not UTF-8, and of numbers with thousands of digits
        raise bad(None, "the body is not valid JSON in UTF-8") from None
    if not isinstance(body, dict):
        raise bad(None, "the body must be a JSON object")
    if _deeper(body, DEEPEST):
        raise bad(None, "the body is nested too deeply")
    return body


def _deeper(value: object, levels: int) -> bool:
    """Whether a value is nested in more levels than that."""
    level: list[Any] = [value]
    for _ in range(levels):
        level = [x for one in level for x in (one.values() if isinstance(one, dict) else one)]
        level = [x for x in level if isinstance(x, dict | list)]
        if not level:
            return False
    return True


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


class Fields:
    """The keys of a JSON object. null counts as absent, as clients send it.

    Args:
        body: the object.
        known: its keys: those that are read, and those that have no effect here.
        refused: keys of the API that are not served, and why.
    """

    def __init__(self, body: Mapping[str, Any], known: frozenset[str], refused: Mapping[str, str]) -> None:
        self._body = {name: value for name, value in body.items() if value is not None}
        for name, value in self._body.items():
            if name in refused and not any(type(value) is type(no) and value == no for no in NOTHING):
                raise bad(name, refused[name], "unsupported_parameter")
            if name not in known and name not in refused:
                param = name if len(name) < 80 and name.isprintable() else None  # no half of a surrogate pair
                raise bad(param, "this key is not known here", "unknown_parameter")

    def __contains__(self, name: str) -> bool:
        return name in self._body

    def get(self, name: str) -> Any:
        return self._body.get(name)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._body.get(name, default)
        if not isinstance(value, bool):
            raise bad(name, f"got {shown(value)}, expected true or false")
        return value

    def whole(self, name: str, default: int, least: int, most: int) -> int:
        value = self._body.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise bad(name, f"got {shown(value)}, expected a whole number from {least} to {most}")
        return value

    def text(self, name: str, default: str = "") -> str:
        value = self._body.get(name, default)
        if not isinstance(value, str):
            raise bad(name, f"got {shown(value)}, expected a text")
        return check_text(name, value)

    def object(self, name: str) -> dict[str, Any]:
        value = self._body.get(name, {})
        if not isinstance(value, dict):
            raise bad(name, f"got {shown(value)}, expected an object")
        check_text(name, json.dumps(value, ensure_ascii=False))  # whatever reads it may write it into a text
        return value

    def stop(self) -> tuple[str, ...]:
        value = self._body.get("stop", [])
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or len(texts) > 16 or not all(isinstance(t, str) and t for t in texts):
            raise bad("stop", "expected a text or up to 16 texts, none of them empty")
        return tuple(dict.fromkeys(check_text("stop", text) for text in texts))

    def without_effect(self) -> None:
        """Checks sampling parameters, which change nothing: the search is deterministic."""
        for name, least, most in (
            ("temperature", 0, 2), ("top_p", 0, 1), ("frequency_penalty", -2, 2), ("presence_penalty", -2, 2),
        ):  # fmt: skip
            value = self._body.get(name, 0)
            if isinstance(value, bool) or not isinstance(value, NUMBERS) or not least <= value <= most:
                raise bad(name, f"got {shown(value)}, expected a number from {least} to {most}")
        seed = self._body.get("seed", 0)
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise bad("seed", f"got {shown(seed)}, expected a whole number")
        self.text("user")


def check_text(name: str, text: str) -> str:
    surrogate = re.search("[\ud800-\udfff]", text)
    if surrogate:
        raise bad(name, f"character {surrogate.start()} is half of a surrogate pair, which is no text")
    return text
