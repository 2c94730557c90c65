"""Requests about the data of files. The rules of handlers are in `exchange`.

The data path belongs to the node: READ and WRITE go by nodeid, and fh says only whether OPEN was answered (it is then
the nodeid) or declined (0). FLUSH is declined with ENOSYS, once: nothing is kept back that an error could come from.
In cached mode OPEN and OPENDIR are, too; the kernel then opens and closes without a message, keeps its page cache over
opens, and sends no RELEASE.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Set
from functools import partial
from time import monotonic, sleep

from unionfsd.fuse import abi, wire
from unionfsd.fuse.abi import Opcode
from unionfsd.fuse.exchange import Exchange, Handler, Payload, nothing
from unionfsd.fuse.privileges import kill_first
from unionfsd.steps import Blocking, Calling
from unionfsd.syscalls import FLAG_CHANGES
from unionfsd.typed import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from unionfsd.fuse.distrust import Distrust
    from unionfsd.fuse.passthrough import Passthrough
    from unionfsd.steps import Op
    from unionfsd.union import Found

T = TypeVar("T")

_BODY: Final = wire.BODY
_DATA: Final = wire.BODY + wire.WRITE_IN.size
_ARGUMENT: Final = wire.BODY + wire.IOCTL_IN.size

_NO_SPACE: Final = frozenset((errno.ENOSPC, errno.EDQUOT))
_DROP_S: Final = 1.0
"""Seconds that a write without space waits at most for the pages of other files to be dropped."""
_FORGET_S: Final = 0.005


class Files:
    """The handlers of opening, reading and writing."""

    def __init__(self, exchange: Exchange, distrust: Distrust) -> None:
        self._exchange = exchange
        self._dropping = distrust.dropping
        self._drop = distrust.drop
        self._renew = distrust.renew
        self._union = exchange.union
        self.handles = True
        """Whether OPEN is answered; False once the kernel was told that it need not send it."""
        self.passthrough: Passthrough | None = None
        """Set where the kernel may be given files."""
        self.flush: Callable[[int], None] | None = None
        """Set where the kernel keeps what was written: in a thread, has it hand over what it keeps of a node."""

    def table(self) -> dict[Opcode, Handler]:
        """The handlers by opcode."""
        return {
            Opcode.OPEN: self._open,
            Opcode.CREATE: self._create,
            Opcode.TMPFILE: self._tmpfile,
            Opcode.RELEASE: self._release,
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.FSYNC: self._fsync,
            Opcode.FALLOCATE: self._fallocate,
            Opcode.LSEEK: self._lseek,
            Opcode.COPY_FILE_RANGE: self._copy_file_range,
            Opcode.COPY_FILE_RANGE_64: self._copy_file_range_64,
            Opcode.IOCTL: self._ioctl,
        }

    # --- opening -----------------------------------------------------------------------------------------------------

    def _open(self, nodeid: int, end: int) -> Payload | None:
        if self.passthrough is not None and self.passthrough.impossible:
            self.handles = False
        if not self.handles:
            raise OSError(errno.ENOSYS, "opened without a message")
        exchange = self._exchange
        flags, _ = wire.OPEN_IN.unpack_from(exchange.buf, _BODY)
        return exchange.start(self._union.open(nodeid, flags), lambda _: self._open_out(nodeid, flags))

    def _create(self, nodeid: int, end: int) -> Payload | None:
        exchange = self._exchange
        flags, mode, umask, _ = wire.CREATE_IN.unpack_from(exchange.buf, _BODY)
        name = wire.name(exchange.buf, _BODY + wire.CREATE_IN.size, end)
        op = self._union.create(nodeid, name, mode, flags, exchange.caller(umask))
        return exchange.start(op, lambda found: self._opened(found, flags))

    def _tmpfile(self, nodeid: int, end: int) -> Payload | None:
        # The name in the request is the kernel's invention, for its messages.
        exchange = self._exchange
        flags, mode, umask, _ = wire.CREATE_IN.unpack_from(exchange.buf, _BODY)
        op = self._union.tmpfile(nodeid, mode, flags, exchange.caller(umask))
        return exchange.start(op, lambda found: self._opened(found, flags))

    def _opened(self, found: Found, flags: int) -> bytes:
        """ENTRY_OUT and OPEN_OUT. Without handles no RELEASE will come, so the open that was counted ends here."""
        if not self.handles:
            self._union.release(found.nodeid)
            return self._exchange.entry(found) + wire.OPEN_OUT.pack(0, abi.FOPEN_KEEP_CACHE, 0)
        try:
            opened = self._open_out(found.nodeid, flags)
        except BaseException:
            self._union.forget(found.nodeid, 1)
            raise
        return self._exchange.entry(found) + opened

    def _open_out(self, nodeid: int, flags: int) -> bytes:
        """OPEN_OUT of an open that the union has counted."""
        if self.passthrough is None:
            return wire.OPEN_OUT.pack(nodeid, abi.FOPEN_KEEP_CACHE, 0)
        try:
            return wire.OPEN_OUT.pack(nodeid, *self.passthrough.opened(nodeid, flags))
        except BaseException:
            self._union.release(nodeid)
            raise

    def _release(self, nodeid: int, end: int) -> Payload:
        fh, flags, _, _ = wire.RELEASE_IN.unpack_from(self._exchange.buf, _BODY)
        if fh:  # else created before the kernel learnt that there are no handles
            if self.passthrough is not None:
                self.passthrough.released(nodeid, flags)
            self._union.release(nodeid)
        return b""

    # --- data --------------------------------------------------------------------------------------------------------

    def _read(self, nodeid: int, end: int) -> Payload | None:
        exchange = self._exchange
        _, offset, size, *_ = wire.READ_IN.unpack_from(exchange.buf, _BODY)
        outbox = exchange.outbox
        view = outbox.view[:size]
        return exchange.start(self._union.readinto(nodeid, view, offset), lambda count: view[:count], outbox)

    def _write(self, nodeid: int, end: int) -> Payload | None:
        exchange = self._exchange
        _, offset, size, flags, _, _ = wire.WRITE_IN.unpack_from(exchange.buf, _BODY)
        if size != end - _DATA:
            raise wire.WireError(f"WRITE of {size} bytes holds {end - _DATA}")
        inbox = exchange.inbox
        data = inbox.view[_DATA:end]
        if flags & abi.FUSE_WRITE_CACHE and self.flush is not None:
            op = self._from_cache(nodeid, partial(self._union.write_late, nodeid, data, offset))
        else:
            op = self._union.write(nodeid, data, offset)
        if flags & abi.FUSE_WRITE_KILL_SUIDGID:
            op = self._unprivileged(op, nodeid)
        return exchange.start(op, wire.WRITE_OUT.pack, inbox)

    def _from_cache(self, nodeid: int, write: Callable[[], Op[int]]) -> Op[int]:
        """`write` writes what readers see already: if it fails, they must not go on seeing it."""
        try:
            try:
                return (yield from write())
            except OSError as exc:
                if exc.errno not in _NO_SPACE:
                    raise
            # The user was told that this is written. What was unlinked may still have its space: the kernel says late
            # what it has forgotten, after other requests, and of what it is to drop not before it has.
            yield Blocking(partial(_wait_for_space, self._dropping, self._deleted() - {nodeid}))
            return (yield from write())
        except OSError:
            self._drop(nodeid)
            raise

    def _deleted(self) -> set[int]:
        """Nodes without a name of which the kernel is to drop what it keeps: with that their space goes."""
        return {nodeid for nodeid in self._dropping.copy() if self._is_deleted(nodeid)}

    def _is_deleted(self, nodeid: int) -> bool:
        try:
            return self._union.place(nodeid) is None
        except OSError:
            return False  # forgotten meanwhile

    def _unprivileged(self, op: Op[T], nodeid: int) -> Op[T]:
        """`op` changes the data of a file for somebody without CAP_FSETID: suid and sgid go first."""
        return kill_first(op, self._union, nodeid, self._exchange.caller(), self._renew)

    def _fsync(self, nodeid: int, end: int) -> Payload | None:
        exchange = self._exchange
        _, flags = wire.FSYNC_IN.unpack_from(exchange.buf, _BODY)
        return exchange.start(self._union.fsync(nodeid, bool(flags & abi.FUSE_FSYNC_FDATASYNC)), nothing)

    def _fallocate(self, nodeid: int, end: int) -> Payload | None:
        exchange = self._exchange
        _, offset, length, mode = wire.FALLOCATE_IN.unpack_from(exchange.buf, _BODY)
        op = self._union.fallocate(nodeid, mode, offset, length, late=self.flush is not None)
        return exchange.start(self._by_caller(op, nodeid), nothing)

    def _lseek(self, nodeid: int, end: int) -> Payload | None:
        exchange = self._exchange
        _, offset, whence = wire.LSEEK_IN.unpack_from(exchange.buf, _BODY)
        op = self._union.lseek(nodeid, offset, whence)
        if self.flush is not None:
            op = _flushed(op, partial(self.flush, nodeid))
        return exchange.start(op, wire.LSEEK_OUT.pack)

    def _copy_file_range(self, nodeid: int, end: int) -> Payload | None:
        return self._exchange.start(self._copy(nodeid), wire.WRITE_OUT.pack)

    def _copy_file_range_64(self, nodeid: int, end: int) -> Payload | None:
        return self._exchange.start(self._copy(nodeid), wire.COPY_FILE_RANGE_OUT.pack)

    def _copy(self, nodeid: int) -> Op[int]:
        _, source_at, target, _, target_at, length, _ = wire.COPY_FILE_RANGE_IN.unpack_from(self._exchange.buf, _BODY)
        length, late = min(length, _COPY_MAX), self.flush is not None
        op = self._union.copy_file_range(nodeid, source_at, target, target_at, length, late=late)
        return self._by_caller(op, target)

    def _by_caller(self, op: Op[T], nodeid: int) -> Op[T]:
        """The same where the request does not say whether the caller has CAP_FSETID."""
        return op if self._exchange.by_root else self._unprivileged(op, nodeid)

    def _ioctl(self, nodeid: int, end: int) -> Payload | None:
        exchange = self._exchange
        _, _, command, _, size, _ = wire.IOCTL_IN.unpack_from(exchange.buf, _BODY)
        if size != end - _ARGUMENT:
            raise wire.WireError(f"IOCTL of {size} bytes holds {end - _ARGUMENT}")
        op = self._union.ioctl(nodeid, command, exchange.buf[_ARGUMENT:end])
        if self.flush is not None and command in FLAG_CHANGES:
            op = _flushed(op, partial(self.flush, nodeid))
        if command in FLAG_CHANGES:
            op = self._seen(op, nodeid)
        return exchange.start(op, _ioctl_out)

    def _seen(self, op: Op[T], nodeid: int) -> Op[T]:
        """`op` changes the ctime of a node by a request of which the kernel does not know that.

        Of a regular file it goes on believing its own with a writeback cache. It could be made to forget the file, but
        with its name goes what somebody has mounted over it.
        """
        result = yield from op
        yield Calling(partial(self._renew, nodeid))
        return result


def _wait_for_space(dropping: Set[int], nodes: Set[int]) -> None:
    """In a thread: until none of `nodes` is being dropped, and the kernel could say what it has forgotten."""
    end = monotonic() + _DROP_S
    while not nodes.isdisjoint(dropping) and monotonic() < end:
        sleep(_FORGET_S)
    sleep(_FORGET_S)


def _ioctl_out(answer: bytes) -> bytes:
    return wire.IOCTL_OUT.pack(0, 0, 0, 0) + answer


_COPY_MAX: Final = 0x7FFFF000
"""Bytes that one copy_file_range moves at most (MAX_RW_COUNT): the reply of 7.28 has 32 bits for it."""


def _flushed(op: Op[T], flush: Callable[[], None]) -> Op[T]:
    """`op` needs all data to be there. The kernel asks it without handing over what it keeps.

    cp(1) would copy holes, and chattr(1) forbid what was written before.
    """
    yield Calling(flush)
    return (yield from op)
