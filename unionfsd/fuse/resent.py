"""Requests that the kernel sends again, because the process that had them ended before it answered.

Rules of this file (linux/fuse.h, FUSE_NOTIFY_RESEND; the rules of handlers are in `exchange`):

- What was carried out, and would answer otherwise a second time, is answered from what is known of it.
- Everything else is done again: it comes to the same.
- A request that ended one process after the other is not tried once more.
- They are taken up before any other, those first of which something is known: what another one does takes the place of
  that, and the process may be killed again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from unionfsd.fuse import wire
from unionfsd.fuse.abi import FUSE_UNIQUE_RESEND, Opcode
from unionfsd.fuse.exchange import Exchange, Handler, Header, Payload
from unionfsd.ledger import Kind
from unionfsd.logger import get_logger
from unionfsd.typed import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from unionfsd.fuse.passthrough import Passthrough
    from unionfsd.heir import Answered, Inheritance

log = get_logger(__name__)

_BODY: Final = wire.BODY
_ONCE: Final = frozenset((errno.EEXIST, errno.ENODATA))
"""What an extended attribute is refused with that was made, or removed, already."""
_BETWEEN: Final = frozenset((Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT))
_OPENING: Final = frozenset((Opcode.OPEN, Opcode.CREATE, Opcode.TMPFILE))


def plain(unique: int) -> int:
    """The unique that a request had when it was sent first."""
    return unique & ~FUSE_UNIQUE_RESEND


class Resent:
    """Answers for one connection that was taken over; `refused` is the unique of a request that is not tried again."""

    def __init__(self, exchange: Exchange, inherited: Inheritance, refused: int) -> None:
        self._exchange = exchange
        self._answered = inherited.answered
        self._hand = plain(inherited.hand)
        self._counted = inherited.counted
        self._refused = refused

    def take_up(self, fd: int, reply: Callable[[int, Payload], None], again: Callable[[bytes], None]) -> None:
        """Answer what is sent again before anything else is begun: by `reply`, or by `again` from its request."""
        os.set_blocking(fd, False)
        for request in self._requests(fd):
            header = wire.IN_HEADER.unpack_from(request)
            if self._is_done(header):
                reply(header[2], b"")  # as long as nothing is begun, the ledger knows that it is done
            else:
                again(request)

    def _requests(self, fd: int) -> list[bytes]:
        """What is sent again, in the order in which it is to be taken up, and then what was read before that was all.

        The kernel has it at the head of its queue (fuse_resend), but for FORGET and INTERRUPT.
        """
        again: list[bytes] = []
        others: list[bytes] = []
        buffer = self._exchange.inbox
        while not others or wire.IN_HEADER.unpack_from(others[-1])[1] in _BETWEEN:
            try:
                received = os.readv(fd, buffer.vector)
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINTR):
                    continue
                break  # nothing more; what else it may be the channel meets again
            if received < wire.BODY:
                break
            request = buffer.map[:received]
            (others if wire.IN_HEADER.unpack_from(request)[2] < FUSE_UNIQUE_RESEND else again).append(request)
        return sorted(again, key=self._rank) + others

    def _rank(self, request: bytes) -> int:
        header = wire.IN_HEADER.unpack_from(request)
        if self._is_done(header):
            return 0
        unique = plain(header[2])
        if self._answered is not None and unique == plain(self._answered.unique):
            return 1
        return 2 if unique == self._hand else 3

    def _is_done(self, header: Header) -> bool:
        """Whether a request was carried out that has no answer but that it was."""
        return header[1] == Opcode.RELEASE and plain(header[2]) == self._hand and bool(self._counted)

    def answer(self, handler: Handler, passthrough: Passthrough | None, nodeid: int, end: int) -> Payload | None:
        """As `handler`, of a request that is sent again."""
        opcode, unique = self._exchange.header[1], plain(self._exchange.header[2])
        if unique == self._refused:
            log.error("request %d (%s) ended the process that had it: not tried again", opcode, Opcode(opcode).name)
            raise OSError(errno.EIO, "not tried again")
        if unique == self._hand and self._counted:
            counted, self._counted = self._counted, []
            self._uncount(counted, passthrough)
        answered = self._answered
        if answered is not None and unique == plain(answered.unique):
            return self._again(answered, handler, nodeid, end)
        return handler(nodeid, end)

    def _uncount(self, counted: list[int], passthrough: Passthrough | None) -> None:
        """The kernel never got the answer that these were counted for."""
        exchange = self._exchange
        if passthrough is not None and exchange.header[1] in _OPENING:
            (flags,) = wire.OPEN_FLAGS.unpack_from(exchange.buf, _BODY)
            counted = [each for each in counted if not passthrough.take_back(each, flags)]
        for nodeid in counted:
            exchange.union.forget(nodeid, 1)

    def _again(self, answered: Answered, handler: Handler, nodeid: int, end: int) -> Payload | None:
        exchange = self._exchange
        if answered.kind is Kind.XATTR:
            try:
                return handler(nodeid, end)
            except OSError as exc:
                if exc.errno in _ONCE:
                    return b""
                raise
        if answered.kind not in (Kind.NEW, Kind.LINK):
            return b""
        if exchange.header[1] == Opcode.CREATE:
            (flags,) = wire.OPEN_FLAGS.unpack_from(exchange.buf, _BODY)
            wire.OPEN_FLAGS.pack_into(exchange.buf, _BODY, flags & ~(os.O_EXCL | os.O_TRUNC))
            return handler(nodeid, end)
        return exchange.entry(exchange.union.lookup(answered.parent, answered.name))
