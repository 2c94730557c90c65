"""Requests about names and attributes: each handler turns one request into one call of the union and its payload.

The rules of handlers are in `exchange`.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Callable
from functools import partial

from unionfsd.fuse import abi, wire
from unionfsd.fuse.abi import Opcode
from unionfsd.fuse.exchange import Exchange, Handler, Payload, nothing
from unionfsd.fuse.privileges import killed
from unionfsd.syscalls import UTIME_NOW
from unionfsd.typed import TYPE_CHECKING, Final
from unionfsd.union import SetAttr

if TYPE_CHECKING:
    from unionfsd.steps import Op
    from unionfsd.union import Attr, Caller, Union

_BODY: Final = wire.BODY
_NS: Final = 1_000_000_000
_DOTS: Final = (b".", b"..")
_PERMISSIONS: Final = 0o7777
_CHANGES: Final = (
    abi.FATTR_MODE
    | abi.FATTR_UID
    | abi.FATTR_GID
    | abi.FATTR_SIZE
    | abi.FATTR_ATIME
    | abi.FATTR_MTIME
    | abi.FATTR_CTIME
)
_FLUSHED: Final = abi.FATTR_MTIME | abi.FATTR_CTIME
"""What the kernel sends by itself when it writes back the times it kept (fuse_flush_times)."""


class Names:
    """The handlers of what is looked up, made, moved, removed, and of attributes, extended ones included."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._union = exchange.union
        self._absent = wire.negative_entry(exchange.valid)
        self.setxattr_ext = False
        """Whether SETXATTR carries its extended struct; known after INIT."""
        self.drop: Callable[[int], None] | None = None
        """Set where the kernel believes nobody else about the mtime of a file: has it forget a node."""

    def table(self) -> dict[Opcode, Handler]:
        """The handlers by opcode."""
        return {
            Opcode.LOOKUP: self._lookup_exported if self._union.exports else self._lookup,
            Opcode.FORGET: self._forget,
            Opcode.BATCH_FORGET: self._batch_forget,
            Opcode.GETATTR: self._getattr,
            Opcode.SETATTR: self._setattr,
            Opcode.STATX: self._statx,
            Opcode.READLINK: self._readlink,
            Opcode.SYMLINK: self._symlink,
            Opcode.MKNOD: self._mknod,
            Opcode.MKDIR: self._mkdir,
            Opcode.UNLINK: self._unlink,
            Opcode.RMDIR: self._rmdir,
            Opcode.RENAME: self._rename,
            Opcode.RENAME2: self._rename2,
            Opcode.LINK: self._link,
            Opcode.STATFS: self._statfs,
            Opcode.SYNCFS: self._syncfs,
            Opcode.SETXATTR: self._setxattr,
            Opcode.GETXATTR: self._getxattr,
            Opcode.LISTXATTR: self._listxattr,
            Opcode.REMOVEXATTR: self._removexattr,
        }

    # --- names -------------------------------------------------------------------------------------------------------

    def _lookup(self, nodeid: int, end: int) -> Payload:
        exchange = self._exchange
        name = wire.name(exchange.buf, _BODY, end)
        try:
            found = self._union.lookup(nodeid, name)
        except FileNotFoundError:
            return self._absent
        return exchange.entry(found)

    def _lookup_exported(self, nodeid: int, end: int) -> Payload:
        exchange = self._exchange
        name = wire.looked_up(exchange.buf, _BODY, end)
        return exchange.entry(self._union.reach(nodeid, name)) if name in _DOTS else self._lookup(nodeid, end)

    def _forget(self, nodeid: int, end: int) -> None:
        self._union.forget(nodeid, wire.FORGET_IN.unpack_from(self._exchange.buf, _BODY)[0])

    def _batch_forget(self, nodeid: int, end: int) -> None:
        forget = self._union.forget
        for forgotten, count in wire.batch_forget(self._exchange.buf, end):
            forget(forgotten, count)

    def _readlink(self, nodeid: int, end: int) -> Payload:
        return self._union.readlink(nodeid)

    def _symlink(self, nodeid: int, end: int) -> Payload:
        exchange = self._exchange
        name, target = wire.symlink(exchange.buf, _BODY, end)
        return exchange.entry(self._union.symlink(nodeid, name, target, exchange.caller()))

    def _mknod(self, nodeid: int, end: int) -> Payload:
        exchange = self._exchange
        mode, rdev, umask = wire.MKNOD_IN.unpack_from(exchange.buf, _BODY)
        name = wire.name(exchange.buf, _BODY + wire.MKNOD_IN.size, end)
        return exchange.entry(self._union.mknod(nodeid, name, mode, rdev, exchange.caller(umask)))

    def _mkdir(self, nodeid: int, end: int) -> Payload:
        exchange = self._exchange
        mode, umask = wire.MKDIR_IN.unpack_from(exchange.buf, _BODY)
        name = wire.name(exchange.buf, _BODY + wire.MKDIR_IN.size, end)
        return exchange.entry(self._union.mkdir(nodeid, name, mode, exchange.caller(umask)))

    def _unlink(self, nodeid: int, end: int) -> Payload | None:
        return self._exchange.start(self._union.unlink(nodeid, wire.name(self._exchange.buf, _BODY, end)), nothing)

    def _rmdir(self, nodeid: int, end: int) -> Payload:
        self._union.rmdir(nodeid, wire.name(self._exchange.buf, _BODY, end))
        return b""

    def _rename(self, nodeid: int, end: int) -> Payload | None:
        (newdir,) = wire.RENAME_IN.unpack_from(self._exchange.buf, _BODY)
        return self._move(nodeid, newdir, 0, _BODY + wire.RENAME_IN.size, end)

    def _rename2(self, nodeid: int, end: int) -> Payload | None:
        newdir, flags = wire.RENAME2_IN.unpack_from(self._exchange.buf, _BODY)
        return self._move(nodeid, newdir, flags, _BODY + wire.RENAME2_IN.size, end)

    def _move(self, nodeid: int, newdir: int, flags: int, start: int, end: int) -> Payload | None:
        old, new = wire.names(self._exchange.buf, start, end)
        return self._exchange.start(self._union.rename(nodeid, old, newdir, new, flags), nothing)

    def _link(self, nodeid: int, end: int) -> Payload | None:
        exchange = self._exchange
        (source,) = wire.LINK_IN.unpack_from(exchange.buf, _BODY)
        name = wire.name(exchange.buf, _BODY + wire.LINK_IN.size, end)
        return exchange.start(self._union.link(source, nodeid, name), exchange.entry)

    def _statfs(self, nodeid: int, end: int) -> Payload:
        return wire.statfs(self._union.statfs(nodeid))

    def _syncfs(self, nodeid: int, end: int) -> Payload | None:
        return self._exchange.start(self._union.syncfs(), nothing)

    # --- attributes --------------------------------------------------------------------------------------------------

    def _getattr(self, nodeid: int, end: int) -> Payload:
        return self._exchange.attributes(nodeid, self._union.getattr(nodeid))

    def _statx(self, nodeid: int, end: int) -> Payload:
        attributes = self._union.getattr(nodeid)
        return wire.statx(self._exchange.validity(nodeid), *attributes, birth_ns=self._union.birth_time(nodeid))

    def _setattr(self, nodeid: int, end: int) -> Payload | None:
        exchange = self._exchange
        body = wire.SETATTR_IN.unpack_from(exchange.buf, _BODY)
        wanted = _wanted(body, self._mode(nodeid, body[0], body[10]))
        op = self._union.setattr(nodeid, wanted, exchange.caller())
        if self.drop is not None and wanted.size is not None and wanted.mtime_ns is None:
            op = _told_anew(op, partial(self.drop, nodeid))
        return exchange.start(op, lambda attributes: exchange.attributes(nodeid, attributes))

    def _mode(self, nodeid: int, valid: int, mode: int) -> int | None:
        """The permissions to set, if any: those asked for, or what a truncation leaves of them.

        A request that changes nothing is chown(-1, -1), which drops suid and sgid, or comes before a write to a file
        with privileges, which keeps them if the writer has CAP_FSETID. The kernel has not checked that the caller owns
        the file. So an owner without privileges drops them, and chown(-1, -1) by others does nothing, unless it may be
        a write that is passed through.
        """
        if valid & abi.FATTR_MODE:
            return mode & _PERMISSIONS
        if valid & abi.FATTR_KILL_SUIDGID:
            return killed(self._union.getattr(nodeid).st, self._exchange.caller())
        if not valid & _CHANGES:
            st, exchange = self._union.getattr(nodeid).st, self._exchange
            drops = not exchange.by_root and (exchange.header[4] == st.st_uid or nodeid in exchange.unsettled)
            return killed(st, exchange.caller()) if drops else None
        return None

    # --- extended attributes -----------------------------------------------------------------------------------------

    def _getxattr(self, nodeid: int, end: int) -> Payload:
        buf = self._exchange.buf
        (size,) = wire.GETXATTR_IN.unpack_from(buf, _BODY)
        name, _ = wire.tail(buf, _BODY + wire.GETXATTR_IN.size, end)
        return _sized(self._union.getxattr(nodeid, name), size)

    def _listxattr(self, nodeid: int, end: int) -> Payload:
        names = self._union.listxattr(nodeid, trusted=self._exchange.by_root)
        (size,) = wire.GETXATTR_IN.unpack_from(self._exchange.buf, _BODY)
        return _sized(b"".join([name + b"\0" for name in names]), size)

    def _setxattr(self, nodeid: int, end: int) -> Payload | None:
        exchange = self._exchange
        name, value, flags, more = wire.setxattr(exchange.buf, end, self.setxattr_ext)
        op = self._union.setxattr(nodeid, name, value, flags)
        if more & abi.FUSE_SETXATTR_ACL_KILL_SGID:
            op = _then_drop_sgid(op, self._union, nodeid, exchange.caller())
        return exchange.start(op, nothing)

    def _removexattr(self, nodeid: int, end: int) -> Payload | None:
        exchange = self._exchange
        name, _ = wire.tail(exchange.buf, _BODY, end)
        return exchange.start(self._union.removexattr(nodeid, name), nothing)


def _then_drop_sgid(op: Op[None], union: Union, nodeid: int, caller: Caller) -> Op[None]:
    """`op` sets an access ACL for somebody outside the file's group, who may not keep setgid on it."""
    yield from op
    mode = union.getattr(nodeid).st.st_mode
    if mode & stat.S_ISGID:
        yield from union.setattr(nodeid, SetAttr(mode=mode & _PERMISSIONS & ~stat.S_ISGID), caller)


def _told_anew(op: Op[Attr], drop: Callable[[], None]) -> Op[Attr]:
    """`op` truncates a file to the size that it has. The kernel keeps the mtime it had then: `> stamp` is not seen."""
    attributes = yield from op
    drop()
    return attributes


def _wanted(body: tuple[int, ...], mode: int | None) -> SetAttr:
    """What a SETATTR_IN asks for. FATTR_CTIME, which comes with the writeback cache, is the file system's to keep."""
    valid, _, size, _, atime, mtime, ctime, atimensec, mtimensec, ctimensec, _, uid, gid = body
    return SetAttr(
        mode=mode,
        uid=uid if valid & abi.FATTR_UID else None,
        gid=gid if valid & abi.FATTR_GID else None,
        size=size if valid & abi.FATTR_SIZE else None,
        atime_ns=_time(valid, abi.FATTR_ATIME, abi.FATTR_ATIME_NOW, atime * _NS + atimensec),
        mtime_ns=_time(valid, abi.FATTR_MTIME, abi.FATTR_MTIME_NOW, mtime * _NS + mtimensec),
        writeback=valid & _CHANGES == _FLUSHED,
        touch=bool(valid & abi.FATTR_CTIME) and (mtime, mtimensec) == (ctime, ctimensec),
    )


def _time(valid: int, flag: int, now: int, nanoseconds: int) -> int | None:
    if not valid & flag:
        return None
    return UTIME_NOW if valid & now else nanoseconds


def _sized(value: bytes, size: int) -> bytes:
    """An extended attribute's reply: its length alone when `size` is 0. ERANGE: longer than `size`."""
    if not size:
        return wire.GETXATTR_OUT.pack(len(value))
    if len(value) > size:
        raise OSError(errno.ERANGE, "value longer than the buffer")
    return value
