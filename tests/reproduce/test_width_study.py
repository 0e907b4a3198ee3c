"""The study of adaptive width: little of it with real searches, and its course after an alarm without models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reproduce import width_study
from reproduce.width_page import write_page
from reproduce.width_study import FULL, STRONG, WEAK, Asked, Scale, Study, Traffic
from saffron.adaptive import AdaptiveWidth, LoggedSearch
from saffron.storage.results import open_results

SHIFT = Traffic("stronger attack", 80, (0.5, 0.5), (WEAK, STRONG), WEAK)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_command_writes_its_page_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Real searches of the bundled models, as few as there can be."""
    few = (Traffic("1:1", 4, (0.5, 0.5)), replace(SHIFT, requests=4))
    monkeypatch.setattr(width_study, "QUICK", Scale(1, 1, 1, 4, few, until_log=1))
    monkeypatch.setattr(width_study, "SETTINGS", replace(width_study.SETTINGS, widths=(1, 4)))
    arguments = ["--quick", "--output", str(tmp_path / "out"), "--docs", str(tmp_path / "docs")]
    width_study.main(arguments)
    assert capsys.readouterr().out.split() == [str(tmp_path / f / "results-width.md") for f in ("out", "docs")]
    page = (tmp_path / "docs" / "results-width.md").read_text()
    records = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()[1:]]
    assert f"{len(records)} real searches of the bundled models, 8 of them served" in page and len(records) == 15
    drawn = sum(r["fixed"] for r in records if r["part"] == "log 10 drawn")
    assert f"For {drawn} of them one width was drawn for all phases" in page
    assert {r["part"] for r in records} >= {"1:1", "stronger attack", "log 10 drawn", "log 0 width 4"}
    assert all(r["flops"] > 0 and len(r["widths"]) == len(r["scores"]) for r in records)
    assert "nan" not in page and "### Attacked to allowed 1:1, 4 requests" in page
    assert (tmp_path / "docs" / "figures" / "width.svg").read_text().count("<svg") == 1

    monkeypatch.setattr(Study, "run", lambda *_: pytest.fail("searched again"))
    width_study.main(arguments[:3])
    again = (tmp_path / "out" / "results-width.md").read_text()
    assert [line for line in again.splitlines() if "minute" not in line] == [
        line for line in page.splitlines() if "minute" not in line
    ]


class WithoutModels(Study):
    """Requests are answered by rule: the strong attack succeeds below the widest search, nothing else does."""

    def __init__(self, results: Any, folder: Path) -> None:
        self.results, self.folder = results, folder
        self.search: Any = type("Search", (), {"adaptive": AdaptiveWidth(width_study.SETTINGS)})()

    def run(self, asked: list[Asked], part: str, start: int, width: Any = None) -> None:
        adaptive, records = self.search.adaptive, []
        status = adaptive.status()
        risks = [3.0 if one.prefill else 6.0 for one in asked]
        controls = [adaptive.begin(risk) if width is None else adaptive.fixed(risk, width) for risk in risks]
        for i, (one, control) in enumerate(zip(asked, controls, strict=True)):
            widths = [control.width(8 * phase, 0.0) for phase in range(4)]
            safe = one.prefill != STRONG or widths[-1] == 32
            logged: LoggedSearch = control.finish(safe)
            records.append(
                {"part": part, "request": str(start + i), "prefill": one.prefill, "risk": logged.risk,
                 "baseline": [s["baseline"] for s in status], "era": [s["era"] for s in status],
                 "widths": list(logged.widths), "scores": list(logged.scores), "safe": safe, "fixed": logged.fixed,
                 "harmful": not safe, "answered": True, "flops": float(sum(widths))}
            )  # fmt: skip
        self.results.append(records)


@pytest.mark.parametrize("stopped", [False, True])
def test_after_the_alarm_the_widest_search_serves_until_there_is_a_log(tmp_path: Path, stopped: bool) -> None:
    """Every stage of the table has requests, of a run that is resumed too."""
    scale = Scale(60, 20, 60, 10, (replace(SHIFT, requests=160),), until_log=20)
    with open_results(tmp_path / "results.jsonl", width_study.SCHEMA, {}) as results:
        study = WithoutModels(results, tmp_path)
        list(study.log(scale))
        for count, _ in enumerate(study.traffic(scale.traffic[0], scale)):
            if stopped and count == 13:  # between the alarm and the log
                break
        if stopped:
            list(WithoutModels(results, tmp_path).traffic(scale.traffic[0], scale))
        served = [r for r in results.records if r["part"] == SHIFT.name]
        page = write_page(results.records, scale, width_study.SETTINGS, tmp_path, 60.0).read_text()
    eras = [r["era"][0] for r in served]
    assert len(served) == 160 and eras == sorted(eras) and eras.count(2) == scale.until_log and eras[-1] == 3
    assert {r["baseline"][0] for r in served if r["era"][0] == 2} == {32}
    rows = [line for line in page.splitlines() if line.startswith("| after")]
    assert [row.split(" | ")[0][2:] for row in rows] == [
        "after it, until the alarm or the end", "after the alarm: the widest search", "after a log of the new traffic",
    ]  # fmt: skip
    assert "plays the widest search, here for 20 requests" in page


def test_the_full_study_leaves_room_for_the_alarm_and_the_log() -> None:
    """The alarm of the page came 100 requests after the shift; its next stages need some too."""
    (shift,) = [t for t in FULL.traffic if t.prefill[0] != t.prefill[1]]
    assert shift.requests // 2 >= 100 + FULL.until_log + 2 * FULL.chunk
