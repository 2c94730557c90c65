"""Looking again: what the union and the kernel remember of layers, given up.

Rules this file obeys:

- Lowers are not supposed to change underneath a mount. When they did, every known node is resolved again from its name,
  directory by directory from the top, so that no more than one directory is looked at without a pause.
- A node whose object is still the same kind of thing, with the same inode number, keeps its nodeid. One that is
  something else, or gone, loses its name; who has it open keeps what it has.
- What is being copied up is left alone: its entry is about to be replaced.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Generator, Iterator
from functools import partial

from .fdcache import FdCache
from .inodes import DirNode, Node, NodeTable, child, path_of
from .lookup import Hit, Resolver
from .remote import Answers, AskedError, attend
from .typed import NamedTuple, TypeVar

T = TypeVar("T")


class Looked(NamedTuple):
    """A directory that was looked at again: its nodeid, and the names known in it.

    `kept` are (name, nodeid, whether its data is a lower's) of what is the same, `replaced` the names of what is not,
    `others` those of the directory that no node has.
    """

    nodeid: int
    kept: list[tuple[bytes, int, bool]]
    replaced: list[bytes]
    others: list[bytes]


class Dropped(NamedTuple):
    """What was let go of."""

    fds: int
    names: int


class Opened(NamedTuple):
    """A file that is open: its path, None without a name, and how often."""

    path: bytes | None
    opens: int


class Memory:
    """What one mount remembers."""

    def __init__(self, resolver: Resolver, table: NodeTable, fds: FdCache) -> None:
        self._resolver = resolver
        self._table = table
        self._fds = fds

    def drop(self) -> Dropped:
        """Give up every descriptor and every listing that can be had again."""
        return Dropped(self._fds.shed(), self._resolver.kept.forget())

    def nodeids(self) -> list[int]:
        """Of everything known."""
        return [node.nodeid for node in self._table]

    def files(self) -> list[int]:
        """nodeids of everything known that is no directory."""
        return [node.nodeid for node in self._table if not isinstance(node, DirNode)]

    def path(self, nodeid: int) -> bytes | None:
        """A path from the root of the mount of what is known by `nodeid`; None when it has none, or is unknown."""
        try:
            return path_of(self._table.get(nodeid))
        except OSError:
            return None

    def opened(self) -> list[Opened]:
        """The files that the kernel says it has open. With io=cached it does not say."""
        return [Opened(path_of(node), node.open.opens) for node in self._table if node.open and node.open.opens]

    def refresh(self, path: tuple[bytes, ...]) -> Iterator[Looked | AskedError]:
        """Resolve what is known of the directory `path` and beneath it again, one directory a step.

        Other operations may run between two steps. What has to be asked first comes as an AskedError: it is to be found
        out before the next step. OSError when a layer cannot be read.
        """
        top = yield from self._asking(lambda: self._top(path))
        pending = [] if top is None else [top]
        while pending:
            node = pending.pop()
            if self._is_known(node):
                yield (yield from self._asking(partial(self._look, node)))
                pending += [below for below in (node.children or {}).values() if isinstance(below, DirNode)]

    def _asking(self, look: Callable[[], T]) -> Generator[AskedError, None, T]:
        answers: Answers | None = {} if self._resolver.stack.is_remote else None
        while True:
            try:
                with attend(answers):
                    return look()
            except AskedError as asked:
                yield asked

    def _top(self, path: tuple[bytes, ...]) -> DirNode | None:
        self._table.root.own_entry(self._resolver.root().entry)
        return self._known(path)

    def _known(self, path: tuple[bytes, ...]) -> DirNode | None:
        """The node of a directory, those above it resolved again; None when it is not known, or none any more."""
        at = self._table.root
        for name in path:
            self._forget(at)
            below = child(at, name)
            if below is None or not self._again(at, name, below) or not isinstance(below, DirNode):
                return None
            at = below
        return at

    def _is_known(self, node: DirNode) -> bool:
        return not node.unlinked and self._table.knows(node)

    def _look(self, node: DirNode) -> Looked:
        self._forget(node)
        looked = Looked(node.nodeid, [], [], [])
        for name, below in list((node.children or {}).items()):
            if self._again(node, name, below):
                lower = not isinstance(below, DirNode) and not below.entry.upper
                looked.kept.append((name, below.nodeid, lower))
            else:
                looked.replaced.append(name)
        known = node.children or {}
        names = (name for name, *_ in self._resolver.listing(node).after(0))
        looked.others.extend(name for name in names if name not in known and name not in (b".", b".."))
        return looked

    def _forget(self, node: DirNode) -> None:
        self._resolver.kept.released(node)
        node.doubt()
        for lower in node.entry.lowers:
            lower.doubt(self._fds)

    def _again(self, parent: DirNode, name: bytes, node: Node) -> bool:
        """Resolve `node` again; False when it is no longer what `name` is, and has lost the name."""
        if node.open is not None and node.open.gate is not None:
            return True
        hit = self._resolver.find(parent, name)
        if hit is None or not _is_same(node, hit):
            self._table.unname(parent, name)
            return False
        if isinstance(node, DirNode):
            if node.entry.upper and not hit.entry.upper:
                self._fds.forget(node.handle)
            node.own_entry(hit.entry)
        elif not (node.entry.upper and hit.entry.upper):
            node.entry = hit.entry.of_object
            if node.open is not None:
                self._fds.forget(node.open)
        return True


def _is_same(node: Node, hit: Hit) -> bool:
    if isinstance(node, DirNode) or stat.S_ISDIR(hit.st.st_mode):
        return isinstance(node, DirNode) and stat.S_ISDIR(hit.st.st_mode)
    return hit.ino == node.ino
