"""Gymnasium environments with discrete spaces as finite-horizon MDPs: read where they show their kernel, else
estimated.

Rewards are scaled to [0, 1]: (reward - low) / (high - low). An episode that ends early goes on in one more state,
without reward, so that the value of every policy is (V - steps * low) / (high - low).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from saffron.conservative.arguments import real, refused, whole
from saffron.conservative.mdp import TabularMDP
from saffron.errors import ConfigError

if TYPE_CHECKING:
    from saffron.conservative.controller import StepMixController


class EnvironmentMDP(NamedTuple):
    """mdp: of one run, states + 1 states, the last being the end. low, high: rewards that 0 and 1 stand for."""

    mdp: TabularMDP
    low: float
    high: float

    def unscaled(self, value: float) -> float:
        """An expected return in the environment's own unit."""
        return value * (self.high - self.low) + self.mdp.steps * self.low


def read_mdp(env: Any, steps: int) -> EnvironmentMDP:
    """The MDP of an environment that shows its kernel as `env.unwrapped.P` (FrozenLake, Taxi, CliffWalking).

    Args:
        env: a `gymnasium.Env` with discrete spaces. steps: the horizon, at least 1.

    Raises:
        ConfigError: other spaces, or no kernel is shown; `estimate_mdp` then estimates it.
    """
    states, actions = _sizes(env, steps)
    table = getattr(env.unwrapped, "P", None)
    if table is None:
        raise ConfigError(f"env: {env} shows no kernel P, expected one; estimate_mdp(env, ...) needs none")
    kernel = np.zeros((states + 1, actions, states + 1))
    paid = np.zeros(kernel.shape)  # probability times reward
    rewards = {0.0}
    for state, outcomes in table.items():
        for action, transitions in outcomes.items():
            for probability, after, reward, terminated in transitions:
                place = states if terminated else after
                kernel[state, action, place] += probability
                paid[state, action, place] += probability * reward
                rewards.add(float(reward))
    start = getattr(env.unwrapped, "initial_state_distrib", None)
    if start is None:
        raise ConfigError(f"env: {env} shows no initial_state_distrib, expected one; estimate_mdp(env, ...) needs none")
    return _assemble(
        kernel, paid, np.append(np.asarray(start, dtype=np.float64), 0.0), min(rewards), max(rewards), steps
    )


def estimate_mdp(env: Any, steps: int, episodes: int, seed: int = 0) -> EnvironmentMDP:
    """An MDP from episodes of uniformly random actions; the kernel is taken to be the same at every step.

    What was never tried leads to the end without reward. Use it to try things out: no guarantee holds for the
    environment itself when it is planned for with estimates (a learner on the environment itself: `play`).

    Raises:
        ConfigError: other spaces, or episodes below 1.
    """
    states, actions = _sizes(env, steps)
    whole("episodes", episodes, 1)
    whole("seed", seed, 0)
    rng = np.random.default_rng(seed)
    kernel, paid = np.zeros((states + 1, actions, states + 1)), np.zeros((states + 1, actions, states + 1))
    start = np.zeros(states + 1)
    low, high = 0.0, 0.0
    for episode in range(episodes):
        state, _ = env.reset(seed=seed + episode)
        start[state] += 1
        for _ in range(steps):
            action = int(rng.integers(actions))
            after, reward, terminated, truncated, _ = env.step(action)
            place = states if terminated else after
            kernel[state, action, place] += 1
            paid[state, action, place] += reward
            low, high = min(low, float(reward)), max(high, float(reward))
            if terminated or truncated:
                break
            state = after
    total = kernel.sum(-1, keepdims=True)
    seen = np.maximum(total, 1)
    return _assemble(kernel / seen, paid / seen, start / start.sum(), low, high, steps)


def play(env: Any, controller: StepMixController, episodes: int, low: float, high: float, seed: int = 0) -> np.ndarray:
    """Lets a controller act in an environment and learn from it. The controller has one state more than it, the end.

    low, high: of the environment's rewards, 0 among them. Returns the undiscounted returns of the episodes, in its
        own unit.

    Raises:
        ConfigError: sizes do not fit, or a reward lies outside of low to high.
    """
    if not hasattr(controller, "horizon"):
        raise refused("controller", controller, "a StepMixController")
    whole("episodes", episodes, 1)
    whole("seed", seed, 0)
    low, high = (real("low, high", given, "an interval that holds 0") for given in (low, high))
    states, actions = _sizes(env, controller.horizon)
    if (controller.states, controller.actions) != (states + 1, actions):
        raise ConfigError(
            f"controller: got {controller.states} states and {controller.actions} actions, expected {states + 1} "
            f"and {actions}"
        )
    if not low <= 0 <= high or low == high:
        raise ConfigError(f"low, high: got {low} and {high}, expected an interval that holds 0")
    zero = -low / (high - low)
    returns = np.zeros(episodes)
    for number in range(episodes):
        state, _ = env.reset(seed=seed + number)
        episode = controller.begin(state)
        trajectory: list[tuple[int, int, int, float]] = []
        ended = False
        for _ in range(controller.horizon):
            action = episode.act(state)
            if ended:
                trajectory.append((state, action, state, zero))
                continue
            after, reward, terminated, truncated, _ = env.step(action)
            if not low <= reward <= high:
                raise ConfigError(f"low, high: the environment paid {reward}, expected rewards from {low} to {high}")
            returns[number] += reward
            ended = bool(terminated or truncated)  # a time limit below the horizon ends the episode too
            after = states if ended else int(after)
            trajectory.append((state, action, after, (float(reward) - low) / (high - low)))
            state = after
        controller.update(trajectory)
    return returns


def _sizes(env: Any, steps: int) -> tuple[int, int]:
    if not all(hasattr(env, name) for name in ("observation_space", "action_space", "unwrapped")):
        raise refused("env", env, "a gymnasium.Env")
    whole("steps", steps, 1)
    sizes = [getattr(space, "n", None) for space in (env.observation_space, env.action_space)]
    if None in sizes:
        raise ConfigError(f"env: got spaces {env.observation_space} and {env.action_space}, expected Discrete ones")
    for name, space in (("observation_space", env.observation_space), ("action_space", env.action_space)):
        if first := int(getattr(space, "start", 0)):
            raise ConfigError(f"env: got an {name} that begins with {first}, expected one that begins with 0")
    return int(sizes[0]), int(sizes[1])  # type: ignore[arg-type]


def _assemble(
    kernel: np.ndarray, paid: np.ndarray, start: np.ndarray, low: float, high: float, steps: int
) -> EnvironmentMDP:
    """kernel: [states, actions, states], rows of sum 0 lead to the end. paid: probability times reward."""
    end = kernel.shape[0] - 1
    kernel[kernel.sum(-1) == 0, end] = 1.0
    span = high - low if high > low else 1.0
    arrival = np.where(kernel > 0, paid / np.where(kernel > 0, kernel, 1.0), 0.0)
    scaled = np.clip((arrival - low) / span, 0.0, 1.0)
    reward = np.clip((kernel * scaled).sum(-1), 0.0, 1.0)

    def every_step(array: np.ndarray) -> np.ndarray:
        return np.broadcast_to(array, (1, steps, *array.shape))

    mdp = TabularMDP(every_step(kernel), every_step(reward), start[None], every_step(scaled))
    return EnvironmentMDP(mdp, low, low + span)
