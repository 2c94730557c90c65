"""What differs between two stacks of layers, in time proportional to the directories that differ."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

from unionfsd import format as fmt
from unionfsd import syscalls
from unionfsd.images.below import Below, Found
from unionfsd.images.beneath import Path
from unionfsd.syscalls import Fd
from unionfsd.typed import Literal, NamedTuple


class Change(NamedTuple):
    """An object that the second stack has and the first has not ("A"), or not so ("C"), or that it lacks ("D")."""

    kind: Literal["A", "C", "D"]
    path: Path


def compare(first: Below, second: Below) -> Iterator[Change]:
    """Every difference, a directory before its content; what is in a deleted one is not listed."""
    pending: list[Path] = [()]
    while pending:
        path = pending.pop()
        before, after = first.directory(path), second.directory(path)
        if _same(before, after):
            continue  # the same directories of the same layers, so the same all the way down
        deeper = []
        for name in sorted(first.listing(path) | second.listing(path)):
            inner = (*path, name)
            old, new = first.find(inner), second.find(inner)
            kind = _kind(old, new)
            if kind is not None:
                yield Change(kind, inner)
            if new is not None and stat.S_ISDIR(new.stat.st_mode):
                deeper.append(inner)
        pending += reversed(deeper)


def _same(before: tuple[Fd, ...], after: tuple[Fd, ...]) -> bool:
    return [_identity(fd) for fd in before] == [_identity(fd) for fd in after]


def _identity(fd: Fd) -> tuple[int, int]:
    st = os.fstat(fd.fd)
    return st.st_dev, st.st_ino


def _kind(old: Found | None, new: Found | None) -> Literal["A", "C", "D"] | None:
    if new is None:
        return "D" if old is not None else None
    if old is None:
        return "A"
    if (old.stat.st_dev, old.stat.st_ino) == (new.stat.st_dev, new.stat.st_ino) or _equal(old, new):
        return None
    return "C"


def _equal(old: Found, new: Found) -> bool:
    """Whether two objects are the same to a user; of the times only the modification's counts, of directories none."""
    one, two = old.stat, new.stat
    if (one.st_mode, one.st_uid, one.st_gid) != (two.st_mode, two.st_uid, two.st_gid):
        return False
    kind = stat.S_IFMT(one.st_mode)
    with syscalls.open_object(old.parent.fd, old.name) as a, syscalls.open_object(new.parent.fd, new.name) as b:
        if _xattrs(a) != _xattrs(b):
            return False
        if kind == stat.S_IFDIR:
            return True
        if one.st_mtime_ns != two.st_mtime_ns or one.st_rdev != two.st_rdev or one.st_size != two.st_size:
            return False
        if kind == stat.S_IFLNK:
            return syscalls.readlink(a.fd) == syscalls.readlink(b.fd)
        return kind != stat.S_IFREG or _same_content(a, b)


def _xattrs(fd: Fd) -> dict[bytes, bytes]:
    return {name: syscalls.getxattr(fd.fd, name) for name in syscalls.listxattr(fd.fd) if not fmt.is_internal(name)}


def _same_content(a: Fd, b: Fd) -> bool:
    with syscalls.reopen(a.fd, os.O_RDONLY) as one, syscalls.reopen(b.fd, os.O_RDONLY) as two:
        while True:
            left, right = os.read(one.fd, 1 << 20), os.read(two.fd, 1 << 20)
            if left != right:
                return False
            if not left:
                return True
