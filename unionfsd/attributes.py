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

from . import format as fmt
from . import owners, syscalls
from .copyup import CopyUp
from .guard import Guard, layer_of
from .handles import Handles
from .inodes import DirNode, Node, NodeTable
from .layers import xattr_names
from .ledger import Kind, Ledger
from .lookup import Resolver
from .options import MountConfig
from .owners import Owners, StatLike
from .steps import Op
from .typed import NamedTuple


class Attr(NamedTuple):
    """Attributes as the mount shows them: `ino` and `nlink` instead of those in `st`, times in nanoseconds."""

    st: StatLike
    ino: int
    nlink: int


class Found(NamedTuple):
    """An object the kernel asked for by name, or that was created; its lookup is counted."""

    nodeid: int
    generation: int
    attr: Attr


class SetAttr(NamedTuple):
    """What to change; None leaves a field. Times are ns since the epoch, or syscalls.UTIME_NOW.

    `writeback`: nobody asked; the kernel hands over the times that its writeback cache kept, also after an unlink.
    `touch`: `mtime_ns` is the time at which it was asked for, which a kernel that keeps times sends itself.
    """

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    writeback: bool = False
    touch: bool = False

    @property
    def only_cuts(self) -> bool:
        """Whether there is nothing but a size."""
        rest = (self.mode, self.uid, self.gid, self.atime_ns, self.mtime_ns)
        return self.size is not None and rest.count(None) == len(rest)

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

    @property
    def touches(self) -> bool:
        """Whether it is no more than a change of times to now."""
        others = (self.mode, self.uid, self.gid, self.size)
        mtime_ns = syscalls.UTIME_NOW if self.touch else self.mtime_ns
        return all(value is None for value in others) and {self.atime_ns, mtime_ns} <= {None, syscalls.UTIME_NOW}


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

    def __init__(
        self,
        resolver: Resolver,
        handles: Handles,
        copy_up: CopyUp | None,
        owners: Owners,
        guard: Guard | None,
        ledger: Ledger,
        config: MountConfig,
    ) -> None:
        self._resolver = resolver
        self._handles = handles
        self._copy_up = copy_up
        self._owners = owners
        self._translates = owners.translates or resolver.stack.overrides
        self._guard = guard
        self._ledger = ledger
        self._static_nlink = config.static_nlink
        self._noacl = config.noacl
        self._noxattrs = config.noxattrs

    def show(self, node: Node, st: os.stat_result) -> Attr:
        """What the mount shows for an object whose topmost layer says `st`."""
        shown: StatLike = st
        if isinstance(node, DirNode):
            single = self._static_nlink or len(node.entry.lowers) + node.entry.upper > 1
            nlink = 0 if node.unlinked else 1 if single else st.st_nlink
        else:
            nlink = st.st_nlink - 1 if _is_kept(node) else st.st_nlink
            if node.entry.index is not None and self._resolver.index is not None:
                nlink = max(0, nlink + self._resolver.index.extra(node.entry.index))
            if self._resolver.follows_data and stat.S_ISREG(st.st_mode) and st.st_blocks * 512 < st.st_size:
                shown = self._with_blocks(node, st)
        return Attr(self._translated(node, shown) if self._translates else shown, node.ino, nlink)

    def show_new(self, node: Node, st: os.stat_result, table: NodeTable) -> Attr:
        """As `show`, of a node that the kernel is about to be told of: where that fails, nobody needs it."""
        try:
            return self.show(node, st)
        except BaseException:
            table.settle(node)
            raise

    def _translated(self, node: Node, st: StatLike) -> StatLike:
        found = st
        layer = layer_of(self._resolver, node)
        if layer.override is not None:
            with self._resolver.open_object(node) as fd:
                found = owners.recorded(fd.fd, st, layer.override)
        return self._owners.show(found, mapped=layer.idmapped) if self._owners.translates else found

    def _form(self, node: Node) -> fmt.OverrideForm | None:
        """How the layer that `node` is in keeps owners."""
        return layer_of(self._resolver, node).override

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
        if change.writeback:
            st = self._resolver.stat(node)
            if change.mtime_ns in (None, st.st_mtime_ns):
                return self.show(node, st)  # nothing new: an unlinked lower file is not copied up for that
        if self._guard is not None and not (change.writeback and node.open is not None and node.open.untimed):
            self._guard.change(node, touch=change.touches)
        yield from self._to_upper(node, change.size)
        if change.mtime_ns is not None and node.open is not None:
            node.open.mtime_ns = change.mtime_ns
            node.open.untimed = False
        if change.size is not None:
            fd = yield from self._handles.writable(node)
            syscalls.truncate(fd.fd, change.size)
        if not change.only_cuts:
            if node.open is not None and node.open.fd is not None and node.open.writable:
                self._apply(node.open.fd.fd, self._form(node), change)
            else:
                with self._resolver.open_object(node) as fd:
                    self._apply(fd.fd, self._form(node), change)
        if isinstance(node, DirNode):
            node.heritage = None
        return self.get(node)

    def _to_upper(self, node: Node, size: int | None = None) -> Op[None]:
        if self._copy_up is None:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        if isinstance(node, DirNode):
            if size is not None:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if node.unlinked and not node.entry.upper:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        yield from self._copy_up.node(node, size, data=size is not None)

    def _apply(self, fd: int, form: fmt.OverrideForm | None, change: SetAttr) -> None:
        uid, gid = self._owners.new_owner(change.uid, change.gid)
        if form is not None:
            if (uid, gid, change.mode) != (-1, -1, None):
                owners.change(fd, form, uid, gid, change.mode)
        else:
            if (uid, gid) != (-1, -1):
                self._owners.forgive(lambda: syscalls.chown(fd, uid, gid))
            if change.mode is not None:
                syscalls.chmod(fd, stat.S_IMODE(change.mode))
        if change.atime_ns is not None or change.mtime_ns is not None:
            syscalls.utimens(fd, _or_omit(change.atime_ns), _or_omit(change.mtime_ns))

    # Extended attributes.

    def getxattr(self, node: Node, name: bytes) -> bytes:
        """Value of an xattr; ENODATA."""
        self._check_name(name, errno.ENODATA)
        form = self._form(node)
        if node.open is not None and node.open.fd is not None and node.entry.data is None:
            value = owners.read_xattr(node.open.fd.fd, name, form)  # asked before the first write to every file
        elif form is None:
            value = syscalls.getxattr_at(*self._resolver.spot(node), fmt.name_in_layer(name, form))
        else:
            with self._resolver.open_object(node) as fd:
                value = owners.read_xattr(fd.fd, name, form)
        return value if layer_of(self._resolver, node).idmapped else self._owners.show_xattr(name, value)

    def _check_name(self, name: bytes, number: int) -> None:
        """EOPNOTSUPP for xattrs that the mount has not, ENOSYS if it has none, errno `number` for those of a layer.

        EINVAL for a namespace without a name, as from VFS.
        """
        if self._noxattrs:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        if self._noacl and name in fmt.ACLS:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if fmt.is_nameless(name):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        if fmt.is_forbidden(name):
            raise OSError(number, os.strerror(number))

    def listxattr(self, node: Node) -> list[bytes]:
        """Names of the xattrs that users may know of."""
        if self._noxattrs:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        form = self._form(node)
        with self._resolver.open_object(node) as fd:
            names = dict.fromkeys(fmt.name_in_mount(name, form) for name in xattr_names(fd.fd))
        return [name for name in names if name is not None and not (self._noacl and name in fmt.ACLS)]

    def setxattr(self, node: Node, name: bytes, value: bytes, flags: int) -> Op[None]:
        """Set an xattr; `flags` are XATTR_CREATE (EEXIST) or XATTR_REPLACE (ENODATA). EPERM for fuse-overlayfs's.

        EINVAL for an ACL with an id that the mount's mapping has not.
        """
        self._check_name(name, errno.EPERM)
        value = self._owners.keep_xattr(name, value)
        if self._guard is not None:
            self._guard.change(node)
        if not node.entry.upper:
            self._check_setxattr(node, name, flags)
        yield from self._to_upper(node)
        with self._resolver.open_object(node) as fd:
            if flags:
                self._ledger.intend(Kind.XATTR, node.nodeid, name)
            form = self._form(node)
            if form is not None and name in fmt.ACLS:
                owners.set_acl(fd.fd, form, name, value, flags)
            else:
                syscalls.setxattr(fd.fd, fmt.name_in_layer(name, form), value, flags)
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
        if self._guard is not None:
            self._guard.change(node)
        yield from self._to_upper(node)
        with self._resolver.open_object(node) as fd:
            self._ledger.intend(Kind.XATTR, node.nodeid, name)
            owners.remove_xattr(fd.fd, name, self._form(node))
        if isinstance(node, DirNode):
            node.heritage = None


def _is_kept(node: Node) -> bool:
    """Whether an object has a name where it lies that it has not in the union."""
    return (node.unlinked and not node.entry.upper) or (node.open is not None and node.open.kept)


def _or_omit(value: int | None) -> int:
    return syscalls.UTIME_OMIT if value is None else value
