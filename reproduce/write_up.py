"""`saffron reproduce`: all runs, then the page."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from reproduce.mrm_study import study
from reproduce.results_page import write_pages
from reproduce.runs import QUICK, Progress, Scale, run_all
from saffron.workers import Workers


def reproduce(scale: Scale, out: Path, docs: Path | None, workers: Workers, progress: Progress) -> Path:
    """Runs what is not there yet and writes the page; returns it.

    Args:
        out: folder for results, page and figures.
        docs: folder that gets a copy of page and figures.
    """
    out.mkdir(parents=True, exist_ok=True)
    clock = _Clock(out / "seconds.json")

    def timed(title: str, done: int, total: int) -> None:
        clock.tick()
        progress(title, done, total)

    results = run_all(scale, out, workers, timed)
    mrm = study(results, out, scale.corpus, timed)
    clock.tick()
    options = [f"--workers {workers.count}"] if workers.count else []
    options += [*(["--quick"] if scale is QUICK else []), *(["--docs docs"] if docs else [])]
    command = " ".join(["saffron reproduce --output DIR", *options])
    count = max(workers.count, 1)
    context = {
        "command": command,
        "minutes": f"{clock.seconds / 60:.0f}",
        "workers": f"processes: {count}, threads of each: {workers.threads}",
    }
    page = write_pages(scale, results, out, mrm, context)
    if docs is not None:
        docs.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(page, docs / page.name)
        shutil.copytree(out / "figures", docs / "figures", dirs_exist_ok=True)
    return page


class _Clock:
    """Seconds spent, over interruptions."""

    def __init__(self, file: Path) -> None:
        self.file, self._last, self._written = file, time.monotonic(), 0.0
        self.seconds = float(json.loads(file.read_text())["seconds"]) if file.exists() else 0.0

    def tick(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._last
        self._last = now
        if now - self._written > 1:
            self.file.write_text(json.dumps({"seconds": self.seconds}) + "\n")
            self._written = now
