"""Nodeids that mean the same object after FORGET and after a remount, so that file handles do (nfs_export=on).

Rules this file obeys:

- The kernel makes a file handle of a nodeid and a generation, and asks for "." of a nodeid that it has forgotten
  (fs/fuse/inode.c, fuse_get_dentry). So a nodeid is the inode number of the object, which stays over copy-up, rename
  and remount, and its generation a digest of the file handle that it has in its layer, or had in that it came from.
- Where each was seen last, parent and name, is kept in memory and appended to a file in the work directory, last line
  wins. It is a hint: what lies there is looked up by the rules of `lookup`, and is another object, or nothing: ESTALE.
- Two objects with one number, as hard links without an index are, have only one that can be found again. The other
  gets a number with the top bit, which no inode number has, and which is good until it is forgotten.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator

from . import format as fmt
from . import syscalls
from .errors import LAYER, UserError
from .inodes import ROOT_ID, DirNode, Node, NodeTable, child
from .inuse import lock
from .layers import LayerStack, optional_xattr
from .ledger import Flag, Ledger
from .logger import get_logger
from .lookup import Hit, Resolver
from .options import MountConfig
from .syscalls import Fd
from .typed import Final, NamedTuple

log = get_logger(__name__)

_LOST: Final = "some file handles will be stale after a remount"
_RECORD: Final = struct.Struct("<QQIH")
_FIRST: Final = b"unionfsd exports 1\n"
_PASSING: Final = 1 << 63
#: A file of which less than this part is still true is written anew.
_WORTH: Final = 0.5
_SMALL: Final = 1 << 16


class Seen(NamedTuple):
    """Where an object was seen last: nodeid of the parent, name; and its generation."""

    parent: int
    name: bytes
    generation: int


class Log:
    """The file of what was seen, in the work directory `dirfd`; `lock` is held as long as it is open."""

    def __init__(self, dirfd: int, lock: Fd | None, *, syncs: bool) -> None:
        self.seen: dict[int, Seen] = {}
        self._lock = lock
        self._incomplete = False
        try:
            self._fd = syscalls.open_data(dirfd, fmt.EXPORTS, os.O_RDWR)
            self._end = self._read()
        except FileNotFoundError:
            self._end = 0
        if self._end == 0 or (self._end > _SMALL and self._size() < _WORTH * self._end):
            self._renew(dirfd, syncs=syncs)

    def _read(self) -> int:
        """Take what is there; returns where it ends, 0 when it is not ours."""
        with open(syscalls.proc_path(self._fd.fd), "rb") as file:
            data = file.read()
        if not data.startswith(_FIRST):
            return 0
        at = len(_FIRST)
        while at + _RECORD.size <= len(data):
            nodeid, parent, generation, length = _RECORD.unpack_from(data, at)
            name = data[at + _RECORD.size : at + _RECORD.size + length]
            if len(name) < length:
                break  # a crash of the machine
            self.seen[nodeid] = Seen(parent, name, generation)
            at += _RECORD.size + length
        return at

    def _size(self) -> int:
        return len(_FIRST) + sum(_RECORD.size + len(seen.name) for seen in self.seen.values())

    def _renew(self, dirfd: int, *, syncs: bool) -> None:
        if syscalls.stat_or_none(dirfd, fmt.EXPORTS_STAGED) is not None:
            syscalls.unlink_at(dirfd, fmt.EXPORTS_STAGED)
        self._fd = syscalls.create_at(dirfd, fmt.EXPORTS_STAGED, 0o600)
        self._end = 0
        self._append(_FIRST + b"".join(_packed(nodeid, seen) for nodeid, seen in self.seen.items()))
        if syncs:
            syscalls.fdatasync(self._fd.fd)
        syscalls.renameat2(dirfd, fmt.EXPORTS_STAGED, dirfd, fmt.EXPORTS)

    def put(self, nodeid: int, seen: Seen) -> None:
        """Keep where `nodeid` is; what cannot be written, for want of space, is kept as long as this is open."""
        if self.seen.get(nodeid) == seen:
            return
        self.seen[nodeid] = seen
        try:
            self._append(_packed(nodeid, seen))
        except OSError as exc:
            (log.debug if self._incomplete else log.warning)("exports: %s: %s", exc.strerror, _LOST)
            self._incomplete = True

    def _append(self, data: bytes) -> None:
        at = self._end
        while data:
            count = syscalls.pwrite(self._fd.fd, data, at)
            at += count
            data = data[count:]
        self._end = at

    def close(self) -> None:
        self._fd.close()
        if self._lock is not None:
            self._lock.close()


def _packed(nodeid: int, seen: Seen) -> bytes:
    return _RECORD.pack(nodeid, seen.parent, seen.generation, len(seen.name)) + seen.name


class Register(Ledger):
    """A ledger whose nodeids are the inode numbers of the objects. `moved` is told of their new places.

    No other process goes on with it: the keeper is not there with nfs_export=on.
    """

    @classmethod
    def new(cls) -> Register:
        made = super().new()
        assert isinstance(made, Register)
        made._records = {ROOT_ID: ROOT_ID}
        made._passing = _PASSING
        #: Those that were not looked up yet since they were added.
        made.fresh = set()
        made.moved = None
        return made

    _records: dict[int, int]
    _passing: int
    fresh: set[int]
    moved: Callable[[int, int, bytes], None] | None

    def add(self, parent: int, name: bytes, ino: int, flags: int = 0) -> int:
        lasting = not flags & (Flag.ALIAS | Flag.OPENS) and ino > ROOT_ID and ino not in self._records
        if lasting:
            nodeid = ino
        else:
            self._passing += 1
            nodeid = self._passing
        self._records[nodeid] = super().add(parent, name, ino, flags)
        self.fresh.add(nodeid)
        return nodeid

    def has(self, record: int) -> bool:
        return record in self._records

    def drop(self, record: int) -> None:
        self.fresh.discard(record)
        super().drop(self._records.pop(record))

    def place(self, record: int, parent: int, name: bytes, flags: int | None = None) -> None:
        super().place(self._records[record], parent, name, flags)
        if self.moved is not None:
            self.moved(record, parent, name)

    def flags(self, record: int) -> int:
        return super().flags(self._records[record])

    def flag(self, record: int, flag: int) -> None:
        super().flag(self._records[record], flag)

    def count(self, nodeid: int) -> None:
        super().count(self._records[nodeid])

    def tally_open(self, record: int, count: int) -> None:
        super().tally_open(self._records[record], count)

    def tally_release(self, record: int, count: int) -> None:
        super().tally_release(self._records[record], count)

    def tally_back(self, record: int, count: int) -> None:
        super().tally_back(self._records[record], count)

    def uncount(self, nodeid: int, count: int) -> None:
        super().uncount(self._records[nodeid], count)

    def lookups(self, nodeid: int) -> int:
        return super().lookups(self._records[nodeid])


class Exports:
    """Where the nodes of one mount are; `node_of` makes a node of what a name in a directory was found to be."""

    def __init__(
        self,
        log: Log,
        register: Register,
        resolver: Resolver,
        table: NodeTable,
        node_of: Callable[[DirNode, bytes, Hit], Node],
    ) -> None:
        self._log = log
        self._register = register
        self._resolver = resolver
        self._table = table
        self._node_of = node_of
        register.moved = self._moved

    def _moved(self, nodeid: int, parent: int, name: bytes) -> None:
        seen = self._log.seen.get(nodeid)
        if seen is not None and not nodeid & _PASSING:
            self._log.put(nodeid, Seen(parent, name, seen.generation))

    def _digest(self, node: Node) -> int:
        """A generation for a node not known before: of the handle of what gives it its inode number."""
        try:
            import zlib  # late: few mounts are exported

            return zlib.crc32(b"%d:%b" % self._handle(node))
        except OSError:
            return 0

    def _handle(self, node: Node) -> tuple[int, bytes]:
        entry = node.entry
        if isinstance(node, DirNode) and entry.lowers:
            return syscalls.file_handle(entry.lowers[0].open(self._resolver.fds), b"")
        dirfd, name = self._resolver.spot(node)
        if entry.upper:
            with self._resolver.open_object(node) as fd:
                if self._resolver.stack.ino(syscalls.fstat(fd.fd)) != node.ino:
                    values = (optional_xattr(fd.fd, attr) for attr in fmt.ORIGIN_NAMES)
                    origin = next((fmt.decode_origin(value) for value in values if value), None)
                    if origin is not None:
                        return origin.kind, origin.handle
        return syscalls.file_handle(dirfd, name)

    # What the kernel asks.

    def generation(self, node: Node) -> int:
        """What tells apart objects that had the same number one after the other; from now on `node` can be reached."""
        nodeid = node.nodeid
        if nodeid in self._register.fresh and node.parent is not None and not nodeid & _PASSING:
            self._register.fresh.discard(nodeid)
            self._log.put(nodeid, Seen(node.parent.nodeid, node.name, self._digest(node)))
        seen = self._log.seen.get(nodeid)
        return 0 if seen is None else seen.generation

    def reach(self, nodeid: int) -> Node:
        """The node `nodeid`, forgotten or of an earlier mount; ESTALE when what had it is not where it was seen."""
        missing = list(self._unknown(nodeid))
        node = self._table.get(missing[-1].parent if missing else nodeid)
        for wanted, seen in zip(self._numbers(nodeid, missing), reversed(missing), strict=True):
            below = self._below(node, seen.name)
            if below is None or below.nodeid != wanted:
                self._table.settle(node if below is None else below)
                raise _stale()
            node = below
        return node

    def _unknown(self, nodeid: int) -> Iterator[Seen]:
        """Where `nodeid` was, and then its parents, up to one that is known."""
        passed = set()
        while not self._register.has(nodeid):
            seen = self._log.seen.get(nodeid)
            if seen is None or nodeid in passed:
                raise _stale()
            passed.add(nodeid)
            yield seen
            nodeid = seen.parent

    @staticmethod
    def _numbers(nodeid: int, missing: list[Seen]) -> list[int]:
        """The nodeids of `missing`, from the top."""
        return [nodeid, *(seen.parent for seen in missing[:-1])][::-1] if missing else []

    def _below(self, node: Node, name: bytes) -> Node | None:
        if not isinstance(node, DirNode) or node.unlinked:
            return None
        known = child(node, name)
        if known is not None:
            return known
        hit = self._resolver.find(node, name)
        return None if hit is None else self._node_of(node, name, hit)

    def close(self) -> None:
        self._log.close()


def _stale() -> OSError:
    return OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def open_log(stack: LayerStack, config: MountConfig) -> Log | None:
    """Where nodes are kept track of, if that is asked for; UserError when it cannot be."""
    if config.nfs_export == "off":
        return None
    if config.workdir is None:
        raise UserError(
            "nfs_export=on without workdir: what handles mean is kept there",
            hint="give workdir=DIR, which a read-only union uses for nothing else",
            code=LAYER,
        )
    syncs = config.syncs
    try:
        if stack.work is not None:
            return Log(stack.work.fd, None, syncs=syncs)
        fd = Fd(os.open(config.workdir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        lock(fd, config.workdir, "workdir")
        return Log(fd.fd, fd, syncs=syncs)
    except OSError as exc:
        raise UserError(f"workdir {os.fsdecode(config.workdir)}: {exc.strerror}", code=LAYER) from exc
