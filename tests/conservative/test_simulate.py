"""Simulation in blocks is simulation episode by episode; counts are what was sampled."""

from __future__ import annotations

import numpy as np
import pytest
import small_mdps

from saffron.conservative import Confidence, Counts, Problem, StepMix, TabularMDP, random_mdps, simulate
from saffron.errors import ConfigError

PRACTICAL = Confidence(scale=0.003)


def draw(probabilities: np.ndarray, uniform: float) -> int:
    return int((uniform >= np.cumsum(probabilities)[:-1]).sum())


def one_by_one(learner: StepMix, mdp: TabularMDP, episodes: int, seed: int, run: int, every: int | None):
    """The same, an episode at a time, of one run. Returns the values of the episodes and the counts."""
    _, steps, states, actions = learner.problem.shape
    counts = Counts.zeros(1, steps, states, actions)
    numbers = np.random.default_rng([seed, run, 0]).random((8192, 2 * steps + 2))
    values, plan, since = [], None, 0
    threshold = np.zeros(counts.visits.shape)
    for number in range(episodes):
        if plan is None or (every is None and (counts.visits >= threshold).any()) or since == every:
            plan, since = learner.plan(counts), 0
            value = float(((1 - plan.weight) * mdp.value(plan.first) + plan.weight * mdp.value(plan.second))[0])
            threshold = np.maximum(2 * counts.visits, 1)
        u = numbers[number]
        policy = plan.second if u[0] < plan.weight[0] else plan.first
        state = draw(mdp.start[0], u[1])
        for h in range(steps):
            action = draw(policy[0, h, state], u[2 * h + 2])
            after = draw(mdp.kernel[0, h, state, action], u[2 * h + 3])
            counts.transitions[0, h, state, action, after] += 1
            counts.visits[0, h, state, action] += 1
            state = after
        values.append(value)
        since += 1
    return np.array(values), counts


@pytest.mark.parametrize("replan", ["doubling", 7, 1])
def test_blocks_change_nothing(replan) -> None:
    mdp = random_mdps(3, 3, 2, 3, seed=1)
    baseline = mdp.boltzmann(3)
    learner = StepMix(Problem(baseline, 0.8 * mdp.value(baseline), mdp.reward), PRACTICAL)
    histories, counts = simulate(learner, mdp, 700, replan=replan, seed=11, first_run=4)
    for run in range(3):
        which = np.array([run])
        alone = TabularMDP(mdp.kernel[which], mdp.reward[which], mdp.start[which])
        every = None if replan == "doubling" else replan
        values, expected = one_by_one(learner.of(which), alone, 700, 11, 4 + run, every)
        history = histories[run]
        np.testing.assert_allclose(np.repeat(history.values, history.episodes), values, atol=1e-12)
        assert (expected.transitions[0] == counts.transitions[run]).all()
        assert (expected.visits[0] == counts.visits[run]).all()


def test_histories_add_up() -> None:
    mdp = random_mdps(2, 3, 2, 2)
    baseline = mdp.boltzmann(3)
    learner = StepMix(Problem(baseline, 0.8 * mdp.value(baseline), mdp.reward), PRACTICAL)
    seen = []
    (history, _), counts = simulate(learner, mdp, 20_000, observe=lambda runs, plan: seen.extend(runs))
    assert history.episodes.sum() == 20_000 and counts.visits[0, 0].sum() == 20_000  # more than one chunk
    assert seen.count(0) == len(history.episodes)
    episodes = np.repeat(history.values, history.episodes)
    assert history.curve(np.array([1, 137, 20_000])) == pytest.approx([episodes[:k].sum() for k in (1, 137, 20_000)])
    assert history.at(np.array([1, 137, 20_000])) == pytest.approx(episodes[[0, 136, 19_999]])
    middle = float(np.median(episodes))
    assert history.below(middle) == (episodes < middle - 1e-9).sum()
    assert history.below(middle, 999) == (episodes[:999] < middle - 1e-9).sum()


def test_rewards_that_depend_on_where_one_arrives() -> None:
    mdp = random_mdps(1, 3, 2, 2)
    arrival = np.random.default_rng(0).random(mdp.kernel.shape)
    mdp = TabularMDP(mdp.kernel, (arrival * mdp.kernel).sum(-1), mdp.start, arrival)
    baseline = np.full((1, 2, 3, 2), 0.5)
    _, counts = simulate(StepMix(Problem(baseline, 1.9)), mdp, 3000)
    assert counts.rewards == pytest.approx((counts.transitions * arrival).sum(-1))
    assert counts.squares == pytest.approx((counts.transitions * arrival**2).sum(-1))


def test_offline_counts_are_a_start() -> None:
    mdp = random_mdps(2, 3, 2, 2)
    baseline = mdp.boltzmann(3)
    offline = small_mdps.counted(mdp, 50, baseline)
    learner = StepMix(Problem(baseline, 0.8 * mdp.value(baseline), mdp.reward), PRACTICAL)
    before = offline.transitions.copy()
    _, counts = simulate(learner, mdp, 100, counts=offline)
    assert (offline.transitions == before).all() and (counts.visits[:, 0].sum((1, 2)) == 150).all()


def test_counts_of_trajectories() -> None:
    rng = np.random.default_rng(0)
    for episodes in (1, 2000):  # both ways to add
        states, actions = rng.integers(0, 4, (episodes, 4)), rng.integers(0, 3, (episodes, 3))
        rewards = rng.random((episodes, 3))
        counts = Counts.from_trajectories(states, actions, rewards, num_states=4, num_actions=3)
        expected = Counts.zeros(1, 3, 4, 3)
        for e in range(episodes):
            for h in range(3):
                cell = (0, h, states[e, h], actions[e, h])
                expected.transitions[(*cell, states[e, h + 1])] += 1
                expected.visits[cell] += 1
                expected.rewards[cell] += rewards[e, h]
                expected.squares[cell] += rewards[e, h] ** 2
        for a, b in zip(counts.arrays(), expected.arrays(), strict=True):
            np.testing.assert_allclose(a, b)
    half = Counts.from_trajectories(states[:900], actions[:900], rewards[:900], num_states=4, num_actions=3)
    rest = Counts.from_trajectories(states[900:], actions[900:], rewards[900:], num_states=4, num_actions=3)
    for a, b in zip((half + rest).arrays(), counts.arrays(), strict=True):
        np.testing.assert_allclose(a, b)


@pytest.mark.parametrize(
    ("states", "actions", "named"),
    [
        ([[0, 4]], [[0]], "states"),
        ([[0, -1]], [[0]], "states"),
        ([[0, 1]], [[3]], "actions"),
        ([[0, 1]], [[0, 1]], "actions"),
    ],
)
def test_trajectories_are_checked(states, actions, named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}: got"):
        Counts.from_trajectories(np.array(states), np.array(actions), num_states=4, num_actions=3)


def test_arguments_are_checked() -> None:
    mdp = random_mdps(1, 2, 2, 2)
    learner = StepMix(Problem(mdp.boltzmann(1), 0.1, mdp.reward))
    with pytest.raises(ConfigError, match="^replan: got 0"):
        simulate(learner, mdp, 5, replan=0)
    with pytest.raises(ConfigError, match="^episodes: got 0"):
        simulate(learner, mdp, 0)
    with pytest.raises(ConfigError, match="^mdp: got shape"):
        simulate(learner, random_mdps(1, 2, 2, 3), 5)
    with pytest.raises(ConfigError, match="^counts: got shape"):
        Counts.zeros(1, 2, 2, 2) + Counts.zeros(1, 2, 3, 2)
    with pytest.raises(ConfigError, match="^kernel: got"):
        TabularMDP(mdp.kernel * 0.9, mdp.reward, mdp.start)
    with pytest.raises(ConfigError, match="^reward: got values from"):
        TabularMDP(mdp.kernel, mdp.reward * 3, mdp.start)
