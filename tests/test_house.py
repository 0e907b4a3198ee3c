"""The house: sizes of files and functions, one file per op in each place, and words that are not the field's."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from saffron_kernels import ops

ROOT = Path(__file__).resolve().parent.parent
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 400, 60


def tracked(*patterns: str) -> list[Path]:
    """Files that git tracks; all files below the root where there is no git."""
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        return [file for name in listed.stdout.splitlines() if (file := ROOT / name).is_file()]
    return [file for pattern in patterns for file in ROOT.rglob(pattern)]


SOURCES = tracked("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")
PYTHON = [file for file in SOURCES if file.suffix == ".py"]


def test_files_are_short() -> None:
    long = {str(f.relative_to(ROOT)): n for f in SOURCES if (n := len(f.read_text().splitlines())) > MOST_LINES}
    assert not long


def test_files_of_tests_have_names_of_their_own() -> None:
    """pytest imports them as top-level modules: of two with one name it collects one."""
    names = Counter(file.name for file in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []


def test_functions_are_short() -> None:
    """Docstrings do not count: a formula is no reason to split a function. Triton kernels may be longer."""
    long = {}
    for file in PYTHON:
        if "backends/triton" in file.as_posix():
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                size = (node.body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                if size > MOST_LINES_OF_A_FUNCTION:
                    long[f"{file.relative_to(ROOT)}:{node.name}"] = size
    assert not long


def test_the_algorithm_fits_on_one_screen() -> None:
    assert len((ROOT / "python/saffron/search/reference.py").read_text().splitlines()) <= 60


@pytest.mark.parametrize("op", ops.NAMES)
def test_every_op_has_its_file_in_each_place(op: str) -> None:
    expected = [f"tests/ops/test_{op}.py", f"csrc/cpu/{op}.cpp", f"csrc/cuda/*/{op}.cu"]
    expected += [f"saffron_kernels/backends/{backend}/{op}.py" for backend in ("cuda", "triton")]
    assert [name for name in expected if not list(ROOT.glob(name))] == []


# Words of an earlier vocabulary, and the field's terms in their place.
RETIRED = {
    r"\banew\b": "again",
    r"\bbeside\b": "next to",
    r"(?<!`|\.)\bblind\b": "all unseen",
    r"(?<!`)carried": "finished",
    r"\bCarver\b|\bsoften(_strip)?\b": "ScratchAllocator, online_softmax",
    r"\bchances\b": "probabilities, log-probabilities",
    r"\bchip\(|\bChip\b": "device_properties, DeviceProperties",
    r"\bdearest\b": "most expensive",
    r"\bDesk\b|\bdesk\.": "BlockScratch, scratch",
    r"\bhand_over\b|\bReadT(ext|okens)\b": "vocabulary mapping, PrefixScorer",
    r"\blay_down\b|\bfeed[<(]": "stage_results, produce",
    r"\bLayOut\b": "ConversationLayout",
    r"\bOwned\b": "SearchPrefix",
    r"\bRewarded\b": "AnnotatedConversation",
    r"faults\.settle\b|\bTokenChance\b|(?<!cross_)\bentropy\(": "raise_if_eager, TokenLikelihood, seed_of",
    r"\bshipped\b": "bundled",
    r"\bturned\b": "rotated, rotary",
    r"\b(compute|[Cc]alls|cost|FLOPs?|GFLOP|log-probability) a (prompt|token)\b": "per",
    r"\b(one|once|bytes|us|ms) a (row|step|layer|token|beam|call|block|query|slot|response|prompt|record)\b": "per",
}


def test_retired_words_stay_retired() -> None:
    found = [
        f"{file.relative_to(ROOT)}: {match.group()} (say: {term})"
        for file in tracked("*.py", "*.md", "*.cpp", "*.h", "*.cu", "*.cuh")
        if file != Path(__file__)
        for word, term in RETIRED.items()
        for match in re.finditer(word, file.read_text())
    ]
    assert not found
