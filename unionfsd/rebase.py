"""Accepting other lowers for an upper: what it says of the old ones is said of those it is given.

Rules this file obeys:

- The view is the same before and after, and after a crash at any call: origins are about identity, inode numbers and
  hard links, not about what is shown. Doing it again goes on where it ended.
- An origin that still means something in the lowers is right, wherever that lies. One that does not is replaced by what
  lies in its place, if that is of the same type, and else taken away.
- An object of the index gets the name of what it is an index of now. One that is of nothing any more leaves the index;
  its names in the upper stay, and those that only lowers had show the lowers again.
"""

from __future__ import annotations

import os
import stat

from . import format as fmt
from . import syscalls
from .doctor import Directory, Walk
from .identity import Places, origin_of
from .layers import LayerStack, exists, optional_xattr
from .logger import get_logger
from .lookup import Resolver
from .syscalls import stat_or_none
from .workdir import Workdir

log = get_logger(__name__)


def rebase(stack: LayerStack, work: Workdir) -> int:
    """Make the upper of `stack` one of its lowers; returns how many origins were changed. OSError ends it halfway."""
    assert stack.upper is not None
    assert stack.work is not None
    walk = Walk(stack)
    change = _Rebase(stack, work, walk.resolver)
    for directory in walk.run():
        change.directory(directory)
    top = fmt.encode_origin(origin_of(stack.lowers[0]))
    _renew(stack.upper.root.fd, fmt.ORIGIN_NAMES, top)
    if exists(stack.work.fd, fmt.INDEX):
        with syscalls.open_dir(stack.work.fd, fmt.INDEX) as index:
            _renew(index.fd, fmt.UPPER_NAMES, fmt.encode_origin(origin_of(stack.upper), fmt.ORIGIN_OF_UPPER))
    return change.count


def _renew(fd: int, names: tuple[bytes, ...], value: bytes) -> None:
    for name in names:
        if optional_xattr(fd, name) not in (None, value):
            syscalls.setxattr(fd, name, value)


class _Rebase:
    def __init__(self, stack: LayerStack, work: Workdir, resolver: Resolver) -> None:
        self.count = 0
        self._resolver = resolver
        self._stack = stack
        self._places = Places(stack)
        self._names = tuple(name for name in fmt.ORIGIN_NAMES if name == work.xattr(fmt.ORIGIN))

    def directory(self, at: Directory) -> None:
        """A directory and what it holds, but for its subdirectories."""
        if at.path != b"/":
            self._object(at, b"", at.fd)
        for name in at.names:
            st = stat_or_none(at.fd, name)
            if st is not None and not stat.S_ISDIR(st.st_mode) and not fmt.is_whiteout_device(st.st_mode, st.st_rdev):
                with syscalls.open_object(at.fd, name) as fd:
                    self._object(at, name, fd.fd)

    def _object(self, at: Directory, name: bytes, fd: int) -> None:
        for attr in self._names:
            value = optional_xattr(fd, attr)
            origin = fmt.decode_origin(value) if value else None
            if value and origin is not None and self._places.lost(origin):
                new = self._in_its_place(at, name, fd)
                self._reindex(value, new)
                if new is None:
                    syscalls.removexattr(fd, attr)
                else:
                    syscalls.setxattr(fd, attr, new)
                self.count += 1

    def _in_its_place(self, at: Directory, name: bytes, fd: int) -> bytes | None:
        """The origin of what a lower has where the object `fd` is."""
        resolver, node = self._resolver, at.node
        if not name:
            lowers = node.entry.lowers
            below = (lowers[0], b"") if lowers else None
        else:
            hit = resolver.find_lower(node, name) if node.entry.lowers else None
            same = hit is not None and stat.S_IFMT(hit.st.st_mode) == stat.S_IFMT(os.fstat(fd).st_mode)
            below = (hit.entry.lowers[0], name) if hit is not None and same else None
        if below is None:
            return None
        lower, name = below
        try:
            kind, handle = syscalls.file_handle(lower.open(resolver.fds), name)
            return fmt.encode_origin(fmt.Origin(kind, handle, lower.layer.uuid))
        except (OSError, ValueError):
            return None

    def _reindex(self, old: bytes, new: bytes | None) -> None:
        """Have the index call its object by the new origin, before that is on it: a crash leaves it unused."""
        if self._stack.work is None or not exists(self._stack.work.fd, fmt.INDEX):
            return
        with syscalls.open_dir(self._stack.work.fd, fmt.INDEX) as index:
            name = old.hex().encode()
            if not exists(index.fd, name):
                return
            if new is None or exists(index.fd, new.hex().encode()):
                syscalls.unlink_at(index.fd, name)
            else:
                syscalls.renameat2(index.fd, name, index.fd, new.hex().encode(), syscalls.RENAME_NOREPLACE)
