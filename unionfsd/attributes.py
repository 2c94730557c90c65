"""Attributes: what stat and the xattr calls show and change.

Rules this file obeys:

- A change copies up, then makes one system call per field, in a fixed order: size, owner, mode, times. A later call
  undoes what an earlier one does on the side (a change of owner drops the suid bit, one of size moves the times).
- The format's own xattrs are invisible; a user's of the same name is kept escaped, so that mounts nest.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from . import format as fmt
from . import syscalls
from .copyup import CopyUp
from .handles import Handles
from .inodes import DirNode, Node
from .layers import xattr_names
from .lookup import Resolver
from .steps import Op


class StatLike(Protocol):
    """The fields of os.stat_result that the mount shows."""

    @property
    def st_mode(self) -> int: ...
    @property
    def st_uid(self) -> int: ...
    @property
    def st_gid(self) -> int: ...
    @property
    def st_size(self) -> int: ...
    @property
    def st_blocks(self) -> int: ...
    @property
    def st_blksize(self) -> int: ...
    @property
    def st_rdev(self) -> int: ...
    @property
    def st_atime_ns(self) -> int: ...
    @property
    def st_mtime_ns(self) -> int: ...
    @property
    def st_ctime_ns(self) -> int: ...


class Attr(NamedTuple):
    """Attributes as the mount shows them: `ino` and `nlink` instead of those in `st`, times in nanoseconds."""

    st: StatLike
    ino: int
    nlink: int


@dataclass(slots=True)
class SetAttr:
    """What to change; None leaves a field. Times are ns since the epoch, or syscalls.UTIME_NOW.

    `writeback`: nobody asked; the kernel hands over the times that its writeback cache kept, also after an unlink.
    """

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    writeback: bool = False

    def fields(self) -> tuple[str, ...]:
        """What somebody asked to change."""
        if self.writeback:
            return ()
        named = {
            "mode": self.mode,
            "uid": self.uid,
            "gid": self.gid,
            "size": self.size,
            "atime": self.atime_ns,
            "mtime": self.mtime_ns,
        }
        return tuple(name for name, value in named.items() if value is not None)


class Owned:
    """A stat whose owner is another: for mounts that show everything as one user's."""

    __slots__ = ("_st", "st_gid", "st_uid")

    def __init__(self, st: StatLike, uid: int | None, gid: int | None) -> None:
        self._st = st
        self.st_uid = st.st_uid if uid is None else uid
        self.st_gid = st.st_gid if gid is None else gid

    def __getattr__(self, name: str) -> int:
        value: int = getattr(self._st, name)
        return value


class Elsewhere:
    """The stat of a file whose data, and so its blocks, are another's."""

    __slots__ = ("_st", "st_blocks")

    def __init__(self, st: os.stat_result, blocks: int) -> None:
        self._st = st
        self.st_blocks = blocks

    def __getattr__(self, name: str) -> int:
        value: int = getattr(self._st, name)
        return value


class Attributes:
    """Attributes of one mount's objects. `copy_up` is None when nothing can be written."""

    def __init__(self, resolver: Resolver, handles: Handles, copy_up: CopyUp | None, owner: Owner) -> None:
        self._resolver = resolver
        self._handles = handles
        self._copy_up = copy_up
        self._owner = owner

    def show(self, node: Node, st: os.stat_result) -> Attr:
        """What the mount shows for an object whose topmost layer says `st`."""
        shown: StatLike = st
        if isinstance(node, DirNode):
            merged = len(node.entry.lowers) + node.entry.upper > 1
            nlink = 0 if node.unlinked else 1 if merged else st.st_nlink
        else:
            nlink = st.st_nlink - 1 if node.unlinked and not node.entry.upper else st.st_nlink
            if node.entry.index is not None and self._resolver.index is not None:
                nlink = max(0, nlink + self._resolver.index.extra(node.entry.index))
            if self._resolver.follows_data and stat.S_ISREG(st.st_mode) and st.st_blocks * 512 < st.st_size:
                shown = self._with_blocks(node, st)
        uid, gid = self._owner
        return Attr(shown if uid is None and gid is None else Owned(shown, uid, gid), node.ino, nlink)

    def _with_blocks(self, node: Node, st: os.stat_result) -> StatLike:
        """The same with the blocks of the file that has the data of `node`, whose object may have none of its own."""
        try:
            with self._resolver.open_object(node) as fd:
                data = self._resolver.locate(node, fd.fd)
            if data is None:
                return st
            blocks = syscalls.stat_at(data.lower.open(self._resolver.fds), data.name).st_blocks
        except OSError:
            return st  # where the data is not to be had, that is said to who wants to read it
        return Elsewhere(st, blocks)

    def get(self, node: Node) -> Attr:
        return self.show(node, self._resolver.stat(node))

    def set(self, node: Node, change: SetAttr) -> Op[Attr]:
        """Apply `change`; EROFS, and what the calls on the upper raise."""
        if change.writeback and self._is_kept(node, change):
            return self.get(node)
        yield from self._to_upper(node, change.size)
        if change.mtime_ns is not None and node.open is not None:
            node.open.mtime_ns = change.mtime_ns
        if change.size is not None:
            fd = yield from self._handles.writable(node)
            syscalls.truncate(fd.fd, change.size)
        with self._resolver.open_object(node) as fd:
            self._apply(fd.fd, change)
        if isinstance(node, DirNode):
            node.heritage = None
        return self.get(node)

    def _is_kept(self, node: Node, change: SetAttr) -> bool:
        """Whether times from the writeback cache say nothing new: an unlinked lower file is not copied up for them."""
        return change.mtime_ns in (None, self._resolver.stat(node).st_mtime_ns)

    def _to_upper(self, node: Node, size: int | None = None) -> Op[None]:
        if self._copy_up is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if isinstance(node, DirNode):
            if size is not None:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if node.unlinked and not node.entry.upper:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        yield from self._copy_up.node(node, size, data=size is not None)

    def _apply(self, fd: int, change: SetAttr) -> None:
        if change.uid is not None or change.gid is not None:
            syscalls.chown(fd, _or_keep(change.uid), _or_keep(change.gid))
        if change.mode is not None:
            syscalls.chmod(fd, stat.S_IMODE(change.mode))
        if change.atime_ns is not None or change.mtime_ns is not None:
            syscalls.utimens(fd, _or_omit(change.atime_ns), _or_omit(change.mtime_ns))

    # Extended attributes.

    def getxattr(self, node: Node, name: bytes) -> bytes:
        """Value of an xattr; ENODATA."""
        if fmt.is_forbidden(name):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        with self._resolver.open_object(node) as fd:
            return syscalls.getxattr(fd.fd, fmt.escape(name))

    def listxattr(self, node: Node) -> list[bytes]:
        """Names of the xattrs that users may know of."""
        with self._resolver.open_object(node) as fd:
            return [fmt.unescape(name) for name in xattr_names(fd.fd) if not fmt.is_internal(name)]

    def setxattr(self, node: Node, name: bytes, value: bytes, flags: int) -> Op[None]:
        """Set an xattr; `flags` are XATTR_CREATE (EEXIST) or XATTR_REPLACE (ENODATA). EPERM for fuse-overlayfs's."""
        if fmt.is_forbidden(name):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        if not node.entry.upper:
            self._check_setxattr(node, name, flags)
        yield from self._to_upper(node)
        with self._resolver.open_object(node) as fd:
            syscalls.setxattr(fd.fd, fmt.escape(name), value, flags)
        if isinstance(node, DirNode):
            node.heritage = None

    def _check_setxattr(self, node: Node, name: bytes, flags: int) -> None:
        """Fail before a copy-up where setxattr would fail after it."""
        try:
            self.getxattr(node, name)
        except OSError as exc:
            if exc.errno != errno.ENODATA or flags & os.XATTR_REPLACE:
                raise
        else:
            if flags & os.XATTR_CREATE:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    def removexattr(self, node: Node, name: bytes) -> Op[None]:
        """Remove an xattr; ENODATA when there is none, and then nothing is copied up."""
        self.getxattr(node, name)
        yield from self._to_upper(node)
        with self._resolver.open_object(node) as fd:
            syscalls.removexattr(fd.fd, fmt.escape(name))
        if isinstance(node, DirNode):
            node.heritage = None


class Owner(NamedTuple):
    """Whose everything is shown as; None for the real owner."""

    uid: int | None
    gid: int | None


def _or_keep(value: int | None) -> int:
    return -1 if value is None else value


def _or_omit(value: int | None) -> int:
    return syscalls.UTIME_OMIT if value is None else value
