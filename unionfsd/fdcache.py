"""A bound on open descriptors: directories and files stay open while they are used and are reopened when they are not.

Rules this file obeys:

- A `Holder` owns at most one descriptor in the cache; the cache may close it at any time unless it is pinned.
- Who needs the number asks the holder each time; who works in a thread, or for long, takes the `Fd` itself.
- A holder whose object has no name any more, and so could not be opened again, is pinned: the cache lets go of it, and
  its descriptor lives as long as its node.
- Eviction is second chance: a holder used since the hand last passed stays for one more round.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from .syscalls import Fd


class Holder:
    """Something that has a descriptor when it needs one. `fd` is None when it is closed."""

    __slots__ = ("fd", "hot", "pinned")

    def __init__(self) -> None:
        self.fd: Fd | None = None
        self.hot = False
        self.pinned = False

    def drop(self) -> None:
        """Let go of the descriptor. It closes with its last reference: a thread that was given the `Fd` keeps it."""
        self.fd = None


class FdCache:
    """Keeps at most `capacity` descriptors of unpinned holders open."""

    #: Below this many a single operation could not hold all it needs at once.
    MINIMUM: Final = 64

    def __init__(self, capacity: int) -> None:
        self.capacity = max(capacity, self.MINIMUM)
        self._hand: OrderedDict[Holder, None] = OrderedDict()

    def admit(self, holder: Holder, fd: Fd) -> int:
        """Give `holder` the descriptor `fd`, closing others if that is one too many; returns its number."""
        holder.drop()
        holder.fd = fd
        holder.hot = True
        self._hand[holder] = None
        while len(self._hand) > self.capacity:
            self._evict_one(holder)
        return fd.fd

    def _evict_one(self, newest: Holder) -> None:
        while True:
            holder, _ = self._hand.popitem(last=False)
            if holder is newest or (holder.hot and holder.fd is not None and not holder.pinned):
                holder.hot = False
                self._hand[holder] = None
                continue
            if not holder.pinned:
                holder.drop()
            return

    def forget(self, holder: Holder) -> None:
        """`holder` is done with: its descriptor goes now, and the cache keeps no reference to it."""
        self._hand.pop(holder, None)
        holder.drop()

    def shed(self) -> int:
        """Close every descriptor that may be closed; returns how many that were."""
        loose = [holder for holder in self._hand if holder.fd is not None and not holder.pinned]
        for holder in loose:
            self.forget(holder)
        return len(loose)

    def close(self) -> None:
        """Close every descriptor, pinned or not."""
        while self._hand:
            self._hand.popitem()[0].drop()

    def __len__(self) -> int:
        return sum(1 for holder in self._hand if holder.fd is not None)
