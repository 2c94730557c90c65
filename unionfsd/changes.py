"""What the upper changes: the difference between the union and its lowers.

Rules this file obeys:

- Only what is in the upper is walked, so the time is in proportion to the upper: of the lowers it takes one look at
  each name that the upper has, and one listing for each directory that replaces another.
- A walk is an iterator that may be dropped anywhere. It works with a `Resolver` of its own, in a thread, while the
  mount changes the upper: what is gone when its turn comes is left out.
- Copying up is no change: what is in the upper and equal to what it covers is left out. The root is not compared.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator

from . import format as fmt
from . import syscalls
from .entries import Entry
from .inodes import DirNode, Node
from .layers import LowerDir, optional_xattr, xattr_names
from .listing import UpperNames, read_upper
from .lookup import Hit, Resolver
from .syscalls import Fd
from .typed import Final, Literal, NamedTuple

Kind = Literal["added", "changed", "deleted"]

_CHUNK: Final = 1 << 18
#: What the mount may have done to an object between its name being read and its being looked at.
GONE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ESTALE)
_FIELDS: Final = ("mode", "uid", "gid", "rdev", "size", "mtime_ns")
_DIR_FIELDS: Final = ("mode", "uid", "gid")


class Change(NamedTuple):
    """A path that differs from the lowers.

    `mode` is the st_mode of what the union has, or of what it lost. `fields` says what changed of an object that both
    have: "type", "mode", "uid", "gid", "rdev", "size", "mtime", "data", "target", "xattrs". `renamed_from` is the path
    that a renamed directory has in the lowers; what is said about its content is relative to that.
    """

    kind: Kind
    path: bytes
    mode: int
    fields: tuple[str, ...] = ()
    renamed_from: bytes | None = None


class UpperDir(NamedTuple):
    """A directory of the upper, its `path` ("" for the root), and the lower directories it covers, merged or not."""

    path: bytes
    node: DirNode
    base: DirNode | None


def changes(
    resolver: Resolver, path: tuple[bytes, ...] = (), tick: Callable[[], None] = lambda: None
) -> Iterator[Change]:
    """Changes beneath the directory `path` of the union; directories come before what is in them.

    `tick` is called for each object looked at. ENOENT and ENOTDIR when the union has no such directory.
    """
    return _Walk(resolver, tick).run(path)


def start(resolver: Resolver, path: tuple[bytes, ...]) -> UpperDir | None:
    """The directory `path` of the union; None when it is not in the upper. ENOENT, ENOTDIR."""
    hit = resolver.root()
    at = UpperDir(b"", DirNode(0, None, b"", hit.entry, hit.ino), _covered(None, b"", hit.entry.lowers))
    for name in path:
        below = resolver.find(at.node, name)
        if below is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fsdecode(name))
        if not stat.S_ISDIR(below.st.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fsdecode(name))
        at = _below(resolver, at, name, below)
    return at if at.node.entry.upper else None


def names_in(resolver: Resolver, node: DirNode) -> UpperNames:
    """What the upper directory of `node` has."""
    upper = resolver.stack.upper
    assert upper is not None
    return read_upper(resolver.upper_dir(node), upper, resolver.stack, xwhiteouts=resolver.xwhiteouts(node))


def _covered(parent: DirNode | None, name: bytes, lowers: tuple[LowerDir, ...]) -> DirNode | None:
    """A node for what the union would be without its upper."""
    return DirNode(0, parent, name, Entry(False, lowers), 0) if lowers else None


def _below(resolver: Resolver, at: UpperDir, name: bytes, hit: Hit) -> UpperDir:
    """The directory `hit`, `name` in `at`."""
    node = DirNode(0, at.node, name, hit.entry, hit.ino)
    lowers = hit.entry.lowers
    if not lowers and at.base is not None:
        found = resolver.find_lower(at.base, name)
        if found is not None and stat.S_ISDIR(found.st.st_mode):
            lowers = found.entry.lowers
    return UpperDir(at.path + b"/" + name, node, _covered(at.base, name, lowers))


class _Walk:
    def __init__(self, resolver: Resolver, tick: Callable[[], None]) -> None:
        self._resolver = resolver
        self._tick = tick
        self._pending: list[UpperDir] = []

    def run(self, path: tuple[bytes, ...]) -> Iterator[Change]:
        first = start(self._resolver, path)
        if first is not None:
            self._pending.append(first)
        while self._pending:
            at = self._pending.pop()
            try:
                yield from self._directory(at)
            except OSError as error:
                if error.errno not in GONE:
                    raise
            self._done(at)

    def _done(self, at: UpperDir) -> None:
        """Keep no names of a directory that was walked: children keep their parents."""
        for node in (at.node, at.base):
            if node is not None:
                self._resolver.kept.released(node)
                node.doubt()

    def _directory(self, at: UpperDir) -> Iterator[Change]:
        upper = names_in(self._resolver, at.node)
        for name in sorted(upper.names.keys() | upper.hidden):
            self._tick()
            try:
                change = self._visible(at, name) if upper.names.get(name) else self._deleted(at, name)
            except OSError as error:
                if error.errno not in GONE:
                    raise
                continue
            if change is not None:
                yield change
        if at.base is not None and not at.node.entry.lowers:
            yield from self._replaced(at, upper)

    def _replaced(self, at: UpperDir, upper: UpperNames) -> Iterator[Change]:
        """What the directories that `at` covers, and is not merged with, have and it has not."""
        assert at.base is not None
        lowers = self._resolver.lower_names(at.base, read=True)
        gone = set() if lowers is None else {name for name, _ in lowers.items()} - upper.names.keys() - upper.hidden
        for name in sorted(gone):
            change = self._deleted(at, name)
            if change is not None:
                yield change

    def _deleted(self, at: UpperDir, name: bytes) -> Change | None:
        old = self._old(at, name)
        return None if old is None else Change("deleted", at.path + b"/" + name, old.st.st_mode)

    def _old(self, at: UpperDir, name: bytes) -> Hit | None:
        return None if at.base is None else self._resolver.find_lower(at.base, name)

    def _visible(self, at: UpperDir, name: bytes) -> Change | None:
        """How `name` differs; a directory is put down to be walked."""
        hit = self._resolver.find(at.node, name)
        if hit is None:
            return None
        source = None
        if stat.S_ISDIR(hit.st.st_mode):
            self._pending.append(_below(self._resolver, at, name, hit))
            if hit.entry.redirect is not None and hit.entry.lowers:
                source = b"/" + b"/".join(hit.entry.lowers[0].components())
        path = at.path + b"/" + name
        old = self._old(at, name)
        if old is None:
            return Change("added", path, hit.st.st_mode, (), source)
        fields = self._compare(at, name, hit, old)
        return Change("changed", path, hit.st.st_mode, fields, source) if fields or source else None

    # Whether an object of the upper differs from what it covers.

    def _compare(self, at: UpperDir, name: bytes, new: Hit, old: Hit) -> tuple[str, ...]:
        if stat.S_IFMT(new.st.st_mode) != stat.S_IFMT(old.st.st_mode):
            return ("type",)
        if stat.S_ISDIR(new.st.st_mode):
            lower = syscalls.reopen(old.entry.lowers[0].open(self._resolver.fds), os.O_PATH | os.O_DIRECTORY)
        else:
            lower = syscalls.open_object(old.entry.lowers[0].open(self._resolver.fds), name)
        with lower, syscalls.open_object(self._resolver.upper_dir(at.node), name) as upper:
            fields = _differences(new.st, old.st)
            if _xattrs(upper) != _xattrs(lower):
                fields.append("xattrs")
            if stat.S_ISLNK(new.st.st_mode) and syscalls.readlink(upper.fd) != syscalls.readlink(lower.fd):
                fields.append("target")
            if not fields and stat.S_ISREG(new.st.st_mode):
                one, other = self._data(at.node, name, new, upper), self._data(at.base, name, old, lower)
                if not self._same_data(one, other):
                    fields.append("data")
        return tuple(fields)

    def _data(self, parent: DirNode | None, name: bytes, hit: Hit, found: Fd) -> Fd:
        """The data of a file whose object is `found`; it may be in another layer."""
        source = self._resolver.locate(Node(0, parent, name, hit.entry, hit.ino), found.fd)
        return syscalls.reopen(found.fd, os.O_RDONLY) if source is None else source.open(self._resolver.fds)

    def _same_data(self, one: Fd, other: Fd) -> bool:
        """Whether two files of one size and time have the same bytes: times can be put back after a change."""
        if os.path.sameopenfile(one.fd, other.fd):
            return True
        with one, other:
            at = 0
            while data := os.pread(one.fd, _CHUNK, at):
                self._tick()
                if data != os.pread(other.fd, _CHUNK, at):
                    return False
                at += len(data)
            return True


def _differences(new: os.stat_result, old: os.stat_result) -> list[str]:
    """Names of the attributes that differ; sizes and times of directories say nothing about themselves."""
    fields = _DIR_FIELDS if stat.S_ISDIR(new.st_mode) else _FIELDS
    return [field.removesuffix("_ns") for field in fields if getattr(new, "st_" + field) != getattr(old, "st_" + field)]


def _xattrs(fd: Fd) -> dict[bytes, bytes | None]:
    return {name: optional_xattr(fd.fd, name) for name in xattr_names(fd.fd) if not fmt.is_internal(name)}
