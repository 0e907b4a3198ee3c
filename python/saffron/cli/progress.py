"""Progress bars on stderr."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Show(Protocol):
    """Shows how far something is; `title` names another bar than the first one, `text` is put behind it."""

    def __call__(self, done: int, total: int | None = None, text: str = "", title: str | None = None) -> None: ...


@contextmanager
def progress(title: str, *, kept: bool = False, shown: bool = True) -> Iterator[Show]:
    """Bars that update in a terminal; of several processes of `accelerate launch` the first one alone draws them.

    Args:
        title: of the first bar.
        kept: leave the bars there at the end.
        shown: otherwise nothing is drawn.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
    )
    shown = shown and os.environ.get("RANK", "0") == "0"
    bars = Progress(*columns, console=Console(stderr=True), transient=not kept, disable=not shown)
    tasks: dict[str, int] = {}

    def show(done: int, total: int | None = None, text: str = "", title: str | None = title) -> None:
        name = title or ""
        if not tasks:
            bars.start()  # what goes wrong before leaves nothing on the screen but its message
        if name not in tasks:
            tasks[name] = bars.add_task(name, total=total, text=text)
        bars.update(tasks[name], completed=done, total=total, text=text)  # type: ignore[arg-type]

    try:
        yield show
    finally:
        if tasks:
            bars.stop()
