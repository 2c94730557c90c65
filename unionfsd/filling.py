"""Filling a staged file: data and metadata of another, then put on disk. What blocks of a copy-up, for a thread.

Rules this file obeys:

- It touches descriptors and immutable values only.
- What is not on disk is put there, unless the mount never syncs. Where nothing was copied, nothing is: an empty file
  has no data, and blocks that are shared with a lower are on disk. Kernel overlayfs does the same (seen on 6.18).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from typing import TypeAlias

from . import format as fmt
from . import owners, syscalls, verity
from .entries import Source
from .filecopy import copy_data, share_data
from .metadata import Keeping, Metadata, apply_metadata
from .syscalls import UTIME_NOW, Fd

#: Raises UnsoundError for a file whose data is not what it must be; reads all of it.
Check: TypeAlias = Callable[[Fd], None]


def staging_mode(metadata: Metadata, keeping: Keeping) -> int:
    """The mode to stage a file with: what it is to have, so that it need not be set, and what we need until then."""
    return owners.disk_mode(metadata.st.st_mode, keeping.form) & 0o777 | 0o600


def fill(
    target: Fd,
    source: Fd,
    elsewhere: Source | None,
    metadata: Metadata,
    size: int | None,
    keeping: Keeping,
    check: Check | None,
    *,
    sync: bool,
) -> int:
    """Give `target` the data of `source` and `metadata`; returns the bytes copied. Runs in a thread.

    `elsewhere`: where `source` is, if that is not the object that `metadata` is of.
    """
    length = metadata.st.st_size if size is None else min(size, metadata.st.st_size)
    copied, fresh = _give(target, source, elsewhere, length, check)
    apply_metadata(target.fd, metadata, keeping)
    if size is not None:
        syscalls.utimens(target.fd, metadata.st.st_atime_ns, UTIME_NOW)
    if sync and fresh:
        syscalls.fsync(target.fd)
    return copied


def fill_data(target: Fd, source: Fd, where: Source, length: int, check: Check | None, *, sync: bool) -> int:
    """Give `target` the first `length` bytes of `source`; returns the bytes copied. Runs in a thread."""
    copied, fresh = _give(target, source, where, length, check)
    if sync and fresh:
        syscalls.fsync(target.fd)
    return copied


def _give(target: Fd, source: Fd, where: Source | None, length: int, check: Check | None) -> tuple[int, bool]:
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
        copied, fresh = copy_data(source.fd, target.fd, available, st), True
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
