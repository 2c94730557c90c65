"""Copying the data of a file: shared where the file system can, with its holes, in the kernel where that goes."""

from __future__ import annotations

import errno
import os

from . import syscalls
from .typed import Final

_CHUNK: Final = 1 << 20
_STRIDE: Final = 4 << 20
"""Bytes after which the disk begins with them: half a gigabyte is copied and synced in two thirds of the time."""
_NO_COPY_RANGE: Final = {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.ETXTBSY}
_NO_CLONE: Final = _NO_COPY_RANGE | {errno.ENOTTY, errno.EISDIR, errno.EBADF}


def copy_data(source: int, target: int, length: int, st: os.stat_result, *, sync: bool) -> int:
    """Copy the first `length` bytes of `source`, whose fstat is `st`, into the empty `target`; returns bytes copied.

    Holes stay holes. `sync`: the target is synced next, so the disk begins with what is copied while the rest is.
    """
    copied = end = 0
    for start, end in _extents(source, length, st):
        _copy_extent(source, target, start, end, _STRIDE if sync else length)
        copied += end - start
    if end != length:
        syscalls.truncate(target, length)
    return copied


def share_data(source: int, target: int) -> bool:
    """Make the empty `target` share all blocks of `source`; False where the file system cannot."""
    try:
        syscalls.clone(target, source)
    except OSError as exc:
        if exc.errno in _NO_CLONE:
            return False
        raise
    return True


def _extents(fd: int, length: int, st: os.stat_result) -> list[tuple[int, int]]:
    """Ranges of the first `length` bytes of `fd` that hold data."""
    if not length:
        return []
    if st.st_blocks * 512 >= st.st_size:
        return [(0, length)]
    ranges = []
    end = 0
    while end < length:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                break
            if exc.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return [(0, length)]
            raise
        if start >= length:
            break
        end = min(os.lseek(fd, start, os.SEEK_HOLE), length)
        ranges.append((start, end))
    return ranges


def _copy_extent(source: int, target: int, start: int, end: int, stride: int) -> None:
    at = start
    while at < end:
        done = _copy_range(source, target, min(stride, end - at), at, write_out=stride < end - at)
        if not done:
            break
        at += done
    while at < end:
        data = os.pread(source, min(_CHUNK, end - at), at)
        if not data:
            raise OSError(errno.EIO, "lower file shrank while it was copied up")
        at += syscalls.pwrite(target, data, at)


def _copy_range(source: int, target: int, count: int, offset: int, *, write_out: bool) -> int:
    try:
        return syscalls.copy_range(source, target, count, offset, offset, write_out=write_out)
    except OSError as exc:
        if exc.errno in _NO_COPY_RANGE:
            return 0
        raise
