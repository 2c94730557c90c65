"""What a stack of layer directories shows at a path: overlayfs's rules for those who have no union at hand.

Enough for layers that came from images and for uppers without redirects: whiteouts in every form, opaque directories.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

from unionfsd import format as fmt
from unionfsd import syscalls
from unionfsd.images.beneath import Path, names
from unionfsd.syscalls import Fd
from unionfsd.typed import NamedTuple


class Found(NamedTuple):
    """An object of the stack: the directory `parent` of the layer that gives it has it as `name`."""

    parent: Fd
    name: bytes
    stat: os.stat_result


class Below:
    """The stack of `layers`, the top one first."""

    def __init__(self, layers: Sequence[Fd]) -> None:
        self._layers = tuple(layers)

    def find(self, path: Path) -> Found | None:
        """What is at `path`, which has a component at least; None for nothing."""
        merged = self._merged(path[:-1])
        for directory in merged:
            found = _entry(directory, path[-1])
            if found is None:
                continue
            return None if isinstance(found, str) else Found(directory, path[-1], found)
        return None

    def directory(self, path: Path) -> tuple[Fd, ...]:
        """The directories of layers that make the directory at `path`, the top one first; none when it is none."""
        return self._merged(path)

    def listing(self, path: Path) -> set[bytes]:
        """The names in the directory at `path`; empty when it is none."""
        seen: set[bytes] = set()
        hidden: set[bytes] = set()
        for directory in self._merged(path):
            here: set[bytes] = set()
            for name in names(directory.fd):
                if fmt.is_reserved(name):
                    here.add(fmt.wh_target(name) or b"")
                elif isinstance(_entry(directory, name), str):
                    here.add(name)
                elif name not in hidden:
                    seen.add(name)
            hidden |= here
        return seen

    def _merged(self, path: Path) -> tuple[Fd, ...]:
        directories = self._layers
        for name in path:
            directories = _down(directories, name)
        return directories


def _down(directories: Sequence[Fd], name: bytes) -> tuple[Fd, ...]:
    found = []
    for directory in directories:
        st = _entry(directory, name)
        if st is None:
            continue
        if isinstance(st, str) or not stat.S_ISDIR(st.st_mode):
            break
        inner = syscalls.open_dir(directory.fd, name)
        found.append(inner)
        if is_opaque(inner):
            break
    return tuple(found)


def _entry(directory: Fd, name: bytes) -> os.stat_result | str | None:
    """What a layer says of `name`: its stat, "whiteout", or None for nothing."""
    st = syscalls.stat_or_none(directory.fd, name)
    if st is None:
        return "whiteout" if syscalls.stat_or_none(directory.fd, fmt.wh_name(name)) is not None else None
    return "whiteout" if is_whiteout(directory, name, st) else st


def is_whiteout(directory: Fd, name: bytes, st: os.stat_result) -> bool:
    """Whether an object of a layer is a whiteout of one of overlayfs's forms."""
    if fmt.is_whiteout_device(st.st_mode, st.st_rdev):
        return True
    if not stat.S_ISREG(st.st_mode) or st.st_size:
        return False
    with syscalls.open_object(directory.fd, name) as fd:
        return any(has_xattr(fd, mark) for mark in fmt.WHITEOUT_NAMES)


def is_opaque(directory: Fd) -> bool:
    """Whether a directory of a layer hides those below."""
    values = [value for name in fmt.OPAQUE_NAMES if (value := xattr(directory, name)) is not None]
    return fmt.marks(values).opaque or syscalls.stat_or_none(directory.fd, fmt.WH_OPAQUE) is not None


def has_xattr(fd: Fd, name: bytes) -> bool:
    return xattr(fd, name) is not None


def xattr(fd: Fd, name: bytes) -> bytes | None:
    """The value of an xattr; None when there is none, or none can be."""
    try:
        return syscalls.getxattr(fd.fd, name)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM):
            return None
        raise
