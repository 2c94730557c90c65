"""Lowers checked against what they must hold (`treeindex`), where that is asked for (``-o verify``): EIO, never data.

When what is looked at:

- the names in a directory, when it is listed or its names are first kept; until then, each name that is looked up;
- owner, mode, times, size, xattrs and the target of a symlink, when the kernel learns of an object, and at copy-up;
- the data of a file, when it is first read, when it was changed since (its ctime says so), and when it is copied up.

Rules this file obeys: what is wrong is counted each time, and told once, in the log and as an event. An upper is ours,
and not looked at; nor is what a lower without an index has.
"""

from __future__ import annotations

import errno
import os
from functools import partial

from . import format as fmt
from . import syscalls, treeindex
from .events import Events
from .fdcache import FdCache
from .layers import LayerStack, LowerDir, exists
from .listing import DT_UNKNOWN, entry_type
from .logger import get_logger
from .metrics import Counters
from .steps import Blocking, Op
from .syscalls import Fd
from .treeindex import NO_CONTENT, Record
from .typed import Final

log = get_logger(__name__)

#: Objects that were told of are remembered up to this many; others are told of each time.
_MAX_TOLD: Final = 10_000
#: Bytes that are read at once.
_PIECE: Final = 1 << 18
#: Files up to this size are looked through without a thread.
_SMALL: Final = 32 * 1024


class Integrity:
    """The checks of one mount."""

    def __init__(self, fds: FdCache, counters: Counters, events: Events) -> None:
        self._fds = fds
        self._counters = counters
        self._events = events
        self._told: set[tuple[bytes, bytes, str]] = set()

    def fail(self, lower: LowerDir, name: bytes, what: str) -> OSError:
        """Tell of something wrong with `name` in `lower`, or with the directory itself; returns what to raise."""
        path = _path(lower, name)
        self._counters.corrupt += 1
        key = (lower.layer.path, path, what)
        if key not in self._told:
            if len(self._told) < _MAX_TOLD:
                self._told.add(key)
            where = os.fsdecode(b"/".join(filter(None, (lower.layer.path, path))))
            log.error("%s: not what the layer must hold: %s", where, what)
            self._events.alarm("corrupt", b"/" + path, fields=(what,))
        return OSError(errno.EIO, os.strerror(errno.EIO), os.fsdecode(path))

    # What is where.

    def resolved(
        self, lowers: tuple[LowerDir, ...], name: bytes, found: tuple[LowerDir, ...], *, directory: bool
    ) -> None:
        """See that the search for `name` in `lowers` was right to find `found`, directories or what has something else.

        EIO for a name that a layer must have and has not, and for a whiteout that must not be there.
        """
        left = [at.layer for at in found]
        for lower in lowers:
            if left and lower.layer is left[0]:
                del left[0]
                if not left and (not directory or found[-1].marks(self._fds).opaque):
                    return
            elif self._has(lower, name) or self._has(lower, fmt.wh_name(name)):
                return  # a whiteout, or something that ends a directory, and rightly so

    def _has(self, lower: LowerDir, name: bytes) -> bool:
        """Whether `name` is in `lower`, where it is just as it must be; EIO where it is not."""
        tree = lower.layer.tree
        if tree is None:
            return False
        if not exists(lower.open(self._fds), name) and tree.find(_path(lower, name)) is None:
            return False
        self.leaf(lower, name)
        return True

    def directories(self, lowers: tuple[LowerDir, ...]) -> None:
        """See that directories of lowers are what they must be, but for the names in them. EIO."""
        for lower in lowers:
            if lower.layer.tree is not None:
                self.vouch(lower, b"", lower.open(self._fds))
                self._has(lower, fmt.WH_OPAQUE)

    def leaf(self, lower: LowerDir, name: bytes) -> None:
        """See that `name` in `lower` is what it must be, but for its data. EIO."""
        if lower.layer.tree is None:
            return
        try:
            with syscalls.open_object(lower.open(self._fds), name) as fd:
                self.vouch(lower, name, fd.fd)
        except FileNotFoundError:
            raise self.fail(lower, name, "missing") from None

    def vouch(self, lower: LowerDir, name: bytes, fd: int) -> None:
        """The same of an object by its O_PATH fd; an empty name means the directory itself."""
        if lower.layer.tree is None:
            return
        wanted = lower.layer.tree.find(_path(lower, name))
        if wanted is None:
            raise self.fail(lower, name, "added")
        if treeindex.describe_object(fd, syscalls.fstat(fd)) != wanted.metadata:
            raise self.fail(lower, name, "metadata")

    def names(self, lower: LowerDir) -> bool:
        """Whether a directory has the names that it must have, whiteouts where they must be, and no others."""
        if lower.layer.tree is None:
            return True
        wanted = lower.layer.tree.find(_path(lower, b""))
        if wanted is not None and self._children(lower) == wanted.content:
            return True
        self.fail(lower, b"", "names")
        return False

    def _children(self, lower: LowerDir) -> bytes:
        fd = lower.open(self._fds)
        xwhiteouts = lower.marks(self._fds).xwhiteouts
        found = {}
        for name, entry in lower.layer.scan(fd):
            kind = DT_UNKNOWN if fmt.is_reserved(name) else entry_type(fd, name, entry, xwhiteouts=xwhiteouts)
            found[name] = treeindex.WHITEOUT if kind is None else kind
        children = treeindex.Children()
        for name in sorted(found):
            children.add(name, found[name])
        return children.digest()

    # Data.

    def data(self, lower: LowerDir, name: bytes) -> Record | None:
        """What the regular file `name` in `lower` must be; None where that is not checked. EIO for an unknown one."""
        if lower.layer.tree is None:
            return None
        wanted = lower.layer.tree.find(_path(lower, name))
        if wanted is None or wanted.content == NO_CONTENT:
            raise self.fail(lower, name, "added")
        return wanted

    def look_through(self, fd: Fd, wanted: Record, path: bytes | None) -> Op[bool]:
        """Whether the data of the readable `fd` is what it must be; it is the file `path` of the mount."""
        small = _at_hand(fd)
        if small is not None:
            return _sha256(small) == wanted.content
        progress = _Progress()
        with self._counters.working("verify", path, syscalls.fstat(fd.fd).st_size, lambda: progress.done):
            sound: bool = yield Blocking(partial(holds, fd, wanted, progress), fd)
        return sound


def _at_hand(fd: Fd) -> memoryview | None:
    """The data of a small file if the page cache has it: looking through it costs less than a thread would."""
    buffer = memoryview(bytearray(_SMALL + 1))
    try:
        count = syscalls.preadv(fd.fd, [buffer], 0, os.RWF_NOWAIT)
    except OSError:
        return None  # not there, or its file system cannot say so
    return buffer[:count] if count == syscalls.fstat(fd.fd).st_size <= _SMALL else None


def _sha256(data: memoryview) -> bytes:
    import hashlib  # late: it loads OpenSSL, a twentieth of the start

    return hashlib.sha256(data).digest()


class _Progress:
    """How much of a file was looked through."""

    def __init__(self) -> None:
        self.done = 0


def holds(fd: Fd, wanted: Record, progress: _Progress | None = None) -> bool:
    """Whether the data of the readable `fd` is what it must be. It reads all of it: for a thread."""
    import hashlib  # late: it loads OpenSSL, a twentieth of the start

    progress = progress or _Progress()
    made = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE))
    while count := os.preadv(fd.fd, [buffer], progress.done):
        made.update(buffer[:count])
        progress.done += count
    return made.digest() == wanted.content


class UnsoundError(Exception):
    """The data of a file is not what it must be."""


def see(wanted: Record, fd: Fd) -> None:
    """See that the data of the readable `fd` is what it must be; UnsoundError."""
    if not holds(fd, wanted):
        raise UnsoundError


def same_state(fd: Fd) -> tuple[int, int, int]:
    """What of an open file changes when somebody changes it."""
    st = syscalls.fstat(fd.fd)
    return st.st_dev, st.st_ino, st.st_ctime_ns


def integrity(stack: LayerStack, fds: FdCache, counters: Counters, events: Events) -> Integrity | None:
    """The checks of a mount; None where nothing is to be checked."""
    every = (*stack.lowers, *stack.data)
    return Integrity(fds, counters, events) if any(layer.tree is not None for layer in every) else None


def _path(lower: LowerDir, name: bytes) -> bytes:
    names = lower.components()
    return b"/".join((*names, name) if name else names)
