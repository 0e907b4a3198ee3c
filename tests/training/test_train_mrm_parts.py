"""What `saffron train-mrm` is made of: order, split, learning rates, agreement, pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("accelerate")

from saffron.errors import ConfigError
from saffron.training import plots
from saffron.training.agreement import Agreement
from saffron.training.batches import Order, split, supervised
from saffron.training.shards import AnnotatedConversation
from saffron.training.train import TrainConfig, learning_rate


def row(length: int, seed: int) -> AnnotatedConversation:
    rng = np.random.default_rng(seed)
    return AnnotatedConversation(
        rng.integers(0, 48, length), np.ones(length, np.int8), rng.normal(size=length).astype(np.float32)
    )


ROWS = [row(length, length) for length in (7, 4, 9)]


def test_order_is_a_shuffle_every_epoch():
    order = Order(10, 3, 4, seed=2)
    assert len(order) == 12
    epochs = [sum((order[step] for step in range(first, first + 3)), []) for first in range(0, 12, 3)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert [Order(10, 3, 4, seed=2)[i] for i in range(12)] == [order[i] for i in range(12)]
    assert Order(10, 3, 4, seed=3)[0] != order[0]


def test_split_parts_the_conversations():
    found = [row(5, seed) for seed in range(10)]
    train, heldout = split(found, 0.3, seed=1)
    assert len(heldout) == 3
    assert {id(row) for row in train} | {id(row) for row in heldout} == {id(row) for row in found}
    assert not {id(row) for row in train} & {id(row) for row in heldout}
    assert split(found, 0.0, seed=1) == (found, [])
    with pytest.raises(ConfigError, match="heldout_share"):
        split(found[:1], 0.5, seed=1)


def test_conversations_without_rewards_are_left_out():
    nothing = AnnotatedConversation(np.arange(3), np.ones(3, np.int8), np.array([1, np.nan, np.nan], np.float32))
    assert supervised([nothing, *ROWS])[0].input_ids is not nothing.input_ids
    assert len(supervised([nothing, *ROWS])) == 3


def test_learning_rates():
    plain = TrainConfig(lr=1.0)
    assert [learning_rate(plain, step, 10) for step in (0, 9)] == [1.0, 1.0]
    linear = TrainConfig(lr=1.0, schedule="linear", warmup=2)
    assert [learning_rate(linear, step, 10) for step in (0, 1, 5)] == pytest.approx([0.5, 0.9, 0.5])
    assert learning_rate(TrainConfig(lr=1.0, schedule="cosine"), 5, 10) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "changes",
    [{"epochs": 0}, {"batch": 0}, {"lr": 0.0}, {"lr": float("nan")}, {"beta1": 1.0}, {"heldout_share": 1.0},
     {"dropout": -0.1}, {"schedule": "steps"}, {"dtype": "int8"}, {"mixed_precision": "fp8"}, {"clip": -1.0}],
)  # fmt: skip
def test_bad_hyperparameters_are_named(changes):
    with pytest.raises(ConfigError, match=next(iter(changes))):
        TrainConfig(**changes)


def test_agreement_by_hand():
    found = Agreement.of(np.array([1.0, 2.0, 5.0]), np.array([0.0, 2.5, 3.0]))
    assert (found.tokens, found.within_1) == (3, pytest.approx(2 / 3))
    assert found.mean_error == pytest.approx(2.5 / 3)
    assert found.root_mean_square_error == pytest.approx((5.25 / 3) ** 0.5)
    assert found.correlation == pytest.approx(np.corrcoef([1, 2, 5], [0, 2.5, 3])[0, 1])
    assert Agreement.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert Agreement.of(np.empty(0), np.empty(0)).to_json()["within_1"] is None


def test_pictures_are_the_same_bytes_again(tmp_path):
    rng = np.random.default_rng(0)
    true = rng.normal(size=plots.MOST_POINTS + 10)
    for name in ("a.png", "b.png"):
        plots.scatter(tmp_path / name, true + 0.1, true)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
