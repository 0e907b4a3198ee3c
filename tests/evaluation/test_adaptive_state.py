"""`saffron eval --method adaptive:state=FILE`: results of two contents of a file are not mixed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from saffron.adaptive import AdaptiveWidth, WidthSettings
from saffron.errors import CheckpointError, ConfigError
from saffron.evaluation.run import Plan, run_plans


def test_a_changed_state_file_is_noticed(tmp_path: Path) -> None:
    state, file = tmp_path / "state.npz", tmp_path / "r.jsonl"
    settings = WidthSettings(widths=(1, 2))
    AdaptiveWidth(settings, seed=1).save(state)
    plan = Plan(count=1, methods=("greedy", f"adaptive:state={state},max_new_tokens=16"), judges=("oracle",))
    records = run_plans([plan], file)
    assert run_plans([plan], file) == records
    AdaptiveWidth(settings, seed=2).save(state)
    with pytest.raises(ConfigError, match="adaptive:state=.*another content of its file"):
        run_plans([replace(plan, count=2)], file)
    assert len(run_plans([replace(plan, methods=("greedy",), count=2)], file)) == 3  # which does not read it
    state.unlink()
    with pytest.raises(CheckpointError, match="state.npz: cannot be read"):
        run_plans([plan], file)
