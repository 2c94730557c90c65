"""Notifications: what this side tells the kernel without being asked.

Rules of this file:

- A notification is written from a thread. The kernel takes the locks of the directory or inode it is about, somebody
  who waits for our answer may hold them, and only the trio thread can answer.
- That the kernel does not know the node or the name any more is no failure.
"""

from __future__ import annotations

import errno
import os
from functools import partial

from unionfsd.fuse import abi, wire
from unionfsd.typed import Final

_UNKNOWN: Final = (FileNotFoundError, NotADirectoryError)


class Notifier:
    """Tells the kernel on `fuse_fd` what not to believe any longer. OSError EINVAL: the kernel is too old for it."""

    def __init__(self, fuse_fd: int) -> None:
        self._fd = fuse_fd

    async def inval_inode(self, nodeid: int, offset: int = 0, length: int = 0) -> bool:
        """Forget attributes and `length` bytes of cached data from `offset` (all of it when 0); no data when it is < 0.

        Here and below, False: the kernel did not know it.
        """
        return await self._send(abi.FUSE_NOTIFY_INVAL_INODE, wire.INVAL_INODE_OUT.pack(nodeid, offset, length))

    async def hand_over(self, nodeids: list[int]) -> None:
        """Have the kernel hand over what was written to the files `nodeids`, and wait; it keeps none of their data."""
        import trio  # late: the channel begins before it is imported

        await trio.to_thread.run_sync(partial(_drop_all, self._fd, nodeids))

    async def inval_entry(self, parent: int, name: bytes) -> bool:
        """Forget the name, and what is mounted beneath it with it."""
        return await self._send(abi.FUSE_NOTIFY_INVAL_ENTRY, wire.inval_entry(parent, name))

    async def expire_entry(self, parent: int, name: bytes) -> bool:
        """Look the name up again before it is next used; mounts beneath it stay. Linux 6.2."""
        return await self._send(abi.FUSE_NOTIFY_INVAL_ENTRY, wire.inval_entry(parent, name, expire=True))

    async def delete(self, parent: int, child: int, name: bytes) -> bool:
        """The name is gone; watchers are told."""
        return await self._send(abi.FUSE_NOTIFY_DELETE, wire.delete(parent, child, name))

    async def prune(self, nodeids: list[int]) -> bool:
        """Forget those of the nodes that nobody uses. Linux 6.18."""
        return await self._send(abi.FUSE_NOTIFY_PRUNE, wire.prune(nodeids))

    async def inc_epoch(self) -> bool:
        """Look every name up again before it is next used. Linux 6.16."""
        return await self._send(abi.FUSE_NOTIFY_INC_EPOCH, b"")

    async def _send(self, code: int, body: bytes) -> bool:
        import trio  # late: the channel begins before it is imported

        return await trio.to_thread.run_sync(partial(_write, self._fd, code, body))


def drop(fuse_fd: int, nodeid: int, place: tuple[int, bytes] | None) -> None:
    """In a thread: have the kernel forget the data of `nodeid`, and its name at `place` (parent nodeid, name).

    What was not handed over yet is before.

    Without the name the inode goes as soon as nobody has it open, and with it the size and the times that a kernel with
    a writeback cache believes from nobody else.
    """
    _write(fuse_fd, abi.FUSE_NOTIFY_INVAL_INODE, wire.INVAL_INODE_OUT.pack(nodeid, 0, 0))
    if place is not None:
        _write(fuse_fd, abi.FUSE_NOTIFY_INVAL_ENTRY, wire.inval_entry(*place))


def forget_attributes(fuse_fd: int, nodeid: int) -> None:
    """In a thread: have the kernel forget the attributes of `nodeid`, and none of its data."""
    _write(fuse_fd, abi.FUSE_NOTIFY_INVAL_INODE, wire.INVAL_INODE_OUT.pack(nodeid, -1, 0))


def resend(fuse_fd: int) -> bool:
    """Have the kernel send again what was not answered; False where it cannot (before Linux 6.9)."""
    try:
        os.write(fuse_fd, wire.notification(abi.FUSE_NOTIFY_RESEND, b""))
    except OSError as exc:
        if exc.errno != errno.EINVAL:
            raise
        return False
    return True


def _drop_all(fuse_fd: int, nodeids: list[int]) -> None:
    for nodeid in nodeids:
        drop(fuse_fd, nodeid, None)


def _write(fuse_fd: int, code: int, body: bytes) -> bool:
    try:
        os.write(fuse_fd, wire.notification(code, body))
    except _UNKNOWN:
        return False
    return True
