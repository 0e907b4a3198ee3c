"""docs/defend.md, from corpus to report, as it stands there, with a tiny policy."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import tiny

pytest.importorskip("pyarrow")
pytest.importorskip("matplotlib")

from saffron.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "defend.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.S | re.M)


def test_the_page_from_corpus_to_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    monkeypatch.delitem(sys.modules, "my_reward", raising=False)
    tiny.save_checkpoint(tmp_path / "POLICY", max_position_embeddings=512)
    (reward,) = blocks("python")
    Path("my_reward.py").write_text(reward)
    for name, text in zip(("prompts.jsonl", "attacks.jsonl"), blocks("json"), strict=True):
        assert f"`{name}`" in PAGE
        Path(name).write_text(text)
    commands = [line for text in blocks("sh") for line in text.splitlines() if line.startswith("saffron ")]
    assert [line.split()[1] for line in commands] == [
        "collect", "annotate", "train-mrm", "eval-mrm", "eval", "report", "generate",
    ]  # fmt: skip
    for line in commands:
        assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "my_reward", raising=False)

    records = [json.loads(line) for line in Path("results.jsonl").read_text().splitlines()[1:]]
    (evaluate,) = (shlex.split(line) for line in commands if line.startswith("saffron eval "))
    methods = evaluate[evaluate.index("--method") + 1 : evaluate.index("--output")]
    found = {(r["method"], r["attack"], r["prompt"]) for r in records}
    assert len(records) == len(found) == 2 * 2 * len(methods)
    for record in records:
        assert record["harmful"]["prm"] == any(word in record["text"].lower() for word in ("stupid", "fool", "idiot"))
        assert set(record["harmful"]) == {"prm", "model:my_reward:short_words"}
    page = Path("report/report.md").read_text()
    assert all(name in page for name in ("ARGS", "CARDS", "Saffron"))
    assert Path("report/report.html").exists()
    trained = json.loads(Path("mrm/mrm_training.json").read_text())
    assert "my_reward:polite" in json.dumps(trained["reward"])
    answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    assert sum("text" in answer for answer in answers) == 4
