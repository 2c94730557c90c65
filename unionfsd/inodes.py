"""Nodes: what the kernel knows by nodeid, under which names, and since how many lookups.

Rules this file obeys:

- A node is a cache of a name and of an identity. What the object is made of is its `Entry`, a value that lookup makes
  and copy-up replaces; the truth is on the disk.
- A node keeps its nodeid and its inode number for as long as the kernel knows it, whatever is copied up or renamed.
- A node lives until the kernel has forgotten it and no living node has it as parent. Memory follows FORGET.
- Objects with several names are one node; of a lower only where the index keeps them together.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from .fdcache import FdCache, Holder
from .format import Digest, Redirect
from .layers import LowerDir
from .listing import Listing, LowerNames
from .steps import Gate
from .syscalls import Fd

ROOT_ID: Final = 1


class Source(NamedTuple):
    """Where data of a file is that has none of its own: `name` in `lower`; `digest` is one still to be checked."""

    lower: LowerDir
    name: bytes
    digest: Digest | None

    def open(self, fds: FdCache) -> Fd:
        """A new O_RDONLY descriptor."""
        return self.lower.layer.open_data(self.lower.open(fds), self.name)

    @property
    def path(self) -> str:
        """Its path, for people."""
        return os.fsdecode(b"/".join((self.lower.layer.path, *self.lower.components(), self.name)))


class Entry:
    """What an object is made of; a value.

    `upper`: it is in the upper, under the very path it has in the union. `lowers`: for a directory, the lower
    directories merged into it, top first; for anything else, the one lower directory that holds it when it is not in
    the upper, else nothing. `redirect`: what the upper directory is called in the lowers, None for its own name.
    `data`: where the data of a file is that has none of its own (metacopy); None also as long as nobody asked. `name`:
    what the lower calls an object that has other names there, which the union may know it by. `index`: what the upper
    object is called in the index; without `upper`, it has become that, but not under the name in question.
    """

    __slots__ = ("data", "index", "lowers", "name", "redirect", "upper")

    def __init__(
        self,
        upper: bool,
        lowers: tuple[LowerDir, ...],
        redirect: Redirect | None = None,
        data: Source | None = None,
        name: bytes | None = None,
        index: bytes | None = None,
    ) -> None:
        self.upper = upper
        self.lowers = lowers
        self.redirect = redirect
        self.data = data
        self.name = name
        self.index = index

    def with_data(self, data: Source | None) -> Entry:
        """The same with its data elsewhere."""
        return Entry(self.upper, self.lowers, self.redirect, data, self.name, self.index)

    @property
    def of_object(self) -> Entry:
        """The entry of the object that has this entry under one of its names."""
        return self if self.upper or self.index is None else Entry(True, (), index=self.index)

    def __repr__(self) -> str:
        return f"Entry(upper={self.upper}, lowers={self.lowers}, redirect={self.redirect})"


#: Of everything that is only in the upper.
UPPER: Final = Entry(True, ())


class Node:
    """An object that the kernel may know. `name` is its name in `parent`; the root has neither."""

    __slots__ = ("_lookups", "entry", "ino", "links", "name", "nodeid", "open", "parent", "unlinked")

    def __init__(self, nodeid: int, parent: DirNode | None, name: bytes, entry: Entry, ino: int) -> None:
        self.nodeid = nodeid
        self.parent = parent
        self.name = name
        self.entry = entry
        self.ino = ino
        self._lookups = 0
        #: Its descriptors and its opens, None while it has neither.
        self.open: OpenState | None = None
        #: It has no name any more: reached through `open`, or through the lower it is still in.
        self.unlinked = False
        #: Further names: of an upper object with hard links, those that were looked up.
        self.links: Links | None = None

    def state(self) -> OpenState:
        """Its `open`, made when missing."""
        if self.open is None:
            self.open = OpenState()
        return self.open

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.nodeid} {self.name!r}>"


class OpenState(Holder):
    """Descriptors of a node that is not a directory; the cached one (`fd`) is for its data.

    `writable`: `fd` is O_RDWR and of the upper. `opens`: how often the kernel has it open, where it says so.
    `append`: it may be written at its end only. `orphan`: O_PATH fd of an upper object without a name. `gate`: its
    copy-up is under way until it opens. `arriving`: writes from the kernel's cache that are under way; `mtime_ns`: what
    they must not change.
    """

    __slots__ = ("append", "arriving", "gate", "mtime_ns", "opens", "orphan", "writable")

    def __init__(self) -> None:
        super().__init__()
        self.writable = False
        self.append = False
        self.opens = 0
        self.orphan: Fd | None = None
        self.gate: Gate | None = None
        self.arriving = 0
        self.mtime_ns = 0

    def drop(self) -> None:
        super().drop()
        self.writable = False


class Heritage(NamedTuple):
    """What a directory passes on: the `gid` of a setgid directory and its default ACL (xattr value), or None."""

    gid: int | None
    default_acl: bytes | None


class DirNode(Node):
    """A directory. `handle` caches the O_PATH fd of its upper directory; the rest caches what its layers hold."""

    __slots__ = (
        "children",
        "handle",
        "heritage",
        "hidden",
        "impure",
        "leaves",
        "lower_names",
        "probes",
        "protection",
        "snapshot",
        "xwhiteouts",
    )

    def __init__(self, nodeid: int, parent: DirNode | None, name: bytes, entry: Entry, ino: int) -> None:
        super().__init__(nodeid, parent, name, entry, ino)
        self.handle = Holder()
        #: Known children by name; None for none.
        self.children: dict[bytes, Node] | None = None
        #: The entries of what is only in one lower: one value for all the files of a directory.
        self.leaves: dict[LowerDir, Entry] | None = None
        #: Merged names of `entry.lowers`, once read: they never change.
        self.lower_names: LowerNames | None = None
        self.probes = 0
        #: Names that ``.wh.`` entries of the upper directory hide; None until it was read.
        self.hidden: set[bytes] | None = None
        #: Whether the upper directory may hold xattr whiteouts, and whether it is marked impure; None until read.
        self.xwhiteouts: bool | None = None
        self.impure: bool | None = None
        #: IMMUTABLE and APPEND of `protection`, None until they were read.
        self.protection: int | None = None
        #: What new objects in it inherit; None until it was read, or when it may have changed.
        self.heritage: Heritage | None = None
        #: The listing that a reader is in the middle of.
        self.snapshot: Listing | None = None

    def leaf_entry(self, lower: LowerDir) -> Entry:
        """The entry of an object that is in `lower`, one of `entry.lowers`, and not a directory."""
        if self.leaves is None:
            self.leaves = {}
        entry = self.leaves.get(lower)
        if entry is None:
            entry = self.leaves[lower] = Entry(False, (lower,))
        return entry

    def doubt(self) -> None:
        """Forget whatever is cached about what the layers hold."""
        self.lower_names = self.leaves = self.hidden = self.xwhiteouts = self.impure = None
        self.heritage = self.snapshot = self.protection = None
        self.probes = 0

    def own_entry(self, entry: Entry) -> None:
        """Take a new entry; what was cached about the layers of the old one goes."""
        if entry.lowers != self.entry.lowers:
            self.lower_names = None
            self.leaves = None
        self.entry = entry


class NodeTable:
    """The nodes of one mount, by nodeid, by name and, where they have several names, by inode."""

    def __init__(self, root: Entry, ino: int, fds: FdCache, dropped: Callable[[DirNode], None]) -> None:
        """`fds` has their descriptors; `dropped` is told of every directory that goes."""
        self._fds = fds
        self._dropped = dropped
        self.root = DirNode(ROOT_ID, None, b"", root, ino)
        self._nodes: dict[int, Node] = {ROOT_ID: self.root}
        self._by_inode: dict[tuple[int, int], Node] = {}
        self._last = ROOT_ID

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def knows(self, node: Node) -> bool:
        """Whether `node` is one of the table still."""
        return self._nodes.get(node.nodeid) is node

    def get(self, nodeid: int) -> Node:
        """The node `nodeid`; ESTALE when there is none."""
        node = self._nodes.get(nodeid)
        if node is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return node

    def directory(self, nodeid: int) -> DirNode:
        """The directory `nodeid`; ESTALE, or ENOTDIR when it is something else."""
        node = self.get(nodeid)
        if not isinstance(node, DirNode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return node

    def add(self, parent: DirNode, name: bytes, entry: Entry, ino: int, *, directory: bool) -> Node:
        """A new node for `name` in `parent`, where no node is known."""
        self._last += 1
        kind = DirNode if directory else Node
        node = kind(self._last, parent, name, entry, ino)
        self._nodes[self._last] = node
        _adopt(parent, name, node)
        return node

    def add_unnamed(self, parent: DirNode, ino: int) -> Node:
        """A new node for a file in the upper that has no name; `parent` is where one was asked for."""
        self._last += 1
        node = Node(self._last, parent, b"", UPPER, ino)
        node.unlinked = True
        self._nodes[self._last] = node
        return node

    def rekey(self, node: Node, key: tuple[int, int]) -> None:
        """`node` is now the object `key`: copied up, with all its names."""
        if node.links is not None:
            self._by_inode.pop(node.links.key, None)
            node.links.key = key
        self.know_inode(key, node)

    def by_inode(self, key: tuple[int, int]) -> Node | None:
        """The node of the upper object with hard links whose (st_dev, st_ino) is `key`, if known."""
        return self._by_inode.get(key)

    def know_inode(self, key: tuple[int, int], node: Node) -> None:
        """From now on other names of the upper object `key` are the same node."""
        if node.links is None:
            node.links = Links(key)
        self._by_inode[key] = node

    def alias(self, node: Node, parent: DirNode, name: bytes) -> None:
        """A further name of a node."""
        assert node.links is not None
        _adopt(parent, name, node)
        if node.parent is None or node.unlinked:
            node.parent, node.name, node.unlinked = parent, name, False
        elif (node.parent, node.name) != (parent, name):
            node.links.names.add((parent, name))

    def unname(self, parent: DirNode, name: bytes) -> None:
        """The union has no `name` in `parent` any more; a node without another known name is unlinked."""
        node = child(parent, name)
        if node is None:
            return
        _disown(parent, name)
        if node.links is not None:
            node.links.names.discard((parent, name))
        if node.parent is parent and node.name == name:
            if node.links is not None and node.links.names:
                node.parent, node.name = node.links.names.pop()
            else:
                node.unlinked = True
        self.settle(parent)

    def move(self, parent: DirNode, name: bytes, new_parent: DirNode, new_name: bytes) -> None:
        """`name` in `parent` is now `new_name` in `new_parent`, where no node is known."""
        node = child(parent, name)
        if node is None:
            return
        _disown(parent, name)
        _adopt(new_parent, new_name, node)
        if node.links is not None and (parent, name) in node.links.names:
            node.links.names.remove((parent, name))
            node.links.names.add((new_parent, new_name))
        else:
            node.parent, node.name = new_parent, new_name
        self.settle(parent)

    def exchange(self, parent: DirNode, name: bytes, other_parent: DirNode, other_name: bytes) -> None:
        """Swap what the two names are."""
        node = child(parent, name)
        if node is not None:
            _disown(parent, name)
        self.move(other_parent, other_name, parent, name)
        if node is not None:
            _adopt(other_parent, other_name, node)
            if node.links is not None and (parent, name) in node.links.names:
                node.links.names.remove((parent, name))
                node.links.names.add((other_parent, other_name))
            else:
                node.parent, node.name = other_parent, other_name

    def looked_up(self, node: Node) -> None:
        """Count one more lookup by the kernel."""
        node._lookups += 1

    def forget(self, nodeid: int, count: int) -> None:
        """The kernel takes back `count` lookups; unknown nodeids are none of our business."""
        node = self._nodes.get(nodeid)
        if node is None or node is self.root:
            return
        node._lookups = max(0, node._lookups - count)
        self.settle(node)

    def settle(self, node: Node) -> None:
        """Drop `node`, and then its parents, as long as nobody needs them."""
        while node._lookups <= 0 and node is not self.root and node.nodeid in self._nodes and not _in_use(node):
            del self._nodes[node.nodeid]
            parents = [node.parent] if node.parent is not None else []
            if node.parent is not None and not node.unlinked:
                _disown(node.parent, node.name)
            if node.links is not None:
                self._by_inode.pop(node.links.key, None)
                for parent, name in node.links.names:
                    _disown(parent, name)
                    parents.append(parent)
            self._release(node)
            for parent in parents[1:]:
                self.settle(parent)
            if not parents:
                return
            node = parents[0]

    def close(self) -> None:
        """Close every descriptor that a node has."""
        for node in self._nodes.values():
            self._release(node)

    def _release(self, node: Node) -> None:
        """Give up what only `node` has. Lower directories are made by a lookup, for one node."""
        if isinstance(node, DirNode):
            self._fds.forget(node.handle)
            for lower in node.entry.lowers:
                self._fds.forget(lower)
            self._dropped(node)
        if node.open is not None:
            self._fds.forget(node.open)
            node.open.orphan = None


class NamesKept(NamedTuple):
    """Lower directories, merged, whose names are kept; the names in all; how often one was read, so far."""

    lists: int
    names: int
    read: int


class KeptNames:
    """Which directories have merged names of their lowers: at most `limit` names in all, the oldest go first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._nodes: dict[DirNode, int] = {}
        self._count = 0
        self._read = 0

    def keep(self, node: DirNode) -> None:
        """`node` has its `lower_names` now."""
        assert node.lower_names is not None
        self._read += 1
        self.released(node)
        self._nodes[node] = len(node.lower_names)
        self._count += len(node.lower_names)
        while self._count > self._limit and len(self._nodes) > 1:
            oldest = next(iter(self._nodes))
            self.released(oldest)
            oldest.lower_names = None

    def released(self, node: DirNode) -> None:
        """`node` is gone."""
        self._count -= self._nodes.pop(node, 0)

    def forget(self) -> int:
        """Keep none; returns how many that were."""
        count = self._count
        for node in self._nodes:
            node.lower_names = None
        self._nodes.clear()
        self._count = 0
        return count

    def held(self) -> NamesKept:
        """What is kept now."""
        return NamesKept(len(self._nodes), self._count, self._read)


class Links:
    """The names of an upper object beyond the node's own, and its (st_dev, st_ino)."""

    __slots__ = ("key", "names")

    def __init__(self, key: tuple[int, int]) -> None:
        self.key = key
        self.names: set[tuple[DirNode, bytes]] = set()


def path_to(parent: Node, name: bytes) -> bytes:
    """The path of `name` in `parent` from the root of the mount, as far as `parent` has one: ``/a/b``."""
    names = [name]
    while parent.parent is not None:
        names.append(parent.name)
        parent = parent.parent
    return b"/" + b"/".join(reversed(names))


def path_of(node: Node) -> bytes | None:
    """A path of `node` from the root of the mount; None when it has no name any more."""
    if node.parent is None:
        return b"/"
    return None if node.unlinked else path_to(node.parent, node.name)


def child(parent: DirNode, name: bytes) -> Node | None:
    """The node known as `name` in `parent`."""
    return None if parent.children is None else parent.children.get(name)


def _adopt(parent: DirNode, name: bytes, node: Node) -> None:
    if parent.children is None:
        parent.children = {}
    parent.children[name] = node


def _disown(parent: DirNode, name: bytes) -> None:
    if parent.children is not None and parent.children.pop(name, None) is not None and not parent.children:
        parent.children = None


def _in_use(node: Node) -> bool:
    if isinstance(node, DirNode):
        return node.children is not None
    return node.open is not None and (node.open.opens > 0 or node.open.gate is not None)
