"""Arguments of every public constructor and method: what is wrong is an error of ours that names the argument."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from saffron.adaptive import AdaptiveWidth, LoggedSearch, WidthControl, WidthSettings, qualify
from saffron.adaptive import merge as merge_widths
from saffron.conservative import (
    DOPE,
    LEARNERS,
    UCBVI,
    Confidence,
    Counts,
    Drift,
    EpsMix,
    OptPessLP,
    Problem,
    StepMix,
    StepMixController,
    TabularMDP,
    baseline_bound,
    estimate_mdp,
    learn_baseline,
    merge,
    offline_problem,
    play,
    random_mdps,
    read_mdp,
    simulate,
)
from saffron.errors import ConfigError

HUGE = 10**400
NO_NUMBER: list[Any] = ["a", b"1", [], [1.0], {}, object(), 1j, math.nan, True, np.bool_(True), np.array([0.5, 0.5])]
NO_REAL = [*NO_NUMBER, None, math.inf, -math.inf, HUGE, "0.5"]
NO_WHOLE = [*NO_REAL[:-2], "1", 0.5, 1.0, np.float64(1), Fraction(1, 2), -1, np.int64(-1)]
NO_FLAG = [0, 1, "yes", None, math.nan, []]
NO_KIND = [5, "a", None, {}, math.nan]
NO_PATH = [5, None, 0.5, True, b"state.npz", "a\0b", ["state.npz"]]
NO_ARRAY: list[Any] = ["a", object(), {}, None, [[1.0], [1.0, 2.0]], [HUGE], np.array(["1"]), np.array([1j])]

MDP = random_mdps(1, 2, 2, 2)
BASELINE = MDP.boltzmann(1.0)
PROBLEM = Problem(BASELINE, 0.1, MDP.reward)
COUNTS = Counts.zeros(1, 2, 2, 2)
CONTROL = StepMixController(PROBLEM)
WIDTHS = AdaptiveWidth(WidthSettings(widths=(1, 4), phases=2))
SETTINGS = WIDTHS.settings
HISTORY = simulate(StepMix(PROBLEM), MDP, 5)[0][0]
ENV = SimpleNamespace(
    observation_space=SimpleNamespace(n=1), action_space=SimpleNamespace(n=2), unwrapped=SimpleNamespace()
)
LOG = LoggedSearch(1.0, (1, 1), (0.0, 0.0), True)
STATES, ACTIONS = np.zeros((1, 2), dtype=int), np.zeros((1, 1), dtype=int)


def counted(**changed: Any) -> Counts:
    return Counts.from_trajectories(
        **{"states": STATES, "actions": ACTIONS, "num_states": 1, "num_actions": 1} | changed
    )


def control() -> WidthControl:
    return WIDTHS.begin(1.0)


# What is called with a wrong value, the name that the message begins with, and the wrong values.
CALLS: list[tuple[Callable[[Any], Any], str, list[Any]]] = [
    (lambda x: Confidence(delta=x), "delta", [*NO_REAL, 0, 1, -0.1]),
    (lambda x: Confidence(scale=x), "scale", [*NO_REAL, 0, 1.1]),
    (lambda x: Confidence(value_range=x), "value_range", [*NO_NUMBER, None, 1]),
    (lambda x: Confidence(uniform=x), "uniform", NO_FLAG),
    (lambda x: Drift(baseline_share=x), "baseline_share", [*NO_REAL, -0.1, 1.1]),
    (lambda x: Drift(half_life=x), "half_life", [*NO_NUMBER, math.inf, HUGE, 0, -1]),
    (lambda x: Drift(alarm_shift=x), "alarm_shift", [*NO_NUMBER, math.inf, HUGE, 0, 1]),
    (lambda x: Drift(alarm_run_length=x), "alarm_run_length", [*NO_REAL, 1, 0]),
    (lambda x: Drift(half_life=1).weight_after(x), "episodes", [*NO_REAL, -1]),
    (lambda x: Problem(x, 0.1), "baseline", [*NO_ARRAY, 1.0, math.nan, BASELINE * math.nan, BASELINE + 1]),
    (lambda x: Problem(BASELINE, x), "floor", [*NO_ARRAY, True, math.nan, math.inf, HUGE, [0.1, 0.1]]),
    (
        lambda x: Problem(BASELINE, 0.1, x),
        "reward",
        [*NO_ARRAY[:3], *NO_ARRAY[4:], 1.0, BASELINE * math.nan, BASELINE + 1],
    ),
    (lambda x: Problem(BASELINE, 0.1, MDP.reward, x), "objective", ["a", 1.0, BASELINE * math.inf, BASELINE[..., :1]]),
    (
        lambda x: Problem(BASELINE, 0.1, start=x),
        "start",
        [*NO_ARRAY, 0.0, 2, -1, True, HUGE, [0.5], [math.nan, 1], [1, 1]],
    ),
    (lambda x: Problem(BASELINE, 0.1, bound=x), "bound", [*NO_NUMBER, math.inf, HUGE, 0, 3]),
    (
        lambda x: Problem(BASELINE, 0.1, MDP.reward, MDP.reward, objective_bound=x),
        "objective_bound",
        ["a", math.nan, 0],
    ),
    (
        lambda x: Problem(BASELINE, 0.1, weights=x),
        "weights",
        ["a", 1.0, None, [], [-1], [math.nan], ["a"], [True], [HUGE]],
    ),
    (lambda x: Counts.zeros(x, 1, 1, 1), "runs", NO_WHOLE),
    (lambda x: Counts.zeros(1, x, 1, 1), "steps", NO_WHOLE),
    (lambda x: Counts.zeros(1, 1, 1, x), "actions", [*NO_WHOLE, 0]),
    (lambda x: Counts.zeros(x, x, x, x), "runs, steps, states, actions", [10**9, HUGE]),
    (lambda x: Counts(*[x] * 4), "transitions", [*NO_ARRAY, np.zeros(3)]),
    (lambda x: Counts(COUNTS.transitions, COUNTS.visits, x, COUNTS.squares), "rewards", [*NO_ARRAY, np.zeros(3)]),
    (
        lambda x: counted(states=x),
        "states",
        [*NO_ARRAY, [[0.5, 0.5]], [[True, False]], [[math.nan, 0]], [[0, 1]], [[-1, 0]]],
    ),
    (lambda x: counted(actions=x), "actions", [*NO_ARRAY, [[0.5]], [[0], [0]], 0, [[1]]]),
    (lambda x: counted(rewards=x), "rewards", [*NO_ARRAY[:3], *NO_ARRAY[4:], [[math.nan]], [[1.5]], [0.5]]),
    (lambda x: counted(num_states=x), "num_states", NO_WHOLE),
    (lambda x: COUNTS.scaled(x), "factor", NO_REAL),
    (lambda x: COUNTS + x, "counts", [*NO_KIND, Counts.zeros(1, 1, 1, 1)]),
    (lambda x: COUNTS.of(x), "runs", ["a", 0.5, [7], object()]),
    (
        lambda x: COUNTS.copy().add(x, STATES, ACTIONS),
        "runs, states, actions",
        ["a", np.full((1, 1), 9), np.array([[0.5]])],
    ),
    (lambda x: TabularMDP(x, MDP.reward, MDP.start), "kernel", [*NO_ARRAY, 1.0, MDP.kernel * math.nan]),
    (lambda x: TabularMDP(MDP.kernel, x, MDP.start), "reward", [*NO_ARRAY, 1.0, MDP.reward * math.nan]),
    (lambda x: TabularMDP(MDP.kernel, MDP.reward, x), "start", [*NO_ARRAY, 1.0, MDP.start * math.nan]),
    (lambda x: MDP.value(x), "policy", [*NO_ARRAY, 1.0]),
    (lambda x: MDP.boltzmann(x), "eta", [*NO_REAL, -1]),
    (lambda x: random_mdps(x), "runs", [*NO_WHOLE, 0]),
    (lambda x: random_mdps(1, x), "states", [*NO_WHOLE, 0]),
    (lambda x: random_mdps(1, seed=x), "seed", NO_WHOLE),
    *[(lambda x, kind=kind: kind(x), "problem", NO_KIND) for kind in (StepMix, EpsMix, UCBVI)],  # type: ignore[misc]
    (lambda x: StepMix(PROBLEM, x), "confidence", [5, "a", 0.5]),
    *[
        (lambda x, kind=LEARNERS[name]: kind(PROBLEM).plan(x), "counts", [*NO_KIND, Counts.zeros(1, 1, 1, 1)])  # type: ignore[misc]
        for name in ("stepmix", "epsmix", "ucbvi", "all-or-nothing", "baseline")
    ],
    (
        lambda x: DOPE(PROBLEM, baseline_value=x, episodes=9),
        "baseline_value",
        [*NO_ARRAY, math.nan, math.inf, 0.0, [1, 1]],
    ),
    (lambda x: OptPessLP(PROBLEM, baseline_value=0.5, episodes=x), "episodes", [*NO_WHOLE, 0]),
    (lambda x: DOPE(PROBLEM, baseline_value=0.5, episodes=9).plan(x), "counts", NO_KIND),
    (lambda x: learn_baseline(x, "clone"), "counts", NO_KIND),
    (lambda x: learn_baseline(COUNTS, x), "method", [5, None, [], "vi", np.array(["clone"])]),
    (
        lambda x: learn_baseline(COUNTS, "pessimistic", reward=x),
        "reward",
        ["a", 1.0, MDP.reward[..., :1], MDP.reward + 1],
    ),
    (lambda x: learn_baseline(COUNTS, "pessimistic", bound=x), "bound", [*NO_NUMBER, 0, 3]),
    (lambda x: learn_baseline(COUNTS, "clone", start=x), "start", ["a", 2, 0.5, True]),
    (lambda x: learn_baseline(COUNTS, "clone", confidence=x), "confidence", [5, "a"]),
    (lambda x: offline_problem(COUNTS, x), "floor", NO_REAL),
    (lambda x: baseline_bound(x, COUNTS), "problem", NO_KIND),
    (lambda x: baseline_bound(PROBLEM, x), "counts", NO_KIND),
    (lambda x: simulate(x, MDP, 1), "learner", NO_KIND),
    (lambda x: simulate(StepMix(PROBLEM), x, 1), "mdp", NO_KIND),
    (lambda x: simulate(StepMix(PROBLEM), MDP, x), "episodes", [*NO_WHOLE, 0]),
    (lambda x: simulate(StepMix(PROBLEM), MDP, 1, replan=x), "replan", [*NO_WHOLE, 0, "always"]),
    (lambda x: simulate(StepMix(PROBLEM), MDP, 1, seed=x), "seed", NO_WHOLE),
    (lambda x: simulate(StepMix(PROBLEM), MDP, 1, first_run=x), "first_run", NO_WHOLE),
    (lambda x: simulate(StepMix(PROBLEM), MDP, 1, counts=x), "counts", [5, "a", Counts.zeros(1, 1, 1, 1)]),
    (lambda x: simulate(StepMix(PROBLEM), MDP, 1, observe=x), "observe", [5, "a"]),
    (lambda x: HISTORY.curve(x), "points", NO_ARRAY),
    (lambda x: HISTORY.at(x), "points", [*NO_ARRAY, [0], [6], [math.nan]]),
    (lambda x: HISTORY.below(x), "floor", NO_REAL),
    (lambda x: HISTORY.below(0.5, x), "until", [x for x in NO_WHOLE if x is not None]),
    (lambda x: StepMixController(x), "problem", NO_KIND),
    (lambda x: StepMixController(PROBLEM, confidence=x), "confidence", [5, "a", 0.5]),
    (lambda x: StepMixController(PROBLEM, method=x), "method", [5, None, [], "vi", np.array(["stepmix"])]),
    (lambda x: StepMixController(PROBLEM, replan=x), "replan", [*NO_WHOLE, 0]),
    (lambda x: StepMixController(PROBLEM, offline=x), "offline", [5, "a"]),
    (lambda x: StepMixController(PROBLEM, trusted=x), "trusted", NO_FLAG),
    (lambda x: StepMixController(PROBLEM, drift=x), "drift", [5, "a"]),
    (lambda x: StepMixController(PROBLEM, seed=x), "seed", NO_WHOLE),
    (lambda x: CONTROL.begin(x), "start_state", [*[x for x in NO_WHOLE if x is not None], 1, 2]),
    (lambda x: CONTROL.begin(rng=x), "rng", [5, "a", np.random]),
    (lambda x: CONTROL.begin().act(x), "state", [*NO_WHOLE, 2]),
    (
        lambda x: CONTROL.update(x),
        "trajectory",
        [*NO_KIND, 5.0, [5, 5], ["aaa", "aaa"], [(0, 0, 0), (0, HUGE, 0)], [(True, 0, 0), (0, 0, 0)], [(0, 0, 0)]],
    ),
    (lambda x: CONTROL.join(x), "other", NO_KIND),
    (lambda x: CONTROL.save(x), "path", NO_PATH),
    (lambda x: StepMixController.load(x), "path", NO_PATH),
    (merge, "replicas", [*NO_KIND, [5], [None], []]),
    (lambda x: read_mdp(x, 1), "env", NO_KIND),
    (lambda x: read_mdp(ENV, x), "steps", [*NO_WHOLE, 0]),
    (lambda x: estimate_mdp(ENV, 1, x), "episodes", [*NO_WHOLE, 0]),
    (lambda x: estimate_mdp(ENV, 1, 1, x), "seed", NO_WHOLE),
    (lambda x: play(ENV, x, 1, 0, 1), "controller", [*NO_KIND, CONTROL][:-1]),
    (lambda x: play(ENV, CONTROL, x, 0, 1), "episodes", [*NO_WHOLE, 0]),
    (lambda x: play(ENV, CONTROL, 1, x, 1), "low, high", NO_REAL),
    *[
        (
            lambda x, name=name: WidthSettings(**{name: x}),
            name,
            [0.5, None, "a", ["a"], [math.nan], [True], [HUGE], [[]], {}],
        )  # type: ignore[misc]
        for name in ("floors", "risk_edges", "score_edges", "weights")
    ],
    (lambda x: WidthSettings(widths=x), "widths", [*NO_KIND, [1], [1, 2.0], [4, 1], [1, True], [0, 1], ["1", "2"]]),
    *[
        (lambda x, name=name: WidthSettings(**{name: x}), name, [*NO_WHOLE, 0])  # type: ignore[misc]
        for name in ("phases", "phase_tokens", "wide")
    ],
    (lambda x: WidthSettings(confidence=x), "confidence", NO_KIND),
    (lambda x: WidthSettings(drift=x), "drift", NO_KIND),
    (lambda x: SETTINGS.floor(x), "risk_bin", [*NO_WHOLE, 2]),
    (lambda x: SETTINGS.bin(x), "risk", ["a", None, True, [1.0], HUGE, object()]),
    (lambda x: SETTINGS.state(x, 0), "score", ["a", None, True, [1.0], HUGE]),
    (lambda x: SETTINGS.state(0.0, x), "action", [*NO_WHOLE, 2]),
    (lambda x: SETTINGS.trajectory([0], [0.0], x), "safe", NO_FLAG),
    (lambda x: SETTINGS.trajectory(x, [0.0], True), "actions, scores", [[], [0, 0], [0] * 3]),
    (lambda x: SETTINGS.problem(x, 0), "risk_bin", [*NO_WHOLE, 2]),
    (lambda x: SETTINGS.problem(0, x), "baseline", [*NO_WHOLE, 2]),
    (AdaptiveWidth, "settings", [5, "a", 0.5]),
    (lambda x: AdaptiveWidth(seed=x), "seed", NO_WHOLE),
    (lambda x: WIDTHS.begin(x), "risk", ["a", None, True, [1.0], HUGE]),
    (lambda x: WIDTHS.begin(1.0, x), "rng", [5, "a"]),
    (lambda x: WIDTHS.begin(1.0, count=x), "count", NO_FLAG),
    (lambda x: WIDTHS.fixed(1.0, x), "width", [*NO_KIND, 2, True, 1.0, HUGE, [1], [1, 2], [1, "4"], [1, True]]),
    (lambda x: WIDTHS.fixed(x, 1), "risk", ["a", None, HUGE]),
    (
        lambda x: WIDTHS.warm_start(x),
        "log",
        [*NO_KIND, [5], [(1.0, (1, 1), (0.0, 0.0), True)], [LOG._replace(widths=1)]],
    ),  # type: ignore[arg-type]
    (lambda x: WIDTHS.warm_start([LOG._replace(safe=x)]), "log.safe", NO_FLAG),
    (lambda x: WIDTHS.warm_start([LOG._replace(risk=x)]), "risk", ["a", None, HUGE]),
    (lambda x: WIDTHS.warm_start([LOG._replace(scores=(x, x))]), "score", ["a", None, HUGE]),
    (lambda x: WIDTHS.warm_start([LOG], x), "bins", [5, "a", [0, 2], [-1], [0.5], [True]]),
    (lambda x: qualify(x, []), "settings", NO_KIND),
    (lambda x: control().width(x), "step", NO_WHOLE),
    (lambda x: control().width(0, x), "score", ["a", None, True, HUGE]),
    (lambda x: control().finish(x), "safe", NO_FLAG),
    (lambda x: control().finish(True, x), "score", ["a", None, True, HUGE]),
    (lambda x: WIDTHS.save(x), "path", NO_PATH),
    (lambda x: AdaptiveWidth.load(x), "path", NO_PATH),
    (merge_widths, "replicas", [*NO_KIND, [5], [None], []]),
]


@pytest.mark.parametrize(("call", "name", "wrong"), CALLS, ids=[f"{i}-{name}" for i, (_, name, _) in enumerate(CALLS)])
def test_what_is_wrong_is_named(call: Callable[[Any], Any], name: str, wrong: list[Any]) -> None:
    for value in wrong:
        with pytest.raises(ConfigError) as error:
            call(value)
        message = str(error.value)
        assert re.match(rf"{re.escape(name)}\b.*(: got|: expected)", message, re.S), (value, message)
        assert "expected" in message and len(message) < 400, (value, message)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    """And a state that was made with them can be saved."""
    problem = Problem(
        BASELINE, np.float32(0.1), MDP.reward, start=np.int64(0), bound=np.float64(2.0), weights=np.ones(2)
    )
    one = StepMixController(
        problem,
        confidence=Confidence(np.float64(0.1), np.float32(0.5), uniform=np.bool_(True)),
        replan=np.int64(3),
        drift=Drift(np.float64(0.1), np.int64(100), np.float32(0.1), np.int64(1000)),
        seed=np.int64(1),
    )
    one.begin(np.int64(0)).act(np.int32(1))
    one.update([(np.int64(0), np.int64(1), np.int64(1)), (1, 0, 0)])
    one.save(tmp_path / "one.npz")
    assert StepMixController.load(tmp_path / "one.npz").confidence == one.confidence
    settings = WidthSettings(
        floors=np.array([0.5]), widths=np.array([1, 4]), phases=np.int64(2), risk_edges=np.array([0.5])
    )
    widths = AdaptiveWidth(settings, seed=np.int64(3))
    assert widths.fixed(np.float64(1), np.int64(4)).finish(np.bool_(True), np.float32(1)).widths == (4,)
    widths.begin(np.float32(math.inf)).finish(True, math.nan)  # as before: infinite is large, NaN is the worst
    widths.warm_start([LOG], bins=np.array([1]))
    widths.save(tmp_path / "widths.npz")
    assert AdaptiveWidth.load(tmp_path / "widths.npz").settings == settings


def test_a_wrong_verdict_can_be_given_again_and_wrong_bins_change_nothing() -> None:
    one = control()
    with pytest.raises(ConfigError, match="^safe"):
        one.finish("yes")  # type: ignore[arg-type]
    assert one.finish(True).safe is True
    eras = [status["era"] for status in WIDTHS.status()]
    with pytest.raises(ConfigError, match="^bins"):
        WIDTHS.warm_start([LOG], [0, 7])
    assert [status["era"] for status in WIDTHS.status()] == eras


def test_what_is_no_counts_is_refused() -> None:
    problem = Problem([[[1.0, 0.0]]], floor=0.5)
    for field in ("visits", "transitions", "rewards", "squares"):
        for wrong in (math.nan, -1.0, 2.0):
            counts = Counts.zeros(*problem.shape)
            getattr(counts, field)[..., 0] = wrong
            with pytest.raises(ConfigError, match="^counts: "):
                StepMixController(problem, offline=counts, trusted=True)
    for reward in (math.nan, 1.5, -0.5):
        with pytest.raises(ConfigError, match="^rewards: "):
            Counts.from_trajectories(
                np.zeros((1, 2), int), np.zeros((1, 1), int), np.full((1, 1), reward), num_states=1, num_actions=2
            )
    for baseline in ([[[1.0], [0.0, 1.0]]], np.zeros((0, 1, 2)), "a"):
        with pytest.raises(ConfigError, match="^baseline: got"):
            Problem(baseline, floor=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("episode", "message"),
    [
        ([(1, 0, 0, 0), (0, 0, 0, 0)], "state 1 at step 0, expected one with a probability in `start`"),
        ([(0, 0, 1, 1), (1, 0, 0, 0.5)], "a return of 1.5, expected at most 1.0, `bound`"),
    ],
)
def test_what_breaks_a_condition_of_the_floor_is_refused(episode: list, message: str) -> None:
    control = StepMixController(Problem(np.full((2, 2, 2), 0.5), floor=0.5, bound=1.0))
    with pytest.raises(ConfigError, match=message):
        control.update(episode)
    assert control.episodes == 0 and not control.counts().visits.any()


def test_a_problem_keeps_what_it_was_given() -> None:
    """One array that is written again for the next controller does not change the baseline of the first."""
    baseline, floor = np.array([[[1.0, 0.0]]]), np.array([0.5])
    problem = Problem(baseline, floor, reward=(reward := np.array([[[0.9, 0.1]]])))
    control = StepMixController(problem)
    baseline[:], floor[:], reward[:] = [[[0.0, 1.0]]], 0.9, 0.0
    assert (problem.baseline[0, 0, 0] == [1, 0]).all() and control.floor == 0.5 and problem.reward is not None
    assert (problem.reward[0, 0, 0] == [0.9, 0.1]).all() and control.begin().act(0) == 0
