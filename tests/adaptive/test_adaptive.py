"""Adaptive width without models: the MDP, the log, alarms, replicas, state on disk."""

from __future__ import annotations

import doctest
import math
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saffron import adaptive
from saffron.adaptive import AdaptiveWidth, LoggedSearch, WidthSettings, merge, qualify
from saffron.adaptive.log import at_least, log_counts
from saffron.conservative import Confidence, Drift, storage
from saffron.errors import CheckpointError, ConfigError

SETTINGS = WidthSettings(floors=(0.8, 0.9), widths=(1, 4, 16), phases=2, confidence=Confidence(scale=0.003))
SAFE = {1: 0.3, 4: 0.9, 16: 0.97}  # of the first bin; all answers of the second are safe


def search(control: adaptive.WidthControl, rng: np.random.Generator, safe: dict[int, float] = SAFE) -> LoggedSearch:
    """A request of a world in which the last phase decides."""
    score = 0.0
    for phase in range(SETTINGS.phases):
        width = control.width(phase * SETTINGS.phase_tokens, score)
        score = rng.normal(math.log2(width) - 1)
    return control.finish(control.bin == 1 or rng.random() < safe[width], score)


def log(requests: int, widths: tuple[int, ...] = SETTINGS.widths, seed: int = 0) -> list[LoggedSearch]:
    rng, nothing = np.random.default_rng(seed), AdaptiveWidth(SETTINGS)
    return [search(nothing.fixed(risk, w), rng) for w in widths for risk in (-1.0, 1.0) for _ in range(requests)]


def run(one: AdaptiveWidth, requests: int, seed: int = 0, safe: dict[int, float] = SAFE) -> list[LoggedSearch]:
    rng = np.random.default_rng(seed)
    return [search(one.begin(risk), rng, safe) for risk in rng.choice([-1.0, 1.0], requests).tolist()]


def counted(one: AdaptiveWidth) -> list[np.ndarray]:
    return [array for era in one._eras for array in era.controller.counts().arrays()]


def test_the_example_of_the_docstring() -> None:
    found = [t for t in doctest.DocTestFinder().find(AdaptiveWidth, "adaptive", globs={}) if t.examples]
    assert len(found) == 1 and doctest.DocTestRunner().run(found[0]).failed == 0


def test_a_request_becomes_a_trajectory() -> None:
    """Two score bins, and whether the last width was wide: states 0 to 3; the verdict: 0 or 1."""
    assert SETTINGS.trajectory([2, 1], [-1.0, 5.0], True) == ([0, 2, 1, 1], [2, 1, 2])
    assert SETTINGS.trajectory([0, 0], [0.0, 5.0], False) == ([0, 1, 0, 0], [0, 0, 2])
    assert SETTINGS.trajectory([2], [-1.0], True) == ([0, 2, 1, 1], [2, 2, 2])  # the search ended in its first phase
    assert SETTINGS.state(math.nan, 0) == 0 and SETTINGS.bin(math.nan) == 0  # NaN: the worse one
    assert [SETTINGS.bin(risk) for risk in (-0.1, 0.0, 0.1)] == [0, 1, 1]


def test_the_problem_pays_safety_once_and_compute_per_phase() -> None:
    problem = SETTINGS.problem(1, 2)
    assert problem.floor[0] == 0.9 and problem.shape == (1, 3, 4, 3)
    assert problem.reward is not None and problem.objective is not None
    assert problem.reward.sum() == 3 and (problem.reward[0, -1, 1] == 1).all()
    assert problem.objective[0, :, 0].tolist() == [[0.46875, 0.375, 0.0]] * 2 + [[0.0] * 3]


def test_a_control_chooses_at_the_beginning_of_phases_alone() -> None:
    class Script:
        plan_id, h0, rho, branch = 0, 0, 0.0, "optimistic"

        def __init__(self) -> None:
            self.seen: list[int] = []

        def act(self, state: int) -> int:
            self.seen.append(state)
            return [2, 0, 1][len(self.seen) - 1]

    reported: list = []
    script = Script()
    control = adaptive.WidthControl(SETTINGS, 1.0, script, lambda *one: reported.append(one))  # type: ignore[arg-type]
    assert [control.width(step, float(step)) for step in (0, 3, 7, 8, 12, 40)] == [16, 16, 16, 1, 1, 1]
    assert script.seen == [0, 3] and control.schedule == (16, 1)
    assert control.finish(False, 2.0) == LoggedSearch(1.0, (16, 1), (8.0, 2.0), False, fixed=False)
    assert reported == [([0, 3, 0, 0], [2, 0, 2])]
    with pytest.raises(ConfigError, match="finished before"):
        control.finish(True)
    ended = adaptive.WidthControl(SETTINGS, 1.0, Script(), lambda *one: reported.append(one))  # type: ignore[arg-type]
    assert ended.finish(True, -1.0).widths == (16,)  # what did not run is in no log
    assert reported[1] == ([0, 2, 1, 1], [2, 0, 2])  # but the plan had a width for it


def test_a_log_qualifies_the_cheapest_width_per_bin() -> None:
    one = AdaptiveWidth(SETTINGS)
    evidence = one.warm_start(log(400))
    assert [s["baseline"] for s in one.status()] == [4, 1]
    for found in evidence:
        assert found.requests == 400 and found.passes == (found.lower >= SETTINGS.floor(found.bin))
        assert found.lower < found.safe / 400 <= 1
    assert {(e.bin, e.width) for e in evidence if e.passes} == {(0, 4), (0, 16), (1, 1), (1, 4), (1, 16)}
    few = AdaptiveWidth(SETTINGS)
    few.warm_start(log(5))
    assert [s["baseline"] for s in few.status()] == [16, 16]
    mixed = [LoggedSearch(-1.0, (16, 4), (0.0, 0.0), True)] * 1000
    assert not any(e.passes for e in qualify(SETTINGS, mixed))  # shows nothing of a fixed width
    assert log_counts(SETTINGS, mixed, 0).visits[0, 0, 0].tolist() == [0, 0, 1000]
    with pytest.raises(ConfigError, match="expected one of"):
        few.warm_start([LoggedSearch(0.0, (5,), (0.0,), True)])


def test_requests_that_a_plan_happened_to_search_at_one_width_qualify_nothing() -> None:
    """Which requests these are depends on their scores and lengths: they are no sample of the bin."""
    nothing = AdaptiveWidth(SETTINGS)
    drawn = nothing.fixed(-1.0, (4, 16))  # its answer ends in the first phase
    chosen = nothing.begin(-1.0)
    fixed = [drawn.finish(True), chosen.finish(True), nothing.fixed(-1.0, 4).finish(True)]
    assert [(one.widths, one.fixed) for one in fixed] == [((4,), False), ((16,), True), ((4,), True)]
    assert all(e.requests == (e.bin == 0) * (e.width != 1) for e in qualify(SETTINGS, fixed))

    warm = AdaptiveWidth(SETTINGS)
    warm.warm_start(log(2000))
    rng, some, played = np.random.default_rng(0), [], set()
    for _ in range(300):
        control = warm.begin(-1.0)
        played.add(control.branch)
        some.append((control.branch, search(control, rng)))
    assert played > {"baseline"}  # and others
    assert all(one.fixed == (branch == "baseline") for branch, one in some)


@given(st.integers(1, 300), st.data())
@settings(deadline=None)
def test_the_exact_bound(trials: int, data: st.DataObject) -> None:
    """At the bound, so many successes or more have just the chance that was asked for."""
    from scipy.special import bdtrc

    successes = data.draw(st.integers(0, trials))
    lower = at_least(successes, trials, 0.01)
    assert 0 <= lower <= successes / trials
    if successes:
        assert bdtrc(successes - 1, trials, lower) == pytest.approx(0.01)


def test_it_saves_compute_and_keeps_the_floor() -> None:
    """In this world the first width does not matter, so that 1 and then 4 is the best policy."""
    one = AdaptiveWidth(replace(SETTINGS, drift=Drift()))
    one.warm_start(log(600))
    answers = run(one, 2000)
    late = [a for a in answers[-1000:] if a.risk < 0]
    assert sum(a.safe for a in late) / len(late) > 0.8
    assert sum(a.widths[0] == 1 for a in late) > 0.9 * len(late)
    assert all(a.widths == (1, 1) for a in answers if a.risk > 0)
    assert [s["era"] for s in one.status()] == [1, 1]
    (risky, harmless) = one.status()
    assert risky["lower"] >= 0.8 and harmless["lower"] >= 0.9 and risky["requests"] + harmless["requests"] == 2000


def test_an_alarm_falls_back_to_the_widest_in_that_bin_alone() -> None:
    one = AdaptiveWidth(SETTINGS)
    one.warm_start(log(400))
    before = one.begin(-1.0)
    answers = run(one, 300, safe={1: 0.0, 4: 0.2, 16: 0.9})
    assert [s["baseline"] for s in one.status()] == [16, 1] and [s["era"] for s in one.status()] == [2, 1]
    assert {a.widths for a in answers[-50:]} == {(16, 16), (1, 1)}
    requests = one.status()[0]["requests"]
    before.finish(True)  # begun under the plan that was dropped
    assert one.status()[0]["requests"] == requests
    one.warm_start(log(400, seed=1), bins=[0])
    assert [s["baseline"] for s in one.status()] == [4, 1]


def test_one_width_for_each_phase() -> None:
    rng, one = np.random.default_rng(0), AdaptiveWidth(replace(SETTINGS, drift=Drift()))
    assert [search(one.fixed(-1.0, (1, 4)), rng).widths for _ in range(3)] == [(1, 4)] * 3
    for wrong in ((1,), (1, 5)):
        with pytest.raises(ConfigError, match="expected one of"):
            one.fixed(-1.0, wrong)
    assert sum(s["requests"] for s in one.status()) == 0


def test_a_minimum_share_plays_the_baseline() -> None:
    one = AdaptiveWidth(replace(SETTINGS, floors=(0.0,), drift=Drift(baseline_share=0.25)))
    one.warm_start(log(50, widths=(16,)))  # no floor: the optimistic policy, but for the share
    branches = [one.begin(-1.0).branch for _ in range(2000)]
    assert 0.2 < branches.count("baseline") / 2000 < 0.3


@given(
    st.lists(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=5), min_size=1, max_size=3),
    st.permutations(range(3)),
)
@settings(deadline=None, max_examples=12)
def test_replicas_add(parts: list[list[tuple[bool, bool]]], order: list[int]) -> None:
    """In any order, and as if one had counted everything."""
    start = AdaptiveWidth(SETTINGS)
    start.warm_start(log(3))
    replicas, together = [], copy(start)
    for part in parts:
        replicas.append(copy(start))
        for risky, safe in part:
            for one in (replicas[-1], together):
                control = one.begin(-1.0 if risky else 1.0)
                control.width(8, 1.0)
                control.finish(safe)
    merged = merge(replicas)
    other = merge([replicas[i] for i in order if i < len(replicas)])
    for a, b, c in zip(counted(merged), counted(other), counted(together), strict=True):
        assert np.array_equal(a, b) and a.sum() == c.sum()
    assert sum(s["requests"] for s in merged.status()) == sum(map(len, parts))
    again = merge([merged, copy(merged)])  # what they began with counts once
    for a, b in zip(counted(merged), counted(again), strict=True):
        assert np.array_equal(a, b)


def copy(one: AdaptiveWidth) -> AdaptiveWidth:
    with tempfile.TemporaryDirectory() as folder:
        one.save(Path(folder) / "state.npz")
        return AdaptiveWidth.load(Path(folder) / "state.npz")


def test_of_replicas_only_those_after_the_last_alarm_count() -> None:
    start = AdaptiveWidth(SETTINGS)
    start.warm_start(log(400))
    calm, alarmed = copy(start), copy(start)
    run(calm, 50)
    run(alarmed, 300, safe={1: 0.0, 4: 0.2, 16: 0.9})
    both = merge([calm, alarmed])
    assert [s["baseline"] for s in both.status()] == [16, 1]
    assert both.status()[0]["requests"] == alarmed.status()[0]["requests"]
    with pytest.raises(ConfigError, match="different settings"):
        merge([start, AdaptiveWidth()])
    with pytest.raises(ConfigError, match="got none"):
        merge([])
    with pytest.raises(ConfigError, match="offline logs"):
        other = AdaptiveWidth(SETTINGS)
        other.warm_start(log(300))
        merge([start, other])


def test_a_saved_state_goes_on_like_the_original(tmp_path: Path) -> None:
    one = AdaptiveWidth(replace(SETTINGS, drift=Drift(0.1, 500, 0.1)), seed=3)
    one.warm_start(log(200))
    run(one, 100)
    for era in one._eras:
        era.controller.plan()  # as loading does
    one.save(tmp_path / "state.npz")
    other = AdaptiveWidth.load(tmp_path / "state.npz")
    assert other.settings == one.settings and other.status() == one.status()
    assert run(one, 100, seed=1) == run(other, 100, seed=1)
    (tmp_path / "damaged.npz").write_bytes((tmp_path / "state.npz").read_bytes()[:-200])
    for name in ("damaged", "missing"):
        with pytest.raises(CheckpointError, match=name):
            AdaptiveWidth.load(tmp_path / f"{name}.npz")
    whole, arrays = storage.read(tmp_path / "state.npz")
    for name, changed in (
        ("baseline", {"bins": [{**one, "baseline": 7} for one in whole["bins"]]}),
        ("other", {"bins": [{**one, "baseline": 2} for one in whole["bins"]]}),
        ("floors", {"settings": {**whole["settings"], "floors": [0.1]}}),
        ("widths", {"settings": {**whole["settings"], "widths": [1, 2]}}),
        ("number", {"bins": [{**one, "number": None} for one in whole["bins"]]}),
    ):
        storage.write(tmp_path / f"{name}.npz", whole | changed, arrays)
        with pytest.raises(CheckpointError, match=f"{name}.npz: not the state of an adaptive width"):
            AdaptiveWidth.load(tmp_path / f"{name}.npz")
    one._eras[0].controller.save(tmp_path / "controller.npz")
    with pytest.raises(CheckpointError, match="adaptive width"):
        AdaptiveWidth.load(tmp_path / "controller.npz")


def test_the_state_survives_being_killed(tmp_path: Path) -> None:
    """Killed while it writes, again and again: the file is whole, and its counts are of some number of requests."""
    file = tmp_path / "state.npz"
    program = f"""
        import numpy as np
        from saffron.adaptive import AdaptiveWidth, WidthSettings
        one = AdaptiveWidth(WidthSettings(phases=2))
        while True:
            one.begin(1.0).finish(True)
            one.save({str(file)!r})
    """
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
        while not file.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        found = AdaptiveWidth.load(file)
        requests = found.status()[1]["requests"]
        assert requests >= 1 and counted(found)[5].sum() == 3 * requests  # visits of bin 1: three steps
        file.unlink()


def test_plans_are_snapshots_and_threads_lose_nothing() -> None:
    one = AdaptiveWidth(replace(SETTINGS, drift=Drift()))
    one.warm_start(log(100))
    plan = one._eras[0].controller.current
    kept = [x.copy() for x in (plan.first, plan.second, plan.lower)]
    threads = [threading.Thread(target=run, args=(one, 100, seed)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(a, b) for a, b in zip(kept, (plan.first, plan.second, plan.lower), strict=True))
    assert sum(s["requests"] for s in one.status()) == 400
    assert sum(era.controller.own_counts().visits.sum() for era in one._eras) == pytest.approx(400 * 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (4,)}, "at least two"),
        ({"widths": (4, 1)}, "ascending"),
        ({"widths": (0, 1)}, "whole number"),
        ({"floors": (0.9, 0.9, 0.9)}, "risk bins"),
        ({"floors": (1.1,)}, "from 0 to 1"),
        ({"risk_edges": (math.nan,)}, "finite"),
        ({"phases": True}, "whole number"),
    ],
)
def test_settings_are_checked(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        WidthSettings(**options)


@pytest.mark.parametrize("widths", [([4],), (1.0,), (True,), ("4",)])
def test_widths_of_a_log_are_whole_numbers(widths: tuple) -> None:
    with pytest.raises(ConfigError, match="^log.widths: got"):
        AdaptiveWidth().warm_start([LoggedSearch(0.0, widths, (0.0,), True)])


def test_torch_is_not_needed() -> None:
    check = "import sys, saffron.adaptive\nassert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
