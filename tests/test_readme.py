"""What the documents say is true: snippets run, and the paths they name exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
# A snippet, and what stands below it as its output.
SNIPPETS = {
    document: re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", document.read_text(), re.S | re.M)
    for document in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
}


@pytest.mark.parametrize("document", [d for d, found in SNIPPETS.items() if found], ids=lambda path: path.name)
def test_snippets_run(document: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In their order, each knowing what stood before it on the page."""
    names: dict[str, object] = {}
    for number, (snippet, output) in enumerate(SNIPPETS[document]):
        capsys.readouterr()
        exec(compile(snippet, f"{document.name}, snippet {number}", "exec"), names)
        if output:
            assert capsys.readouterr().out.strip() == output.strip()


def test_readme_has_snippets() -> None:
    assert len(SNIPPETS[ROOT / "README.md"]) >= 2 and SNIPPETS[ROOT / "README.md"][0][1]  # the first with its output
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        assert target.startswith("https://") or (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_op_table_is_complete() -> None:
    import saffron_kernels
    from saffron_kernels.backends import reference

    table = (ROOT / "docs" / "decoders.md").read_text().split("| op | what it does |")[1].split("\n\n")[0]
    listed = set(re.findall(r"^\| `(\w+)` \|", table, re.M))
    functions = {name for name in saffron_kernels.__all__ if hasattr(reference, name)}
    assert listed == functions


def test_every_command_line_option_in_the_documents_exists(capsys: pytest.CaptureFixture[str]) -> None:
    from saffron.cli import main

    lines = [line for document in SNIPPETS for line in re.findall(r"^saffron (.*)$", document.read_text(), re.M)]
    assert len(lines) >= 3
    for line in lines:
        command = line.split()[0]
        with pytest.raises(SystemExit):
            main([command, "--help"])
        help_text = capsys.readouterr().out
        for option in re.findall(r"(--[a-z-]+)", line):
            assert option in help_text, f"saffron {command} {option}"
