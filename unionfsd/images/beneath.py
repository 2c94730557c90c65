"""Objects beneath a directory descriptor, one component at a time, no symlink followed, in bounded descriptors."""

from __future__ import annotations

import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator

from unionfsd import syscalls
from unionfsd.syscalls import Fd
from unionfsd.typed import Final

Path = tuple[bytes, ...]

_CAPACITY: Final = 64
_READ_DIR: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Tree:
    """The directories beneath `root`, by their paths; those used last stay open.

    Nobody else may rename or replace directories in it meanwhile, and who removes one tells it (`forget`).
    """

    def __init__(self, root: Fd) -> None:
        self.root = root
        self._open: OrderedDict[Path, Fd] = OrderedDict()

    def close(self) -> None:
        self._open.clear()

    def directory(self, path: Path) -> Fd:
        """O_PATH fd of the directory at `path`; ENOENT, or ENOTDIR or ELOOP when something else is on the way."""
        if not path:
            return self.root
        found = self._open.get(path)
        if found is not None:
            self._open.move_to_end(path)
            return found
        depth = len(path) - 1
        while depth and path[:depth] not in self._open:
            depth -= 1
        at = self._open[path[:depth]] if depth else self.root
        for position in range(depth, len(path)):
            at = syscalls.open_dir(at.fd, path[position])
            if len(path) - position <= _CAPACITY // 2:
                self._keep(path[: position + 1], at)
        return at

    def forget(self, path: Path) -> None:
        """The directory at `path` goes, with all beneath it."""
        for known in [known for known in self._open if known[: len(path)] == path]:
            del self._open[known]

    def _keep(self, path: Path, fd: Fd) -> None:
        self._open[path] = fd
        while len(self._open) > _CAPACITY:
            self._open.popitem(last=False)


def names(dirfd: int) -> list[bytes]:
    """The names in the directory `dirfd` (O_PATH allowed), sorted."""
    fd = os.open(b".", _READ_DIR, dir_fd=dirfd)
    try:
        return sorted(map(os.fsencode, os.listdir(fd)))
    finally:
        os.close(fd)


def walk(root: Fd) -> Iterator[tuple[Path, Fd, bytes, os.stat_result]]:
    """(path, directory, name, stat) of every object beneath `root`, a directory before its content, names sorted."""
    tree = Tree(root)
    pending: list[tuple[Path, list[bytes]]] = [((), names(root.fd)[::-1])]
    while pending:
        path, left = pending[-1]
        if not left:
            pending.pop()
            continue
        name = left.pop()
        directory = tree.directory(path)
        st = syscalls.stat_at(directory.fd, name)
        yield (*path, name), directory, name, st
        if stat.S_ISDIR(st.st_mode):
            with syscalls.open_dir(directory.fd, name) as inner:
                pending.append(((*path, name), names(inner.fd)[::-1]))


def remove(dirfd: int, name: bytes) -> None:
    """Remove whatever `name` is, with everything in it; nothing when there is nothing."""
    st = syscalls.stat_or_none(dirfd, name)
    if st is None:
        return
    if not stat.S_ISDIR(st.st_mode):
        syscalls.unlink_at(dirfd, name)
        return
    with syscalls.open_dir(dirfd, name) as top:
        _empty(top)
    syscalls.rmdir_at(dirfd, name)


def _empty(top: Fd) -> None:
    """Remove what is in a directory; deep trees by a loop, and with their directories made writable first."""
    tree = Tree(top)
    pending: list[Path] = [()]
    while pending:
        path = pending[-1]
        directory = tree.directory(path)
        if os.geteuid():
            syscalls.chmod(directory.fd, 0o700)
        deeper = False
        for name in names(directory.fd):
            try:
                syscalls.unlink_at(directory.fd, name)
            except OSError as error:
                if error.errno not in (errno.EISDIR, errno.EPERM):
                    raise
                pending.append((*path, name))
                deeper = True
        if not deeper:
            pending.pop()
            tree.forget(path)
            if path:
                syscalls.rmdir_at(tree.directory(path[:-1]).fd, path[-1])


def write_file(dirfd: int, name: bytes, data: bytes, *, mode: int = 0o644) -> None:
    """Make the file `name` and put it on disk; EEXIST."""
    with syscalls.create_at(dirfd, name, mode) as fd:
        view = memoryview(data)
        at = 0
        while at < len(view):
            at += syscalls.pwrite(fd.fd, view[at:], at)
        syscalls.fsync(fd.fd)


def replace_file(dirfd: int, name: bytes, data: bytes) -> None:
    """Give the file `name` new content in one step, on disk when this returns. The caller holds what locks it."""
    staged = b"." + name + b".new"
    remove(dirfd, staged)
    write_file(dirfd, staged, data)
    syscalls.renameat2(dirfd, staged, dirfd, name)
    sync_directory(dirfd)


def sync_directory(dirfd: int) -> None:
    """Put the names in a directory on disk."""
    with Fd(os.open(b".", _READ_DIR, dir_fd=dirfd)) as fd:
        syscalls.fsync(fd.fd)


def read_file(dirfd: int, name: bytes, limit: int) -> bytes:
    """The content of the regular file `name`, of at most `limit` bytes; EFBIG, ENOENT, EINVAL for other objects."""
    with syscalls.open_data(dirfd, name, os.O_RDONLY) as fd:
        st = os.fstat(fd.fd)
        if not stat.S_ISREG(st.st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), os.fsdecode(name))
        parts = []
        left = limit + 1
        while left > 0 and (part := os.read(fd.fd, min(left, 1 << 20))):
            parts.append(part)
            left -= len(part)
        if left <= 0:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), os.fsdecode(name))
        return b"".join(parts)
