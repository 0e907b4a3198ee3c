"""The script of docs/vllm.md as it stands there: groups of samples of one prompt."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import tiny
import vllm_engine
from vllm_engine import needs_vllm

pytestmark = needs_vllm
PAGE = Path(__file__).parents[2] / "docs" / "vllm.md"
CHECK = """
    for group in groups:
        assert len(group.outputs) == 32 and all(len(sample.token_ids) == 8 for sample in group.outputs)
        assert all(step[token].logprob <= 0 for s in group.outputs for token, step in zip(s.token_ids, s.logprobs))
    assert len(advantages) == 32 and abs(sum(advantages)) < 1e-9
"""


def test_groups_of_samples(tmp_path: Path) -> None:
    script = re.search(r"```text\n(import os\n.*?)```", PAGE.read_text(), re.DOTALL)
    assert script is not None
    shape = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    model = tiny.save_checkpoint(tmp_path / "model", **shape)
    given = {
        '"MODEL"': f'"{model}", dtype="float32", enforce_eager=True',
        "max_tokens=256": "max_tokens=8, ignore_eos=True",
    }
    text = script[1]
    for old, new in given.items():
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "groups.py").write_text(text + CHECK)
    ran = subprocess.run(
        [sys.executable, "groups.py"], cwd=tmp_path, env=vllm_engine.environment_of_a_process(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
