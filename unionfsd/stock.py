"""Files made in advance: the next one to be staged, where one follows the other.

To make an inode takes longer than all else of a small copy-up but the sync where many were deleted not long ago: ext4
without a journal looks at each of those (fs/ext4/ialloc.c, recently_deleted). A thread that has synced one file makes
the next, while its name is given to the first and the next request is on its way.

Rules this file obeys:

- A file that waits has no name, so nothing is left of it whatever happens.
- It is used soon or not at all: its birth time is seen. The last of a row waits until the next copy-up or the end of
  the mount.
"""

from __future__ import annotations

import contextlib
from collections import deque
from time import monotonic

from . import syscalls
from .syscalls import Fd
from .typed import Final

#: Seconds in which a file made in advance is used, and in which one staged file follows another.
_SOON: Final = 0.1


class Stock:
    """Of the directory that the O_PATH descriptor `dirfd` refers to, in a file system that has O_TMPFILE."""

    def __init__(self, dirfd: int) -> None:
        self._dirfd = dirfd
        self._waiting: deque[tuple[float, int, Fd]] = deque()
        self._taken = 0.0
        self._in_a_row = False

    def take(self, mode: int) -> Fd:
        """An empty regular file of `mode` without a name, opened O_RDWR; raises what openat does."""
        now = monotonic()
        self._in_a_row = now - self._taken < _SOON
        self._taken = now
        while self._waiting:
            made, has, fd = self._waiting.popleft()
            if now - made < _SOON:
                if has != mode:
                    syscalls.chmod(fd.fd, mode)
                return fd
            fd.close()
        return syscalls.tmpfile_at(self._dirfd, mode)

    def add(self, mode: int) -> None:
        """In any thread: make the next one, most likely of `mode`, if one was taken just now, and one just before it.

        Best effort: what fails here is tried again, and reported, when the file is needed.
        """
        if self._in_a_row and not self._waiting and monotonic() - self._taken < _SOON:
            with contextlib.suppress(OSError):
                self._waiting.append((monotonic(), mode, syscalls.tmpfile_at(self._dirfd, mode)))

    def close(self) -> None:
        """Close what waits."""
        while self._waiting:
            self._waiting.popleft()[2].close()
