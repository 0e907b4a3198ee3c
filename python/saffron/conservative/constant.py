"""The baseline in every episode: what conservative exploration has to improve on."""

from __future__ import annotations

import numpy as np

from saffron.conservative.counts import Counts
from saffron.conservative.evaluation import evaluate
from saffron.conservative.learner import Learner, Plan


class ConstantBaseline(Learner):
    """pi^b, whatever was seen; its bounds are computed all the same."""

    name = "baseline"
    two_signals = True

    def plan(self, counts: Counts) -> Plan:
        problem = self.problem
        found = self.widths(counts, self.confidence)
        lower, upper = evaluate(counts, found, self.confidence, self.reward(found), problem.start, problem.baseline)
        runs, steps, _, _ = problem.shape
        return Plan(
            first=problem.baseline,
            second=problem.baseline,
            weight=np.zeros(runs),
            lower=lower[:, None],
            upper=upper[:, None],
            h0=np.full(runs, steps),
            h0_second=np.full(runs, steps),
            safe=lower >= problem.floor,
        )
