"""Taking from the kernel what it keeps of a file and believes against what is so: a failed write, a time, a mode."""

from __future__ import annotations

import errno
from functools import partial

from unionfsd.fuse import notify
from unionfsd.logger import get_logger
from unionfsd.typed import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from unionfsd.fuse.workers import Workers
    from unionfsd.union import Union

log = get_logger(__name__)

_GONE: Final = frozenset((errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN))


class Distrust:
    """What is being taken back over one connection, in threads of `workers`."""

    def __init__(self, fuse_fd: int, union: Union, workers: Workers) -> None:
        self._fd = fuse_fd
        self._union = union
        self._workers = workers
        self.dropping: set[int] = set()
        """The nodes it is at."""
        self._wanted: set[int] = set()

    def renew(self, nodeid: int) -> None:
        """In a thread: have the kernel ask for the attributes of `nodeid` anew. Of a regular file it believes its own
        size and times all the same, where it has a writeback cache."""
        try:
            notify.forget_attributes(self._fd, nodeid)
        except OSError as exc:
            if exc.errno not in _GONE:
                raise

    def drop(self, nodeid: int) -> None:
        """Begin to; once at a time for a node, and once more if that had begun before."""
        self._wanted.add(nodeid)
        if nodeid in self.dropping:
            return
        try:
            place = self._union.place(nodeid)
        except OSError:
            self._wanted.discard(nodeid)
            return  # forgotten, and with it what was kept
        self.dropping.add(nodeid)
        self._workers.call(partial(self._drop_now, nodeid, place))

    def _drop_now(self, nodeid: int, place: tuple[int, bytes] | None) -> None:
        while nodeid in self._wanted:
            self._wanted.discard(nodeid)
            self.dropping.add(nodeid)
            try:
                notify.drop(self._fd, nodeid, place)
            except OSError as exc:
                if exc.errno not in _GONE:
                    log.warning("what a file no longer holds may be seen until it is no longer cached: %s", exc)
            finally:
                self.dropping.discard(nodeid)
