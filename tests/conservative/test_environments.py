"""Gymnasium environments: what is read from them is what they do."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from saffron.conservative import (
    Confidence,
    Drift,
    Problem,
    StepMix,
    StepMixController,
    estimate_mdp,
    play,
    read_mdp,
    simulate,
)
from saffron.errors import ConfigError

gymnasium = pytest.importorskip("gymnasium")


def test_frozen_lake_is_read() -> None:
    """The known optimum of slippery FrozenLake, by value iteration over its own table."""
    env = gymnasium.make("FrozenLake-v1", is_slippery=True)
    found = read_mdp(env, 20)
    values = np.zeros(17)
    for _ in range(20):
        new = np.zeros(17)
        for state, outcomes in env.unwrapped.P.items():
            new[state] = max(
                sum(p * (r + (0.0 if done else values[after])) for p, after, r, done in outcomes[a]) for a in range(4)
            )
        values = new
    assert found.unscaled(float(found.mdp.optimal()[0][0])) == pytest.approx(values[0], abs=1e-12)
    assert (found.low, found.high) == (0.0, 1.0) and found.mdp.states == 17
    assert (found.mdp.kernel[0, 3, 16, :, 16] == 1).all() and (found.mdp.reward[0, :, 16] == 0).all()


def test_taxi_is_read_and_its_optimum_is_reached() -> None:
    """Rewards from -10 to 20, random starts; the optimal policy, played in the environment itself."""
    env = gymnasium.make("Taxi-v4")
    found = read_mdp(env, 20)
    value, policy, _ = found.mdp.optimal()
    returns = []
    for episode in range(200):
        state, _ = env.reset(seed=episode)
        total = 0.0
        for h in range(20):
            state, reward, ended, _, _ = env.step(int(policy[0, h, state].argmax()))
            total += float(reward)
            if ended:
                break
        returns.append(total)
    expected = found.unscaled(float(value[0]))
    assert (found.low, found.high) == (-10.0, 20.0)
    assert np.mean(returns) == pytest.approx(expected, abs=4 * np.std(returns) / np.sqrt(200))


def test_estimates_near_what_is_read() -> None:
    env = gymnasium.make("FrozenLake-v1", is_slippery=True, map_name="4x4")
    read, estimated = read_mdp(env, 4), estimate_mdp(env, 4, 8000)
    often = np.zeros(17, dtype=bool)
    often[[0, 1, 4]] = True
    assert np.abs(read.mdp.kernel - estimated.mdp.kernel)[:, :, often].max() < 0.06
    assert (estimated.mdp.start == read.mdp.start).all()
    uniform = np.full((1, 4, 17, 4), 0.25)
    assert float(read.mdp.value(uniform)[0]) == pytest.approx(float(estimated.mdp.value(uniform)[0]), abs=0.01)


def test_a_controller_learns_in_the_environment() -> None:
    """A corridor of two states: StepMix finds the way while the floor stands; rewards are estimated."""
    env = gymnasium.make("FrozenLake-v1", is_slippery=False, desc=["SG", "FF"])
    found = read_mdp(env, 2)
    baseline = np.zeros((2, 5, 4))
    baseline[..., 2], baseline[..., 0] = 0.7, 0.3  # right most of the time
    problem = Problem(baseline, 0.55, start=found.mdp.start)
    control = StepMixController(problem, confidence=Confidence(scale=0.05), drift=Drift(baseline_share=0.05))
    returns = play(env, control, 3000, found.low, found.high)
    assert returns[-1000:].mean() > 0.975 and control.current.h0[0] == 0  # the baseline's is 0.91
    assert control.counts().visits[0, 0].sum() == 3000 and (control.counts().visits[0, 1, 4] > 0).any()


def test_a_learner_on_what_was_read() -> None:
    env = gymnasium.make("FrozenLake-v1", is_slippery=True, desc=["SF", "FG"])
    found = read_mdp(env, 4)
    baseline = found.mdp.boltzmann(10.0)
    value = found.mdp.value(baseline)
    problem = Problem(baseline, 0.9 * value, start=found.mdp.start, bound=1.0)
    histories, _ = simulate(StepMix(problem, Confidence(scale=0.003)), found.mdp, 10_000)
    assert histories[0].below(float(problem.floor[0])) == 0 and histories[0].values[-1] > value[0]


def test_what_cannot_be_read_is_refused() -> None:
    lake = gymnasium.make("FrozenLake-v1")
    with pytest.raises(ConfigError, match="^steps: got 0"):
        read_mdp(lake, 0)
    with pytest.raises(ConfigError, match="^env: got spaces"):
        read_mdp(gymnasium.make("CartPole-v1"), 3)
    hidden = SimpleNamespace(
        observation_space=lake.observation_space, action_space=lake.action_space, unwrapped=SimpleNamespace()
    )
    with pytest.raises(ConfigError, match="^env: .* shows no kernel P"):
        read_mdp(hidden, 3)
    for name in ("observation_space", "action_space"):
        later = SimpleNamespace(**{**vars(hidden), name: gymnasium.spaces.Discrete(4, start=1)})
        with pytest.raises(ConfigError, match=f"^env: got an {name} that begins with 1"):
            estimate_mdp(later, 3, 1)
    with pytest.raises(ConfigError, match="^episodes: got 0"):
        estimate_mdp(lake, 3, 0)
    control = StepMixController(Problem(np.full((3, 4, 4), 0.25), 0.0))
    with pytest.raises(ConfigError, match="^controller: got 4 states"):
        play(lake, control, 1, 0.0, 1.0)
    control = StepMixController(Problem(np.full((3, 17, 4), 0.25), 0.0))
    with pytest.raises(ConfigError, match="^low, high: got 1.0 and 2.0"):
        play(lake, control, 1, 1.0, 2.0)
