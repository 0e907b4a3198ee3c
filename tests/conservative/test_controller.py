"""The controller of a running system: episodes, plans, threads, state on disk, replicas."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from saffron.conservative import (
    Confidence,
    Counts,
    Drift,
    EpsMix,
    Problem,
    StepMix,
    StepMixController,
    TabularMDP,
    baseline_bound,
    merge,
    random_mdps,
    simulate,
    storage,
)
from saffron.errors import CheckpointError, ConfigError

PRACTICAL = Confidence(scale=0.003)


def world(seed: int = 0, share: float = 0.9) -> tuple[TabularMDP, Problem]:
    mdp = random_mdps(1, 3, 2, 3, seed)
    baseline = mdp.boltzmann(4.0)
    return mdp, Problem(baseline, share * mdp.value(baseline), mdp.reward)


def run(control: StepMixController, mdp: TabularMDP, episodes: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(episodes):
        episode, state, trajectory = control.begin(), int(rng.choice(mdp.states, p=mdp.start[0])), []
        for h in range(mdp.steps):
            action = episode.act(state)
            after = int(rng.choice(mdp.states, p=mdp.kernel[0, h, state, action]))
            trajectory.append((state, action, after))
            state = after
        control.update(trajectory)


def same(one: Counts, other: Counts) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one.arrays(), other.arrays(), strict=True))


def test_it_learns_and_its_plan_is_the_learners() -> None:
    mdp, problem = world()
    control = StepMixController(problem, confidence=PRACTICAL)
    assert control.begin().branch == "baseline"
    run(control, mdp, 3000)
    counts = control.counts()
    assert counts.visits[0].sum((1, 2)).tolist() == [3000] * 3
    plan, expected = control.plan(), StepMix(problem, PRACTICAL).plan(counts)
    assert (
        (plan.lower == expected.lower).all() and (plan.first == expected.first).all() and plan.weight == expected.weight
    )
    assert mdp.value(plan.first)[0] > mdp.value(problem.baseline)[0] >= control.floor


def test_actions_follow_the_plan() -> None:
    """Frequencies of actions and branches are those of the mixture."""
    mdp, problem = world()
    _, offline = simulate(StepMix(Problem(problem.baseline, 9.0, mdp.reward)), mdp, 20)
    lower = StepMix(problem, PRACTICAL).plan(offline).lower[0]
    problem = Problem(problem.baseline, (lower[1] + lower[2]) / 2, mdp.reward)
    assert lower[:2].max() < problem.floor < lower[2:].min()
    control = StepMixController(problem, confidence=PRACTICAL, offline=offline)
    plan, seen = control.current, np.zeros((3, 3, 2))
    branches = {"baseline": 0, "mixed": 0, "optimistic": 0}
    for _ in range(4000):
        episode = control.begin(0)
        branches[episode.branch] += 1
        assert episode.rho == plan.weight[0] and episode.h0 in (plan.h0[0], plan.h0_second[0])
        for h in range(3):
            seen[h, h, episode.act(h)] += 1
    expected = plan.markov()[0]
    for h in range(3):
        assert np.abs(seen[h, h] / 4000 - expected[h, h]).max() < 0.04
    assert branches["mixed"] == 4000 and plan.weight[0] == pytest.approx(0.5) and plan.h0[0] == 2


def test_epsmix_and_baseline_as_methods() -> None:
    mdp, problem = world()
    mixing = StepMixController(problem, confidence=PRACTICAL, method="epsmix")
    trusted = StepMixController(problem, confidence=PRACTICAL, method="baseline")
    for control in (mixing, trusted):
        run(control, mdp, 500)
    assert mixing.plan().lower.tolist() == EpsMix(problem, PRACTICAL).plan(mixing.counts()).lower.tolist()
    assert trusted.begin().branch == "baseline" and (trusted.plan().first == problem.baseline).all()


def test_plans_are_due_when_counts_double() -> None:
    problem = Problem([[[1.0]]], 0.5)
    control, planned = StepMixController(problem), []
    before = control.begin().plan_id
    for number in range(1, 200):
        control.update([(0, 0, 0, 1.0)])
        if control.begin().plan_id != before:
            planned.append(number)
        before = control.begin().plan_id
    assert planned == [1, 2, 4, 8, 16, 32, 64, 128]
    every = StepMixController(problem, replan=50)
    first = every.begin().plan_id
    for _ in range(149):
        every.update([(0, 0, 0, 1.0)])
    assert every.begin().plan_id == first + 2


def test_offline_data_have_to_reach_the_floor() -> None:
    mdp, problem = world()
    _, few = simulate(StepMix(Problem(problem.baseline, 9.0, mdp.reward)), mdp, 5)
    _, many = simulate(StepMix(Problem(problem.baseline, 9.0, mdp.reward)), mdp, 5000)
    with pytest.raises(ConfigError, match="^floor: got .* `offline` only shows"):
        StepMixController(problem, confidence=PRACTICAL, offline=few)
    control = StepMixController(problem, confidence=PRACTICAL, offline=many)
    assert (
        control.current.safe[0] and control.counts().visits.sum() == 15_000 and control.own_counts().visits.sum() == 0
    )
    lower = baseline_bound(problem, many, PRACTICAL)  # less some kappa, a floor to choose
    assert control.floor < lower <= mdp.value(problem.baseline)[0]


def test_a_baseline_below_the_floor_is_noticed() -> None:
    problem = Problem([[[1.0, 0.0]]], 0.9)
    control = StepMixController(problem)
    with pytest.warns(UserWarning, match="the baseline returns at most .* below the floor"):
        for number in range(4000):
            control.update([(0, 0, 0, float(number % 2))])
    assert control.begin().branch == "baseline"


def test_threads_lose_nothing_and_readers_do_not_wait() -> None:
    """8 threads; meanwhile planning is held up, and episodes go on all the same."""
    mdp, problem = world()
    control = StepMixController(problem, confidence=PRACTICAL)
    threads = [threading.Thread(target=run, args=(control, mdp, 150, seed)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counts = control.counts()
    assert control.episodes == 1200 and counts.visits.sum() == counts.transitions.sum() == 3600
    assert (counts.transitions.sum(-1) == counts.visits).all()
    with control._planning:  # as while another thread makes a plan
        done = threading.Event()
        thread = threading.Thread(target=lambda: (run(control, mdp, 2000), done.set()))
        thread.start()
        assert done.wait(60)
    assert control.episodes == 3200
    held = control.begin().plan_id
    run(control, mdp, 1)  # whoever comes next makes the plan that was due
    assert control.begin().plan_id > held


def test_a_state_survives_a_round_trip(tmp_path: Path) -> None:
    mdp, problem = world()
    _, offline = simulate(StepMix(Problem(problem.baseline, 9.0, mdp.reward)), mdp, 3000)
    problem = Problem(problem.baseline, problem.floor, mdp.reward, mdp.reward[:, ::-1], bound=3.0, weights=(1.0, 2.0))
    control = StepMixController(problem, confidence=PRACTICAL, offline=offline, replan=33, seed=5)
    run(control, mdp, 200)
    control.save(tmp_path / "state.npz")
    again = StepMixController.load(tmp_path / "state.npz")
    assert same(again.counts(), control.counts()) and same(again.own_counts(), control.own_counts())
    assert again.problem.weights == (1.0, 2.0) and again.replan == 33 and again.episodes == 200
    control.plan()
    run(control, mdp, 100, seed=9)
    run(again, mdp, 100, seed=9)
    assert same(again.counts(), control.counts())  # the same random numbers too
    assert (again.plan().first == control.plan().first).all()
    assert [path.name for path in tmp_path.iterdir()] == ["state.npz"]


def test_a_state_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing/state.npz: cannot be written"):
        storage.write(tmp_path / "missing" / "state.npz", {}, {})
    assert list(tmp_path.iterdir()) == []


def test_damaged_states_are_refused(tmp_path: Path) -> None:
    _, problem = world()
    path = tmp_path / "state.npz"
    with pytest.raises(CheckpointError, match="state.npz: not a controller's state"):
        StepMixController.load(path)
    StepMixController(problem).save(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2], b"PK\x03\x04nonsense"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="state.npz"):
            StepMixController.load(path)
    path.write_bytes(whole)
    arrays = dict(np.load(path))
    np.savez(path, **{**arrays, "schema": np.array(99)})
    with pytest.raises(CheckpointError, match="got version 99, expected 1"):
        StepMixController.load(path)
    settings = json.loads(str(arrays["settings"]))
    drawn = {**settings["random"], "state": {**settings["random"]["state"], "state": -1}}
    for changed in (
        {"method": "stepmix"},
        *({**settings, **more} for more in ({"episodes": "x"}, {"episodes": -1}, {"elapsed": 1 << 70})),
        {**settings, "base_weight": None},
        {**settings, "random": drawn},
    ):
        np.savez(path, **{**arrays, "settings": np.array(json.dumps(changed))})
        with pytest.raises(CheckpointError, match=r"^[^:]*: not a controller's state \([^()]*\)$"):  # said once
            StepMixController.load(path)
    for name, wrong in (
        ("visits", arrays["visits"] * np.nan),
        ("visits", arrays["visits"] - 5),
        ("transitions", arrays["transitions"] + 1),
        ("base_visits", arrays["visits"][..., :1]),
        ("rewards", arrays["rewards"] + 1),
        ("squares", arrays["squares"] + np.inf),
        ("visits", arrays["visits"] + np.inf),
    ):
        np.savez(path, **{**arrays, name: wrong})
        with pytest.raises(CheckpointError, match="counts: "):
            StepMixController.load(path)
    state, counts = StepMixController(problem, drift=Drift(alarm_shift=0.1)).state()
    for name, value in (("level", np.nan), ("level", np.inf), ("base_weight", np.nan), ("base_weight", 2)):
        with pytest.raises(ConfigError, match=f"{name}: got {value}, expected a (finite )?number from 0"):
            StepMixController.from_state({**state, name: value}, counts)
    at = whole.index(b"PK\x01\x02") + 10  # a compression that does not exist
    path.write_bytes(whole[:at] + b"\x63" + whole[at + 1 :])
    with pytest.raises(CheckpointError, match="not a controller's state"):
        StepMixController.load(path)


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    """kill -9 at random moments of saving in a loop: what lies there loads."""
    path = tmp_path / "state.npz"
    script = textwrap.dedent(
        f"""
        import numpy as np
        from saffron.conservative import Problem, StepMixController
        control = StepMixController(Problem(np.full((4, 60, 4), 0.25), 0.0))
        while True:
            control.save({str(path)!r})
            print("saved", flush=True)
        """
    )
    for delay in (0.0, 0.007, 0.013):
        process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"saved\n"
        threading.Event().wait(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert StepMixController.load(path).horizon == 4


def test_replicas_merge_to_what_one_would_have_counted(tmp_path: Path) -> None:
    mdp, problem = world()
    _, offline = simulate(StepMix(Problem(problem.baseline, 9.0, mdp.reward)), mdp, 3000)
    replicas = [StepMixController(problem, confidence=PRACTICAL, offline=offline, seed=s) for s in range(3)]
    for number, replica in enumerate(replicas):
        run(replica, mdp, 100, seed=number)
    merged = merge(replicas)
    expected = offline
    for replica in replicas:
        expected = expected + replica.own_counts()
    assert same(merged.counts(), expected) and merged.episodes == 300 and merged.own_counts().visits.sum() == 0
    assert merged.counts().visits.sum() == 3 * 3300
    plan = StepMix(problem, PRACTICAL).plan(expected)
    assert (merged.current.lower == plan.lower).all()
    merged.save(tmp_path / "next.npz")  # the next round
    copies = [StepMixController.load(tmp_path / "next.npz") for _ in range(2)]
    run(copies[0], mdp, 50)
    assert merge(copies).counts().visits.sum() == 3 * 3350
    with pytest.raises(ConfigError, match="^replicas: got none"):
        merge([])
    with pytest.raises(ConfigError, match="^replicas: got controllers of other"):
        merge([replicas[0], StepMixController(problem, confidence=PRACTICAL)])
    with pytest.raises(ConfigError, match="^replicas: got controllers of other"):
        merge([replicas[0], StepMixController(problem, offline=offline, confidence=Confidence(scale=0.004))])


class Counted(RuleBasedStateMachine):
    """Updates, refused updates, plans and saves in any order: counts are a dictionary's."""

    def __init__(self) -> None:
        super().__init__()
        self.control = StepMixController(
            Problem(np.full((2, 3, 2), 0.5), 0.1, start=np.full(3, 1 / 3)), confidence=PRACTICAL
        )
        self.expected: dict[tuple, float] = {}
        self.rewards = 0.0

    @rule(
        states=st.tuples(*[st.integers(0, 2)] * 3),
        actions=st.tuples(*[st.integers(0, 1)] * 2),
        rewards=st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 2),
    )
    def update(self, states, actions, rewards) -> None:
        self.control.update([(states[h], actions[h], states[h + 1], rewards[h]) for h in range(2)])
        for h in range(2):
            cell = (0, h, states[h], actions[h], states[h + 1])
            self.expected[cell] = self.expected.get(cell, 0) + 1
        self.rewards += sum(rewards)

    @rule(
        wrong=st.sampled_from(
            [
                [],
                [(0, 0, 1, 0.5)],
                [(0, 0, 1, 0.5), (2, 0, 1, 0.5)],
                [(0, 0, 1), (1, 0, 1)],
                [(0, 0, 1, 0.5), (1, 2, 1, 0.5)],
                [(0, 0, 1, 0.5), (1, -1, 1, 0.5)],
                [(0, 0, 1, 0.5), (1, 0, 3, 0.5)],
                [(0, 0, 1, 0.5), (1, 0, 1, 1.5)],
                [(0, 0, 1, 0.5), (1, 0, 1, float("nan"))],
            ]
        )
    )
    def refused(self, wrong) -> None:
        with pytest.raises(ConfigError, match="^trajectory: got"):
            self.control.update(wrong)

    @rule()
    def plan(self) -> None:
        self.control.plan()

    @rule(state=st.integers(0, 2))
    def act(self, state: int) -> None:
        episode = self.control.begin()
        assert episode.act(state) in (0, 1) and episode.act(state) in (0, 1)
        with pytest.raises(ConfigError, match="^act: called 3 times, expected at most 2"):
            episode.act(state)

    @invariant()
    def counts(self) -> None:
        counts = self.control.counts()
        found = {tuple(map(int, cell)): counts.transitions[tuple(cell)] for cell in np.argwhere(counts.transitions)}
        assert found == self.expected and counts.rewards.sum() == self.rewards
        assert (counts.transitions.sum(-1) == counts.visits).all()


TestCounted = Counted.TestCase
TestCounted.settings = settings(max_examples=30, stateful_step_count=30)


@pytest.mark.parametrize(
    "second",
    [
        (0, 0.5, 0, 1),
        (0, "a", 0, 1),
        (0, True, 0, 1),
        (0, 0, 0, "1"),
        (0, 0, 0, 10**400),
        None,
        (0, 0, 0, None),
        (0, 0, 0),
        (0, 0, 0, math.nan),
        (0, 0, 0, math.inf),
    ],
)
def test_of_a_wrong_episode_nothing_is_counted(second: Any) -> None:
    control = StepMixController(Problem([[[1.0, 0.0]], [[1.0, 0.0]]], floor=0.85))
    with pytest.raises(ConfigError, match="^trajectory: got"):
        control.update([(0, 0, 0, 1), second])
    assert not any(array.any() for array in control.counts().arrays()) and control.episodes == 0


def test_arguments_are_checked() -> None:
    mdp, problem = world()
    for arguments, named in (
        ({"method": "ucbvi"}, "method"),
        ({"replan": "always"}, "replan"),
        ({"replan": 0}, "replan"),
        ({"replan": True}, "replan"),
        ({"offline": Counts.zeros(1, 2, 3, 2)}, "counts"),
    ):
        with pytest.raises(ConfigError, match=f"^{named}: got"):
            StepMixController(problem, **arguments)
    with pytest.raises(ConfigError, match="^problem: got 2 runs"):
        StepMixController(Problem(np.repeat(problem.baseline, 2, 0), 0.5))
    control = StepMixController(problem)
    with pytest.raises(ConfigError, match="^start_state: got 1"):
        control.begin(1)  # every episode starts in 0
    with pytest.raises(ConfigError, match="^state: got -1"):
        control.begin(0).act(-1)
    assert mdp.steps == control.horizon
