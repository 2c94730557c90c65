"""A bound on open descriptors: directories and files stay open while they are used and are reopened when they are not.

Rules this file obeys:

- A `Holder` owns at most one descriptor in the cache; the cache may close it at any time unless it is pinned.
- Who needs the number asks the holder each time; who works in a thread takes the `Fd` itself. Whose object has no name
  any more, and so could not be opened again, is pinned.
- Eviction is second chance: a holder used since the hand last passed stays for one more round.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from .syscalls import Fd


class Holder:
    """Something that has a descriptor when it needs one. `fd` is None when it is closed."""

    __slots__ = ("fd", "hot", "pins")

    def __init__(self) -> None:
        self.fd: Fd | None = None
        self.hot = False
        self.pins = 0

    def drop(self) -> None:
        """Let go of the descriptor. It closes with its last reference: a thread that was given the `Fd` keeps it."""
        self.fd = None


class FdCache:
    """Keeps at most about `capacity` descriptors of unpinned holders open."""

    #: Below this many a single operation could not hold all it needs at once.
    MINIMUM: Final = 64

    def __init__(self, capacity: int) -> None:
        self.capacity = max(capacity, self.MINIMUM)
        self._hand: deque[Holder] = deque()

    def admit(self, holder: Holder, fd: Fd) -> int:
        """Give `holder` the descriptor `fd`, closing others if that is one too many; returns its number."""
        if holder.fd is not None:
            holder.drop()
        else:
            self._hand.append(holder)
        holder.fd = fd
        holder.hot = True
        if len(self._hand) > self.capacity:
            self._evict()
        return fd.fd

    def _evict(self) -> None:
        for _ in range(2 * len(self._hand)):
            if len(self._hand) <= self.capacity:
                return
            holder = self._hand.popleft()
            if holder.fd is None:
                continue
            if holder.hot or holder.pins:
                holder.hot = False
                self._hand.append(holder)
            else:
                holder.drop()

    def close(self) -> None:
        """Close every descriptor, pinned or not."""
        while self._hand:
            self._hand.popleft().drop()

    def __len__(self) -> int:
        return sum(1 for holder in self._hand if holder.fd is not None)
