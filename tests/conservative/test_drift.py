"""Traffic that changes: the alarm, what it does, forgetting, and the baseline's share."""

from __future__ import annotations

import random

import numpy as np
import pytest

from saffron.conservative import Confidence, Drift, Problem, StepMixController, merge
from saffron.conservative.drift import Cusum
from saffron.errors import ConfigError

BASELINE = [[[1.0, 0.0]]]


def bandit(**arguments) -> StepMixController:
    """Two actions, the first trusted; rewards are reported."""
    return StepMixController(Problem(BASELINE, 0.8), confidence=Confidence(scale=0.2), **arguments)


def run(control: StepMixController, success: tuple[float, float], episodes: int, seed: int = 0) -> list[int]:
    """Plays; returns the episodes that ended in an alarm."""
    world, alarms = random.Random(seed), []
    for number in range(episodes):
        before = control.alarms
        action = control.begin().act(0)
        control.update([(0, action, 0, world.random() < success[action])])
        if control.alarms > before:
            alarms.append(number)
    return alarms


def test_false_alarms_are_as_rare_as_promised() -> None:
    """Failures exactly at the accepted rate, binary and not: the mean run is at least `run_length`."""
    rng = np.random.default_rng(0)
    for draw in (lambda: float(rng.random() < 0.2), lambda: float(rng.beta(1, 4))):
        cusum = Cusum(0.2, 0.15, 100)
        alarms = sum(cusum.add(draw()) for _ in range(50_000))
        assert 0 < alarms < 500 * 1.1 or alarms == 0
    cusum = Cusum(0.2, 0.15, 100)
    assert sum(cusum.add(float(rng.random() < 0.2)) for _ in range(50_000)) > 10  # and the bound is not idle


def test_a_rise_is_found_in_about_the_time_that_theory_says() -> None:
    """log(run length) / (relative entropy of the new rate against the old), within a factor of 2."""
    rng = np.random.default_rng(1)
    delays = []
    for _ in range(200):
        cusum, count = Cusum(0.1, 0.2, 1e4), 0
        while not cusum.add(float(rng.random() < 0.3)):
            count += 1
        delays.append(count)
    entropy = 0.3 * np.log(0.3 / 0.1) + 0.7 * np.log(0.7 / 0.9)
    assert np.log(1e4) / entropy / 2 < np.mean(delays) < np.log(1e4) / entropy * 2


def test_an_alarm_falls_back_to_the_baseline_and_learning_starts_again() -> None:
    control = bandit(drift=Drift(alarm_shift=0.2, alarm_run_length=1e4))
    assert run(control, (0.9, 0.99), 3000) == []
    assert control.current.h0[0] == 0  # the second action by now
    alarms = run(control, (0.9, 0.4), 500)  # which gets bad
    assert len(alarms) == 1 and alarms[0] < 60 and control.alarms == 1
    assert control.current.h0[0] == 1 and control.counts().visits.sum() == 500 - alarms[0] - 1
    assert run(control, (0.9, 0.4), 3000) == [] and control.counts().visits[0, 0, 0, 1] < 600
    run(control, (0.9, 0.99), 20_000)  # and good again


def test_without_an_alarm_nothing_notices() -> None:
    """What the alarm is for: old counts outweigh the new traffic for long."""
    control = bandit()
    run(control, (0.9, 0.99), 3000)
    run(control, (0.9, 0.4), 200)
    assert control.current.h0[0] == 0 and control.alarms == 0


def test_counts_decay() -> None:
    control = bandit(drift=Drift(half_life=100.0))
    run(control, (0.9, 0.99), 5000)
    assert control.counts().visits.sum() < 1.25 * 100 / np.log(2)  # the sum of all weights
    control = bandit(drift=Drift(half_life=100.0), replan=10**9)
    run(control, (0.9, 0.99), 5000)  # plans are due by decay alone
    assert control.counts().visits.sum() < 1.25 * 100 / np.log(2)
    assert Drift(half_life=50).weight_after(100) == 0.25 and Drift().weight_after(10**9) == 1


def test_forgetting_follows_the_traffic_sooner() -> None:
    """How often the second action is played after it got bad. (No guarantee: old counts still count for a while.)"""
    played = []
    for half_life in (None, 300.0):
        control = bandit(drift=Drift(half_life=half_life))
        run(control, (0.9, 0.99), 5000)
        assert control.begin().branch != "baseline"
        before = control.counts().visits[0, 0, 0, 1]
        calls = 0
        world = random.Random(7)
        for _ in range(3000):
            action = control.begin().act(0)
            calls += action
            control.update([(0, action, 0, world.random() < (0.9, 0.3)[action])])
        assert before > 100
        played.append(calls)
    assert played[1] < played[0] / 2, played


def test_the_baseline_keeps_its_share() -> None:
    control = bandit(drift=Drift(baseline_share=0.25))
    run(control, (0.9, 0.99), 3000)
    branches = [control.begin().branch for _ in range(2000)]
    assert 0.2 < branches.count("baseline") / 2000 < 0.3
    control = bandit(drift=Drift(baseline_share=1.0))
    run(control, (0.9, 0.99), 1000)
    assert control.counts().visits[0, 0, 0, 1] == 0


def test_state_and_replicas_know_of_alarms(tmp_path) -> None:
    made = [bandit(drift=Drift(alarm_shift=0.2, alarm_run_length=1e4), seed=seed) for seed in range(2)]
    for control in made:
        run(control, (0.9, 0.99), 3000)
    run(made[0], (0.3, 0.3), 10)
    made[0].save(tmp_path / "state.npz")
    again = StepMixController.load(tmp_path / "state.npz")
    assert again._cusum is not None and made[0]._cusum is not None
    assert again._cusum.level == made[0]._cusum.level > 0
    assert run(again, (0.3, 0.3), 200, 5) == run(made[0], (0.3, 0.3), 200, 5) != []
    merged = merge(made)  # the other's counts are of the time before
    assert merged.alarms == made[0].alarms and merged.counts().visits.sum() == made[0].counts().visits.sum()
    assert merged.episodes == 6210


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"baseline_share": 1.5}, "baseline_share"),
        ({"half_life": 0.0}, "half_life"),
        ({"alarm_shift": 1.0}, "alarm_shift"),
        ({"alarm_run_length": 1.0}, "alarm_run_length"),
        ({"alarm_run_length": float("nan")}, "alarm_run_length"),
    ],
)
def test_drift_is_checked(wrong: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}: got"):
        Drift(**wrong)
