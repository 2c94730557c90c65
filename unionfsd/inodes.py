"""Nodes: what the kernel knows by nodeid, under which names, and since how many lookups.

Rules this file obeys:

- A node is a cache of a name and of an identity. What the object is made of is its `Entry`, a value that lookup makes
  and copy-up replaces; the truth is on the disk.
- A node keeps its nodeid and its inode number for as long as the kernel knows it, whatever is copied up or renamed.
- A node lives until the kernel has forgotten it and no living node has it as parent. Memory follows FORGET.
- What must outlive the process (nodeids, names, lookups) is in the `Ledger`, which is told of every change here.
- Objects with several names are one node; of a lower only where the index keeps them together.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

from .acl import Heritage
from .entries import UPPER, Asleep, Entry
from .fdcache import FdCache, Holder
from .layers import LowerDir
from .ledger import ROOT_ID, Flag, Ledger, Record
from .listing import Listing, LowerNames
from .steps import Gate
from .syscalls import Fd
from .typed import Final

__all__ = ["ROOT_ID", "DirNode", "Node", "NodeTable", "OpenState", "child"]


_NO_NODE: Final = Flag.ALIAS | Flag.OPENS


class Node:
    """An object that the kernel may know. `name` is its name in `parent`; the root has neither."""

    __slots__ = ("entry", "ino", "links", "name", "nodeid", "open", "parent", "unlinked")

    def __init__(self, nodeid: int, parent: DirNode | None, name: bytes, entry: Entry, ino: int) -> None:
        self.nodeid = nodeid
        self.parent = parent
        self.name = name
        self.entry = entry
        self.ino = ino
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
    `append`: it may be written at its end only. `kept`: it has no name in the union any more, but one in work, by which
    a successor finds it. `orphan`: O_PATH fd of an upper object without a name that is not kept. `gate`: its copy-up is
    under way until it opens. `arriving`: writes from the kernel's cache that are under way; `mtime_ns`: what they must
    not change; `untimed`: some arrived, and not yet their time. `checking`: its data is looked through until it opens;
    `sound`: the state it had then.
    """

    __slots__ = (
        "append",
        "arriving",
        "checking",
        "gate",
        "kept",
        "mtime_ns",
        "opens",
        "orphan",
        "sound",
        "untimed",
        "writable",
    )

    def __init__(self) -> None:
        super().__init__()
        self.writable = False
        self.append = False
        self.opens = 0
        self.kept = False
        self.orphan: Fd | None = None
        self.gate: Gate | None = None
        self.checking: Gate | None = None
        self.sound: tuple[int, int, int] | None = None
        self.arriving = 0
        self.mtime_ns = 0
        self.untimed = False

    def drop(self) -> None:
        super().drop()
        self.writable = False


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

    def __init__(
        self,
        root: Entry,
        ino: int,
        fds: FdCache,
        dropped: Callable[[DirNode], None],
        ledger: Ledger | None = None,
        let_go: Callable[[int], None] | None = None,
    ) -> None:
        """`fds` has their descriptors; `dropped` is told of directories that go, `let_go` of nodeids that are kept."""
        self._fds = fds
        self._dropped = dropped
        self._let_go = let_go
        self.ledger = Ledger.new() if ledger is None else ledger
        self.root = DirNode(ROOT_ID, None, b"", root, ino)
        self._nodes: dict[int, Node] = {ROOT_ID: self.root}
        self._by_inode: dict[tuple[int, int], Node] = {}

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
        if node.entry.asleep:
            _wake(node)
        return node

    def directory(self, nodeid: int) -> DirNode:
        """The directory `nodeid`; ESTALE, or ENOTDIR when it is something else."""
        node = self.get(nodeid)
        if not isinstance(node, DirNode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return node

    def add(self, parent: DirNode, name: bytes, entry: Entry, ino: int, *, directory: bool) -> Node:
        """A new node for `name` in `parent`, where no node is known."""
        kind, flags = (DirNode, Flag.DIRECTORY) if directory else (Node, 0)
        nodeid = self.ledger.add(parent.nodeid, name, ino, flags)
        node = kind(nodeid, parent, name, entry, ino)
        self._nodes[nodeid] = node
        _adopt(parent, name, node)
        return node

    def add_unnamed(self, parent: DirNode, ino: int) -> Node:
        """A new node for a file in the upper that has no name; `parent` is where one was asked for."""
        nodeid = self.ledger.add(parent.nodeid, b"", ino, Flag.UNLINKED)
        node = Node(nodeid, parent, b"", UPPER, ino)
        node.unlinked = True
        self._nodes[nodeid] = node
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
            self.ledger.flag(node.nodeid, Flag.LINKED)
        self._by_inode[key] = node

    def alias(self, node: Node, parent: DirNode, name: bytes) -> None:
        """A further name of a node."""
        assert node.links is not None
        _adopt(parent, name, node)
        if node.parent is None or node.unlinked:
            node.parent, node.name, node.unlinked = parent, name, False
            self.ledger.place(node.nodeid, parent.nodeid, name, Flag.LINKED)
            self._let_go_of(node)
        elif (node.parent, node.name) != (parent, name) and (parent, name) not in node.links.names:
            node.links.names[parent, name] = self.ledger.add(parent.nodeid, name, node.nodeid, Flag.ALIAS)

    def _let_go_of(self, node: Node) -> None:
        """A node has a name, or is gone: what it was held by is not needed any more."""
        if node.open is not None:
            node.open.orphan = None
            if node.open.kept and self._let_go is not None:
                node.open.kept = False
                self._let_go(node.nodeid)

    def unname(self, parent: DirNode, name: bytes) -> None:
        """The union has no `name` in `parent` any more; a node without another known name is unlinked."""
        node = _known(parent, name)
        if node is None:
            return
        _disown(parent, name)
        if node.links is not None and (alias := node.links.names.pop((parent, name), None)) is not None:
            self.ledger.drop(alias)
        if node.parent is parent and node.name == name:
            self._lose_name(node)
        self.settle(parent)

    def _lose_name(self, node: Node) -> None:
        """The name that `node` is known by is gone: it goes by another, or has none any more."""
        if node.links is not None and node.links.names:
            (node.parent, node.name), alias = node.links.names.popitem()
            self.ledger.place(node.nodeid, node.parent.nodeid, node.name)
            self.ledger.drop(alias)
        else:
            node.unlinked = True
            flag = Flag.UNLINKED | Flag.LOWER if node.entry.in_lowers else Flag.UNLINKED
            self.ledger.flag(node.nodeid, flag)

    def record_of(self, parent: DirNode, name: bytes) -> int:
        """The record of the ledger that says that `name` in `parent` is what it is; 0 when no node has the name."""
        node = _known(parent, name)
        if node is None:
            return 0
        return node.nodeid if node.links is None else node.links.names.get((parent, name), node.nodeid)

    def _moved(self, node: Node, old: tuple[DirNode, bytes], new: tuple[DirNode, bytes]) -> None:
        record = node.nodeid
        if node.links is not None and old in node.links.names:
            record = node.links.names[new] = node.links.names.pop(old)
        else:
            node.parent, node.name = new
        self.ledger.place(record, new[0].nodeid, new[1])

    def move(self, parent: DirNode, name: bytes, new_parent: DirNode, new_name: bytes) -> None:
        """`name` in `parent` is now `new_name` in `new_parent`, where no node is known."""
        node = _known(parent, name)
        if node is None:
            return
        _disown(parent, name)
        _adopt(new_parent, new_name, node)
        self._moved(node, (parent, name), (new_parent, new_name))
        self.settle(parent)

    def exchange(self, parent: DirNode, name: bytes, other_parent: DirNode, other_name: bytes) -> None:
        """Swap what the two names are."""
        node = _known(parent, name)
        if node is not None:
            _disown(parent, name)
        self.move(other_parent, other_name, parent, name)
        if node is not None:
            _adopt(other_parent, other_name, node)
            self._moved(node, (parent, name), (other_parent, other_name))

    def looked_up(self, node: Node) -> None:
        """Count one more lookup by the kernel."""
        self.ledger.count(node.nodeid)

    def forget(self, nodeid: int, count: int) -> None:
        """The kernel takes back `count` lookups; unknown nodeids are none of our business."""
        node = self._nodes.get(nodeid)
        if node is None or node is self.root:
            return
        self.ledger.uncount(nodeid, count)
        self.settle(node)

    def settle(self, node: Node) -> None:
        """Drop `node`, and then its parents, as long as nobody needs them."""
        ledger = self.ledger
        while node is not self.root and not _in_use(node) and node.nodeid in self._nodes:
            if ledger.lookups(node.nodeid):
                return
            del self._nodes[node.nodeid]
            ledger.drop(node.nodeid)
            parents = [node.parent] if node.parent is not None else []
            if node.parent is not None and not node.unlinked:
                _disown(node.parent, node.name)
            if node.links is not None:
                self._by_inode.pop(node.links.key, None)
                for (parent, name), alias in node.links.names.items():
                    ledger.drop(alias)
                    _disown(parent, name)
                    parents.append(parent)
            self._release(node)
            for parent in parents[1:]:
                self.settle(parent)
            if not parents:
                return
            node = parents[0]

    def close(self) -> None:
        """Close every descriptor that a node has, and let go of the ledger."""
        for node in self._nodes.values():
            self._release(node)
        self.ledger.close()

    # What a process before this one knew.

    def restore(self, records: list[Record], asleep: Asleep) -> None:
        """Know again what the ledger has: `records` is all of it."""
        nodes = self._nodes
        for nodeid, _, name, number, _, flags in records:
            if not flags & _NO_NODE:
                node = (DirNode if flags & Flag.DIRECTORY else Node)(nodeid, None, name, asleep, number)
                node.unlinked = bool(flags & Flag.UNLINKED)
                nodes[nodeid] = node
        for record in records:
            if not record.flags & _NO_NODE:
                self._restore_name(record)

    def restore_alias(self, record: Record) -> None:
        """The further name that `record` is of a node that is awake, and known by its inode."""
        parent, node = self._nodes.get(record.parent), self._nodes.get(record.ino)
        if not isinstance(parent, DirNode) or node is None or node.links is None or node is _known(parent, record.name):
            self.ledger.drop(record.nodeid)
        else:
            _adopt(parent, record.name, node)
            node.links.names[parent, record.name] = record.nodeid

    def promote_alias(self, record: Record) -> None:
        """A node that lost the name it was known by goes by the further name that `record` is, if it still has none."""
        parent, node = self._nodes.get(record.parent), self._nodes.get(record.ino)
        if isinstance(parent, DirNode) and node is not None and node.unlinked:
            node.parent, node.name, node.unlinked = parent, record.name, False
            _adopt(parent, record.name, node)
            self.ledger.place(node.nodeid, parent.nodeid, record.name, Flag.LINKED)
            self.ledger.drop(record.nodeid)

    def _restore_name(self, record: Record) -> None:
        parent, node = self._nodes.get(record.parent), self._nodes[record.nodeid]
        if not isinstance(parent, DirNode) and node.unlinked:
            # Its last name was not the one it is used by, so that the kernel could forget where it was.
            parent = self.root
            self.ledger.place(record.nodeid, ROOT_ID, b"", Flag.UNLINKED)
        if not isinstance(parent, DirNode):
            # Its parent was let go of: so was it, a moment before the end.
            del self._nodes[record.nodeid]
            self.ledger.drop(record.nodeid)
            return
        node.parent = parent
        if not node.unlinked:
            _adopt(parent, record.name, node)

    def _release(self, node: Node) -> None:
        """Give up what only `node` has. Lower directories are made by a lookup, for one node."""
        if isinstance(node, DirNode):
            self._fds.forget(node.handle)
            for lower in node.entry.lowers:
                self._fds.forget(lower)
            self._dropped(node)
        if node.open is not None:
            self._fds.forget(node.open)
            self._let_go_of(node)


class Links:
    """The names of an upper object beyond the node's own with their records, and its (st_dev, st_ino)."""

    __slots__ = ("key", "names")

    def __init__(self, key: tuple[int, int]) -> None:
        self.key = key
        self.names: dict[tuple[DirNode, bytes], int] = {}


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
    node = _known(parent, name)
    if node is not None and node.entry.asleep:
        _wake(node)
        return _known(parent, name)
    return node


def _known(parent: DirNode, name: bytes) -> Node | None:
    """As `child`, asleep perhaps."""
    return None if parent.children is None else parent.children.get(name)


def _wake(node: Node) -> None:
    assert isinstance(node.entry, Asleep)
    node.entry.wake(node)


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
