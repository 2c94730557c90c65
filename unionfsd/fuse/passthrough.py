"""Passthrough: files that the kernel reads, writes and maps itself, and which opens may do so.

Rules of this file (docs/performance.md; fs/fuse/passthrough.c, fs/fuse/iomode.c):

- What a node's first open is, all its opens are until the last is released: passthrough with one backing id, or cached.
  The kernel fails any other open with EIO. It has let go of an open before it sends the RELEASE, so what is counted
  here is never less than what the kernel has.
- The kernel opens the registered *path* again, with the flags of the caller's open and with our credentials. So the
  only file ever registered is the one that `Union.backing` gives: of the upper, or of a mount without one. An id is
  never used for another file, nor after its last release.
- Data in the kernel's cache of a node is stale once the file was written past it. A cached open of a file that may
  have been does not keep the cache.
- A store to a shared mapping moves the file's times and tells nobody. While a node is open for writing, its attributes
  are given to the kernel for a single use; at the first such open it is told to drop those it has. That needs no
  thread, unlike other notifications: whoever opens holds the inode, so the kernel waits for nothing.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from struct import Struct

from unionfsd.fuse import abi, wire
from unionfsd.ledger import Flag, Record
from unionfsd.logger import get_logger
from unionfsd.typed import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from unionfsd.syscalls import Fd
    from unionfsd.union import Union

log = get_logger(__name__)

_BACKING_MAP: Final = Struct("=iIQ")
"""struct fuse_backing_map: fd, flags, padding"""
_ID: Final = Struct("=I")
_CACHED: Final = 0


class How(NamedTuple):
    """What OPEN_OUT says of an open: FOPEN_*, and the backing id, `_CACHED` for none."""

    flags: int
    backing: int


class _Opens:
    """The opens of one node: how the kernel has them, how many, and how many of them can write."""

    __slots__ = ("count", "how", "record", "writing")

    def __init__(self, how: How, record: int) -> None:
        self.how = how
        self.record = record
        self.count = 0
        self.writing = 0


class Passthrough:
    """The open files of one connection whose kernel offers passthrough."""

    def __init__(self, fuse_fd: int, union: Union, unsettled: set[int], *, asked_for: bool) -> None:
        """`unsettled`: the nodes that may be written unseen. `asked_for`: a refusal is worth a warning."""
        self._fd = fuse_fd
        self._union = union
        self._ledger = union.ledger
        self._unsettled = unsettled
        self._asked_for = asked_for
        self._opens: dict[int, _Opens] = {}
        self._granted = False
        self._refused = False

    @property
    def impossible(self) -> bool:
        """Nothing can be passed through, and nothing ever was: opens need not be sent any more."""
        return self._refused and not self._granted

    def opened(self, nodeid: int, flags: int) -> How:
        """Count an open with the open(2) `flags` that the union has granted."""
        opens = self._opens.get(nodeid)
        if opens is None:
            how = self._first(nodeid)
            record = self._ledger.add(nodeid, b"", how.flags << 32 | how.backing, Flag.OPENS)
            opens = self._opens[nodeid] = _Opens(how, record)
        opens.count += 1
        if opens.how.backing and flags & os.O_ACCMODE:
            opens.writing += 1
            if opens.writing == 1:
                self._unsettled.add(nodeid)
                self._distrust(nodeid)
        self._ledger.tally_open(opens.record, opens.writing << 32 | opens.count)
        return opens.how

    def restore(self, records: list[Record]) -> None:
        """Know the opens again that a process before this one counted."""
        for record in records:
            opens = _Opens(How(record.ino >> 32, record.ino & 0xFFFF_FFFF), record.nodeid)
            opens.count, opens.writing = record.lookups & 0xFFFF_FFFF, record.lookups >> 32
            self._granted = self._granted or bool(opens.how.backing)
            if opens.count:
                self._opens[record.parent] = opens
                if opens.writing:
                    self._unsettled.add(record.parent)
            else:
                self._ledger.drop(record.nodeid)

    def take_back(self, record: int, flags: int) -> bool:
        """An open that was counted in `record` will be asked for again; False when that counts something else."""
        for nodeid, opens in self._opens.items():
            if opens.record == record:
                self._close(nodeid, flags, self._ledger.tally_back)
                return True
        return False

    def _first(self, nodeid: int) -> How:
        file = self._union.backing(nodeid)
        if file is None:
            return How(abi.FOPEN_KEEP_CACHE, _CACHED)
        backing = _CACHED if self._refused else self._register(file)
        return How(abi.FOPEN_PASSTHROUGH if backing else 0, backing)

    def _register(self, file: Fd) -> int:
        """The id of `file`. From the first refusal on no file has one."""
        try:
            backing = backing_open(self._fd, file.fd)
        except OSError as exc:
            self._refused = True
            why = _REASONS.get(exc.errno or 0, exc.strerror)
            (log.warning if self._asked_for else log.debug)("io=passthrough is not possible: %s", why)
            return _CACHED
        self._granted = True
        return backing

    def released(self, nodeid: int, flags: int) -> None:
        """Count the end of an open with the open(2) `flags`."""
        self._close(nodeid, flags, self._ledger.tally_release)

    def _close(self, nodeid: int, flags: int, tally: Callable[[int, int], None]) -> None:
        opens = self._opens.get(nodeid)
        if opens is None:
            return
        if opens.writing and flags & os.O_ACCMODE:
            opens.writing -= 1
            if not opens.writing:
                self._unsettled.discard(nodeid)
        opens.count -= 1
        tally(opens.record, opens.writing << 32 | opens.count)
        if not opens.count:
            del self._opens[nodeid]
            self._ledger.drop(opens.record)
            if opens.how.backing:
                backing_close(self._fd, opens.how.backing)

    def _distrust(self, nodeid: int) -> None:
        body = wire.INVAL_INODE_OUT.pack(nodeid, _NO_DATA, 0)
        try:
            os.write(self._fd, wire.notification(abi.FUSE_NOTIFY_INVAL_INODE, body))
        except OSError as exc:
            log.debug("attributes of node %d stay cached: %s", nodeid, exc)


_NO_DATA: Final = -1
"""An offset that leaves cached data alone."""

_REASONS: Final = {
    errno.EPERM: "it takes CAP_SYS_ADMIN outside of any container",
    errno.ELOOP: "a layer lies on a stacked file system, such as overlayfs",
}


def backing_open(fuse_fd: int, fd: int) -> int:
    """Register the open file `fd`; returns its id, above 0. EPERM, ELOOP; EOPNOTSUPP for a file that has no data."""
    # With a mutable argument fcntl.ioctl returns what the system call does.
    backing: int = fcntl.ioctl(fuse_fd, abi.FUSE_DEV_IOC_BACKING_OPEN, bytearray(_BACKING_MAP.pack(fd, 0, 0)))
    return backing


def backing_close(fuse_fd: int, backing: int) -> None:
    """Give an id back. Opens that were answered with it keep the file."""
    fcntl.ioctl(fuse_fd, abi.FUSE_DEV_IOC_BACKING_CLOSE, _ID.pack(backing))
