"""Nodes: found under every name they have, the same for as long as the kernel knows them, and gone after that."""

from __future__ import annotations

import errno
import os

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from unionfsd.entries import UPPER, Entry
from unionfsd.fdcache import FdCache
from unionfsd.inodes import ROOT_ID, DirNode, Node, NodeTable, child
from unionfsd.syscalls import Fd

NAMES = [b"a", b"b", b"c", b"d"]


def new_table(dropped: list[DirNode] | None = None) -> NodeTable:
    return NodeTable(Entry(True, ()), 1, FdCache(FdCache.MINIMUM), ([] if dropped is None else dropped).append)


class Known:
    """What the machine expects of a node: its names as (directory, name), what the kernel owes, and its opens."""

    def __init__(self, node: Node, place: tuple[DirNode, bytes]) -> None:
        self.node = node
        self.names = {place}
        self.lookups = 1
        self.opens = 0


class TableMachine(RuleBasedStateMachine):
    """Does to the table what the union does at the kernel's requests, and keeps an own account.

    The kernel's side of the bargain is kept: a directory that a request names has been looked up and not forgotten.
    """

    def __init__(self) -> None:
        super().__init__()
        self.dropped: list[DirNode] = []
        self.table = new_table(self.dropped)
        self.known: dict[int, Known] = {}
        self.names: dict[tuple[DirNode, bytes], int] = {}
        self.keys = 0

    # The account.

    def directories(self) -> list[DirNode]:
        held = [self.table.root]
        for known in self.known.values():
            if isinstance(known.node, DirNode) and known.lookups and known.names:
                held.append(known.node)
        return held

    def place(self, picks: tuple[int, int]) -> tuple[DirNode, bytes]:
        held = self.directories()
        return held[picks[0] % len(held)], NAMES[picks[1] % len(NAMES)]

    def is_needed(self, known: Known) -> bool:
        return known.lookups > 0 or known.opens > 0 or any(parent is known.node for parent, _ in self.names)

    def let_go(self) -> None:
        """Take out of the account whatever nobody needs, and then what was needed only for that."""
        while idle := [known for known in self.known.values() if not self.is_needed(known)]:
            for known in idle:
                del self.known[known.node.nodeid]
                for place in known.names:
                    del self.names[place]

    def has_ancestor(self, node: Node, wanted: Node) -> bool:
        at: Node | None = node
        while at is not None and at is not wanted:
            at = at.parent
        return at is wanted

    # What the union does.

    picks = st.tuples(st.integers(0, 20), st.integers(0, 20))

    @rule(at=picks, directory=st.booleans())
    def look_up(self, at: tuple[int, int], directory: bool) -> None:
        parent, name = self.place(at)
        node = child(parent, name)
        if node is None:
            node = self.table.add(parent, name, UPPER, 100, directory=directory)
            assert node.nodeid not in self.known
            self.known[node.nodeid] = Known(node, (parent, name))
            self.names[(parent, name)] = node.nodeid
        else:
            self.known[node.nodeid].lookups += 1
        self.table.looked_up(node)

    @rule(at=picks, to=picks)
    def link(self, at: tuple[int, int], to: tuple[int, int]) -> None:
        """A hard link is made, or the second name of one is looked up."""
        node, place = child(*self.place(at)), self.place(to)
        if node is None or isinstance(node, DirNode) or place in self.names:
            return
        if node.links is None:
            self.keys += 1
            self.table.know_inode((1, self.keys), node)
        self.table.alias(node, *place)
        self.table.looked_up(node)
        self.names[place] = node.nodeid
        self.known[node.nodeid].names.add(place)
        self.known[node.nodeid].lookups += 1

    @rule(at=picks)
    def remove(self, at: tuple[int, int]) -> None:
        place = self.place(at)
        node = child(*place)
        if node is not None and any(parent is node for parent, _ in self.names):
            return  # not empty
        self.table.unname(*place)
        if node is not None:
            del self.names[place]
            self.known[node.nodeid].names.remove(place)
        self.let_go()

    @rule(at=picks, to=picks)
    def move(self, at: tuple[int, int], to: tuple[int, int]) -> None:
        here, there = self.place(at), self.place(to)
        node = child(*here)
        if there in self.names or (node is not None and self.has_ancestor(there[0], node)):
            return
        self.table.move(*here, *there)
        if node is not None:
            self.rename(node.nodeid, here, there)
        self.let_go()

    @rule(at=picks, to=picks)
    def exchange(self, at: tuple[int, int], to: tuple[int, int]) -> None:
        here, there = self.place(at), self.place(to)
        left, right = child(*here), child(*there)
        if here == there or (left is not None and left is right):
            return  # rename(2) does nothing
        for node, parent in ((left, there[0]), (right, here[0])):
            if node is not None and self.has_ancestor(parent, node):
                return
        self.table.exchange(*here, *there)
        for node, old, new in ((left, here, there), (right, there, here)):
            if node is not None:
                self.known[node.nodeid].names.remove(old)
                self.known[node.nodeid].names.add(new)
        self.names = {place: nodeid for nodeid, known in self.known.items() for place in known.names}
        self.let_go()

    def rename(self, nodeid: int, old: tuple[DirNode, bytes], new: tuple[DirNode, bytes]) -> None:
        del self.names[old]
        self.names[new] = nodeid
        self.known[nodeid].names.remove(old)
        self.known[nodeid].names.add(new)

    @rule(pick=st.integers(0, 40), count=st.integers(1, 3))
    def forget(self, pick: int, count: int) -> None:
        owed = [known for known in self.known.values() if known.lookups]
        if owed:
            known = owed[pick % len(owed)]
            count = min(count, known.lookups)
            known.lookups -= count
            self.table.forget(known.node.nodeid, count)
            self.let_go()

    @rule(at=picks)
    def open(self, at: tuple[int, int]) -> None:
        node = child(*self.place(at))
        if node is not None and not isinstance(node, DirNode):
            node.state().opens += 1
            self.known[node.nodeid].opens += 1

    @rule(pick=st.integers(0, 40))
    def release(self, pick: int) -> None:
        held = [known for known in self.known.values() if known.opens]
        if held:
            known = held[pick % len(held)]
            assert known.node.open is not None
            known.node.open.opens -= 1
            known.opens -= 1
            self.table.settle(known.node)
            self.let_go()

    # What must hold after each of them.

    @invariant()
    def every_name_leads_to_its_node(self) -> None:
        for (parent, name), nodeid in self.names.items():
            assert child(parent, name) is self.known[nodeid].node
        assert sum(len(node.children or ()) for node in self.table if isinstance(node, DirNode)) == len(self.names)

    @invariant()
    def every_node_knows_where_it_is(self) -> None:
        for known in self.known.values():
            node = known.node
            assert node.unlinked is not bool(known.names)
            if known.names:
                assert (node.parent, node.name) in known.names
                further = set() if node.links is None else node.links.names
                assert {(node.parent, node.name), *further} == known.names

    @invariant()
    def the_table_holds_what_is_needed_and_nothing_else(self) -> None:
        held = {node.nodeid: node for node in self.table}
        assert held == {ROOT_ID: self.table.root} | {nodeid: known.node for nodeid, known in self.known.items()}
        assert all(self.table.get(nodeid) is node for nodeid, node in held.items())
        assert len(self.table) == len(held)
        assert len(set(self.dropped)) == len(self.dropped)
        assert not set(self.dropped) & set(self.table)

    def teardown(self) -> None:
        for known in list(self.known.values()):
            while known.opens:
                assert known.node.open is not None
                known.node.open.opens -= 1
                known.opens -= 1
            self.table.forget(known.node.nodeid, known.lookups)
            self.table.settle(known.node)
        assert list(self.table) == [self.table.root]
        assert self.table.root.children is None
        assert [self.table.by_inode((1, key)) for key in range(1, self.keys + 1)] == [None] * self.keys


TestTable = TableMachine.TestCase
TestTable.settings = settings(deadline=None, max_examples=150, stateful_step_count=40)


# One at a time.


def test_nodeids_are_never_used_again() -> None:
    table = new_table()
    seen = set()
    for _ in range(3):
        node = table.add(table.root, b"a", UPPER, 7, directory=False)
        table.looked_up(node)
        seen.add(node.nodeid)
        table.forget(node.nodeid, 1)
    assert len(seen) == 3
    assert len(table) == 1


@pytest.mark.parametrize("nodeid", [0, 2, -1, 1 << 64])
def test_a_nodeid_that_nobody_has_is_stale(nodeid: int) -> None:
    table = new_table()
    for call in (table.get, table.directory):
        with pytest.raises(OSError) as caught:
            call(nodeid)
        assert caught.value.errno == errno.ESTALE
    table.forget(nodeid, 1)


def test_a_file_is_no_directory() -> None:
    table = new_table()
    node = table.add(table.root, b"a", UPPER, 7, directory=False)
    with pytest.raises(NotADirectoryError):
        table.directory(node.nodeid)


def test_the_root_is_never_forgotten() -> None:
    table = new_table()
    table.forget(ROOT_ID, 10**6)
    assert table.get(ROOT_ID) is table.root


def test_too_many_forgets_do_not_count_against_later_lookups() -> None:
    table = new_table()
    node = table.add(table.root, b"a", UPPER, 7, directory=True)
    inner = table.add(node, b"b", UPPER, 8, directory=False) if isinstance(node, DirNode) else node
    table.looked_up(inner)
    table.forget(node.nodeid, 5)
    table.looked_up(node)
    table.forget(inner.nodeid, 1)
    assert table.get(node.nodeid) is node


def test_a_file_that_never_had_a_name_gets_one() -> None:
    table = new_table()
    node = table.add_unnamed(table.root, 7)
    table.looked_up(node)
    assert node.unlinked
    table.know_inode((1, 7), node)
    table.alias(node, table.root, b"named")
    assert (node.parent, node.name, node.unlinked) == (table.root, b"named", False)
    assert child(table.root, b"named") is node is table.by_inode((1, 7))
    table.forget(node.nodeid, 1)
    assert len(table) == 1
    assert table.root.children is None


def test_a_directory_that_only_a_second_name_needed_goes_with_it() -> None:
    """The kernel forgot the directory first, and the file that was linked into it later."""
    table = new_table()
    directory = table.add(table.root, b"d", UPPER, 7, directory=True)
    assert isinstance(directory, DirNode)
    node = table.add(table.root, b"a", UPPER, 8, directory=False)
    table.looked_up(directory)
    table.looked_up(node)
    table.know_inode((1, 8), node)
    table.alias(node, directory, b"b")
    table.forget(directory.nodeid, 1)
    assert table.get(directory.nodeid) is directory
    table.forget(node.nodeid, 1)
    assert list(table) == [table.root]


def test_what_a_node_held_open_is_closed_when_it_goes() -> None:
    table = new_table()
    node = table.add(table.root, b"a", UPPER, 7, directory=False)
    table.looked_up(node)
    state = node.state()
    state.orphan = Fd(os.open("/", os.O_PATH))
    orphan = state.orphan.fd
    state.fd = Fd(os.open("/", os.O_PATH))
    data = state.fd.fd
    table.unname(table.root, b"a")
    os.fstat(orphan)
    table.forget(node.nodeid, 1)
    for number in (orphan, data):
        with pytest.raises(OSError):
            os.fstat(number)


def test_closing_the_table_closes_what_nodes_hold() -> None:
    table = new_table()
    node = table.add(table.root, b"a", UPPER, 7, directory=True)
    assert isinstance(node, DirNode)
    node.handle.fd = Fd(os.open("/", os.O_PATH))
    number = node.handle.fd.fd
    table.close()
    with pytest.raises(OSError):
        os.fstat(number)
