"""Going on where another process stopped: the successor of one that crashed, or was told to make room.

The kernel goes on asking by the nodeids it was given, and sends again what was not answered. What those nodeids are is
in the ledger; what they are made of is found again when somebody asks for them.

Rules this file obeys:

- Whether the last change was carried out is decided by the disk: nobody else writes to the upper, and the kernel holds
  the directories of a change locked until it is answered.
- What was carried out is not done again. Everything here can be interrupted and begun again.
- An object that cannot be found again is ESTALE, never another object.
"""

from __future__ import annotations

import contextlib
import os
import stat

from . import intent, syscalls
from .entries import UPPER, Asleep, Entry
from .inodes import DirNode, Node, NodeTable, child
from .ledger import ROOT_ID, Flag, Intent, Kind, Record
from .logger import get_logger
from .lookup import Resolver
from .remote import Patience
from .syscalls import Fd, stat_or_none
from .typed import Final, NamedTuple
from .workdir import Workdir

log = get_logger(__name__)

_PATIENCE: Final = 5.0
"""Seconds that lowers which wait for somebody have, in all: then they count as layers that cannot be read."""


class Answered(NamedTuple):
    """The request `unique` was carried out, whatever became of its answer; of a `Kind.XATTR` that is not known.

    What it made, if anything, is `name` in the directory `parent` (a nodeid).
    """

    unique: int
    kind: Kind
    parent: int
    name: bytes


class Inheritance(NamedTuple):
    """What a successor is told of requests that are sent again.

    `hand` is the unique of the request that was in hand last, and `counted` the nodeids whose lookups were counted for
    its answer: if it is sent again, the kernel never counted them. `opens`: the `Flag.OPENS`.
    """

    answered: Answered | None
    hand: int
    counted: list[int]
    opens: list[Record]


class Heir:
    """The way back into one mount; `work` is None where nothing could be written."""

    def __init__(self, resolver: Resolver, table: NodeTable, work: Workdir | None) -> None:
        self._resolver = resolver
        self._table = table
        self._work = work
        self._kept: set[int] = set()
        self._patience = Patience(_PATIENCE)

    def resume(self) -> Inheritance:
        """Know again what the ledger has, and settle what became of the last change."""
        ledger, table = self._table.ledger, self._table
        upper = self._resolver.stack.upper
        if self._work is not None and upper is not None:
            intent.recover(self._work, upper.root.fd)
        records = list(ledger.records())
        last = ledger.intent()
        if last is not None and not last.applied and self._moved(last, records):
            self._move(last)
            records = list(ledger.records())
            ledger.done()
            last = last._replace(applied=True)
        table.restore(records, Asleep(self._wake))
        if self._work is not None:
            victim = [last.record] if last is not None and last.kind is Kind.GONE else []
            self._kept = self._work.take_over({*victim, *(r.nodeid for r in records if r.flags & Flag.UNLINKED)})
        self._restore_links(records)
        answered = None if last is None or not self._was_done(last) else _answer(last)
        opens = [record for record in records if record.flags & Flag.OPENS]
        return Inheritance(answered, *ledger.put_down(), opens)

    def _was_done(self, last: Intent) -> bool:
        table = self._table
        if last.kind in (Kind.RENAME, Kind.EXCHANGE):
            return last.applied
        if last.kind is Kind.XATTR:
            return True
        try:
            parent = self._patience.get(lambda: table.directory(last.parent))
            there = self._patience.get(lambda: self._resolver.find(parent, last.name)) is not None
        except OSError:
            return False  # the directory is gone: so is who asked
        if there is (last.kind is Kind.GONE):
            return False
        if last.kind is Kind.GONE:
            table.unname(parent, last.name)
            if last.lower and table.ledger.has(last.record):
                table.ledger.flag(last.record, Flag.LOWER)
        elif last.kind is Kind.LINK and child(parent, last.name) is None:
            self._link(parent, last)
        table.ledger.done()
        return True

    def _link(self, parent: DirNode, last: Intent) -> None:
        """The node that got a further name has it, and who looks up either finds the one node."""
        with contextlib.suppress(OSError):  # forgotten since
            node, st = self._found(last.record)
            self._table.know_inode((st.st_dev, st.st_ino), node)
            self._table.alias(node, parent, last.name)

    # Renames: decided and redone before any node is made.

    def _moved(self, last: Intent, records: list[Record]) -> bool:
        """Whether what was to move, if anything was, is where it was to be."""
        if last.kind not in (Kind.RENAME, Kind.EXCHANGE):
            return False
        path = _path(last.new_parent, {record.nodeid: record for record in records})
        upper = self._resolver.stack.upper
        if path is None or upper is None:
            return False
        try:
            with _descend(upper.root.fd, path) as fd:
                st = stat_or_none(fd.fd, last.new_name)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return st is not None and st.st_ino == last.ino

    def _move(self, last: Intent) -> None:
        ledger = self._table.ledger
        if last.other and ledger.has(last.other):
            if last.kind is Kind.EXCHANGE:
                ledger.place(last.other, last.parent, last.name)
            elif ledger.flags(last.other) & Flag.ALIAS:
                ledger.drop(last.other)
            else:
                ledger.flag(last.other, Flag.UNLINKED | Flag.LOWER if last.lower else Flag.UNLINKED)
        if last.record and ledger.has(last.record):
            ledger.place(last.record, last.new_parent, last.new_name)

    # Nodes.

    def _restore_links(self, records: list[Record]) -> None:
        """Wake what has several names: which names are one node is known by the inode."""
        table = self._table
        for record in records:
            if record.flags & Flag.ALIAS:
                table.promote_alias(record)
        for record in records:
            if record.flags & Flag.LINKED and table.ledger.has(record.nodeid):
                with contextlib.suppress(OSError):  # asleep still: then it is ESTALE to who asks
                    node, st = self._found(record.nodeid)
                    table.know_inode((st.st_dev, st.st_ino), node)
        for record in records:
            if record.flags & Flag.ALIAS and table.ledger.has(record.nodeid):
                table.restore_alias(record)

    def _found(self, nodeid: int) -> tuple[Node, os.stat_result]:
        node = self._patience.get(lambda: self._table.get(nodeid))
        return node, self._patience.get(lambda: self._resolver.stat(node))

    def _wake(self, node: Node) -> None:
        """Find out what a node is made of, and what it lies in. OSError where a layer cannot be read."""
        asleep: list[Node] = []
        at: Node | None = node
        while at is not None and at.entry.asleep:
            asleep.append(at)
            at = at.parent
        for each in reversed(asleep):
            self._find(each)

    def _find(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        if node.unlinked:
            self._find_nameless(node, parent)
            return
        hit = self._resolver.find(parent, node.name)
        if hit is None or isinstance(node, DirNode) is not stat.S_ISDIR(hit.st.st_mode):
            log.warning("%r is not where it was: layers changed while nobody served the mount", node.name)
            node.entry = UPPER
            self._table.unname(parent, node.name)
        elif isinstance(node, DirNode):
            node.own_entry(hit.entry)
        else:
            node.entry = hit.entry.of_object

    def _find_nameless(self, node: Node, parent: DirNode) -> None:
        """What was kept is in work; what was only in a lower is there still; anything else is gone."""
        flags = self._table.ledger.flags(node.nodeid)
        node.entry = UPPER
        if node.nodeid in self._kept:
            node.state().kept = True
        elif flags & Flag.LOWER:
            hit = self._resolver.find_lower(parent, node.name)
            if hit is not None and isinstance(node, DirNode) is stat.S_ISDIR(hit.st.st_mode):
                node.entry = Entry(False, hit.entry.lowers, name=hit.entry.name)


def _answer(last: Intent) -> Answered:
    return Answered(last.unique, last.kind, last.parent, last.name)


def _path(nodeid: int, records: dict[int, Record]) -> list[bytes] | None:
    """The names from the root to a directory; None when it has none."""
    names: list[bytes] = []
    while nodeid != ROOT_ID:
        record = records.get(nodeid)
        if record is None or record.flags & Flag.UNLINKED or len(names) > len(records):
            return None
        names.append(record.name)
        nodeid = record.parent
    return names[::-1]


def _descend(root: int, names: list[bytes]) -> Fd:
    """A new O_PATH fd of the directory that `names` lead to beneath the directory fd `root`."""
    fd = syscalls.reopen(root, os.O_PATH | os.O_DIRECTORY)
    for name in names:
        with fd as above:
            fd = syscalls.open_dir(above.fd, name)
    return fd
