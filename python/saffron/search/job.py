"""Another method in an engine, as its caller sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from saffron.search.config import Request
from saffron.search.handle import Pending

if TYPE_CHECKING:
    from saffron.search.engine import Engine
    from saffron.search.method import Decoder


class Job(Pending):
    """A request to another method, which an engine runs between the steps of its searches.

    Args:
        method: how it is answered, step by step.
    """

    def __init__(self, engine: Engine, method: Decoder[Any], request: Request) -> None:
        super().__init__(engine, request)
        self._tokens = final = list[int]()
        self._steps = method.run([request], lambda _, token: final.append(token))

    @property
    def tokens(self) -> list[int]:
        return self._tokens if self._result is None else self._result.token_ids

    def advance(self) -> None:
        """Goes on to the next pause; for the engine."""
        try:
            if self.cancelled:
                self._steps.close()
                self.fail(None)
            else:
                next(self._steps)
                self.notify()
        except StopIteration as end:
            (self._result,) = end.value
            self.notify()
        except BaseException as error:
            self.fail(error)
            if not isinstance(error, Exception):
                raise
