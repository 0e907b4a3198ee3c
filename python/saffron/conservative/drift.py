"""What a controller does about traffic that changes: forgetting, an alarm, a share of episodes for the baseline."""

from __future__ import annotations

import math
from dataclasses import dataclass

from saffron.conservative.arguments import within

SMALLEST = 1e-6  # of a failure rate and of its distance to 1, so that logarithms are finite


@dataclass(frozen=True, slots=True)
class Drift:
    """Measures against drift. By default there are none: the guarantee is for one MDP that does not change.

    Attributes:
        baseline_share: share of the episodes that play the baseline whatever the plan says, in [0, 1].
        half_life: episodes after which a count has lost half of its weight; None: nothing is forgotten.
        alarm_shift: if given, a CUSUM on the return of the floor's reward watches for a rise of the failure,
            1 - return / bound, by as much above what the floor allows. On alarm all counts are dropped, and the
            baseline is played until new ones allow more.
        alarm_run_length: mean number of episodes to a false alarm, at least; above 1.
    """

    baseline_share: float = 0.0
    half_life: float | None = None
    alarm_shift: float | None = None
    alarm_run_length: float = 1e6

    def __post_init__(self) -> None:
        for name, low, high, open_low, open_high, allowed in (
            ("baseline_share", 0, 1, False, False, "a number from 0 to 1"),
            ("half_life", 0, math.inf, True, False, "a finite number above 0, or None"),
            ("alarm_shift", 0, 1, True, True, "a number between 0 and 1, or None"),
            ("alarm_run_length", 1, math.inf, True, False, "a finite number above 1"),
        ):
            given = getattr(self, name)
            if given is not None or not allowed.endswith("None"):
                found = within(name, given, allowed, low, high, open_low=open_low, open_high=open_high)
                object.__setattr__(self, name, found)

    def weight_after(self, episodes: float) -> float:
        """What a count still weighs after so many episodes."""
        if self.half_life is None:
            return 1.0
        return 0.5 ** (within("episodes", episodes, "a number of at least 0", 0, math.inf) / self.half_life)


class Cusum:
    """Sums up evidence that the mean failure has risen from `accepted` to `accepted + shift` (Page 1954).

    With failure f in [0, 1], p0 = accepted and p1 = p0 + shift, for every outcome

        s = max(0, s + f log(p1 / p0) + (1 - f) log((1 - p1) / (1 - p0))),   alarm at s >= log(run_length).

    exp of the increment is convex in f, so that its mean is at most 1 for every law of f with a mean of at most p0; the
    mean number of outcomes to a false alarm is then at least `run_length` (Lorden 1971; the step to f between 0 and 1
    is elementary).
    """

    def __init__(self, accepted: float, shift: float, run_length: float, level: float = 0.0) -> None:
        p0 = min(max(accepted, SMALLEST), 1 - 2 * SMALLEST)
        p1 = min(p0 + shift, 1 - SMALLEST)
        self._failed, self._succeeded = math.log(p1 / p0), math.log((1 - p1) / (1 - p0))
        self._threshold = math.log(run_length)
        self.level = level

    def add(self, failure: float) -> bool:
        """Counts one outcome, 0 (as good as can be) to 1; returns whether there is an alarm, which starts again at
        0."""
        self.level = max(0.0, self.level + failure * self._failed + (1 - failure) * self._succeeded)
        if self.level < self._threshold:
            return False
        self.level = 0.0
        return True
