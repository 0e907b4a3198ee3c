"""Baselines from data: nothing is played until a bound allows it."""

from __future__ import annotations

import numpy as np
import pytest
import small_mdps

from saffron.conservative import (
    Confidence,
    ConstantBaseline,
    Counts,
    NoSafePolicyError,
    Problem,
    StepMix,
    learn_baseline,
    offline,
    offline_problem,
    random_mdps,
    simulate,
)
from saffron.conservative.offline import clone, pessimistic_value_iteration
from saffron.errors import ConfigError

PRACTICAL = Confidence(scale=0.003)


def logged(episodes: int, runs: int = 1, seed: int = 0):
    mdp = random_mdps(runs, seed=seed)
    behaviour = mdp.boltzmann(10.0)
    floor = 0.9 * mdp.value(behaviour)
    problem = Problem(behaviour, floor, mdp.reward)
    _, counts = simulate(ConstantBaseline(problem), mdp, episodes, seed=seed)
    return mdp, behaviour, floor, counts


def test_a_clone_is_the_frequencies() -> None:
    mdp, behaviour, _, counts = logged(20_000)
    policy = clone(counts)
    visited = counts.visits.sum(-1) > 0
    frequencies = counts.visits[visited] / counts.visits.sum(-1)[visited][:, None]
    np.testing.assert_allclose(policy[visited], frequencies)
    assert (policy[0, 0, 1:] == 0.2).all()  # nobody starts there
    assert mdp.value(policy) == pytest.approx(mdp.value(behaviour), rel=0.01)


@pytest.mark.parametrize("value_range", ["remaining", "horizon"])
def test_pessimistic_value_iteration_against_the_equations(value_range: str) -> None:
    mdp, _, _, counts = logged(300)
    confidence = Confidence(0.1, 0.01, value_range, uniform=True)
    policy = pessimistic_value_iteration(counts, mdp.reward, confidence)
    after = np.zeros(5)
    for h in (2, 1, 0):
        within = (2 - h) if value_range == "remaining" else 3
        values = np.zeros(5)
        for s in range(5):
            q = []
            for a in range(5):
                n = counts.visits[0, h, s, a]
                if n == 0:
                    q.append(mdp.reward[0, h, s, a] if within == 0 else 0.0)
                    continue
                p = counts.transitions[0, h, s, a] / n
                beta = np.log(3 * 75 / 0.1) + 5 * np.log(8 * np.e * (n + 1))
                variance = p @ after**2 - (p @ after) ** 2
                width = 0.01 * (3 * np.sqrt(max(variance, 0) * beta / n) + 14 * 3 * within * beta / n)
                q.append(max(0.0, mdp.reward[0, h, s, a] + p @ after - width))
            chosen = policy[0, h, s].argmax()
            assert q[chosen] == pytest.approx(max(q), abs=1e-9)
            values[s] = q[chosen]
        after = values
    assert set(np.unique(policy)) == {0.0, 1.0}


@pytest.mark.parametrize("method", ["clone", "pessimistic"])
def test_bounds_hold_at_scale_1_and_grow(method: str) -> None:
    mdp, _, _, few = logged(3000, runs=5)
    _, _, _, many = logged(100_000, runs=5)
    low = [learn_baseline(counts, method, reward=mdp.reward, confidence=Confidence(0.1)) for counts in (few, many)]
    for learned in low:
        true = mdp.value(learned.policy)
        assert (learned.lower <= true).all() and (true <= learned.upper).all() and learned.method == method
    assert (low[1].lower > low[0].lower + 0.01).all()


@pytest.mark.parametrize("method", ["clone", "pessimistic"])
def test_bounds_of_learned_policies_have_beta_under_the_root(method: str) -> None:
    mdp, _, _, counts = logged(500)
    learned = learn_baseline(counts, method, reward=mdp.reward, confidence=PRACTICAL)
    confidence = Confidence(scale=PRACTICAL.scale, uniform=True)
    expected = small_mdps.interval(counts, mdp.reward[0], learned.policy[0], mdp.start[0], confidence, 3, 1)
    assert (learned.lower[0], learned.upper[0]) == pytest.approx(expected, abs=1e-9)


def test_refusal_until_a_bound_passes() -> None:
    mdp, behaviour, floor, counts = logged(10)
    with pytest.raises(NoSafePolicyError, match=r"no policy learned .* clone: at least .* keep running"):
        offline_problem(counts, float(floor[0]), reward=mdp.reward, confidence=PRACTICAL)
    assert mdp.value(behaviour)[0] > floor[0]  # although the policy that was run is safe
    _, _, _, counts = logged(5000)
    problem, learned = offline_problem(counts, float(floor[0]), reward=mdp.reward, confidence=PRACTICAL)
    assert learned.lower[0] >= floor[0] and mdp.value(learned.policy)[0] >= floor[0]
    confidence = Confidence(scale=PRACTICAL.scale, uniform=True)
    (history,), _ = simulate(StepMix(problem, confidence), mdp, 20_000, counts=counts)
    assert history.below(float(floor[0])) == 0
    assert history.values[-1] > mdp.value(behaviour)[0]


def test_the_first_that_passes_is_taken() -> None:
    mdp, _, _, counts = logged(2000)
    lower = {
        method: learn_baseline(counts, method, reward=mdp.reward, confidence=PRACTICAL).lower[0]
        for method in ("clone", "pessimistic")
    }
    assert lower["pessimistic"] > lower["clone"]
    for floor, expected in ((lower["clone"], "pessimistic"), (lower["pessimistic"], "pessimistic")):
        assert offline_problem(counts, floor, reward=mdp.reward, confidence=PRACTICAL)[1].method == expected


def test_the_clone_is_the_second_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    mdp, _, _, counts = logged(2000)
    worst = 1 - clone(counts)[0].argmax(-1)  # any policy that is worse
    monkeypatch.setattr(
        offline, "pessimistic_value_iteration", lambda *arguments: np.eye(5)[np.clip(worst, 0, 4)][None]
    )
    floor = learn_baseline(counts, "clone", reward=mdp.reward, confidence=PRACTICAL).lower[0]
    problem, learned = offline_problem(counts, floor, reward=mdp.reward, confidence=PRACTICAL)
    assert learned.method == "clone" and (problem.baseline == clone(counts)).all()


def test_arguments_are_checked() -> None:
    _, _, _, counts = logged(10, runs=2)
    with pytest.raises(ConfigError, match="^method: got 'copy'"):
        learn_baseline(counts, "copy")
    with pytest.raises(ConfigError, match="^counts: got 2 runs"):
        offline_problem(counts, 1.0)
    with pytest.raises(NoSafePolicyError):
        offline_problem(Counts.zeros(1, 2, 2, 2), 0.5)
