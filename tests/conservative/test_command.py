"""`saffron stepmix`: what it writes, that it resumes, and that help and the package do without torch."""

from __future__ import annotations

import doctest
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from saffron.cli import main
from saffron.conservative import controller, experiment
from saffron.conservative.report import at_most, mean_interval

ROOT = Path(__file__).parent.parent.parent


def test_the_example_of_the_docstring(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten lines put a floor under a two-action problem."""
    found = doctest.DocTestFinder().find(controller.StepMixController, "controller", globs={})
    examples = [test for test in found if test.examples]
    assert len(examples) == 1 and len(examples[0].examples) <= 10
    assert doctest.DocTestRunner().run(examples[0]).failed == 0


def test_the_snippets_of_the_page_run() -> None:
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "conservative.md").read_text(), re.S)
    assert snippets
    names: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "docs/conservative.md", "exec"), names)


def test_nothing_imports_torch() -> None:
    for code in ("import saffron.conservative, saffron.conservative.experiment, saffron.conservative.report", HELP):
        check = (
            "import sys\nloaded = {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\nassert not loaded, loaded"
        )
        result = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


HELP = """
from saffron.cli import main
try:
    main(["stepmix", "--help"])
except SystemExit:
    pass
"""


def test_it_writes_resumes_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["stepmix", "--quick", "--experiment", "paper", "offline", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--docs", str(tmp_path / "docs")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "results-conservative.md")
    file = tmp_path / "out" / "records.jsonl"
    whole = file.read_text()
    for folder in ("out", "docs"):
        page = (tmp_path / folder / "results-conservative.md").read_text()
        assert "## The paper's experiment" in page and "## A baseline learned from a log" in page
        for target in re.findall(r"!\[.*?\]\((.*?)\)", page):
            assert (tmp_path / folder / target).exists()
    assert not (tmp_path / "docs" / "records.jsonl").exists()

    lines = whole.splitlines()
    file.write_text("\n".join([*lines[:5], lines[5][:40]]))  # killed while writing
    assert main([*arguments, "--json"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert file.read_text() == whole
    assert printed == [record for line in lines[1:] for record in json.loads(line)["records"]]
    before = file.read_text()
    assert main(["stepmix", "--quick", "--experiment", "offline", "--output", str(tmp_path / "out")]) == 0
    assert sorted(file.read_text().splitlines()) == sorted(before.splitlines())  # a part of it leaves the rest alone


def test_a_job_is_the_same_alone_and_among_more_trials() -> None:
    few, more = (experiment.run_job(experiment.Job("paper", "stepmix", n, 3000)) for n in (2, 5))
    for a, b in zip(few, more, strict=False):
        assert a["regret"] == pytest.approx(b["regret"], rel=1e-9) and a["below"] == b["below"]


def test_intervals() -> None:
    assert at_most(0, 20) == pytest.approx(1 - 0.05 ** (1 / 20)) and at_most(3, 3) == 1
    middle, low, high = map(float, re.findall(r"[\d.]+", mean_interval([0.0, 1.0] * 50)))
    assert middle == 0.5 and 0.37 < low < 0.43 and 0.57 < high < 0.63


@pytest.mark.parametrize(
    "name, content",
    [
        ("records.jsonl", "a line of mine\n"),
        ("results-conservative.md", "# Mine\n"),
        ("figures/conservative-paper.svg", "<svg/>"),
    ],
)
def test_what_others_wrote_stays(name: str, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    assert main(["stepmix", "--quick", "--experiment", "offline", "--output", str(tmp_path)]) == 2
    assert name in capsys.readouterr().err and (tmp_path / name).read_text() == content


def test_records_that_nobody_wrote_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By their line, whatever is wrong with them; none reaches the tables."""
    jobs = [experiment.Job("floor", "stepmix", 1, 50), experiment.Job("offline", "clone", 1, 30)]
    good = [{"job": job.name, "records": json.loads(json.dumps(experiment.run_job(job)))} for job in jobs]
    manifest = experiment.SCHEMA.manifest({}).decode()
    file = tmp_path / "records.jsonl"
    file.write_text(manifest + "".join(json.dumps(line) + "\n" for line in good))
    assert experiment.run(jobs, file, lambda *_: iter(()), lambda *_: None)  # these are ours
    arguments = ["stepmix", "--quick", "--experiment", "floor", "--output", str(tmp_path)]
    wrong = [None, "x", float("nan"), [], {}, True]
    changes = [(name, value) for name in ("below", "best", "last", "scale", "worst", "checked") for value in wrong]
    changes += [("experiment", 3), ("points", [1]), ("values", "x"), ("regrets", [None]), ("starts", "x")]
    for name, value in changes:
        changed = {**good[0], "records": [{**good[0]["records"][0], name: value}]}
        file.write_text(manifest + json.dumps(changed) + "\n")
        assert main(arguments) == 2
        assert "line 2 is not a result of `saffron stepmix`" in capsys.readouterr().err
    for changed in ({**good[0], "records": []}, {**good[0], "job": "x"}, {**good[0], "job": '{"a": 1}'}):
        file.write_text(manifest + json.dumps(changed) + "\n")
        assert main(arguments) == 2 and "line 2 is not a result" in capsys.readouterr().err
