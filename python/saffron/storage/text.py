"""JSON and JSON lines as they are found: with or without a byte order mark, at most one object a line."""

from __future__ import annotations

import difflib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from saffron.errors import CheckpointError, ConfigError, SaffronError, outside

_BOM = b"\xef\xbb\xbf"


def read_bytes(file: Path, kind: type[SaffronError] = ConfigError) -> bytes:
    """What a file or pipe holds; a device has no end."""
    with outside(f"{file}: cannot be read", kind):
        mode = os.stat(file).st_mode
        if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and not os.path.samefile(file, os.devnull)):
            raise kind(f"{file}: cannot be read (it is a device)")
        return file.read_bytes()


def parse_json(content: bytes | str, where: str, kind: type[SaffronError] = ConfigError) -> Any:
    """One JSON value of valid Unicode. `where` begins the message of an error."""
    with outside(where, kind):
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a character, which no text has
        return value


def read_json(file: Path, kind: type[SaffronError] = CheckpointError) -> dict[str, Any]:
    """The JSON object that a file holds. Raises an error of that kind if there is none."""
    record = parse_json(read_bytes(file, kind), f"{file}: not JSON", kind)
    if not isinstance(record, dict):
        raise kind(f"{file}: expected a JSON object")
    return record


def read_json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of every line that is not blank.

    Lines end at a newline alone: other characters that Unicode counts as line breaks may stand inside strings.

    Raises:
        ConfigError: the file cannot be read, or a line is not JSON.
    """
    content = read_bytes(file).removeprefix(_BOM)
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            yield number, parse_json(line, f"{file}: not JSON lines: line {number}")


def check_keys(where: str, record: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raises `ConfigError` for a key that looks like a known one and is none. Others may stand there."""
    for key in record:
        if key not in known and (near := difflib.get_close_matches(key, known, 1, 0.75)) and near[0] not in record:
            raise ConfigError(f"{where}: got the key {key!r}, which is not known; {near[0]!r} is")


def check_text(name: str, text: str) -> str:
    """The text. Raises `ConfigError` for half a character (a lone surrogate), as bytes that are not UTF-8 become."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name}: character {error.start + 1} is not Unicode (a lone surrogate)") from error
    return text
