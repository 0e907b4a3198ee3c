"""Stop texts in streams: what has been said is the beginning of what is cut at the end."""

from __future__ import annotations

import pytest

pytest.importorskip("starlette")

from hypothesis import given
from hypothesis import strategies as st

from saffron.serving.running import cut, settled

letters = st.text("abc é😀", max_size=10)
stops = st.lists(st.text("abc é😀", min_size=1, max_size=4), max_size=4).map(tuple)


@given(text=letters, stop=stops)
def test_what_was_said_stays_said(text: str, stop: tuple[str, ...]) -> None:
    final, _ = cut(text, stop)
    heard = [settled(text[:length], stop) for length in range(len(text) + 1)]
    for before, later in zip(heard, [*heard[1:], final], strict=True):
        assert later.startswith(before)
    assert not any(one in final for one in stop)


def test_a_longer_stop_text_may_have_begun_before_a_shorter_one() -> None:
    stop = "abc", "b"
    assert settled("ab", stop) == "" and cut("abc", stop) == ("", True) and cut("abd", stop) == ("a", True)
    assert settled("abd", stop) == "a" and settled("xa", stop) == "x" and settled("xy", ()) == "xy"
