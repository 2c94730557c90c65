"""The space that the upper takes, by directory. What `changes` says about walks goes for this one, too."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator

from . import syscalls
from .changes import GONE, names_in, start
from .entries import UPPER
from .inodes import DirNode
from .lookup import Resolver
from .typed import NamedTuple


class Usage(NamedTuple):
    """What a directory of the upper takes, everything beneath it included. A hard link counts where it is met first."""

    path: bytes
    disk: int
    """Bytes allocated."""
    apparent: int
    """Bytes of file sizes."""
    objects: int
    """Whiteouts are not among them."""
    whiteouts: int


class _Sum:
    __slots__ = ("apparent", "depth", "disk", "objects", "path", "whiteouts")

    def __init__(self, path: bytes, depth: int) -> None:
        self.path = path
        self.depth = depth
        self.disk = self.apparent = self.objects = self.whiteouts = 0

    def count(self, st: os.stat_result) -> None:
        self.disk += st.st_blocks * 512
        self.apparent += st.st_size
        self.objects += 1

    def usage(self) -> Usage:
        return Usage(self.path or b"/", self.disk, self.apparent, self.objects, self.whiteouts)


class _Open(NamedTuple):
    """A directory to be read, and the sums it counts in: of the directories above that are shown, and its own."""

    node: DirNode
    path: bytes
    sums: tuple[_Sum, ...]


def usage(
    resolver: Resolver, path: tuple[bytes, ...] = (), depth: int = 1, tick: Callable[[], None] = lambda: None
) -> list[Usage]:
    """Space of the directory `path` of the upper, then of those down to `depth` levels beneath it, the largest first.

    `tick` is called for each object. Empty when the directory is not in the upper; ENOENT and ENOTDIR when it is not in
    the union.
    """
    first = start(resolver, path)
    if first is None:
        return []
    top = _Sum(first.path, 0)
    top.count(os.fstat(resolver.upper_dir(first.node)))
    sums = [top]
    seen: set[tuple[int, int]] = set()
    pending = [_Open(first.node, first.path, (top,))]
    while pending:
        at = pending.pop()
        for name, st in _objects(resolver, at, tick):
            if st.st_nlink > 1 and not stat.S_ISDIR(st.st_mode):
                if (st.st_dev, st.st_ino) in seen:
                    continue
                seen.add((st.st_dev, st.st_ino))
            pending += _count(at, name, st, depth, sums)
    parts = sorted((part.usage() for part in sums[1:]), key=lambda part: (-part.disk, part.path))
    return [top.usage(), *parts]


def _count(at: _Open, name: bytes, st: os.stat_result, depth: int, sums: list[_Sum]) -> Iterator[_Open]:
    """Count an object of `at`; yields it if it is a directory. A sum of its own is added to `sums`."""
    for above in at.sums:
        above.count(st)
    if not stat.S_ISDIR(st.st_mode):
        return
    path, shown = at.path + b"/" + name, at.sums
    if shown[-1].depth < depth:
        own = _Sum(path, shown[-1].depth + 1)
        own.count(st)
        sums.append(own)
        shown = (*shown, own)
    yield _Open(DirNode(0, at.node, name, UPPER, 0), path, shown)


def _objects(resolver: Resolver, at: _Open, tick: Callable[[], None]) -> Iterator[tuple[bytes, os.stat_result]]:
    """Names and stats of the objects in the upper directory of `at`; its whiteouts are counted."""
    try:
        upper = names_in(resolver, at.node)
        dirfd = resolver.upper_dir(at.node)
    except OSError as error:
        if error.errno not in GONE:
            raise
        return
    whiteouts = len(upper.hidden) + sum(found is None for found in upper.names.values())
    for above in at.sums:
        above.whiteouts += whiteouts
    for name in [name for name, found in upper.names.items() if found is not None]:
        tick()
        try:
            yield name, syscalls.stat_at(dirfd, name)
        except FileNotFoundError:
            pass
