"""For whom the union is at work: which request the operation belongs to that runs right now.

The request in hand, while it is answered at once. An operation that was deferred goes on later, between requests of
others, and takes its own along.
"""

from __future__ import annotations

from functools import partial

from unionfsd.events import NOBODY, Who
from unionfsd.steps import Op, Step
from unionfsd.typed import TypeVar

T = TypeVar("T")


class Acting:
    """Who asked for what one transport is doing. `now` is None between operations."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now: Who | None = None

    def who(self) -> Who:
        """For `Events.who`."""
        return NOBODY if self.now is None else self.now

    def resumed(self, op: Op[T], step: Step, who: Who) -> Op[T]:
        """`op`, which has yielded `step`, with `who` for the time it runs."""
        while True:
            try:
                resume = partial(op.send, (yield step))
            except Exception as error:
                resume = partial(op.throw, error)
            before, self.now = self.now, who
            try:
                step = resume()
            except StopIteration as stop:
                result: T = stop.value
                return result
            finally:
                self.now = before
