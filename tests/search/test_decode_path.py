"""What a Saffron answer passes through in Python, models included: which files that is, and that it does not grow."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest
import tiny
from searches import make

from saffron.models.reward_models import MultifurcationRewardModel
from saffron.models.shared_trunk import SharedTrunk
from saffron.search import SaffronSearch
from saffron.search.config import SearchConfig

PACKAGE = Path(sys.modules["saffron"].__file__ or "").parent
# Files of which a function runs between a prompt and its answer: step by step, in captured steps, or where policy and
# MRM have different tokenizers or share a trunk; and what says what a step is.
DECODE_PATH = {
    "models": {
        "attention", "chat", "checks", "cuda_graph", "fingerprint", "flops", "plain_text", "policy", "reward_models",
        "shared_trunk", "text_model", "trie_model", "vocabulary",
    },
    "search": {
        "admission", "captured_step", "config", "eager_step", "engine", "handle", "model_pair", "prefix_scorer",
        "readers", "result", "saffron", "static_forest", "statistics", "step", "tree",
    },
}  # fmt: skip
FILES = {PACKAGE / room / f"{name}.py" for room, names in DECODE_PATH.items() for name in names}
MOST_LINES = 5013  # whoever makes the path shorter lowers this ceiling


@contextmanager
def called_files() -> Iterator[set[Path]]:
    """Files of the package of which a function is called within."""
    found: set[Path] = set()

    def look(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_name != "<module>":
            found.add(Path(frame.f_code.co_filename))

    sys.setprofile(look)
    try:
        yield found
    finally:
        sys.setprofile(None)
        found &= set(PACKAGE.rglob("*.py"))


def test_the_path_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, mrm, _ = tiny.trio()
    other = tiny.trio(guard_tokenizer=tiny.tokenizer(280, ["completely different words make another vocabulary"] * 4))
    config = SearchConfig(width=3, max_new_tokens=3, min_new_tokens=1)
    captured = make(monkeypatch, None, policy, mrm, config)
    shared = SharedTrunk(policy.model, {}, None)
    one_trunk = SaffronSearch(policy, MultifurcationRewardModel(shared.model, policy.tokenizer, shared=shared), config)
    plain, through_text = SaffronSearch(policy, mrm, config), SaffronSearch(other.policy, other.mrm, config)
    with called_files() as files:
        for search in (plain, through_text, captured, one_trunk):
            search.generate("hello there", "the quick", config=replace(config, top_p=0.9))
        assert "".join(plain.stream("hello there"))
    assert files | {PACKAGE / "search" / "step.py"} == FILES


def test_the_path_does_not_grow() -> None:
    assert sum(len(file.read_text().splitlines()) for file in FILES) <= MOST_LINES
