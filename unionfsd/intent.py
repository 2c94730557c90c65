"""The intent record: the one change of names that takes two calls, made whole after a crash.

Where the upper's file system has no RENAME_WHITEOUT, or whiteouts are not devices, a rename over an existing name
whose old name a lower has cannot be one call: the two objects are exchanged, then what came to the old name is replaced
by a whiteout. Between the two stands a record in the work directory, on disk before the first call: the old name, and
the inode number of the object that must not stay there. At the next mount, an object with that number under that name
means that the exchange happened and the whiteout did not; anything else means that there is nothing to do.
"""

from __future__ import annotations

import os
import stat

from . import syscalls
from .layers import exists
from .logger import get_logger
from .typed import Final
from .workdir import INTENT, Workdir

log = get_logger(__name__)

_MAGIC: Final = b"unionfsd rename 1"


def record(work: Workdir, path: tuple[bytes, ...], ino: int) -> None:
    """Put on disk that the name `path` of the upper becomes a whiteout once its st_ino is `ino`, or it is gone (0)."""
    if exists(work.fd, INTENT):
        syscalls.unlink_at(work.fd, INTENT)
    with syscalls.create_at(work.fd, INTENT, 0o600) as fd:
        try:
            syscalls.pwrite(fd.fd, b"\0".join((_MAGIC, b"%d" % ino, *path, b"")), 0)
            syscalls.fsync(fd.fd)
            _sync_work(work)
        except BaseException:
            work.discard(INTENT)
            raise


def retire(work: Workdir) -> None:
    """The change is complete, or undone. Best effort: a record that stays finds nothing to do, or is written over."""
    work.discard(INTENT)


def _sync_work(work: Workdir) -> None:
    with syscalls.reopen(work.fd, os.O_RDONLY | os.O_DIRECTORY) as fd:
        syscalls.fsync(fd.fd)


def recover(work: Workdir, upper: int) -> None:
    """Complete what a record in `work` speaks of in the upper, whose root is the O_PATH fd `upper`."""
    try:
        wanted = _read(work)
    except FileNotFoundError:
        return
    if wanted is not None:
        _complete(work, upper, *wanted)
    retire(work)


def _complete(work: Workdir, upper: int, path: tuple[bytes, ...], ino: int) -> None:
    fd = syscalls.reopen(upper, os.O_PATH | os.O_DIRECTORY)
    try:
        for name in path[:-1]:
            fd = syscalls.open_dir(fd.fd, name)
        if _finish(work, fd.fd, path[-1], ino):
            log.info("recovered: %s was renamed when the last mount ended", os.fsdecode(b"/".join(path)))
    except (FileNotFoundError, NotADirectoryError):
        log.info("recovered: the record of a rename speaks of a name that is gone")


def _finish(work: Workdir, dirfd: int, name: bytes, ino: int) -> bool:
    if not ino:
        if exists(dirfd, name):
            return False
        work.place_whiteout(dirfd, name)
        return True
    st = syscalls.stat_at(dirfd, name)
    if st.st_ino != ino:
        return False
    work.replace_by_whiteout(dirfd, name, directory=stat.S_ISDIR(st.st_mode))
    return True


def _read(work: Workdir) -> tuple[tuple[bytes, ...], int] | None:
    """(path, inode number) of the record; None when the crash tore it, which was before the exchange. ENOENT: none."""
    with syscalls.open_data(work.fd, INTENT, os.O_RDONLY) as fd:
        fields = os.pread(fd.fd, 1 << 16, 0).split(b"\0")
    if len(fields) < 4 or fields[0] != _MAGIC or fields[-1] or not fields[1].isdigit():
        return None
    return tuple(fields[2:-1]), int(fields[1])
