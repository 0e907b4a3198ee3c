"""Conservative exploration: learning with a floor under the expected return of every episode.

NumPy and SciPy alone; nothing here imports torch. `StepMixController` is for a running system; `Learner`s are pure
functions from counts to plans; `simulate` runs them on known MDPs. docs/conservative.md says what is guaranteed.
"""

from saffron.conservative.all_or_nothing import AllOrNothing
from saffron.conservative.confidence import Confidence
from saffron.conservative.constant import ConstantBaseline
from saffron.conservative.controller import StepMixController, baseline_bound
from saffron.conservative.counts import Counts
from saffron.conservative.dope import DOPE
from saffron.conservative.drift import Drift
from saffron.conservative.environments import estimate_mdp, play, read_mdp
from saffron.conservative.episode import Episode
from saffron.conservative.epsmix import EpsMix
from saffron.conservative.learner import WEIGHTS, Learner, Plan, Problem
from saffron.conservative.mdp import TabularMDP, random_mdps
from saffron.conservative.offline import LearnedBaseline, NoSafePolicyError, learn_baseline, offline_problem
from saffron.conservative.optpess import OptPessLP
from saffron.conservative.replicas import merge
from saffron.conservative.simulate import History, simulate
from saffron.conservative.stepmix import StepMix
from saffron.conservative.ucbvi import UCBVI

LEARNERS = {
    learner.name: learner for learner in (StepMix, EpsMix, UCBVI, AllOrNothing, ConstantBaseline, DOPE, OptPessLP)
}

__all__ = [
    "AllOrNothing",
    "Confidence",
    "ConstantBaseline",
    "Counts",
    "DOPE",
    "Drift",
    "EpsMix",
    "Episode",
    "History",
    "LEARNERS",
    "Learner",
    "LearnedBaseline",
    "NoSafePolicyError",
    "OptPessLP",
    "Plan",
    "Problem",
    "StepMix",
    "StepMixController",
    "TabularMDP",
    "UCBVI",
    "WEIGHTS",
    "baseline_bound",
    "estimate_mdp",
    "learn_baseline",
    "merge",
    "offline_problem",
    "play",
    "random_mdps",
    "read_mdp",
    "simulate",
]
