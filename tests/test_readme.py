"""What the documents say is true: snippets run, and the paths they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_readme_snippets_run(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(SNIPPETS[number], f"README.md, snippet {number}", "exec"), {})


def test_readme_has_snippets() -> None:
    assert len(SNIPPETS) >= 2


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert target.startswith("https://") or (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_op_table_is_complete() -> None:
    import saffron_kernels
    from saffron_kernels.backends import reference

    table = (ROOT / "README.md").read_text().split("| op | what it does |")[1].split("\n\n")[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", table, re.M))
    functions = {name for name in saffron_kernels.__all__ if hasattr(reference, name)}
    assert listed == functions


def test_every_command_line_option_in_the_readme_exists(capsys: pytest.CaptureFixture[str]) -> None:
    from saffron.cli import main

    for line in re.findall(r"^saffron (.*)$", (ROOT / "README.md").read_text(), re.M):
        command = line.split()[0]
        with pytest.raises(SystemExit):
            main([command, "--help"])
        help_text = capsys.readouterr().out
        for option in re.findall(r"(--[a-z-]+)", line):
            assert option in help_text, f"saffron {command} {option}"
