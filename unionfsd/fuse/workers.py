"""Threads for what blocks, and the way back: how operations of the channel wait without a task or an event loop.

Rules of this file:

- A thread runs the function of one `Blocking` step, which touches descriptors and immutable values, and nothing else.
- What asks the kernel for something (`Calling`) may come back only after requests of the kernel's were answered, and
  those may need threads: it has threads of its own, as many as it takes.
- A step that reads a layer that waits for somebody else (`remote`) runs in a thread of that one's file system.
- Everything else here is the channel's thread's. What is due comes back through `ready`, which threads append to; the
  channel takes from it between two requests.
- A channel that spins takes the interpreter from a thread again and again, so it sleeps while a step is `fresh`.
- A sleeping channel is woken through `fd`, an eventfd; one that is awake looks at `ready` by itself. `sleeping` is set
  before the last look at `ready`, and a thread looks at it after it has appended, so no wake-up is lost.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections import deque
from collections.abc import Callable
from functools import partial
from time import monotonic

from unionfsd import remote
from unionfsd.logger import get_logger
from unionfsd.pool import Pool
from unionfsd.steps import Calling
from unionfsd.typed import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from unionfsd.fuse.exchange import Deferred
    from unionfsd.steps import Blocking

log = get_logger(__name__)

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
        self._steps = Pool(THREADS, "unionfsd step")
        self._calls = Pool(None, "unionfsd call")

    def submit(self, deferred: Deferred, step: Blocking) -> None:
        """Have a thread do `step`; `deferred` is then due with what it returned or raised."""
        system = remote.system_of(step.source)
        pool = self._calls if isinstance(step, Calling) else self._steps
        self.submit_to(pool if system is None else system.readers, deferred, step.fn, step.then)

    def submit_to(
        self, pool: Pool, deferred: Deferred, fn: Callable[[], Any], then: Callable[[], None] | None = None
    ) -> None:
        """Have a thread of `pool` call `fn`, likewise, and `then` after it."""
        self._latest = monotonic()
        try:
            pool.submit(partial(self._do, deferred, fn, then))
        except RuntimeError as exc:
            self.ready.append(Due(deferred, None, OSError(errno.EAGAIN, f"no thread: {exc}")))

    @property
    def fresh(self) -> bool:
        """Whether a step is likely to be over soon."""
        return monotonic() - self._latest < _SOON

    def call(self, fn: Callable[[], Any]) -> None:
        """Have a thread ask the kernel for something by `fn`, which raises nothing and which nobody waits for."""
        try:
            self._calls.submit(fn)
        except RuntimeError as exc:
            log.warning("no thread: %s", exc)

    def due(self, deferred: Deferred) -> None:
        """`deferred` waits no longer. From the channel's thread, in the midst of another operation perhaps."""
        self._back(Due(deferred, None, None))

    def take(self) -> Due:
        """The next of `ready`, which is not empty."""
        return self.ready.popleft()

    def awake(self) -> None:
        """The channel has slept; wake-ups that were sent meanwhile are over."""
        self.sleeping = False
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fd)

    def close(self) -> None:
        """End the threads. Nothing may be under way."""
        self._steps.close()
        self._calls.close()
        os.close(self.fd)

    def _do(self, deferred: Deferred, fn: Callable[[], Any], then: Callable[[], None] | None) -> None:
        self._back(_done(deferred, fn))
        if then is not None:
            then()

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
