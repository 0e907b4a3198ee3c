"""Tabular episodic MDPs with step-dependent kernels, and their exact values.

Every array has a leading axis of `runs`: independent problems of equal size are planned and simulated together. Steps
are counted from 0 in arrays and from 1 in equations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from saffron.conservative.arguments import floats, whole, within
from saffron.errors import ConfigError

ROUNDING = 1e-9  # by how much probabilities may miss 1


@dataclass(frozen=True, slots=True, eq=False)
class TabularMDP:
    """Episodic MDPs of one size.

    Attributes:
        kernel: float64 [runs, steps, states, actions, states], P_h(s'|s,a). An axis may be a broadcast view.
        reward: float64 [runs, steps, states, actions], the mean of r_h(s,a), in [0, 1].
        start: float64 [runs, states], the law of the first state.
        arrival_reward: float64 [runs, steps, states, actions, states] or None. If given, the reward that is observed
            depends on the next state, and `reward` is its mean; otherwise the observed reward is `reward` itself.
    """

    kernel: np.ndarray
    reward: np.ndarray
    start: np.ndarray
    arrival_reward: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("kernel", "reward", "start", "arrival_reward"):
            if name != "arrival_reward" or self.arrival_reward is not None:
                object.__setattr__(self, name, floats(name, getattr(self, name)))
        if self.kernel.ndim != 5 or self.kernel.shape[2] != self.kernel.shape[4]:
            raise ConfigError(f"kernel: got shape {self.kernel.shape}, expected [runs, steps, states, actions, states]")
        runs, steps, states, actions, _ = self.kernel.shape
        if self.reward.shape != (runs, steps, states, actions):
            raise ConfigError(f"reward: got shape {self.reward.shape}, expected {(runs, steps, states, actions)}")
        if self.start.shape != (runs, states):
            raise ConfigError(f"start: got shape {self.start.shape}, expected {(runs, states)}")
        if self.arrival_reward is not None and self.arrival_reward.shape != self.kernel.shape:
            raise ConfigError(f"arrival_reward: got shape {self.arrival_reward.shape}, expected {self.kernel.shape}")
        check_probabilities("kernel", self.kernel)
        check_probabilities("start", self.start)
        check_unit("reward", self.reward)

    @property
    def runs(self) -> int:
        return self.kernel.shape[0]

    @property
    def steps(self) -> int:
        return self.kernel.shape[1]

    @property
    def states(self) -> int:
        return self.kernel.shape[2]

    @property
    def actions(self) -> int:
        return self.kernel.shape[3]

    def value(self, policy: np.ndarray) -> np.ndarray:
        """V_1 of policies under the true kernel. policy: [runs, steps, states, actions]. Returns float64 [runs]."""
        policy = floats("policy", policy)
        if policy.shape != self.reward.shape:
            raise ConfigError(f"policy: got shape {policy.shape}, expected {self.reward.shape}")
        after = np.zeros((self.runs, self.states))
        for h in reversed(range(self.steps)):
            q = self.reward[:, h] + np.matmul(self.kernel[:, h], after[:, None, :, None])[..., 0]
            after = (policy[:, h] * q).sum(-1)
        return (self.start * after).sum(-1)

    def optimal(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Backward induction.

        Returns:
            V* [runs]; an optimal policy [runs, steps, states, actions] (ties: the lowest action); Q* of that shape.
        """
        q = np.empty(self.reward.shape)
        after = np.zeros((self.runs, self.states))
        for h in reversed(range(self.steps)):
            q[:, h] = self.reward[:, h] + np.matmul(self.kernel[:, h], after[:, None, :, None])[..., 0]
            after = q[:, h].max(-1)
        return (self.start * after).sum(-1), one_hot(q.argmax(-1), self.actions), q

    def boltzmann(self, eta: float) -> np.ndarray:
        """The policy in proportion to exp(eta Q*_h(s,a)): [runs, steps, states, actions]. eta 0 is uniform.

        The baseline of the paper's experiment (from memory; its eta is unknown).
        """
        eta = within("eta", eta, "a finite number of at least 0", 0, np.inf)
        _, _, q = self.optimal()
        weights = np.exp(eta * (q - q.max(-1, keepdims=True)))
        return weights / weights.sum(-1, keepdims=True)


def random_mdps(runs: int, states: int = 5, actions: int = 5, steps: int = 3, seed: int = 0) -> TabularMDP:
    """Random MDPs of the paper's experiment: rewards uniform in [0, 1], kernels uniform on the simplex, start in 0.

    The i-th run is made from (seed, i) alone, whatever the number of runs. (arXiv 2306.06265, section on experiments;
    certainty: paper, as quoted by an index of its reproducibility.)
    """
    seed = whole("seed", seed, 0)
    for name, size in (("runs", runs), ("states", states), ("actions", actions), ("steps", steps)):
        whole(name, size, 1)
    kernels, rewards = [], []
    for run in range(runs):
        rng = np.random.default_rng([seed, run])
        rewards.append(rng.random((steps, states, actions)))
        kernels.append(rng.dirichlet(np.ones(states), (steps, states, actions)))
    start = np.zeros((runs, states))
    start[:, 0] = 1.0
    return TabularMDP(np.array(kernels), np.array(rewards), start)


def one_hot(actions: np.ndarray, count: int) -> np.ndarray:
    """Deterministic policies as probabilities: [..., states] -> float64 [..., states, count]."""
    return (actions[..., None] == np.arange(count)).astype(np.float64)


def check_probabilities(name: str, array: np.ndarray) -> None:
    """Raises `ConfigError` unless the last axis holds probabilities."""
    sums = array.sum(-1)
    if not (np.isfinite(sums).all() and (array >= 0).all() and (np.abs(sums - 1) <= ROUNDING * array.shape[-1]).all()):
        raise ConfigError(f"{name}: got values that are no probabilities, expected numbers of at least 0 with sum 1")


def check_unit(name: str, array: np.ndarray) -> None:
    """Raises `ConfigError` unless all values lie in [0, 1]."""
    if not ((array >= 0).all() and (array <= 1).all()):
        low, high = np.min(array), np.max(array)
        raise ConfigError(f"{name}: got values from {low} to {high}, expected numbers from 0 to 1")
