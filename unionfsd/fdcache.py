"""A bound on open descriptors: directories and files stay open while they are used and are reopened when they are not.

Rules this file obeys:

- A `Holder` owns at most one descriptor in the cache; the cache may close it at any time unless it is pinned.
- Who needs the number asks the holder each time; who works in a thread, or for long, takes the `Fd` itself.
- A holder whose object has no name any more, and so could not be opened again, is pinned: the cache lets go of it, and
  its descriptor lives as long as its node.
- Eviction is second chance: a holder used since the hand last passed stays for one more round.
- Uses are counted where they are marked, in `Holder.hot`, so that counting them costs nothing.
"""

from __future__ import annotations

import resource
from collections import OrderedDict
from typing import Final, NamedTuple

from .syscalls import Fd

#: Descriptors left for everything that is not a cached one.
_SPARE_FDS: Final = 256
_MAX_CACHED_FDS: Final = 65536


class Holder:
    """Something that has a descriptor when it needs one. `fd` is None when it is closed.

    `hot`: how often it was wanted since the hand last passed; who finds `fd` there adds one.
    """

    __slots__ = ("fd", "hot", "pinned")

    def __init__(self) -> None:
        self.fd: Fd | None = None
        self.hot = 0
        self.pinned = False

    def drop(self) -> None:
        """Let go of the descriptor. It closes with its last reference: a thread that was given the `Fd` keeps it."""
        self.fd = None


class Usage(NamedTuple):
    """What a cache was good for."""

    hits: int
    misses: int
    evictions: int


class FdCache:
    """Keeps at most `capacity` descriptors of unpinned holders open."""

    #: Below this many a single operation could not hold all it needs at once.
    MINIMUM: Final = 64

    def __init__(self, capacity: int) -> None:
        self.capacity = max(capacity, self.MINIMUM)
        self._hand: OrderedDict[Holder, None] = OrderedDict()
        self._uses = 0
        self._opened = 0
        self._evicted = 0

    def admit(self, holder: Holder, fd: Fd) -> int:
        """Give `holder` the descriptor `fd`, closing others if that is one too many; returns its number."""
        holder.drop()
        holder.fd = fd
        holder.hot += 1
        self._opened += 1
        self._hand[holder] = None
        while len(self._hand) > self.capacity:
            self._evict_one(holder)
        return fd.fd

    def _evict_one(self, newest: Holder) -> None:
        while True:
            holder, _ = self._hand.popitem(last=False)
            if holder is newest or (holder.hot and holder.fd is not None and not holder.pinned):
                self._cool(holder)
                self._hand[holder] = None
                continue
            self._cool(holder)
            if not holder.pinned:
                self._evicted += holder.fd is not None
                holder.drop()
            return

    def forget(self, holder: Holder) -> None:
        """`holder` is done with: its descriptor goes now, and the cache keeps no reference to it."""
        self._hand.pop(holder, None)
        self._cool(holder)
        holder.drop()

    def _cool(self, holder: Holder) -> None:
        self._uses += holder.hot
        holder.hot = 0

    def shed(self) -> int:
        """Close every descriptor that may be closed; returns how many that were."""
        loose = [holder for holder in self._hand if holder.fd is not None and not holder.pinned]
        for holder in loose:
            self.forget(holder)
        return len(loose)

    def usage(self) -> Usage:
        """How often a descriptor was there, had to be opened, or was closed to make room, so far."""
        uses = self._uses + sum(holder.hot for holder in self._hand)
        return Usage(hits=uses - self._opened, misses=self._opened, evictions=self._evicted)

    def close(self) -> None:
        """Close every descriptor, pinned or not."""
        while self._hand:
            self._hand.popitem()[0].drop()

    def __len__(self) -> int:
        return sum(1 for holder in self._hand if holder.fd is not None)


def fd_budget() -> int:
    """How many descriptors a cache may keep open in this process."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(max(soft - _SPARE_FDS, soft // 2), _MAX_CACHED_FDS)
