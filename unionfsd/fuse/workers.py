"""Threads for what blocks, and the way back: how operations of the channel wait without a task or an event loop.

Rules of this file:

- A thread runs the function of one `Blocking` step, which touches descriptors and immutable values, and nothing else.
- Everything else here is the channel's thread's. What is due comes back through `ready`, which threads append to; the
  channel takes from it between two requests.
- A channel that spins takes the interpreter from a thread again and again, so it sleeps while a step is `fresh`.
- A sleeping channel is woken through `fd`, an eventfd; one that is awake looks at `ready` by itself. `sleeping` is set
  before the last look at `ready`, and a thread looks at it after it has appended, so no wake-up is lost.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from unionfsd.fuse.exchange import Deferred

log = logging.getLogger(__name__)

THREADS: Final = 16
"""Blocking steps at work at once, for one mount; the others queue."""


_SOON: Final = 0.002
"""Seconds in which most steps are over: a read from a disk, a sync of little."""


class Due(NamedTuple):
    """An operation that can go on: with the value of its step, or by `error` being raised in it."""

    deferred: Deferred
    value: Any
    error: BaseException | None


class Workers:
    """The threads of one channel, started when they are needed."""

    def __init__(self) -> None:
        self.ready: deque[Due] = deque()
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.sleeping = False
        self._latest = 0.0
        self._calls: queue.SimpleQueue[tuple[Deferred | None, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._at_work = 0

    def submit(self, deferred: Deferred, fn: Callable[[], Any]) -> None:
        """Have a thread call `fn`; `deferred` is then due with what it returned or raised."""
        self._at_work += 1
        self._latest = monotonic()
        if self._at_work > len(self._threads) < THREADS:
            try:
                self._start()
            except RuntimeError as exc:  # no more threads for us; those there are come round to it
                if not self._threads:
                    self.ready.append(Due(deferred, None, OSError(errno.EAGAIN, f"no thread: {exc}")))
                    return
        self._calls.put((deferred, fn))

    @property
    def fresh(self) -> bool:
        """Whether a step is likely to be over soon."""
        return monotonic() - self._latest < _SOON

    def call(self, fn: Callable[[], Any]) -> None:
        """Have a thread call `fn`, which raises nothing and which nobody waits for."""
        if not self._threads:
            try:
                self._start()
            except RuntimeError as exc:
                log.warning("no thread: %s", exc)
                return
        self._calls.put((None, fn))

    def due(self, deferred: Deferred) -> None:
        """`deferred` waits no longer. From the channel's thread, in the midst of another operation perhaps."""
        self._at_work += 1
        self._back(Due(deferred, None, None))

    def take(self) -> Due:
        """The next of `ready`, which is not empty."""
        self._at_work -= 1
        return self.ready.popleft()

    def awake(self) -> None:
        """The channel has slept; wake-ups that were sent meanwhile are over."""
        self.sleeping = False
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        """End the threads. Nothing may be under way."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join()
        os.close(self.fd)

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name="unionfsd step", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            deferred, fn = call
            if deferred is None:
                fn()
            else:
                self._back(_done(deferred, fn))
            del call, deferred, fn  # not kept alive until the next call

    def _back(self, due: Due) -> None:
        self.ready.append(due)
        if self.sleeping:
            self.sleeping = False
            os.eventfd_write(self.fd, 1)


def _done(deferred: Deferred, fn: Callable[[], Any]) -> Due:
    try:
        return Due(deferred, fn(), None)
    except BaseException as error:
        return Due(deferred, None, error)
