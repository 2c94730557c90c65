"""A bound on open descriptors: directories and files stay open while they are used and are reopened when they are not.

Rules this file obeys:

- A `Holder` owns at most one descriptor in the cache; the cache may close it at any time unless it is pinned.
- Who needs the number asks the holder each time; who works in a thread, or for long, takes the `Fd` itself.
- A descriptor of an object that has no name any more could not be opened again, and lives as long as its node: it is
  kept outside (`keep`), or its holder is pinned (`pin`). The more of them, the fewer the cache keeps open. Whoever can
  delete what he has open could take all there are, so there is a bound, and no user has more than half of what is left.
- The cache refers to holders weakly: one that nobody else has, as of a name that was only looked at, goes with its
  descriptor.
- Eviction is second chance: a holder used since the hand last passed stays for one more round.
- Uses are counted where they are marked, in `Holder.hot`, so that counting them costs nothing.
"""

from __future__ import annotations

import errno
import os
import resource
from collections import Counter, OrderedDict
from collections.abc import Callable
from weakref import ref

from .logger import get_logger
from .syscalls import Fd
from .typed import Final, NamedTuple

log = get_logger(__name__)

#: Descriptors left for everything that is not a cached one.
_SPARE_FDS: Final = 256
_MAX_CACHED_FDS: Final = 65536


class Holder:
    """Something that has a descriptor when it needs one. `fd` is None when it is closed.

    `hot`: how often it was wanted since the hand last passed; who finds `fd` there adds one.
    """

    __slots__ = ("__weakref__", "fd", "hot", "pin")

    def __init__(self) -> None:
        self.fd: Fd | None = None
        self.hot = 0
        self.pin: Pin | None = None

    def drop(self) -> None:
        """Let go of the descriptor. It closes with its last reference: a thread that was given the `Fd` keeps it."""
        self.fd = None


class Pins:
    """How many descriptors may not be closed: in all, and by the user on whose behalf."""

    __slots__ = ("by_user", "total")

    def __init__(self) -> None:
        self.total = 0
        self.by_user: Counter[int | None] = Counter()


class Pin:
    """One of them, counted for as long as this object lives."""

    __slots__ = ("_pins", "_uid")

    def __init__(self, pins: Pins, uid: int | None) -> None:
        self._pins = pins
        self._uid = uid
        pins.total += 1
        pins.by_user[uid] += 1

    def __del__(self) -> None:
        self._pins.total -= 1
        self._pins.by_user[self._uid] -= 1
        if not self._pins.by_user[self._uid]:
            del self._pins.by_user[self._uid]


class Kept(Fd):
    """A descriptor that is kept outside of the cache, and counted there."""

    __slots__ = ("_pin",)

    def __init__(self, fd: int, pin: Pin) -> None:
        super().__init__(fd)
        self._pin = pin


class Usage(NamedTuple):
    """What a cache was good for."""

    hits: int
    misses: int
    evictions: int


class FdCache:
    """Keeps at most `capacity` descriptors of unpinned holders open, fewer when others may not be closed.

    `total`: how many there may be in all. `who` says which user an operation is for, None for nobody.
    """

    #: Below this many a single operation could not hold all it needs at once.
    MINIMUM: Final = 64

    def __init__(self, capacity: int, total: int = 0, who: Callable[[], int | None] = lambda: None) -> None:
        self.capacity = max(capacity, self.MINIMUM)
        self._total = max(total, self.capacity)
        self._who = who
        self._pins = Pins()
        self._refused: set[int | None] = set()
        self._hand: OrderedDict[ref[Holder], None] = OrderedDict()
        self._uses = 0
        self._opened = 0
        self._evicted = 0

    def admit(self, holder: Holder, fd: Fd) -> int:
        """Give `holder` the descriptor `fd`, closing others if that is one too many; returns its number."""
        holder.drop()
        holder.fd = fd
        holder.hot += 1
        self._opened += 1
        self._hand[ref(holder, self._gone)] = None
        while len(self._hand) > self._room():
            self._evict_one(holder)
        return fd.fd

    def _gone(self, key: ref[Holder]) -> None:
        if key in self._hand:
            del self._hand[key]
            self._uses += 1  # at least the one that it was opened for

    def _held(self) -> list[Holder]:
        return [holder for key in self._hand if (holder := key()) is not None]

    def _room(self) -> int:
        return min(self.capacity, max(self.MINIMUM, self._total - self._pins.total))

    def keep(self, opener: Callable[[], Fd]) -> Kept:
        """What `opener` opens, to be kept for as long as who asked for it wants; ENFILE where that is too many."""
        pin = self._pin()
        fd = opener()
        number, fd.fd = fd.fd, -1
        return Kept(number, pin)

    def pin(self, holder: Holder) -> None:
        """Never close the descriptor of `holder`, which has one; ENFILE where that is too many."""
        if holder.pin is None:
            holder.pin = self._pin()

    def _pin(self) -> Pin:
        uid = self._who()
        left = self._total - self.capacity // 2 - self._pins.total
        mine = self._pins.by_user[uid]
        if left <= 0 or (mine >= left and uid not in (None, 0, os.geteuid())):
            if uid not in self._refused:
                self._refused.add(uid)
                log.warning("user %s keeps %d deleted objects open: more are not deleted (ENFILE)", uid, mine)
            raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
        return Pin(self._pins, uid)

    def _evict_one(self, newest: Holder) -> None:
        while True:
            key, _ = self._hand.popitem(last=False)
            holder = key()
            if holder is None:
                return
            if holder is newest or (holder.hot and holder.fd is not None and holder.pin is None):
                self._cool(holder)
                self._hand[key] = None
                continue
            self._cool(holder)
            if holder.pin is None:
                self._evicted += holder.fd is not None
                holder.drop()
            return

    def forget(self, holder: Holder) -> None:
        """`holder` is done with: its descriptor goes now, and the cache keeps no reference to it."""
        self._hand.pop(ref(holder), None)
        self._cool(holder)
        holder.drop()
        holder.pin = None

    def _cool(self, holder: Holder) -> None:
        self._uses += holder.hot
        holder.hot = 0

    def shed(self) -> int:
        """Close every descriptor that may be closed; returns how many that were."""
        loose = [holder for holder in self._held() if holder.fd is not None and holder.pin is None]
        for holder in loose:
            self.forget(holder)
        return len(loose)

    def usage(self) -> Usage:
        """How often a descriptor was there, had to be opened, or was closed to make room, so far."""
        uses = self._uses + sum(holder.hot for holder in self._held())
        return Usage(hits=uses - self._opened, misses=self._opened, evictions=self._evicted)

    def close(self) -> None:
        """Close every descriptor, pinned or not."""
        for holder in self._held():
            holder.drop()
        self._hand.clear()

    def __len__(self) -> int:
        return sum(1 for holder in self._held() if holder.fd is not None)


def fd_budget() -> tuple[int, int]:
    """How many descriptors a cache may keep open in this process, and with those that it may not close."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    total = max(soft - _SPARE_FDS, soft // 2)
    return min(total, _MAX_CACHED_FDS), total
