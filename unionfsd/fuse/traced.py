"""A channel that logs every message, for ``-d``."""

from __future__ import annotations

import errno

from unionfsd.fuse import wire
from unionfsd.fuse.abi import Opcode
from unionfsd.fuse.channel import Channel
from unionfsd.fuse.exchange import Payload
from unionfsd.logger import get_logger
from unionfsd.typed import Final

log = get_logger(__name__)

_KNOWN: Final = frozenset(Opcode)


def traced(kind: type[Channel]) -> type[Channel]:
    """The same kind of channel, logging every message."""
    return TracedChannel if kind is Channel else type(f"Traced{kind.__name__}", (TracedChannel, kind), {})


class TracedChannel(Channel):
    """A channel that logs every message."""

    def _answer(self, received: int) -> None:
        length, opcode, unique, nodeid, uid, gid, pid, _ = wire.IN_HEADER.unpack_from(self._exchange.buf)
        name = Opcode(opcode).name if opcode in _KNOWN else str(opcode)
        log.debug("#%d %s node %d, %d bytes, uid %d gid %d pid %d", unique, name, nodeid, length, uid, gid, pid)
        super()._answer(received)

    def _write(self, parts: list[Payload]) -> None:
        length, code, unique = wire.OUT_HEADER.unpack_from(parts[0])
        log.debug("#%d answered: %s, %d bytes", unique, errno.errorcode.get(-code, "ok"), length)
        super()._write(parts)
