"""Brute force for small MDPs: every deterministic policy, and bounds computed cell by cell in plain Python."""

from __future__ import annotations

import itertools
import math

import numpy as np

from saffron.conservative import Confidence, Counts, TabularMDP


def policies(steps: int, states: int, actions: int) -> np.ndarray:
    """All deterministic policies: float64 [actions^(steps * states), steps, states, actions]."""
    choices = np.array(list(itertools.product(range(actions), repeat=steps * states)))
    return np.eye(actions)[choices.reshape(-1, steps, states)]


def value(mdp: TabularMDP, policy: np.ndarray, run: int = 0) -> float:
    """The value of one policy [steps, states, actions], by summing over all trajectories' probabilities forwards."""
    law = mdp.start[run].copy()
    total = 0.0
    for h in range(mdp.steps):
        joint = law[:, None] * policy[h]
        total += float((joint * mdp.reward[run, h]).sum())
        law = np.einsum("sa,sat->t", joint, mdp.kernel[run, h])
    return total


def counted(mdp: TabularMDP, episodes: int, policy: np.ndarray, seed: int = 0) -> Counts:
    """Counts of episodes that were sampled one by one. policy: [runs, steps, states, actions]."""
    rng = np.random.default_rng(seed)
    counts = Counts.zeros(*mdp.kernel.shape[:4])
    for run in range(mdp.runs):
        for _ in range(episodes):
            state = rng.choice(mdp.states, p=mdp.start[run])
            for h in range(mdp.steps):
                action = rng.choice(mdp.actions, p=policy[run, h, state])
                after = rng.choice(mdp.states, p=mdp.kernel[run, h, state, action])
                counts.transitions[run, h, state, action, after] += 1
                counts.visits[run, h, state, action] += 1
                reward = mdp.reward[run, h, state, action]
                if mdp.arrival_reward is not None:
                    reward = mdp.arrival_reward[run, h, state, action, after]
                counts.rewards[run, h, state, action] += reward
                counts.squares[run, h, state, action] += reward**2
                state = after
    return counts


def interval(
    counts: Counts,
    reward: np.ndarray | None,
    policy: np.ndarray,
    start: np.ndarray,
    confidence: Confidence,
    bound: float,
    comparators: int,
) -> tuple[float, float]:
    """Lower and upper bound of the value of one policy, of run 0, by the equations as they are written."""
    steps, states, actions = counts.visits.shape[1:]
    delta = confidence.delta / comparators / (2 if reward is None else 1)
    first = math.log(3 * states * actions * steps / delta)
    up, low = [0.0] * states, [0.0] * states
    for h in reversed(range(steps)):
        cap, after = min(steps - h, bound), min(steps - h - 1, bound)
        within = bound if confidence.value_range == "horizon" else after
        new_up, new_low = [0.0] * states, [0.0] * states
        for s in range(states):
            for a in range(actions):
                n = float(counts.visits[0, h, s, a])
                if n == 0 and (within > 0 or reward is None):
                    q_up, q_low = cap, 0.0
                elif n == 0:
                    q_up = q_low = float(reward[h, s, a])
                else:
                    p = [float(x) / n for x in counts.transitions[0, h, s, a]]
                    mean = sum(x * y for x, y in zip(p, up, strict=True))
                    variance = sum(x * (y - mean) ** 2 for x, y in zip(p, up, strict=True))
                    beta = first + states * math.log(8 * math.e * (n + 1))
                    star = beta if confidence.uniform else first + math.log(8 * math.e * (n + 1))
                    gap = sum(x * (u - v) for x, u, v in zip(p, up, low, strict=True))
                    width = 3 * math.sqrt(variance * star / n) + 14 * steps * within * beta / n + gap / steps
                    paid, margin = _reward(counts, reward, h, s, a, delta * comparators)
                    width = confidence.scale * (width + margin)
                    q_up = min(cap, paid + mean + width)
                    q_low = max(0.0, paid + sum(x * v for x, v in zip(p, low, strict=True)) - width)
                new_up[s] += policy[h, s, a] * q_up
                new_low[s] += policy[h, s, a] * q_low
        up, low = new_up, new_low
    return float(np.dot(start, low)), float(np.dot(start, up))


def _reward(counts: Counts, reward: np.ndarray | None, h: int, s: int, a: int, delta: float) -> tuple[float, float]:
    if reward is not None:
        return float(reward[h, s, a]), 0.0
    steps, states, actions = counts.visits.shape[1:]
    n = float(counts.visits[0, h, s, a])
    mean = float(counts.rewards[0, h, s, a]) / n
    variance = max(0.0, float(counts.squares[0, h, s, a]) / n - mean**2)
    x = math.log(3 * states * actions * steps * n * (n + 1) / delta)
    return mean, math.sqrt(2 * variance * x / n) + 3 * x / n
