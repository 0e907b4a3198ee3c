"""Room in the caches that the searches of an engine set aside, and what becomes of it when the engine goes."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from weakref import WeakSet

from saffron.errors import CapacityError, EngineClosedError
from saffron.models.trie_model import TrieModel
from saffron.search.handle import Handle, Pending
from saffron.search.model_pair import ModelPair
from saffron.search.step import Step

_all: WeakSet[Admission] = WeakSet()


class Admission:
    """What the searches of one engine have set aside.

    Args:
        limit: slots of either cache that all of them may need together; None: what the cache has, if it does not grow.

    Attributes:
        held: slots of the two caches by search.
        driver: the thread that took the last step.
    """

    def __init__(self, models: ModelPair, limit: int | None) -> None:
        self.held: dict[Handle, tuple[int, int]] = {}
        self.driver: int | None = None
        self._models, self._limit = models, limit
        self._caches = models.policy, models.mrm
        _all.add(self)

    def _most(self, model: TrieModel) -> int | None:
        """Slots that the searches of this engine may have together, None for any number."""
        return min(
            (x for x in (self._limit, None if model.kv.grow else model.kv.capacity) if x is not None), default=None
        )

    def check(self, search: Handle) -> None:
        """Raises `CapacityError` for a search that could never be admitted."""
        search.slots = self._models.slots(search.request, search.max_width, search.config.max_new_tokens)
        for model, needed in zip(self._caches, search.slots, strict=True):
            most = self._most(model)
            if most is not None and needed > most:
                raise CapacityError(
                    f"the request could need {needed} slots of the {type(model).__name__}'s cache, which holds {most}:"
                    f" {search.config.max_new_tokens} new tokens at width {search.max_width}"
                )

    def admit(self, search: Handle) -> bool:
        """Sets aside what a search needs; False if it is not free now."""
        needs = search.slots
        policy, mrm = (model.kv for model in self._caches)
        if not policy.reserve(needs[0], self._limit):
            return False
        if not mrm.reserve(needs[1], self._limit):
            policy.reserve(-needs[0])
            return False
        self.held[search] = needs
        if self._most(self._models.mrm) is not None:
            search.mrm_slots = needs[1]
        return True

    def give_back(self, search: Handle) -> None:
        """What a search has set aside is free again."""
        for model, slots in zip(self._caches, self.held.pop(search), strict=True):
            model.kv.reserve(-slots)

    def wait(self, waiting: deque[Pending], changed: threading.Condition) -> None:
        """Waits a little for room, or fails the first of those that wait, if it would wait for ever."""
        first = waiting[0] if waiting else None
        stuck = self._stuck(first) if isinstance(first, Handle) else None
        if stuck is None:
            return time.sleep(0.001)
        with changed:
            search = waiting.popleft()
        search.fail(stuck)

    def _stuck(self, search: Handle) -> CapacityError | None:
        """The error of a search for which this thread would wait for ever: what is missing is held by searches that
        only this thread could take further (a stream that it has begun), and none of this engine's own."""
        if self.held:
            return None
        mine = threading.get_ident()
        others = [one for one in list(_all) if one is not self and one.held and one.driver == mine]
        for model, need in zip(self._caches, search.slots, strict=True):
            kv, most = model.kv, self._most(model)
            held = sum(
                slots
                for other in others
                for needs in list(other.held.values())
                for theirs, slots in zip(other._caches, needs, strict=True)
                if theirs.kv is kv
            )
            if held and most is not None and need + held > most:
                return CapacityError(
                    f"the search needs {need} slots of the {type(model).__name__}'s cache, of whose {most} those "
                    f"that this thread has begun and not ended (a stream that is open) hold {held}; end them first"
                )
        return None


def give_up(step: Step, room: Admission, waiting: Iterable[Pending], jobs: Iterable[Pending]) -> None:
    """What an engine that is dropped without `close` leaves behind: rooms and nodes go back, and nobody waits on."""
    left = [*room.held, *waiting, *jobs]
    try:
        step.close()
    finally:
        for search in list(room.held):
            room.give_back(search)
        for pending in left:
            pending.fail(EngineClosedError("the engine was dropped before the search ended; keep it, or close it"))
