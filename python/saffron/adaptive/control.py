"""The width of one request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from saffron.adaptive.log import LoggedSearch
from saffron.adaptive.settings import WidthSettings
from saffron.conservative import Episode
from saffron.conservative.arguments import flag, real, whole
from saffron.errors import ConfigError


class Search(Protocol):
    """What of a running search is looked at: `saffron.search.Handle` is one."""

    width: int

    @property
    def tree(self) -> Any: ...
    @property
    def answer(self) -> Any: ...


class WidthControl:
    """Chooses the widths of one request by the plan that was current when it began. For one thread.

    Attributes:
        bin: its risk bin. schedule: the widths of its phases so far. plan_id, h0, rho, branch: as of `Episode`.
    """

    def __init__(
        self,
        settings: WidthSettings,
        risk: float,
        episode: Episode,
        report: Callable[[list[int], list[int]], None],
    ) -> None:
        self.settings, self.risk, self.bin = settings, risk, settings.bin(risk)
        self.plan_id, self.h0, self.rho, self.branch = episode.plan_id, episode.h0, episode.rho, episode.branch
        self._episode, self._report, self._finished = episode, report, False
        self._actions = [episode.act(0)]
        self._scores: list[float] = []

    @property
    def schedule(self) -> tuple[int, ...]:
        return tuple(self.settings.widths[action] for action in self._actions)

    def width(self, step: int, score: float = 0.0) -> int:
        """The width of the next step of the search.

        Args:
            step: steps that were made (tokens). score: the best MRM score now; read at the beginning of a phase.
        """
        if type(step) is not int or step < 0:
            step = whole("step", step, 0)
        score = real("score", score, "a number", finite=False)
        phase = min(step // self.settings.phase_tokens, self.settings.phases - 1)
        while len(self._actions) <= phase:  # more than one if a captured step reports several at a time
            self._scores.append(score)
            self._actions.append(self._episode.act(self.settings.state(score, self._actions[-1])))
        return self.settings.widths[self._actions[-1]]

    def on_step(self, search: Search) -> None:
        """For `Engine.submit(..., on_step=control.on_step)`: sets the width of a running search after each step."""
        search.width = self.width(len(search.tree.steps), search.answer.score)

    def finish(self, safe: bool, score: float = 0.0) -> LoggedSearch:
        """Reports the guard's verdict of the answer; returns the request as a log has it. Do not call it for a request
        that was cancelled.

        Args:
            score: the answer's MRM score.

        Raises:
            ConfigError: it was finished before.
        """
        safe, score = flag("safe", safe), real("score", score, "a number", finite=False)
        if self._finished:
            raise ConfigError("finish: the request was finished before, expected one verdict")
        self._finished = True
        logged = LoggedSearch(self.risk, self.schedule, (*self._scores, score), safe)
        self.width(self.settings.phases * self.settings.phase_tokens, score)  # phases that did not happen, by the plan
        self._report(*self.settings.trajectory(self._actions, [*self._scores, score], safe))
        return logged._replace(fixed=self.h0 >= self.settings.phases and len(set(self._actions)) == 1)
