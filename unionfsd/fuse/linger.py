"""Waiting for the next request where it costs least: adaptive spinning, then a moment in poll(2).

A client that stats file after file sends its next request some microseconds after it got its reply. Going to sleep in
between costs two context switches and, when client and daemon are on different processors, the wake-up of an idle one:
20 to 50 us, several times what the request itself takes. So, after a reply, the channel looks on for `WINDOW` first.

Spinning pays only if requests come and a processor is free for it, so it lives on credit: a request caught earns, a
window wasted costs more, and without credit there is no spinning until requests again come quickly after the channel
went to sleep. The worst case, a client that has to share its processor with the spinner, wastes a fifth of a window a
request.
"""

from __future__ import annotations

import os
import select
from collections.abc import Sized
from time import perf_counter

from unionfsd.typed import Final

WINDOW: Final = 50e-6
"""Seconds: about what going to sleep and being woken costs. Longer never wins back what it wastes."""
_QUICK: Final = 2 * WINDOW
"""A request that comes so soon after the channel went to sleep would have been worth spinning for."""
SLEEP_MS: Final = 1
"""Milliseconds in poll(2), which wakes faster than an event loop does and burns nothing."""
_MOST: Final = 16
_MISS: Final = 4


class Lingerer:
    """Waits for one of `fds` to become readable, or for `ready` to have something, briefly."""

    __slots__ = ("_credit", "_poll", "_ready", "_spins")

    def __init__(self, *fds: int, ready: Sized = ()) -> None:
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLIN)
        self._poll = poll.poll
        self._ready = ready
        self._credit = 0
        self._spins = len(os.sched_getaffinity(0)) > 1

    def spin(self) -> bool:
        """Look for a request for as long as it is worth it. True: there is one."""
        if self._credit <= 0 or not self._spins:
            return False
        poll, ready = self._poll, self._ready
        end = perf_counter() + WINDOW
        while not poll(0) and not ready:
            if perf_counter() > end:
                self._credit -= _MISS
                return False
        if self._credit < _MOST:
            self._credit += 1
        return True

    def sleep(self, milliseconds: int = SLEEP_MS) -> bool:
        """Sleep until a descriptor is readable or so much time is over. True: one is."""
        start = perf_counter()
        if not self._poll(milliseconds):
            return False
        self.woken(perf_counter() - start)
        return True

    def woken(self, after: float) -> None:
        """A request came `after` seconds of sleep."""
        if after < _QUICK and self._credit < _MOST:
            self._credit += 1
