"""`reproduce.fluent`: the noise is what it says, and the tables hold what was measured."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from reproduce import fluent
from reproduce.fluent import Cell, NoisyPair, NoisyStep, Study, cells, tables
from saffron.search import Engine
from saffron.search.config import SearchConfig


def test_every_cell_is_a_search() -> None:
    for cell in [*cells(True), *cells(False)]:
        assert isinstance(cell.config(), SearchConfig)


def test_noise_and_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards differ from the MRM's by numbers of that deviation, the same ones whenever a response is read."""
    monkeypatch.setattr(fluent, "TOKENS", 6)
    study = Study(2, seed=0)
    rewards: dict[float, list[float]] = {}
    for noise in (0.0, 2.0):
        pair = NoisyPair(study.models, noise, seed=0)
        engine = Engine(pair, SearchConfig(top_p=1.0, width=1, max_new_tokens=1), step=NoisyStep(pair))
        handle = engine.submit(study.requests[0], trace=False, eos_token_id=())
        outputs = []
        choose = engine._step._multifurcate  # type: ignore[attr-defined]
        monkeypatch.setattr(
            engine._step, "_multifurcate", lambda b, s, r, c=choose, o=outputs: (o.append(r.outputs), c(b, s, r))
        )
        engine.run(handle)
        (_, hidden), head = outputs[0], pair.head(True)
        rewards[noise] = (hidden[0] @ head.weight.T).tolist()
    difference = torch.tensor(rewards[2.0]) - torch.tensor(rewards[0.0])
    assert 1.8 < float(difference.std()) < 2.2 and abs(float(difference.mean())) < 0.3

    cell = Cell(2.0, 2, "reward_cap=2,commit_every=3")
    found = study.search(cell)
    assert found == study.search(cell)
    assert len(found["harmful"]) == 2 and -20 < found["log_probability"] < 0
    assert found["first_final"] <= 3 and 0 < found["final_early"] <= 1
    text = tables({json.dumps(asdict(cell)): found, json.dumps({"method": "greedy"}): found})
    assert f"{found['log_probability']:.2f}" in text and "no defence, greedy" in text
