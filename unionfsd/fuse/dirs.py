"""Requests that list directories. The rules of handlers are in `exchange`.

A listing has no state here: each request says after which cookie it goes on, and the union keeps the snapshot that
cookies refer to. An entry that does not fit is not taken; the kernel asks for it again.

READDIRPLUS is asked for always (DO_READDIRPLUS without READDIRPLUS_AUTO, by which the kernel gives up after the first
part of a listing when nobody has looked anything up yet, as `os.walk` and `rm -r` do not). Whether the entries are
looked up is decided here: a lookup that comes along costs an eighth of one that is asked for later.
"""

from __future__ import annotations

from struct import Struct

from unionfsd.fuse import abi, wire
from unionfsd.fuse.abi import Opcode
from unionfsd.fuse.exchange import Exchange, Handler, Payload, nothing
from unionfsd.steps import LaterError
from unionfsd.typed import Final

_BODY: Final = wire.BODY
_DOTS: Final = (b".", b"..")
_NO_ENTRY: Final = wire.negative_entry(wire.Validity.of(0, 0))
"""The entry of a direntplus that looks nothing up."""


class Dirs:
    """The handlers of directories."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._union = exchange.union
        self.handles = True
        """Whether OPENDIR is answered; without handles nobody says when a listing is over but its last, empty part."""
        self._forms: dict[int, Struct] = {}
        """Of a direntplus, by the length of its name."""

    def table(self) -> dict[Opcode, Handler]:
        """The handlers by opcode."""
        return {
            Opcode.OPENDIR: self._opendir,
            Opcode.READDIR: self._readdir,
            Opcode.READDIRPLUS: self._readdirplus,
            Opcode.RELEASEDIR: self._releasedir,
            Opcode.FSYNCDIR: self._fsyncdir,
        }

    def _opendir(self, nodeid: int, end: int) -> Payload:
        self._union.opendir(nodeid)
        return wire.OPEN_OUT.pack(nodeid, abi.FOPEN_KEEP_CACHE | abi.FOPEN_CACHE_DIR, 0)

    def _releasedir(self, nodeid: int, end: int) -> Payload:
        fh = wire.RELEASE_IN.unpack_from(self._exchange.buf, _BODY)[0]
        if fh:
            self._union.releasedir(nodeid)
        return b""

    def _fsyncdir(self, nodeid: int, end: int) -> Payload | None:
        exchange = self._exchange
        _, flags = wire.FSYNC_IN.unpack_from(exchange.buf, _BODY)
        return exchange.start(self._union.fsyncdir(nodeid, bool(flags & abi.FUSE_FSYNC_FDATASYNC)), nothing)

    def _readdir(self, nodeid: int, end: int) -> Payload:
        exchange = self._exchange
        _, cookie, size, *_ = wire.READ_IN.unpack_from(exchange.buf, _BODY)
        view = exchange.outbox.view
        size = min(size, len(view))
        pack, head = wire.DIRENT.pack_into, wire.DIRENT.size
        at = 0
        for name, ino, kind, after in self._union.listdir(nodeid, cookie):
            length = len(name)
            room = (head + length + 7) & ~7
            if at + room > size:
                break
            pack(view, at, ino, after, length, kind)
            view[at + head : at + head + length] = name
            at += room
        return self._part(nodeid, view[:at])

    def _readdirplus(self, nodeid: int, end: int) -> Payload:
        """As READDIR, each entry looked up too, which counts one reference, so only entries that fit are."""
        exchange, union = self._exchange, self._union
        _, cookie, size, *_ = wire.READ_IN.unpack_from(exchange.buf, _BODY)
        view = exchange.outbox.view
        size = min(size, len(view))
        at = 0
        entries = union.listdir(nodeid, cookie)
        eager = union.eager(nodeid)
        entry = _NO_ENTRY  # the dots', which come first, if they come
        for name, ino, kind, after in entries:
            length = len(name)
            form = self._forms.get(length) or self._form(length)
            room = form.size
            if at + room > size:
                break
            if eager and name not in _DOTS:
                entry, ino = self._entry(nodeid, name, ino)
            form.pack_into(view, at, entry, ino, after, length, kind, name)
            at += room
        return self._part(nodeid, view[:at])

    def _part(self, nodeid: int, part: memoryview) -> Payload:
        if not part and not self.handles:
            self._union.releasedir(nodeid)
        return part

    def _form(self, length: int) -> Struct:
        return self._forms.setdefault(length, wire.direntplus(length))

    def _entry(self, parent: int, name: bytes, ino: int) -> tuple[bytes, int]:
        """ENTRY_OUT and inode number of one name; one that cannot be looked up is listed all the same, with `ino`."""
        try:
            found = self._union.lookup(parent, name)
        except (OSError, LaterError):  # a layer that waits for somebody else is asked by who wants to know
            return _NO_ENTRY, ino
        return self._exchange.entry(found), found.attr.ino
