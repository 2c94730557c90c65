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

from . import format as fmt
from . import intent, syscalls
from .entries import UPPER, Asleep, Entry
from .inodes import DirNode, Node, NodeTable, child
from .layers import exists, read_marks
from .ledger import ROOT_ID, Flag, Intent, Kind, Ledger, Record
from .logger import get_logger
from .lookup import Resolver
from .remote import Patience
from .syscalls import Fd, stat_or_none
from .typed import Final, NamedTuple
from .workdir import Workdir, is_whiteout

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
    its answer: if it is sent again, the kernel never counted them. `opens`: the `Flag.OPENS`. The ledger has `hand`,
    `counted` and `answered` until another request is begun, or changes something: what they speak of is taken up first.
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
        last = ledger.intent()
        happened = last is not None and (last.applied or self._happened(last))
        if last is not None and happened and not last.applied and last.kind is not Kind.LINK:
            self._apply(last)
            ledger.done()
        records = list(ledger.records())
        table.restore(records, Asleep(self._wake))
        if self._work is not None:
            self._kept = self._work.take_over({r.nodeid for r in records if r.flags & Flag.UNLINKED})
        self._restore_links(records)
        if last is not None and happened and not last.applied and last.kind is Kind.LINK:
            self._link(last)
            ledger.done()
        answered = _answer(last) if last is not None and happened else None
        opens = [record for record in records if record.flags & Flag.OPENS]
        return Inheritance(answered, *ledger.left(), opens)

    # The last change: decided, and but for links written down, before any node is made.

    def _happened(self, last: Intent) -> bool:
        """Whether the upper is as the change was to make it; of an extended attribute that is not known."""
        if last.kind is Kind.XATTR:
            return True
        moves = last.kind in (Kind.RENAME, Kind.EXCHANGE)
        path = _path(last.new_parent if moves else last.parent, self._table.ledger)
        upper = self._resolver.stack.upper
        if path is None or upper is None:
            return False  # the directory is gone: so is who asked
        try:
            with _descend(upper.root.fd, path) as fd:
                return _moved(last, fd.fd) if moves else _made_or_gone(last, fd.fd)
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _apply(self, last: Intent) -> None:
        """See that the records of names say what happened, of which some may already."""
        ledger = self._table.ledger
        if last.kind is Kind.GONE:
            self._lost(last.record, (last.parent, last.name), last)
        elif last.kind is Kind.RENAME:
            self._lost(last.other, (last.new_parent, last.new_name), last)
        elif last.kind is Kind.EXCHANGE and ledger.has(last.other):
            ledger.place(last.other, last.parent, last.name)
        if last.new_name and ledger.has(last.record):
            ledger.place(last.record, last.new_parent, last.new_name)

    def _lost(self, record: int, place: tuple[int, bytes], last: Intent) -> None:
        """What `record` is has lost the name `place`; a node that has others goes by one of them when it wakes."""
        ledger = self._table.ledger
        known = ledger.record(record)
        if known is None or (known.parent, known.name) != place:
            return
        if known.flags & Flag.ALIAS:
            ledger.drop(record)
        else:
            ledger.flag(record, Flag.UNLINKED | Flag.LOWER if last.lower else Flag.UNLINKED)

    def _link(self, last: Intent) -> None:
        """The node that got a further name has it, and who looks up either finds the one node."""
        with contextlib.suppress(OSError):  # forgotten since
            parent = self._patience.get(lambda: self._table.directory(last.parent))
            if child(parent, last.name) is None:
                node, st = self._found(last.record)
                self._table.know_inode((st.st_dev, st.st_ino), node)
                self._table.alias(node, parent, last.name)

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


def _moved(last: Intent, dirfd: int) -> bool:
    st = stat_or_none(dirfd, last.new_name)
    return st is not None and st.st_ino == last.ino


def _made_or_gone(last: Intent, dirfd: int) -> bool:
    st = stat_or_none(dirfd, last.name)
    marked = st is not None and is_whiteout(dirfd, last.name, st, xwhiteouts=read_marks(dirfd).xwhiteouts)
    if st is not None and not marked:
        return last.kind is not Kind.GONE
    hidden = marked or not last.lower or exists(dirfd, fmt.wh_name(last.name))
    return last.kind is Kind.GONE and hidden


def _answer(last: Intent) -> Answered:
    return Answered(last.unique, last.kind, last.parent, last.name)


def _path(nodeid: int, ledger: Ledger) -> list[bytes] | None:
    """The names from the root to a directory; None when it has none."""
    names: list[bytes] = []
    passed: set[int] = set()
    while nodeid != ROOT_ID:
        record = ledger.record(nodeid)
        if record is None or record.flags & Flag.UNLINKED or nodeid in passed:
            return None
        passed.add(nodeid)
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
