"""Filling a staged file: data and metadata of another, then put on disk. What blocks of a copy-up, for a thread.

Rules this file obeys:

- It touches descriptors and immutable values only.
- A small file that the page cache has is filled at once: a thread takes longer than it. Only its sync is left to one.
- What is not on disk is put there, unless the mount never syncs. Where nothing was copied, nothing is: an empty file
  has no data, and blocks that are shared with a lower are on disk. Kernel overlayfs does the same (seen on 6.18).
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable

from . import format as fmt
from . import owners, syscalls, verity
from .entries import Source
from .filecopy import copy_data, share_data
from .metadata import Keeping, Metadata, apply_metadata
from .syscalls import UTIME_NOW, Fd
from .typed import NamedTuple, TypeAlias

#: Raises UnsoundError for a file whose data is not what it must be; reads all of it.
Check: TypeAlias = Callable[[Fd], None]


def staging_mode(metadata: Metadata, keeping: Keeping) -> int:
    """The mode to stage a file with: what it is to have, so that it need not be set, and what we need until then."""
    return owners.disk_mode(metadata.st.st_mode, keeping.form) & 0o777 | 0o600


class Filling(NamedTuple):
    """A staged file, `target`, that is to have the data of `source` and `metadata`.

    `elsewhere`: where `source` is, if that is not the object that `metadata` is of. `size`: so much of the data, as if
    truncated now; None for all.
    """

    target: Fd
    source: Fd
    elsewhere: Source | None
    metadata: Metadata
    size: int | None
    keeping: Keeping
    check: Check | None

    @property
    def length(self) -> int:
        """Bytes of data that it is to have."""
        whole = self.metadata.st.st_size
        return whole if self.size is None else min(self.size, whole)

    def run(self, *, sync: bool) -> int:
        """Do it, in a thread; returns the bytes copied."""
        copied, fresh = _give(self.target, self.source, self.elsewhere, self.length, self.check, sync=sync)
        self._finish()
        if sync and fresh:
            syscalls.fsync(self.target.fd)
        return copied

    def at_once(self, room: memoryview) -> int | None:
        """Do it without waiting for a disk, by way of `room`; returns the bytes copied, which are not synced.

        None, and nothing was done: it takes a thread.
        """
        if self.elsewhere is not None or self.check is not None or self.length > len(room):
            return None
        if self.length and not (self.size is None and share_data(self.source.fd, self.target.fd)):
            data = room[: self.length]
            if not _read_cached(self.source.fd, data):
                return None
            _put(self.target.fd, data)
            self._finish()
            return self.length
        self._finish()
        return 0

    def _finish(self) -> None:
        apply_metadata(self.target.fd, self.metadata, self.keeping)
        if self.size is not None:
            syscalls.utimens(self.target.fd, self.metadata.st.st_atime_ns, UTIME_NOW)


def _read_cached(fd: int, buffer: memoryview) -> bool:
    """Read the beginning of a file without holes; False unless the page cache has all of it."""
    st = os.fstat(fd)
    if st.st_blocks * 512 < st.st_size:
        return False
    try:
        return os.preadv(fd, [buffer], 0, os.RWF_NOWAIT) == len(buffer)
    except OSError as exc:
        if exc.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
            return False
        raise


def _put(fd: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += syscalls.pwrite(fd, data[done:], done)


def fill_data(target: Fd, source: Fd, where: Source, length: int, check: Check | None, *, sync: bool) -> int:
    """Give `target` the first `length` bytes of `source`; returns the bytes copied. Runs in a thread."""
    copied, fresh = _give(target, source, where, length, check, sync=sync)
    if sync and fresh:
        syscalls.fsync(target.fd)
    return copied


def _give(
    target: Fd, source: Fd, where: Source | None, length: int, check: Check | None, *, sync: bool
) -> tuple[int, bool]:
    """Give `target` the first `length` bytes of `source`, which is `where`, checked if they must be.

    Returns the bytes copied, and whether there is data that is not on disk.
    """
    if not length:
        return 0, False
    if where is not None and where.digest is not None:
        verity.check(source, where.digest, where.path)
    st = os.fstat(source.fd)
    if check is not None and length != st.st_size:
        check(source)
    if length == st.st_size and share_data(source.fd, target.fd):
        copied, fresh = 0, False
    else:
        available = length if where is None else min(length, st.st_size)
        copied, fresh = copy_data(source.fd, target.fd, available, st, sync=sync), True
        if available != length:
            syscalls.truncate(target.fd, length)
    if check is not None and length == st.st_size:
        check(target)  # the copy: what is checked is what is kept
    return copied, fresh


def restore_privileges(fd: int, before: Metadata, form: fmt.OverrideForm | None) -> None:
    """Give a file back what writing to it took away."""
    capability = before.xattrs.get(fmt.CAPABILITY)
    if capability is not None:
        syscalls.setxattr(fd, fmt.name_in_layer(fmt.CAPABILITY, form), capability)
    if form is not None:
        return
    lost = stat.S_IMODE(before.st.st_mode) & ~os.fstat(fd).st_mode & (stat.S_ISUID | stat.S_ISGID)
    if lost:
        syscalls.chmod(fd, stat.S_IMODE(before.st.st_mode))
