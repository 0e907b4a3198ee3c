"""Widths for many requests: one conservative controller per risk bin, an alarm, one file of state."""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saffron.adaptive.control import WidthControl
from saffron.adaptive.log import LoggedSearch, Qualified, log_counts, qualify
from saffron.adaptive.settings import WidthSettings
from saffron.conservative import Confidence, Counts, Drift, Episode, Problem, StepMixController, arguments, storage
from saffron.conservative import merge as merge_controllers
from saffron.conservative.arguments import flag, instance, listed, refused, whole
from saffron.conservative.episode import policy_rows
from saffron.conservative.replicas import alike, check_apart
from saffron.errors import CheckpointError, ConfigError


@dataclass(frozen=True, slots=True, eq=False)
class Era:
    """A risk bin between two alarms: replaced, never changed. baseline: place of its fixed width."""

    number: int
    baseline: int
    controller: StepMixController


class AdaptiveWidth:
    """Chooses the width of every phase of every request, such that the share of safe answers stays above a floor.

    Guaranteed, per risk bin, at `Confidence.scale` 1 and with probability 1 - delta: whatever plan a request begins
    with, its *expected* verdict, over the requests of the bin and the draws of the plan, is at least the floor - if

    1. the fixed width that is the bin's baseline reaches the floor. Without a log that is the widest search, which is
       trusted; with one, the cheapest width whose exact bound on the log reaches it (wrong with probability delta,
       for all bins and widths together);
    2. requests of a bin are independent and of one kind of traffic, which does not change, and the log is of it;
    3. the state (bin of the best MRM score, whether the last width was wide) says all that the next phase depends on;
    4. every request that is begun is finished, or left out for reasons that have nothing to do with its answer.

    Not guaranteed: any single answer; harm that the guard does not see, since the floor is on the guard's verdicts;
    anything while traffic changes, or if whoever attacks chooses the requests by how they were answered - an alarm
    (CUSUM on the verdicts of a bin) then falls back to the widest search, which limits the loss and does not prevent
    it; and anything at a smaller scale, without which it hardly ever leaves the baseline. Condition 3 is an
    approximation.
    docs/adaptive-width.md has measurements.

    Lower bound, mixing step and weight use safety alone; the policy that is mixed in maximises saved compute + lambda *
    safety, for the lambda of a grid whose mixture saves most.

    `begin` reads an immutable plan and waits for nobody; everything may be called from any thread.

    Example:
        >>> from saffron.adaptive import AdaptiveWidth, WidthSettings
        >>> adaptive = AdaptiveWidth(WidthSettings(floors=(0.9,), widths=(1, 4, 16)))
        >>> control = adaptive.begin(risk=-1.5)  # what the guard says of prompt and prefill
        >>> control.width(step=0), control.width(step=8, score=2.5)  # the widest, until there is evidence for less
        (16, 16)
        >>> _ = control.finish(safe=True)  # what the guard says of the answer

    Args:
        settings: None: the default ones.
        seed: of the random numbers that draw from plans.
    """

    def __init__(self, settings: WidthSettings | None = None, *, seed: int = 0) -> None:
        instance("settings", settings, WidthSettings, or_none=True)
        self.settings = settings or WidthSettings()
        self.seed = whole("seed", seed, 0)
        self._swap, self._lineage = threading.Lock(), storage.Lineage()
        self._eras = [self._era(number, 0, self.settings.widest) for number in range(self.settings.bins)]

    def __repr__(self) -> str:
        baselines = ", ".join(str(self.settings.widths[era.baseline]) for era in self._eras)
        return f"{type(self).__name__}(baseline widths of the risk bins: {baselines})"

    @property
    def max_width(self) -> int:
        """For `Engine.submit(..., max_width=...)`."""
        return self.settings.widths[-1]

    def begin(self, risk: float, rng: np.random.Generator | None = None, *, count: bool = True) -> WidthControl:
        """Begins a request.

        Args:
            risk: known before the search: the guard's reward of prompt and prefill.
            rng: draws from the plan; None: the bin's own generator.
            count: whether its verdict is to be counted.
        """
        risk_bin, count = self.settings.bin(risk), flag("count", count)
        era = self._eras[risk_bin]
        return WidthControl(
            self.settings,
            risk,
            era.controller.begin(rng=rng),
            (lambda states, actions: self._count(risk_bin, era, states, actions)) if count else _nowhere,
        )

    def fixed(self, risk: float, width: int | Sequence[int]) -> WidthControl:
        """A request at one width, or at one for each phase, which is counted nowhere: for logs.

        Raises:
            ConfigError: other widths than those of the settings, or not as many as phases.
        """
        known, phases = self.settings.widths, self.settings.phases
        allowed = f"one of {known}, or one for each of {phases} phases"
        several = not isinstance(width, (int, np.integer))
        widths = listed("width", width, allowed) if several else [width] * phases
        widths = [whole("width", one, 1, what=f"{allowed}, each a whole number") for one in widths]
        if len(widths) != phases or not set(widths) <= set(known):
            raise refused("width", width, allowed)
        policy = np.zeros((1, phases + 1, self.settings.states, len(known)))
        for step, chosen in enumerate([*widths, known[-1]]):
            policy[0, step, :, known.index(chosen)] = 1.0
        episode = Episode(0, phases + 1, 0.0, policy_rows(policy), [0.5] * (phases + 1))
        return WidthControl(self.settings, risk, episode, _nowhere)

    def warm_start(self, log: Iterable[LoggedSearch], bins: Iterable[int] | None = None) -> list[Qualified]:
        """Begins again from a log of requests: the baseline of a bin becomes the cheapest fixed width whose bound
        reaches the floor, and everything in the log counts for its plans. Where no width passes, it is the widest.

        Args:
            log: of today's traffic: searches at fixed widths, of `WidthControl.finish`, or both; of the latter those
                that played a fixed width whatever their scores are evidence for it. They need not have been served: to
                come back after an alarm, search recent requests again.
            bins: only these.

        Returns:
            the evidence for every bin and width.
        """
        log = listed("log", log, "a sequence of LoggedSearch")
        evidence, last = qualify(self.settings, log), self.settings.bins - 1
        chosen = range(last + 1) if bins is None else listed("bins", bins, "a sequence of risk bins")
        for risk_bin in [whole("bins", one, 0, last, "risk bins") for one in chosen]:
            passing = [one.width for one in evidence if one.bin == risk_bin and one.passes]
            baseline = self.settings.widths.index(passing[0]) if passing else self.settings.widest
            counts = log_counts(self.settings, log, risk_bin)
            with self._swap:
                number = self._eras[risk_bin].number + 1
                self._eras[risk_bin] = self._era(risk_bin, number, baseline, counts)
        return evidence

    def status(self) -> list[dict[str, Any]]:
        """Of every bin, for logs and monitoring: risks from and below, floor, baseline width, requests counted since
        the last alarm, eras (1 more with every alarm and warm start), and the plan: h0, rho, and the lower bound of
        what is played."""
        found = []
        edges = (None, *self.settings.risk_edges, None)
        for risk_bin, era in enumerate(self._eras):
            plan = era.controller.current
            h0, rho = int(plan.h0[0]), float(plan.weight[0])
            safe = bool(plan.safe[0])
            lower = plan.lower[0]
            bound = (1 - rho) * lower[h0] + rho * lower[int(plan.h0_second[0])] if safe else None
            found.append(
                {
                    "risk_from": edges[risk_bin],
                    "risk_below": edges[risk_bin + 1],
                    "floor": self.settings.floor(risk_bin),
                    "baseline": self.settings.widths[era.baseline],
                    "requests": era.controller.episodes,
                    "era": era.number,
                    "h0": h0,
                    "rho": rho,
                    "lower": None if bound is None else float(bound),
                }
            )
        return found

    def save(self, path: str | Path) -> None:
        """Writes everything to one .npz file, atomically: after a crash there is the old file or the new one.

        Several processes may load one file and save to it. If others saved there meanwhile, what was counted here since
        the last load or save is added to what they counted, in the file and here; a bin in which one of them had an
        alarm is begun again in all.

        Raises:
            CheckpointError: the file holds a later state that does not go on from this one's, or with a bin that was
                begun again from another log.
        """
        self._lineage.save(arguments.path(path), self)

    def _saved(self) -> tuple[dict[str, Any], dict[str, np.ndarray], bool]:
        bins: list[dict[str, Any]] = []
        arrays: dict[str, np.ndarray] = {}
        self._written = [*self._eras]
        for risk_bin, era in enumerate(self._written):
            settings, own = era.controller.state(sync=True)
            bins.append({"number": era.number, "baseline": era.baseline, "controller": settings})
            arrays |= {f"bin{risk_bin}.{name}": array for name, array in own.items()}
        whole = {"kind": "adaptive width", "settings": asdict(self.settings), "seed": self.seed, "bins": bins}
        return whole, arrays, any(era.controller.own_counts().visits.any() for era in self._written)

    def _unsaved(self) -> None:
        for era in self._written:
            era.controller._unsaved()

    def _joined(self, settings: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        other = self._read(settings, arrays)
        if other.settings != self.settings:
            raise ValueError("other settings")
        for mine, theirs in zip(self._eras, other._eras, strict=True):
            if mine.number == theirs.number and not alike(mine.controller, theirs.controller):
                raise ValueError("a bin was begun again from another log")
        for risk_bin, theirs in enumerate(other._eras):
            with self._swap:
                mine = self._eras[risk_bin]
                if mine.number < theirs.number:
                    self._eras[risk_bin] = theirs
            if mine.number == theirs.number:
                mine.controller.join(theirs.controller)

    @classmethod
    def load(cls, path: str | Path) -> AdaptiveWidth:
        """As it was saved, random numbers included.

        Raises:
            CheckpointError: the file is missing, damaged, of another version, or of something else.
        """
        settings, arrays = storage.read(arguments.path(path))
        try:
            found = cls._read(settings, arrays)
            found._lineage = storage.Lineage.of(settings)
        except (IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: not the state of an adaptive width ({error!r})") from error
        return found

    @classmethod
    def _read(cls, whole: dict[str, Any], arrays: dict[str, np.ndarray]) -> AdaptiveWidth:
        options = dict(whole["settings"])
        options["confidence"], options["drift"] = Confidence(**options["confidence"]), Drift(**options["drift"])
        found = cls(WidthSettings(**options), seed=whole["seed"])
        if len(whole["bins"]) != found.settings.bins:
            raise ValueError(f"{len(whole['bins'])} bins")
        for risk_bin, stored in enumerate(whole["bins"]):
            prefix = f"bin{risk_bin}."
            own = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
            controller = StepMixController.from_state(stored["controller"], own)
            number, baseline = operator.index(stored["number"]), operator.index(stored["baseline"])
            if not _fits(controller.problem, found.settings.problem(risk_bin, baseline)):
                raise ValueError(f"bin {risk_bin} is not what the settings say")
            found._eras[risk_bin] = Era(number, baseline, controller)
        return found

    def _era(self, risk_bin: int, number: int, baseline: int, counts: Counts | None = None) -> Era:
        settings = self.settings
        controller = StepMixController(
            settings.problem(risk_bin, baseline),
            confidence=settings.confidence,
            offline=counts,
            trusted=True,  # by an exact bound on the log, or since it is the widest
            drift=settings.drift,
            seed=int(np.random.SeedSequence([self.seed, risk_bin, number]).generate_state(1)[0]),
        )
        return Era(number, baseline, controller)

    def _count(self, risk_bin: int, era: Era, states: list[int], actions: list[int]) -> None:
        """Reports a request to the era that it began in, if that lasts; after an alarm the bin begins again."""
        if self._eras[risk_bin] is not era:
            return  # of traffic as it was before
        era.controller.update([*zip(states[:-1], actions, states[1:], strict=True)])
        if era.controller.alarms:
            with self._swap:
                if self._eras[risk_bin] is era:
                    self._eras[risk_bin] = self._era(risk_bin, era.number + 1, self.settings.widest)


def _fits(one: Problem, other: Problem) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("baseline", "floor", "reward", "objective")
    )


def _nowhere(states: list[int], actions: list[int]) -> None:
    """Counts nothing."""


def merge(replicas: Sequence[AdaptiveWidth]) -> AdaptiveWidth:
    """One from replicas that began with equal state: what each counted adds, per bin. Of replicas in different eras of
    a bin (one of them had an alarm) only the latest count.

    Raises:
        ConfigError: there are none, or they differ in settings or in what they began with.
    """
    replicas = listed("replicas", replicas, "a sequence of AdaptiveWidth")
    for replica in replicas:
        instance("replicas", replica, AdaptiveWidth)
    if not replicas:
        raise ConfigError("replicas: got none, expected at least one")
    if any(replica.settings != replicas[0].settings for replica in replicas):
        raise ConfigError("replicas: got different settings, expected equal ones")
    check_apart(replicas)
    merged = AdaptiveWidth(replicas[0].settings, seed=replicas[0].seed)
    for risk_bin in range(merged.settings.bins):
        eras = [replica._eras[risk_bin] for replica in replicas]
        latest = max(era.number for era in eras)
        counted = [era for era in eras if era.number == latest]
        if len({era.baseline for era in counted}) > 1:
            raise ConfigError(f"replicas: got different baselines in bin {risk_bin}, expected equal ones")
        controller = merge_controllers([era.controller for era in counted])
        merged._eras[risk_bin] = Era(latest, counted[0].baseline, controller)
    return merged
