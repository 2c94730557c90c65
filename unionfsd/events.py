"""What changes in a mount, as a stream of numbered events: for who wants to follow, or to look back a little.

Rules this file obeys:

- Nothing but alarms is recorded until somebody asks, and nothing any more when nobody has asked for a while (`LINGER`):
  whoever changes something looks at `recording` first, and that is all it costs then.
- An event is told after the change is there, and exactly once. Numbers have no gaps; what a reader missed it is told.
- Everything runs in the thread of the union. Waking a reader is all that happens in it for readers.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import islice
from math import inf

from unionfsd.typed import Final, NamedTuple

RING: Final = 4096
"""Events kept for readers to come."""
LINGER: Final = 600.0
"""Seconds that recording goes on after somebody asked."""
_WRITERS: Final = 1024
"""Pairs of a file and a writer that are remembered, so that only the first write of each is an event."""


class Who(NamedTuple):
    """The process that asked for a change: its pid and its user, as the kernel tells them to a daemon in its place.

    `pid` is 0 when there is none (pages that the kernel writes back), both are None when the transport does not know.
    """

    pid: int | None
    uid: int | None


NOBODY: Final = Who(None, None)


class Event(NamedTuple):
    """A change. `path` and `to` are from the root of the mount; `path` is None for a file without a name.

    `to`: the new name of a rename, an exchange or a link. `fields`: what a change of attributes changes, or what of an
    object of a lower is not as it must be ("corrupt", whose path is that in the layer).
    """

    number: int
    time_ns: int
    kind: str
    path: bytes | None
    to: bytes | None
    fields: tuple[str, ...]
    who: Who


class Since(NamedTuple):
    """Events from a number on; `lost` were there and are not kept any more, `next` comes after the last."""

    events: list[Event]
    lost: int
    next: int


def nobody() -> Who:
    """Who asked, where no transport says."""
    return NOBODY


class Events:
    """The events of one mount. `who` is set by its transport: it says for whom the union is at work right now."""

    def __init__(self, *, always: bool = False) -> None:
        """`always`: recording begins now, and never ends."""
        self.recording = False
        self.who: Callable[[], Who] = nobody
        self._ring: deque[Event] = deque(maxlen=RING)
        self._next = 1
        self._until = 0.0
        self._wanted: list[Callable[[], None]] = []
        self._writers: OrderedDict[tuple[int, Who], None] = OrderedDict()
        if always:
            self.listen(always=True)

    def record(self, kind: str, path: bytes | None, to: bytes | None = None, *, fields: tuple[str, ...] = ()) -> None:
        """Keep an event, and wake who waits for one."""
        if time.monotonic() > self._until:
            self._stop()
            return
        self._keep(kind, path, to, fields, self.who())

    def _keep(self, kind: str, path: bytes | None, to: bytes | None, fields: tuple[str, ...], who: Who) -> None:
        self._ring.append(Event(self._next, time.time_ns(), kind, path, to, fields, who))
        self._next += 1
        wanted, self._wanted = self._wanted, []
        for wake in wanted:
            wake()

    def alarm(self, kind: str, path: bytes | None, *, fields: tuple[str, ...] = ()) -> None:
        """Keep an event that matters to who asks later, too, whether or not anything else is recorded."""
        self._keep(kind, path, None, fields, self.who())

    def is_first_write(self, nodeid: int) -> bool:
        """Whether who is at work now has not written to the file before, as far as is remembered."""
        key = (nodeid, self.who())
        known = key in self._writers
        self._writers[key] = None
        self._writers.move_to_end(key)
        if len(self._writers) > _WRITERS:
            self._writers.popitem(last=False)
        return not known

    def listen(self, *, always: bool = False) -> None:
        """Record from now on for `LINGER` seconds, or `always`. An event "start" says that nothing was before."""
        self._until = inf if always else max(self._until, time.monotonic() + LINGER)
        if not self.recording:
            self.recording = True
            self._keep("start", None, None, (), NOBODY)

    def _stop(self) -> None:
        self.recording = False
        self._ring.clear()
        self._writers.clear()

    @property
    def next(self) -> int:
        """The number of the next event."""
        return self._next

    def since(self, number: int | None, limit: int) -> Since:
        """At most `limit` events from `number` on; all that are kept for None."""
        oldest = self._ring[0].number if self._ring else self._next
        if number is None or number > self._next:  # such a number is of another mount
            number = oldest
        first = max(number, oldest)
        found = list(islice(self._ring, first - oldest, first - oldest + limit))
        return Since(found, first - max(number, 1), first + len(found))

    def on_next(self, wake: Callable[[], None]) -> None:
        """Call `wake` once, at the next event."""
        self._wanted.append(wake)

    def never_mind(self, wake: Callable[[], None]) -> None:
        """Do not, if it was not yet."""
        if wake in self._wanted:
            self._wanted.remove(wake)
