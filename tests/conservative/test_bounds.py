"""Bounds of policies from counts: against the equations in plain Python, against the truth, and their symmetries."""

from __future__ import annotations

import numpy as np
import pytest
import small_mdps
from hypothesis import example, given, settings
from hypothesis import strategies as st

from saffron.conservative import UCBVI, Confidence, Counts, Problem, StepMix, TabularMDP, random_mdps, simulate
from saffron.conservative.confidence import widths
from saffron.conservative.evaluation import caps, evaluate, signal, sweep
from saffron.errors import ConfigError

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))  # states, actions, steps


def stochastic(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Probabilities with zeros and ties among them."""
    weights = rng.integers(0, 4, shape).astype(float)
    weights[..., 0] += weights.sum(-1) == 0
    return weights / weights.sum(-1, keepdims=True)


def mdp_and_counts(sizes: tuple[int, int, int], seed: int, episodes: int) -> tuple[TabularMDP, Counts]:
    states, actions, steps = sizes
    mdp = random_mdps(1, states, actions, steps, seed)
    policy = stochastic(np.random.default_rng(seed), 1, steps, states, actions)
    return mdp, small_mdps.counted(mdp, episodes, policy, seed)


@settings(max_examples=60)
@given(
    SIZES, st.integers(0, 999), st.sampled_from([0, 1, 7, 60]), st.sampled_from([1.0, 0.1, 0.003]), st.booleans(),
    st.sampled_from(["remaining", "horizon"]), st.booleans(), st.sampled_from([None, 1.0, 1.5]),
)  # fmt: skip
@example((3, 2, 3), 0, 60, 0.003, True, "remaining", True, None)
@example((3, 2, 3), 0, 60, 0.003, False, "horizon", False, 1.0)
def test_bounds_are_the_equations(sizes, seed, episodes, scale, uniform, value_range, known, bound) -> None:
    """Every candidate of one pass, against one policy at a time in plain Python."""
    states, actions, steps = sizes
    mdp, counts = mdp_and_counts(sizes, seed, episodes)
    rng = np.random.default_rng(seed + 1)
    baseline = stochastic(rng, 1, steps, states, actions)
    start = stochastic(rng, 1, states)
    confidence = Confidence(0.1, scale, value_range, uniform)
    reward = mdp.reward if known else None
    bound = None if bound is None else min(bound, steps)
    largest = steps if bound is None else bound
    comparators = 1 if uniform else steps + 1
    found = widths(counts, confidence, comparators, reward is None)
    bounds = sweep(counts, found, confidence, signal(found, reward, largest), start, baseline)
    chosen = np.eye(actions)[bounds.actions[0, 0]]
    for h0 in range(steps + 1):
        policy = np.where((np.arange(steps) < h0)[:, None, None], baseline[0], chosen)
        expected = small_mdps.interval(
            counts, None if reward is None else reward[0], policy, start[0], confidence, largest, comparators
        )
        assert (bounds.lower[0, 0, h0], bounds.upper[0, 0, h0]) == pytest.approx(expected, abs=1e-9)
        alone = evaluate(counts, found, confidence, signal(found, reward, largest), start, policy[None])
        assert (float(alone[0][0]), float(alone[1][0])) == pytest.approx(expected, abs=1e-9)
    for action in range(actions):  # at the first step no other action has a larger upper bound
        policy = chosen.copy()
        policy[0] = np.eye(actions)[action]
        alone = evaluate(counts, found, confidence, signal(found, reward, largest), start, policy[None])
        assert alone[1][0] <= bounds.upper[0, 0, 0] + 1e-9


@pytest.mark.parametrize("value_range", ["remaining", "horizon"])
def test_no_interval_misses_at_scale_1(value_range: str) -> None:
    """100 runs, all candidates of all plans: L <= V <= U. They learn without a constraint, so that they see much."""
    runs, steps = 100, 2
    mdp = random_mdps(runs, 2, 2, steps, seed=5)
    baseline = mdp.boltzmann(5.0)
    problem = Problem(baseline, np.zeros(runs), mdp.reward)
    learner = UCBVI(problem, Confidence(0.1, 1.0, value_range))
    tight = 0

    def check(which: np.ndarray, plan) -> None:
        nonlocal tight
        for h0 in range(steps + 1):
            policy = np.where((np.arange(steps) < h0)[:, None, None], baseline[which], plan.first)
            true = TabularMDP(mdp.kernel[which], mdp.reward[which], mdp.start[which]).value(policy)
            assert (plan.lower[:, h0] <= true + 1e-9).all() and (true <= plan.upper[:, h0] + 1e-9).all()
            tight += int((plan.lower[:, h0] > 0.2).sum())

    simulate(learner, mdp, 30_000, observe=check, seed=3)
    assert tight > runs  # the intervals became narrow enough to be able to miss


def test_bounds_can_miss_at_a_small_scale() -> None:
    """What the test above would see."""
    mdp = random_mdps(30, 3, 2, 3, seed=5)
    problem = Problem(mdp.boltzmann(5.0), np.zeros(30), mdp.reward)
    missed = 0

    def check(which: np.ndarray, plan) -> None:
        nonlocal missed
        true = TabularMDP(mdp.kernel[which], mdp.reward[which], mdp.start[which]).value(plan.first)
        missed += int((plan.lower[:, 0] > true).sum())

    simulate(UCBVI(problem, Confidence(0.1, 1e-5)), mdp, 3000, observe=check)
    assert missed


def test_nothing_seen() -> None:
    mdp = random_mdps(1)
    for value_range, last in (("horizon", 0.0), ("remaining", 1.0)):
        confidence = Confidence(value_range=value_range)
        plan = StepMix(Problem(mdp.boltzmann(5), 0.5, mdp.reward), confidence).plan(Counts.zeros(1, 3, 5, 5))
        assert (plan.lower <= last).all() and (plan.upper >= 2).all() and not plan.safe.any()
        assert (plan.first == mdp.boltzmann(5)).all()


def test_bounds_narrow_to_the_truth() -> None:
    """Counts as if every transition had been seen 1e12 times in its proportion."""
    mdp = random_mdps(4, 4, 3, 3)
    counts = Counts.zeros(4, 3, 4, 3)
    counts.visits[:] = 1e12
    counts.transitions[:] = 1e12 * mdp.kernel
    plan = StepMix(Problem(mdp.boltzmann(5), np.zeros(4), mdp.reward)).plan(counts)
    best, policy, _ = mdp.optimal()
    assert (plan.first == policy).all()
    np.testing.assert_allclose(plan.lower[:, 0], best, atol=1e-4)
    np.testing.assert_allclose(plan.upper[:, 0], best, atol=1e-4)


def test_the_range_of_the_next_step_is_tighter_and_caps_fall() -> None:
    mdp, counts = mdp_and_counts((3, 2, 3), 0, 500)
    problem = Problem(mdp.boltzmann(3), 0.1, mdp.reward)
    paper, tighter = (
        StepMix(problem, Confidence(scale=0.01, value_range=r)).plan(counts) for r in ("horizon", "remaining")
    )
    assert (tighter.lower >= paper.lower).all() and (tighter.lower > paper.lower).any()
    assert caps(np.array([1.5, 3.0]), 3).tolist() == [[1.5, 1.5, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]]


def test_runs_are_independent() -> None:
    """Planned together and one by one: the same bits."""
    mdp = random_mdps(5, 3, 3, 3)
    baseline = mdp.boltzmann(3)
    counts = small_mdps.counted(mdp, 40, baseline)
    problem = Problem(baseline, np.full(5, 0.4), mdp.reward)
    together = StepMix(problem, Confidence(scale=0.01)).plan(counts)
    for run in range(5):
        which = np.array([run])
        alone = StepMix(problem, Confidence(scale=0.01)).of(which).plan(counts.of(which))
        np.testing.assert_allclose(alone.lower[0], together.lower[run], rtol=1e-12)
        assert (alone.first[0] == together.first[run]).all() and alone.h0[0] == together.h0[run]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"delta": 0.0}, "delta"),
        ({"scale": 0.0}, "scale"),
        ({"scale": 1.5}, "scale"),
        ({"delta": float("nan")}, "delta"),
        ({"value_range": "all"}, "value_range"),
    ],
)
def test_confidence_is_checked(wrong: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}: got"):
        Confidence(**wrong)
