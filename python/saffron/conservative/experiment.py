"""The paper's experiment and sweeps around it: jobs, their records as JSON lines, resumed where they stopped.

Random MDPs with S = A = 5 and H = 3, rewards and kernels uniform (paper); the baseline is exp(10 Q*), the floor a
share of its value (reconstructed: eta, floor, episodes and scale of the paper are unknown).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saffron.conservative import LEARNERS
from saffron.conservative.confidence import Confidence
from saffron.conservative.constant import ConstantBaseline
from saffron.conservative.counts import Counts
from saffron.conservative.learner import Learner, Plan, Problem
from saffron.conservative.linear_program import ProgramLearner
from saffron.conservative.mdp import TabularMDP, random_mdps
from saffron.conservative.offline import METHODS, learn_baseline
from saffron.conservative.simulate import History, simulate
from saffron.storage.results import Schema, open_results

ETA = 10.0
MIXING = ("stepmix", "epsmix", "ucbvi", "all-or-nothing")
PRACTICAL = 0.003
POINTS = 60  # of a curve
_ALWAYS = ("trial", "best", "baseline", "floor", "worst", "below")  # numbers of every record
_OF_LEARNERS = ("regret", "below_first_tenth", "last", "plans", "missed", "checked")
_CURVES = ("points", "values", "regrets")
Record = dict[str, Any]
Map = Callable[[Callable[[], Callable[["Job"], list[Record]]], Sequence["Job"]], Iterator[tuple[int, list[Record]]]]


@dataclass(frozen=True, slots=True)
class Job:
    """Trials of one learner in one setting, planned together.

    Attributes:
        experiment: "paper", "proof", "scale", "floor" or "offline".
        learner: a name of `LEARNERS`; of "offline" the way to learn a baseline.
        share: the floor as a share of the baseline's value. episodes: of each trial; of "offline", logged ones.
    """

    experiment: str
    learner: str
    trials: int
    episodes: int
    scale: float = PRACTICAL
    value_range: str = "remaining"
    share: float = 0.9
    seed: int = 0

    @property
    def name(self) -> str:
        return json.dumps(asdict(self))


def _fits(record: Record) -> bool:
    found = record.get("records")
    try:
        job = Job(**json.loads(record["job"]))
    except (TypeError, ValueError):  # not JSON, or not a job's fields
        return False
    names = _ALWAYS if job.experiment == "offline" else (*_ALWAYS, *_OF_LEARNERS)
    return isinstance(found, list) and bool(found) and all(_is_record(one, asdict(job), names) for one in found)


def _is_record(one: Any, job: dict[str, Any], names: Sequence[str]) -> bool:
    return (
        isinstance(one, dict)
        and {name: one.get(name) for name in job} == job
        and all(_is_number(one.get(name)) for name in names)
        and (one.get("starts") is None or _is_number(one["starts"]))
        and all(isinstance(one.get(n, []), list) and all(map(_is_number, one.get(n, []))) for n in _CURVES)
        and len({len(one.get(name, [])) for name in _CURVES}) == 1
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


SCHEMA = Schema("stepmix", ("job",), _fits)


def jobs(trials: int = 20, episodes: int = 40_000, quick: bool = False) -> list[Job]:
    """Everything that docs/results-conservative.md shows. quick: little of each, to see that it runs."""
    if quick:
        trials, episodes = 2, 400
    ranges = ("remaining", "horizon")
    paper = [Job("paper", name, trials, episodes, value_range=r) for r in ranges for name in (*MIXING, "baseline")]
    paper += [
        Job("paper", name, min(trials, 10), episodes, scale, "-")
        for name in ("dope", "optpess-lp") for scale in (1.0, 0.03, 0.003)
    ]  # fmt: skip
    long = 400 if quick else 2_000_000
    proof = [Job("proof", name, min(trials, 10), long, 1.0) for name in MIXING]
    scales = [
        Job("scale", name, trials, episodes, scale, r)
        for r in ranges for scale in (1.0, 0.1, 0.03, 0.01, 0.003, 0.001, 1e-4, 1e-5) for name in MIXING
    ]  # fmt: skip
    many = 2 if quick else 5 * trials
    floors = [
        Job("floor", name, many, min(episodes, 8000), scale, share=share)
        for scale in (0.003, 0.001, 1e-4, 1e-5, 1e-6) for share in (0.9, 0.97, 0.99, 0.999)
        for name in ("stepmix", "epsmix")
    ]  # fmt: skip
    offline = [
        Job("offline", method, many, logged, PRACTICAL)
        for logged in ((30, 100) if quick else (10, 30, 100, 300, 1000, 3000, 10_000)) for method in METHODS
    ]  # fmt: skip
    return paper + proof + scales + floors + offline


def run(todo: Sequence[Job], file: Path, spread: Map, done: Callable[[int, int], None]) -> list[Record]:
    """Runs the jobs that `file` does not hold yet, and appends them; returns the records of all trials of the jobs.

    spread: as `Workers.run`. done: called with jobs done, and all.

    Raises:
        ConfigError: the file cannot be written, or holds something else, which stays.
    """
    with open_results(file, SCHEMA, {}) as results:
        left = [job for job in todo if (job.name,) not in results.done]
        done(len(todo) - len(left), len(todo))
        for count, (number, found) in enumerate(spread(_runner, left), start=len(todo) - len(left) + 1):
            results.append([{"job": left[number].name, "records": found}])
            done(count, len(todo))
        records = {record["job"]: record["records"] for record in results.records}
    return [record for job in todo for record in records[job.name]]


def run_job(job: Job) -> list[Record]:
    """One record per trial."""
    mdp = random_mdps(job.trials, seed=job.seed)
    trusted = mdp.boltzmann(ETA)
    value, best = mdp.value(trusted), mdp.optimal()[0]
    floor = job.share * value
    common = [
        {**asdict(job), "trial": i, "best": best[i], "baseline": value[i], "floor": floor[i]} for i in range(job.trials)
    ]
    if job.experiment == "offline":
        return _offline(job, mdp, Problem(trusted, floor, mdp.reward), common)
    value_range = "remaining" if job.value_range == "-" else job.value_range  # the linear programs have none
    confidence = Confidence(scale=job.scale, value_range=value_range)
    learner = _learner(job, Problem(trusted, floor, mdp.reward), confidence, value)
    missed = np.zeros((2, job.trials))
    check = _coverage(mdp, trusted, missed) if job.learner == "ucbvi" else None
    histories, _ = simulate(learner, mdp, job.episodes, seed=job.seed, observe=check)
    return [
        {**common[i], **_summary(history, float(best[i]), float(floor[i]), job.episodes), "missed": missed[0, i],
         "checked": missed[1, i]}
        for i, history in enumerate(histories)
    ]  # fmt: skip


def _runner() -> Callable[[Job], list[Record]]:
    return run_job


def _learner(job: Job, problem: Problem, confidence: Confidence, value: np.ndarray) -> Learner:
    kind: Any = LEARNERS[job.learner]
    if issubclass(kind, ProgramLearner):
        return kind(problem, confidence, baseline_value=value, episodes=job.episodes)
    return kind(problem, confidence)


def _coverage(mdp: TabularMDP, trusted: np.ndarray, missed: np.ndarray) -> Callable[[np.ndarray, Plan], None]:
    """Counts in missed[0] candidates whose lower bound exceeds their value, of missed[1]; `first` is the optimistic
    one."""
    steps = np.arange(mdp.steps)

    def check(runs: np.ndarray, plan: Plan) -> None:
        part = TabularMDP(mdp.kernel[runs], mdp.reward[runs], mdp.start[runs])
        for h0 in range(mdp.steps + 1):
            true = part.value(np.where((steps < h0)[:, None, None], trusted[runs], plan.first))
            missed[0, runs] += plan.lower[:, h0] > true + 1e-9
            missed[1, runs] += 1

    return check


def _summary(history: History, best: float, floor: float, episodes: int) -> Record:
    points = np.unique(np.geomspace(1, episodes, POINTS).astype(int))
    left = np.flatnonzero(~history.baseline)
    ends = np.concatenate([[0], np.cumsum(history.episodes)])
    return {
        "regret": float(episodes * best - history.curve(np.array([episodes]))[0]),
        "below": history.below(floor),
        "below_first_tenth": history.below(floor, max(1, episodes // 10)),
        "worst": float(history.values.min() - floor),
        "last": float(history.values[-1]),
        "starts": int(ends[left[0]]) if left.size else None,  # episodes of the baseline before anything else was played
        "plans": len(history.episodes),
        "points": points.tolist(),
        "values": np.round(history.at(points), 6).tolist(),
        "regrets": np.round(points * best - history.curve(points), 3).tolist(),
    }


def _offline(job: Job, mdp: TabularMDP, problem: Problem, common: list[Record]) -> list[Record]:
    """A baseline learned from `episodes` logged ones; what it is worth, and whether its bound reaches the floor."""
    confidence = Confidence(scale=job.scale, value_range=job.value_range)
    _, counts = simulate(ConstantBaseline(problem), mdp, job.episodes, seed=job.seed)
    records = []
    for i, record in enumerate(common):
        which = np.array([i])
        found: Counts = counts.of(which)
        learned = learn_baseline(found, job.learner, reward=mdp.reward[which], confidence=confidence)
        part = TabularMDP(mdp.kernel[which], mdp.reward[which], mdp.start[which])
        margin = float(part.value(learned.policy)[0] - record["floor"])
        records.append(
            {**record, "worst": margin, "below": int(margin < 0), "passes": bool(learned.lower[0] >= record["floor"])}
        )
    return records
