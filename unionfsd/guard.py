"""Who may change what: objects that are immutable or append-only refuse what VFS would refuse for them.

The kernel does not know the flags of what a FUSE mount shows, so it refuses nothing itself.

Rules this file obeys:

- The answer comes before anything is copied up. EPERM, as VFS has it (fs/namei.c, may_delete; fs/attr.c, may_setattr).
- Copy-up of parents asks nobody: it changes nothing that can be seen.
"""

from __future__ import annotations

import errno
import os

from . import format as fmt
from . import syscalls
from .entries import Entry
from .inodes import DirNode, Node
from .layers import Layer, has_any_xattr, optional_xattr
from .lookup import Resolver
from .protection import IMMUTABLE, PROTECTED, decode
from .workdir import Workdir


def layer_of(resolver: Resolver, node: Node) -> Layer:
    """The layer that decides what `node` is."""
    layer = resolver.stack.upper if node.entry.upper else node.entry.lowers[0].layer
    assert layer is not None
    return layer


class Guard:
    """What protects the objects of one mount. `work` is None when nothing can be written."""

    def __init__(self, resolver: Resolver, work: Workdir | None) -> None:
        self._resolver = resolver
        self._xattr = None if work is None else work.xattr(fmt.PROTATTR)

    def of(self, node: Node) -> int:
        """IMMUTABLE and APPEND of a node. In the upper flags on the inode itself are left to the file system."""
        if isinstance(node, DirNode):
            if node.protection is None:
                node.protection = self._of(node)
            return node.protection
        return self._of(node)

    def _of(self, node: Node) -> int:
        dirfd, name = self._resolver.spot(node)
        if not node.entry.upper:
            return syscalls.attributes_at(dirfd, name) & PROTECTED
        return self._of_upper(dirfd, name)

    def _of_upper(self, dirfd: int, name: bytes) -> int:
        if self._xattr is None or (name and not has_any_xattr(dirfd, name, (self._xattr,))):
            return 0
        opened = syscalls.open_object(dirfd, name) if name else syscalls.reopen(dirfd, os.O_PATH)
        with opened as fd:
            value = optional_xattr(fd.fd, self._xattr)
        return 0 if value is None else decode(value)

    def change(self, node: Node, *, touch: bool = False) -> None:
        """EPERM unless attributes of `node` may change; of what is append-only only times, to now (`touch`)."""
        if self.of(node) & (IMMUTABLE if touch else PROTECTED):
            raise _refused()

    def add(self, parent: DirNode) -> None:
        """EPERM unless a name may be made in `parent`."""
        if self.of(parent) & IMMUTABLE:
            raise _refused()

    def take(self, parent: DirNode, name: bytes, entry: Entry, *, directory: bool) -> None:
        """EPERM unless `name` in `parent`, which is `entry`, may go."""
        if self.of(parent) & PROTECTED:
            raise _refused()
        if entry.upper:
            flags = self._of_upper(self._resolver.upper_dir(parent), name)
        elif entry.index is not None and self._resolver.index is not None:
            flags = self._of_upper(self._resolver.index.fd, entry.index)
        else:
            lower = entry.lowers[0].open(self._resolver.fds)
            flags = syscalls.attributes_at(lower, b"" if directory else entry.name or name) & PROTECTED
        if flags:
            raise _refused()


def _refused() -> PermissionError:
    return PermissionError(errno.EPERM, os.strerror(errno.EPERM))
