"""Several processes that load one file of state and save to it: counts add, nothing is lost silently."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from saffron.adaptive import AdaptiveWidth, LoggedSearch, WidthSettings
from saffron.adaptive import merge as merge_widths
from saffron.conservative import Drift, Problem, StepMixController, merge, storage
from saffron.errors import CheckpointError, ConfigError

PROBLEM = Problem([[[0.5, 0.5]]], floor=0.1)
SETTINGS = WidthSettings(floors=(0.5,), widths=(1, 4), phases=2, drift=Drift(alarm_shift=0.2, alarm_run_length=100.0))


def count(one: StepMixController, episodes: int, action: int = 0, reward: float = 1.0) -> None:
    for _ in range(episodes):
        one.update([(0, action, 0, reward)])


def seen(one: StepMixController) -> list[float]:
    return one.counts().visits[0, 0, 0].tolist()


def started(path: Path, controller: StepMixController, workers: int = 2) -> list[StepMixController]:
    controller.save(path)
    return [StepMixController.load(path) for _ in range(workers)]


@pytest.mark.parametrize("path", [".", "", "/"])
def test_a_path_without_a_name_is_an_error_of_ours(path: str) -> None:
    with pytest.raises(ConfigError, match="is a folder, expected an ordinary file"):
        StepMixController(PROBLEM).save(path)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    """Without NumPy's advice how to load what may run code."""
    path, one = tmp_path / "state.npz", StepMixController(PROBLEM)
    path.write_text("a text")
    with pytest.raises(CheckpointError, match="File is no .npz file") as refused:
        StepMixController.load(path)
    assert "pickle" not in str(refused.value)
    one.save(tmp_path / "own.npz")
    np.savez(path, schema=np.array(1), settings=np.array("[]"))
    with pytest.raises(CheckpointError, match="settings: got"):
        StepMixController.load(path)
    one.save(path)  # no state of ours, as any other file
    assert StepMixController.load(path).episodes == 0


def test_nothing_is_merged_with_itself() -> None:
    one, width = StepMixController(PROBLEM), AdaptiveWidth(SETTINGS)
    count(one, 5)
    with pytest.raises(ConfigError, match="twice"):
        merge([one, one])
    with pytest.raises(ConfigError, match="twice"):
        merge_widths([width, width])


def test_savers_of_one_file_add(tmp_path: Path) -> None:
    """In the file and in memory, whoever saves in whatever order; and nothing is added twice."""
    path, first = tmp_path / "state.npz", StepMixController(PROBLEM)
    count(first, 5)
    one, other = started(path, first)
    count(one, 3)
    count(other, 4, action=1)
    for saver, expected in ((one, [8, 0]), (other, [8, 4]), (other, [8, 4]), (one, [8, 4]), (one, [8, 4])):
        saver.save(path)
        assert seen(StepMixController.load(path)) == expected
    assert seen(one) == seen(other) == [8, 4] and one.episodes == other.episodes == 12
    count(one, 1)
    count(other, 2)
    other.save(path)
    one.save(path)
    assert seen(one) == seen(StepMixController.load(path)) == [11, 4] and one.episodes == 15
    assert one.own_counts().visits.sum() == 15  # as of one controller that has counted it all
    assert (one.current.lower == StepMixController.load(path).current.lower).all()


def test_what_could_not_be_written_is_added_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.npz"
    one, other = started(path, StepMixController(PROBLEM))
    count(one, 3)
    with monkeypatch.context() as full:
        full.setattr(storage, "write", lambda *_: (_ for _ in ()).throw(ConfigError("state.npz: no space left")))
        with pytest.raises(ConfigError, match="no space left"):
            one.save(path)
    count(other, 2)
    other.save(path)
    count(one, 1)
    one.save(path)
    assert seen(StepMixController.load(path)) == [6, 0]


def test_decayed_counts_add(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    start = StepMixController(PROBLEM, drift=Drift(half_life=100), replan=1)
    count(start, 50)
    one, other = started(path, start)
    before = seen(one)[0]
    for worker in (one, other):
        count(worker, 10)
    one.save(path)
    other.save(path)
    decay = 0.5**0.1
    own = seen(one)[0] - before * decay
    assert seen(other)[0] == pytest.approx(before * decay**2 + own * decay + own, rel=1e-9)


def test_a_state_that_does_not_go_on_from_this_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    one, other = started(path, StepMixController(PROBLEM))
    StepMixController(PROBLEM).save(path)  # a new one replaces what lies there
    count(one, 1)
    with pytest.raises(CheckpointError, match=r"state\.npz: got a state that others saved there"):
        one.save(path)
    one.save(tmp_path / "own.npz")
    assert seen(StepMixController.load(tmp_path / "own.npz")) == [1, 0]
    path.write_bytes(path.read_bytes()[:200])  # damaged
    other.save(path)
    assert seen(StepMixController.load(path)) == [0, 0]


def test_what_is_no_state_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    path.write_bytes(b"somebody's notes")
    with pytest.raises(ConfigError, match="holds something else, which is not overwritten"):
        StepMixController(PROBLEM).save(path)
    assert path.read_bytes() == b"somebody's notes"


def test_an_older_copy_is_replaced(tmp_path: Path) -> None:
    one = StepMixController(PROBLEM)
    one.save(tmp_path / "old.npz")
    count(one, 2)
    one.save(tmp_path / "state.npz")
    one.save(tmp_path / "old.npz")
    assert seen(StepMixController.load(tmp_path / "old.npz")) == [2, 0]


def test_files_of_earlier_versions_are_shared_too(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    storage.write(path, *StepMixController(PROBLEM).state())
    workers = [StepMixController.load(path) for _ in range(2)]
    for worker in workers:
        count(worker, 2)
        worker.save(path)
    assert seen(StepMixController.load(path)) == [4, 0]


def test_processes_that_save_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    AdaptiveWidth(SETTINGS).save(path)
    script = textwrap.dedent(
        f"""
        from saffron.adaptive import AdaptiveWidth
        one = AdaptiveWidth.load({str(path)!r})
        for _ in range(25):
            one.begin(1.0).finish(True)
            one.save({str(path)!r})
        """
    )
    workers = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [worker.wait(120) for worker in workers] == [0, 0, 0]
    assert [s["requests"] for s in AdaptiveWidth.load(path).status()] == [0, 75]
    assert [file.name for file in tmp_path.iterdir()] == ["state.npz"]


def answer(one: AdaptiveWidth, requests: int, risk: float = 1.0, safe: bool = True) -> None:
    for _ in range(requests):
        one.begin(risk).finish(safe)


def requests(one: AdaptiveWidth) -> list[int]:
    return [status["requests"] for status in one.status()]


def test_an_alarm_of_one_worker_is_taken_over_by_the_others(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    start = AdaptiveWidth(SETTINGS)
    start.warm_start([LoggedSearch(risk, (1, 1), (0.0, 0.0), True) for risk in (-1.0, 1.0) for _ in range(200)])
    start.save(path)
    one, other, third = (AdaptiveWidth.load(path) for _ in range(3))
    answer(one, 30, risk=-1.0, safe=False)
    answer(other, 20, risk=-1.0)
    answer(third, 3)
    assert [s["baseline"] for s in one.status()] == [4, 1] and [s["baseline"] for s in other.status()] == [1, 1]
    after = requests(one)[0]
    for worker in (one, other, third):
        worker.save(path)
        found = AdaptiveWidth.load(path)
        assert [s["baseline"] for s in worker.status()] == [s["baseline"] for s in found.status()] == [4, 1]
        assert requests(worker) == requests(found) == [after, 3 * (worker is third)]  # not those before the alarm
    answer(other, 2, risk=-1.0)
    other.save(path)
    one.save(path)
    assert requests(one) == [after + 2, 3]


def test_a_bin_that_others_began_again_from_another_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    AdaptiveWidth(SETTINGS).save(path)
    one, other = (AdaptiveWidth.load(path) for _ in range(2))
    for worker, size in ((one, 200), (other, 300)):
        worker.warm_start([LoggedSearch(1.0, (1, 1), (0.0, 0.0), True)] * size)
    one.save(path)
    answer(other, 2)
    with pytest.raises(CheckpointError, match=r"state\.npz: cannot be joined .*another log"):
        other.save(path)
    assert requests(other) == [0, 2]


def test_merging_what_one_file_had_counted_is_refused(tmp_path: Path) -> None:
    """It would be added twice, and intervals would be narrower than the data."""
    path, start = tmp_path / "state.npz", StepMixController(PROBLEM)
    count(start, 5)
    replicas = started(path, start)
    for replica in replicas:
        count(replica, 1)
    with pytest.raises(ConfigError, match="^replicas: got some that go on from one file"):
        merge(replicas)
    copies = started(tmp_path / "next.npz", merge([start]))
    for number, copy in enumerate(copies):
        count(copy, 1)
        copy.save(tmp_path / f"own{number}.npz")
    assert seen(merge(copies)) == [7, 0]

    widths = AdaptiveWidth(SETTINGS)
    answer(widths, 2)
    path = tmp_path / "widths.npz"
    widths.save(path)
    with pytest.raises(ConfigError, match="^replicas: got some that go on from one file"):
        merge_widths([AdaptiveWidth.load(path), AdaptiveWidth.load(path)])
    merge_widths([widths]).save(path)
    assert requests(merge_widths([AdaptiveWidth.load(path)])) == [0, 2]


def test_a_file_with_a_wrong_lineage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    settings, arrays = StepMixController(PROBLEM).state()
    for wrong in (5, [1], [["a"]], "x"):
        storage.write(path, {**settings, "revisions": wrong}, arrays)
        with pytest.raises(CheckpointError, match="not a controller's state"):
            StepMixController.load(path)


def test_states_of_another_version_or_kind_are_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "state.npz"
    StepMixController(PROBLEM).save(path)
    one = StepMixController.load(path)
    kept = dict(np.load(path))
    for schema in (99, np.arange(3)):
        np.savez(path, **{**kept, "schema": np.asarray(schema)})
        whole = path.read_bytes()
        for writer in (one, StepMixController(PROBLEM)):
            with pytest.raises(CheckpointError, match=r"state\.npz: got version .*, expected 1, or another file"):
                writer.save(path)
        assert path.read_bytes() == whole
    path.unlink()
    AdaptiveWidth(SETTINGS).save(path)
    whole = path.read_bytes()
    with pytest.raises(ConfigError, match=r"state\.npz: holds a state of something else, which is not overwritten"):
        StepMixController(PROBLEM).save(path)
    assert path.read_bytes() == whole
    path.unlink()
    StepMixController(PROBLEM).save(path)
    with pytest.raises(ConfigError, match=r"state\.npz: holds a state of something else, which is not overwritten"):
        AdaptiveWidth(SETTINGS).save(path)
