"""What adaptive width is told, and the MDP of one risk bin that it makes of it."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from saffron.conservative import Confidence, Drift, Problem
from saffron.conservative.arguments import flag, instance, listed, real, whole
from saffron.conservative.learner import WEIGHTS, safety_weights
from saffron.errors import ConfigError

UNSAFE, SAFE = 0, 1  # states of the last step


@dataclass(frozen=True, slots=True)
class WidthSettings:
    """How requests, searches and verdicts become a Markov decision process.

    Attributes:
        floors: the smallest allowed share of safe answers, of each risk bin; a tuple of one: of all of them.
        widths: what may be chosen, ascending; the last is the widest search, the fallback.
        phases: choices in a request; the last one lasts to its end.
        phase_tokens: tokens of a phase.
        risk_edges: ascending; a request's risk score (the guard's reward of prompt and prefill, high is harmless) falls
            in bin 0 below the first, and so on. Every bin is an MDP of its own, with a floor of its own.
        score_edges: ascending; the best MRM score of the search, likewise, is the state.
        wide: the state also says whether the last width was at least this.
        confidence: of the bounds; scale 1 is what the proof needs. `delta` is for each bin, and once more for all
            choices of a fixed width from a log together.
        drift: measures against traffic that changes.
        weights: lambda of the policies that maximise saved compute + lambda * safety; the one that saves most is
            played.
    """

    floors: tuple[float, ...] = (0.9,)
    widths: tuple[int, ...] = (1, 4, 16, 64)
    phases: int = 4
    phase_tokens: int = 8
    risk_edges: tuple[float, ...] = (0.0,)
    score_edges: tuple[float, ...] = (0.0,)
    wide: int = 16
    confidence: Confidence = field(default_factory=Confidence)
    drift: Drift = field(default_factory=lambda: Drift(baseline_share=0.02, alarm_shift=0.1))
    weights: tuple[float, ...] = WEIGHTS

    def __post_init__(self) -> None:
        for name in ("floors", "widths", "risk_edges", "score_edges", "weights"):
            kind = _whole if name == "widths" else _number
            given = listed(name, getattr(self, name), "a sequence of numbers")
            object.__setattr__(self, name, tuple(kind(name, one) for one in given))
        for name in ("phases", "phase_tokens", "wide"):
            object.__setattr__(self, name, _whole(name, getattr(self, name)))
        object.__setattr__(self, "weights", safety_weights(self.weights))
        instance("confidence", self.confidence, Confidence)
        instance("drift", self.drift, Drift)
        if len(self.widths) < 2:
            raise ConfigError(f"widths: got {self.widths}, expected at least two")
        for name in ("widths", "risk_edges", "score_edges"):
            values = getattr(self, name)
            if not all(map(math.isfinite, values)) or list(values) != sorted(set(values)):
                raise ConfigError(f"{name}: got {values}, expected finite numbers in ascending order")
        if len(self.floors) not in (1, self.bins) or not all(0 <= floor <= 1 for floor in self.floors):
            raise ConfigError(
                f"floors: got {self.floors}, expected one number from 0 to 1, or one for each of {self.bins} risk bins"
            )

    @property
    def bins(self) -> int:
        """Risk bins."""
        return len(self.risk_edges) + 1

    @property
    def widest(self) -> int:
        """The place of the widest search among the widths."""
        return len(self.widths) - 1

    @property
    def states(self) -> int:
        """States of a step: bins of the score, with and without a wide search before; at least safe and unsafe."""
        return 2 * (len(self.score_edges) + 1)

    def floor(self, risk_bin: int) -> float:
        whole("risk_bin", risk_bin, 0, self.bins - 1)
        return self.floors[risk_bin % len(self.floors)]

    def bin(self, risk: float) -> int:
        """The risk bin of a risk score. NaN: the first, the riskiest."""
        risk = real("risk", risk, "a number", finite=False)
        return 0 if math.isnan(risk) else bisect_right(self.risk_edges, risk)

    def state(self, score: float, action: int) -> int:
        """The state after a phase: of the best score, and of the width it was searched with (its place)."""
        bins, score = len(self.score_edges) + 1, real("score", score, "a number", finite=False)
        whole("action", action, 0, self.widest)
        place = 0 if math.isnan(score) else bisect_right(self.score_edges, score)
        return place + bins * (self.widths[action] >= self.wide)

    def trajectory(self, actions: Sequence[int], scores: Sequence[float], safe: bool) -> tuple[list[int], list[int]]:
        """States of steps 0..phases + 1 and actions of steps 0..phases of a request; a phase that did not happen
        because the search had ended goes on with what was.

        Args:
            actions, scores: of each phase, the best score after it; as many, at least one and at most `phases`.
        """
        if not 0 < len(actions) == len(scores) <= self.phases:
            raise ConfigError(
                f"actions, scores: got {len(actions)} and {len(scores)}, expected as many, 1 to {self.phases}"
            )
        missing = self.phases - len(actions)
        actions = [*actions, *[actions[-1]] * missing]
        scores = [*scores, *[scores[-1]] * missing]
        last = SAFE if flag("safe", safe) else UNSAFE
        between = [self.state(score, action) for score, action in zip(scores[:-1], actions, strict=False)]
        return [0, *between, last, last], [*actions, self.widest]

    def problem(self, risk_bin: int, baseline: int) -> Problem:
        """The MDP of a bin whose baseline is a fixed width (its place).

        Steps 0..phases - 1 choose the width of a phase. Step `phases` is the verdict: reward 1 in state SAFE. So the
        safety is a known function of the state, and at most 1 in a request. Saved compute is
        (1 - width / widest) / phases per phase: a step's FLOPs are proportional to its beams but for the prompt's.
        """
        steps, actions = self.phases + 1, len(self.widths)
        whole("baseline", baseline, 0, self.widest)
        shape = (steps, self.states, actions)
        policy, safety, saved = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        policy[:, :, baseline] = 1.0
        safety[-1, SAFE] = 1.0
        saved[:-1] = (1 - np.array(self.widths) / self.widths[-1]) / self.phases
        return Problem(
            policy, np.array(self.floor(risk_bin)), safety, saved,
            bound=1.0, objective_bound=1.0, weights=self.weights,
        )  # fmt: skip


def _whole(name: str, given: object) -> int:
    return whole(name, given, 1)


def _number(name: str, given: object) -> float:
    return real(name, given, "finite numbers")
