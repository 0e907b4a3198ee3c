"""DOPE and OptPess-LP: their programs against brute force, and that they stay safe."""

from __future__ import annotations

import numpy as np
import pytest
import small_mdps

from saffron.conservative import DOPE, Confidence, Counts, OptPessLP, Problem, TabularMDP, random_mdps, simulate
from saffron.errors import ConfigError


def made(learner, mdp: TabularMDP, share: float = 0.9, scale: float = 1.0, eta: float = 3.0):
    baseline = mdp.boltzmann(eta)
    value = mdp.value(baseline)
    problem = Problem(baseline, share * value, mdp.reward)
    return learner(problem, Confidence(scale=scale), baseline_value=value, episodes=10_000)


def seen_infinitely(mdp: TabularMDP) -> Counts:
    counts = Counts.zeros(*mdp.kernel.shape[:4])
    counts.visits[:] = 1e13
    counts.transitions[:] = 1e13 * mdp.kernel
    return counts


@pytest.mark.parametrize("learner", [DOPE, OptPessLP])
def test_a_known_mdp_is_solved(learner) -> None:
    mdp = random_mdps(3, 2, 2, 3, seed=4)
    plan = made(learner, mdp).plan(seen_infinitely(mdp))
    best = [max(small_mdps.value(mdp, p, run) for p in small_mdps.policies(3, 2, 2)) for run in range(3)]
    assert plan.safe.all() and mdp.value(plan.first) == pytest.approx(best, abs=1e-3)


@pytest.mark.parametrize("learner", [DOPE, OptPessLP])
def test_nothing_seen_is_the_baseline(learner) -> None:
    mdp = random_mdps(2, 3, 2, 2)
    plan = made(learner, mdp).plan(Counts.zeros(2, 2, 3, 2))
    assert not plan.safe.any() and (plan.first == mdp.boltzmann(3.0)).all() and (plan.h0 == 2).all()


def test_optpess_against_all_mixtures_of_two_policies() -> None:
    """One constraint: a mixture of two deterministic policies solves the program, found here by brute force."""
    mdp = random_mdps(1, 2, 2, 2, seed=3)
    learner = made(OptPessLP, mdp, scale=0.002, share=0.8)
    counts = small_mdps.counted(mdp, 3000, np.full((1, 2, 2, 2), 0.5))
    steps, states, actions, n = 2, 2, 2, np.maximum(counts.visits[0], 1)
    kernel = np.where(counts.visits[0][..., None] > 0, counts.transitions[0] / n[..., None], 1 / states)
    beta = 0.002 * np.sqrt(np.log(32 * states**2 * actions * steps * 10_000 / 0.05) / n)
    kappa = float(learner.baseline_value[0] - learner.problem.floor[0])
    factor = 1 + states * steps
    pessimistic = mdp.reward[0] - factor * beta
    optimistic = mdp.reward[0] + (factor + 4 * steps * factor / kappa) * beta

    def worth(reward: np.ndarray, policy: np.ndarray) -> float:
        law, total = mdp.start[0], 0.0
        for h in range(steps):
            joint = law[:, None] * policy[h]
            total += float((joint * reward[h]).sum())
            law = np.einsum("sa,sat->t", joint, kernel[h])
        return total

    floor = float(learner.problem.floor[0])
    pairs = [(worth(pessimistic, p), worth(optimistic, p)) for p in small_mdps.policies(steps, states, actions)]
    best = -np.inf
    for low_a, high_a in pairs:
        if low_a >= floor:
            best = max(best, high_a)
            for low_b, high_b in pairs:
                if low_b < floor:
                    share = (low_a - floor) / (low_a - low_b)
                    best = max(best, (1 - share) * high_a + share * high_b)
    plan = learner.plan(counts)
    assert plan.safe[0] and plan.upper[0, 0] == pytest.approx(best, abs=1e-6)
    assert plan.lower[0, 0] >= floor - 1e-6 and worth(pessimistic, plan.first[0]) >= floor - 1e-6


def test_dope_chooses_kernel_and_policy() -> None:
    """One step to decide, then three states: the program moves as much mass to the good one as the radius allows."""
    kernel = np.zeros((1, 2, 3, 2, 3))
    kernel[0, :, :, 0] = [0.4, 0.3, 0.3]
    kernel[0, :, :, 1] = [0.7, 0.2, 0.1]
    reward = np.zeros((1, 2, 3, 2))
    reward[0, 1, 1] = 1.0  # the second state pays at the second step
    mdp = TabularMDP(kernel, reward, np.array([[1.0, 0.0, 0.0]]))
    counts = Counts.zeros(1, 2, 3, 2)
    counts.visits[:] = 1e6
    counts.transitions[:] = 1e6 * kernel
    baseline = np.zeros((1, 2, 3, 2))
    baseline[..., 0] = 1
    learner = DOPE(Problem(baseline, 0.1, reward), baseline_value=np.array([0.3]), episodes=100)
    log = np.log(6 * 9 * 2 * 2 * 100 / 0.05)
    radius = 2 * np.sqrt(log * kernel * (1 - kernel) / 1e6) + 14 * log / 3e6
    total = radius.sum(-1)[0]
    plan = learner.plan(counts)
    # Action 0 at both steps: the better estimate at first, the larger radius and so the larger bonus.
    moved = 0.3 + radius[0, 0, 0, 0, 1]
    assert plan.safe[0] and plan.first[0, 0, 0].tolist() == pytest.approx([1, 0])
    assert plan.upper[0, 0] == pytest.approx(moved + 4 / 0.2 * (total[0, 0, 0] + total[1, 0, 0]), abs=1e-6)
    assert plan.lower[0, 0] == pytest.approx(moved - 2 * (total[0, 0, 0] + total[1, 0, 0]), abs=1e-6)
    assert mdp.value(plan.first)[0] == pytest.approx(0.3)


def test_optpess_waits_for_the_middle() -> None:
    """The baseline is played until its own pessimistic value is above (floor + value) / 2, solvable or not."""
    mdp = random_mdps(1, 2, 2, 2, seed=3)
    counts = small_mdps.counted(mdp, 3000, np.full((1, 2, 2, 2), 0.5))
    n = np.maximum(counts.visits[0], 1)
    kernel = np.where(counts.visits[0][..., None] > 0, counts.transitions[0] / n[..., None], 0.5)[None]
    between = 0
    for scale in np.geomspace(0.001, 0.5, 40):
        learner = made(OptPessLP, mdp, scale=float(scale), share=0.8)
        floor, value = float(learner.problem.floor[0]), float(learner.baseline_value[0])
        beta = scale * np.sqrt(np.log(32 * 4 * 2 * 2 * 10_000 / 0.05) / n)
        after = np.zeros(2)
        for h in (1, 0):
            q = mdp.reward[0, h] - 5 * beta[h] + kernel[0, h] @ after
            after = (learner.problem.baseline[0, h] * q).sum(-1)
        assert learner.plan(counts).safe[0] == (after[0] > (floor + value) / 2)
        between += floor < after[0] <= (floor + value) / 2
    assert between


@pytest.mark.parametrize(("learner", "scale", "episodes"), [(DOPE, 0.003, 3000), (OptPessLP, 0.01, 20_000)])
def test_the_floor_is_kept_at_a_practical_scale(learner, scale: float, episodes: int) -> None:
    mdp = random_mdps(3, 3, 2, 2, seed=9)
    mine = made(learner, mdp, scale=scale, eta=5.0)
    histories, _ = simulate(mine, mdp, episodes)
    for run, history in enumerate(histories):
        assert history.below(float(mine.problem.floor[run])) == 0
    best = mdp.optimal()[0]
    assert any(history.values[-1] > 0.98 * v for history, v in zip(histories, best, strict=True))


def test_what_they_have_to_be_told() -> None:
    mdp = random_mdps(1, 2, 2, 2)
    baseline = mdp.boltzmann(3)
    problem = Problem(baseline, 0.5, mdp.reward)
    with pytest.raises(ConfigError, match="^baseline_value: got"):
        DOPE(problem, baseline_value=np.array([0.4]), episodes=10)
    with pytest.raises(ConfigError, match="^episodes: got 0"):
        DOPE(problem, baseline_value=np.array([0.6]), episodes=0)
    with pytest.raises(ConfigError, match="^reward: optpess-lp needs"):
        OptPessLP(Problem(baseline, 0.5), baseline_value=np.array([0.6]), episodes=10)
    with pytest.raises(ConfigError, match="^objective: dope maximises"):
        DOPE(Problem(baseline, 0.5, mdp.reward, mdp.reward), baseline_value=np.array([0.6]), episodes=10)
