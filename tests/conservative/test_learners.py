"""The rules of StepMix, EpsMix and their like: linearity, degenerate cases, and brute force over policies."""

from __future__ import annotations

import numpy as np
import pytest
import small_mdps
from hypothesis import given, settings
from hypothesis import strategies as st

from saffron.conservative import (
    LEARNERS,
    UCBVI,
    AllOrNothing,
    Confidence,
    ConstantBaseline,
    Counts,
    EpsMix,
    Problem,
    StepMix,
    TabularMDP,
    random_mdps,
    simulate,
)
from saffron.errors import ConfigError

PRACTICAL = Confidence(scale=0.003)


def seen_infinitely(mdp: TabularMDP) -> Counts:
    counts = Counts.zeros(*mdp.kernel.shape[:4])
    counts.visits[:] = 1e13
    counts.transitions[:] = 1e13 * mdp.kernel
    return counts


def test_values_of_mdps_against_brute_force() -> None:
    mdp = random_mdps(3, 2, 2, 3, seed=1)
    everything = small_mdps.policies(3, 2, 2)
    best, policy, q = mdp.optimal()
    for run in range(3):
        values = [small_mdps.value(mdp, p, run) for p in everything]
        assert best[run] == pytest.approx(max(values), abs=1e-12)
        assert small_mdps.value(mdp, policy[run], run) == pytest.approx(max(values), abs=1e-12)
        assert q[run, 0, 0].max() == pytest.approx(max(values), abs=1e-12)
    soft = mdp.boltzmann(2.0)
    assert mdp.value(soft) == pytest.approx([small_mdps.value(mdp, soft[r], r) for r in range(3)], abs=1e-12)
    assert (mdp.boltzmann(0.0) == 0.5).all()


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(0, 400), st.floats(0.0, 3.0))
def test_the_mixture_is_linear(seed: int, episodes: int, floor: float) -> None:
    """One Markov policy, mixed at one step, is worth what the coin between two policies is, to 1e-12."""
    mdp = random_mdps(2, 3, 2, 3, seed)
    baseline = mdp.boltzmann(2.0)
    counts = small_mdps.counted(mdp, episodes, baseline, seed)
    plan = StepMix(Problem(baseline, np.full(2, floor), mdp.reward), PRACTICAL).plan(counts)
    coin = (1 - plan.weight) * mdp.value(plan.first) + plan.weight * mdp.value(plan.second)
    np.testing.assert_allclose(mdp.value(plan.markov()), coin, rtol=0, atol=1e-12)
    assert ((plan.weight >= 0) & (plan.weight <= 1)).all()
    for run in range(2):
        lower, h0 = plan.lower[run], plan.h0[run]
        if not (lower >= floor).any():
            assert h0 == 3 and plan.weight[run] == 0 and not plan.safe[run]
        else:
            assert lower[h0] >= floor and (lower[:h0] < floor).all() and plan.safe[run]
            if h0:  # the lower bound of what is played is the floor
                bound = (1 - plan.weight[run]) * lower[h0] + plan.weight[run] * lower[h0 - 1]
                assert bound == pytest.approx(floor, abs=1e-12) and plan.h0_second[run] == h0 - 1


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(0, 400), st.floats(0.0, 3.0))
def test_epsmix_weighs_its_two_bounds(seed: int, episodes: int, floor: float) -> None:
    mdp = random_mdps(2, 3, 2, 3, seed)
    baseline = mdp.boltzmann(2.0)
    counts = small_mdps.counted(mdp, episodes, baseline, seed)
    problem = Problem(baseline, np.full(2, floor), mdp.reward)
    plan, other = EpsMix(problem, PRACTICAL).plan(counts), AllOrNothing(problem, PRACTICAL).plan(counts)
    for run in range(2):
        optimistic, trusted = plan.lower[run, 0], plan.lower[run, -1]
        eps = 1.0 if plan.h0[run] == 0 else plan.weight[run]
        if optimistic >= floor:
            assert eps == 1
        elif trusted < floor:
            assert eps == 0
        else:
            assert (1 - eps) * trusted + eps * optimistic == pytest.approx(floor, abs=1e-12)
        assert other.h0[run] == (0 if optimistic >= floor else 3) and other.weight[run] == 0


def test_no_floor_is_no_constraint() -> None:
    """gamma = 0: StepMix and EpsMix are UCBVI from the first episode on."""
    mdp = random_mdps(4)
    problem = Problem(mdp.boltzmann(5), np.zeros(4), mdp.reward)
    free = simulate(UCBVI(problem, PRACTICAL), mdp, 2000)
    for learner in (StepMix, EpsMix, AllOrNothing):
        histories, counts = simulate(learner(problem, PRACTICAL), mdp, 2000)
        assert (counts.transitions == free[1].transitions).all()
        assert all((a.values == b.values).all() for a, b in zip(histories, free[0], strict=True))


def test_a_floor_out_of_reach_is_the_baseline() -> None:
    mdp = random_mdps(4)
    baseline = mdp.boltzmann(5)
    problem = Problem(baseline, mdp.optimal()[0] + 0.1, mdp.reward)
    for learner in (StepMix, EpsMix, AllOrNothing, ConstantBaseline):
        histories, _ = simulate(learner(problem, PRACTICAL), mdp, 3000)
        assert all(history.baseline.all() for history in histories)
        assert [history.values[0] for history in histories] == pytest.approx(list(mdp.value(baseline)))


@pytest.mark.parametrize("learner", [StepMix, EpsMix, AllOrNothing, UCBVI])
def test_a_known_mdp_is_solved(learner) -> None:
    """With infinite counts the optimum is played, against all policies."""
    mdp = random_mdps(3, 2, 2, 3, seed=4)
    baseline = mdp.boltzmann(3.0)
    plan = learner(Problem(baseline, 0.95 * mdp.value(baseline), mdp.reward)).plan(seen_infinitely(mdp))
    values = [[small_mdps.value(mdp, p, run) for p in small_mdps.policies(3, 2, 2)] for run in range(3)]
    assert mdp.value(plan.first) == pytest.approx([max(v) for v in values]) and (plan.weight == 0).all()


def test_two_signals_against_all_mixtures() -> None:
    """With infinite counts: the floor holds for the safety, and the objective is near the best of all policies'."""
    mdp = random_mdps(6, 2, 2, 3, seed=7)
    objective = random_mdps(6, 2, 2, 3, seed=8).reward
    saving = TabularMDP(mdp.kernel, objective, mdp.start)
    safest, trusted, _ = mdp.optimal()
    floor = 0.85 * safest
    weights = tuple(np.linspace(0, 6, 61))
    problem = Problem(trusted, floor, mdp.reward, objective, weights=weights)
    plan = StepMix(problem).plan(seen_infinitely(mdp))
    played = mdp.value(plan.markov())
    assert (played >= floor - 1e-9).all() and plan.safe.all()
    gained = saving.value(plan.markov())
    assert (gained > saving.value(trusted) + 1e-9).any()
    for run in range(6):
        pairs = [
            (small_mdps.value(mdp, p, run), small_mdps.value(saving, p, run)) for p in small_mdps.policies(3, 2, 2)
        ]
        best = max(o for s, o in pairs if s >= floor[run])  # of the deterministic ones
        lagrange = max(o for s, o in pairs if _supported(s, o, pairs) and s >= floor[run])
        assert gained[run] >= lagrange - 1e-3, (run, gained[run], best, lagrange)


def _supported(s: float, o: float, pairs: list[tuple[float, float]]) -> bool:
    """Whether a policy is best for some weight of the grid."""
    return any(o + w * s >= max(b + w * a for a, b in pairs) - 1e-9 for w in np.linspace(0, 6, 61))


def test_two_signals_test_the_floor_with_beta_under_the_root() -> None:
    """Their lower bounds are those of `uniform`, of the safety alone."""
    mdp = random_mdps(5, 3, 3, 3)
    baseline = mdp.boltzmann(20)
    counts = small_mdps.counted(mdp, 300, np.full(baseline.shape, 1 / 3))
    floor = np.full(5, 0.3)
    plan = StepMix(Problem(baseline, floor, mdp.reward, random_mdps(5, 3, 3, 3, 1).reward), PRACTICAL).plan(counts)
    uniform = Confidence(scale=PRACTICAL.scale, uniform=True)
    alone = ConstantBaseline(Problem(baseline, floor, mdp.reward), uniform).plan(counts)
    narrow = ConstantBaseline(Problem(baseline, floor, mdp.reward), PRACTICAL).plan(counts)
    np.testing.assert_allclose(plan.lower[:, -1], alone.lower[:, 0], rtol=1e-12)
    assert (alone.lower != narrow.lower).all()


def test_one_state_one_step_is_a_conservative_bandit() -> None:
    """Estimated rewards: the trusted arm until its bound allows another, then the better arm, never below the floor."""
    runs, means = 20, np.array([0.7, 0.9, 0.2])
    kernel = np.zeros((runs, 1, 2, 3, 2))  # the next state is the outcome
    kernel[..., 1], kernel[..., 0] = means, 1 - means
    arrival = np.zeros(kernel.shape)
    arrival[..., 1] = 1.0
    start = np.tile([1.0, 0.0], (runs, 1))
    mdp = TabularMDP(kernel, np.broadcast_to(means, (runs, 1, 2, 3)).copy(), start, arrival)
    baseline = np.zeros((runs, 1, 2, 3))
    baseline[..., 0] = 1
    histories, counts = simulate(StepMix(Problem(baseline, np.full(runs, 0.6))), mdp, 30_000)
    assert all(history.below(0.6) == 0 for history in histories)
    assert all(history.baseline[0] and history.values[-1] == pytest.approx(0.9, abs=0.03) for history in histories)
    assert (counts.visits[:, 0, 0, 2] > 0).all()  # the bad arm was tried too, a little at a time


@pytest.mark.parametrize("replan", ["doubling", 10])
def test_the_floor_is_kept_while_the_unconstrained_learner_breaks_it(replan) -> None:
    mdp = random_mdps(20, seed=2)
    baseline = mdp.boltzmann(10)
    floor = 0.9 * mdp.value(baseline)
    below = {}
    for learner in (StepMix, EpsMix, UCBVI):
        histories, _ = simulate(learner(Problem(baseline, floor, mdp.reward), PRACTICAL), mdp, 4000, replan=replan)
        below[learner.name] = [history.below(f) for history, f in zip(histories, floor, strict=True)]
        if learner is not UCBVI:
            assert all(history.values[-1] > v for history, v in zip(histories, mdp.value(baseline), strict=True))
    assert sum(below["stepmix"]) == sum(below["epsmix"]) == 0 and min(below["ucbvi"]) > 0


def test_every_learner_has_one_interface() -> None:
    mdp = random_mdps(2, 3, 2, 2)
    baseline = mdp.boltzmann(3)
    problem = Problem(baseline, 0.8 * mdp.value(baseline), mdp.reward)
    told = {"baseline_value": mdp.value(baseline), "episodes": 1000}
    for name, learner in LEARNERS.items():
        made = learner(problem, PRACTICAL, **(told if name in ("dope", "optpess-lp") else {}))
        plan = made.plan(small_mdps.counted(mdp, 20, baseline))
        assert made.name == name and plan.first.shape == plan.second.shape == baseline.shape
        np.testing.assert_allclose(plan.first.sum(-1), 1)
        assert made.of(np.array([1])).problem.shape[0] == 1
        with pytest.raises(ConfigError, match="^counts: got shape"):
            made.plan(Counts.zeros(2, 2, 4, 2))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"baseline": [[[0.5, 0.4]]]}, "baseline"),
        ({"baseline": [0.5, 0.5]}, "baseline"),
        ({"floor": float("nan")}, "floor"),
        ({"floor": [0.1, 0.2]}, "floor"),
        ({"reward": [[[0.5, 1.5]]]}, "reward"),
        ({"reward": [[[0.5, 0.5, 0.5]]]}, "reward"),
        ({"reward": [[[0.5, float("nan")]]]}, "reward"),
        ({"start": 1}, "start"),
        ({"start": 0.5}, "start"),
        ({"start": [0.5]}, "start"),
        ({"bound": 2.0}, "bound"),
        ({"bound": 0.0}, "bound"),
        ({"bound": 0.5, "reward": [[[0.6, 0.1]]]}, "bound"),
        ({"objective_bound": -1.0}, "objective_bound"),
        ({"weights": ()}, "weights"),
        ({"weights": (-1.0,)}, "weights"),
    ],
)
def test_problems_are_checked(wrong: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}: got"):
        Problem(**{"baseline": [[[0.5, 0.5]]], "floor": 0.5, **wrong})
