"""What the request handlers of one connection share: the union, the buffers, and the way into an operation.

Rules of this file and of its users (`names`, `files`, `dirs`):

- A handler is called as ``handler(nodeid, end)`` with the request in ``exchange.buf[:end]``, past `wire.check`.
  It returns the payload of the reply, or None when no reply is due from it: never (FORGET), or later (an operation that
  was deferred).
- It raises OSError for the caller and WireError for hostile bytes; the channel turns both into replies.
- Buffers are reused. A view of one is valid until the reply is written, unless the buffer was handed to a deferred
  operation by `start`, which puts another in its place.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable

from unionfsd.fuse import wire
from unionfsd.fuse.abi import Opcode
from unionfsd.fuse.negotiate import MAX_WRITE
from unionfsd.steps import Gate
from unionfsd.typed import TYPE_CHECKING, Final, TypeAlias, TypeVar
from unionfsd.union import Caller

if TYPE_CHECKING:
    from unionfsd.steps import Op, Step
    from unionfsd.union import Attr, Found, Union

T = TypeVar("T")

Payload: TypeAlias = bytes | memoryview
Handler: TypeAlias = Callable[[int, int], Payload | None]
Header: TypeAlias = tuple[int, int, int, int, int, int, int, int]
"""The members of fuse_in_header, in order."""

_READY: Final = 4
"""Further buffers that are made ready; more are needed only while very much is under way, and memory counts then."""
_ROOM: Final = 4096
"""What a request may hold besides MAX_WRITE bytes of data: its header and struct, or two names and a value."""


class Buffer:
    """Anonymous memory for one request or reply: pages never used cost nothing, and slicing it gives bytes.

    `ready`: with all its pages there. Into pages that are still to be made the kernel copies nothing for a process that
    was just killed, and answers the request with EIO itself (fs/fuse/dev.c, `fuse_dev_do_read`) instead of keeping it
    for the next one.
    """

    __slots__ = ("map", "vector", "view")

    def __init__(self, *, ready: bool = False) -> None:
        there = mmap.MAP_POPULATE if ready else 0  # one call takes a third of the time that 257 faults do
        self.map = mmap.mmap(-1, MAX_WRITE + _ROOM, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | there)
        self.map.madvise(mmap.MADV_DONTFORK)  # a page that a child shares is to be made, too, when it is written to
        self.view = memoryview(self.map)
        self.vector = [self.map]


class Deferred:
    """An operation that yielded: its request, the step to do first, what its result becomes, the buffer it keeps.

    `began` is when its request was read, in ns. `ended` is for whoever waits for its end. `place`: where the
    ledger has it, for kernels that send nothing again.
    """

    __slots__ = ("began", "done", "ended", "header", "held", "op", "place", "step")

    @property
    def changes(self) -> bool:
        """Whether it may be at work on a change."""
        return self.header[1] != Opcode.READ

    def __init__(
        self, header: Header, op: Op[T], step: Step, done: Callable[[T], Payload], held: Buffer | None
    ) -> None:
        self.header = header
        self.began = 0
        self.place = -1
        self.op = op
        self.step = step
        self.done = done
        self.held = held
        self.ended: Gate | None = None

    def end(self) -> Gate:
        """What opens when it has ended."""
        if self.ended is None:
            self.ended = Gate()
        return self.ended


class Exchange:
    """The state of one connection that its handlers share."""

    __slots__ = ("_defer", "_spare", "_unready", "buf", "header", "inbox", "outbox", "union", "unsettled", "valid")

    def __init__(self, union: Union, valid: wire.Validity, defer: Callable[[Deferred], None]) -> None:
        self.union = union
        self.valid = valid
        self.unsettled: set[int] = set()
        """Nodes that may be written without a message: the kernel is not to keep their attributes."""
        self.inbox = Buffer(ready=True)
        self.outbox = Buffer()
        self.buf = self.inbox.map
        self.header: Header = (0, 0, 0, 0, 0, 0, 0, 0)
        self._defer = defer
        self._spare: list[Buffer] = []
        self._unready = _READY

    def start(self, op: Op[T], done: Callable[[T], Payload], held: Buffer | None = None) -> Payload | None:
        """Run `op` to its end or to its first step. The payload `done` makes of its result; None when it was deferred.

        `held` is the inbox or outbox if `op` has a view of it.
        """
        try:
            step = op.send(None)
        except StopIteration as stop:
            return done(stop.value)
        if held is not None:
            self._replace(held)
        self._defer(Deferred(self.header, op, step, done, held))
        return None

    def _replace(self, held: Buffer) -> None:
        if self._spare:
            fresh = self._spare.pop()
        else:
            fresh = Buffer(ready=self._unready > 0)
            self._unready -= 1
        if held is self.inbox:
            self.inbox = fresh
            self.buf = fresh.map
        else:
            self.outbox = fresh

    def give_back(self, buffer: Buffer) -> None:
        """Take a buffer back from a deferred operation that has ended."""
        self._spare.append(buffer)

    @property
    def by_root(self) -> bool:
        """Whether the request in hand is root's, who is taken to have every capability: no request says so."""
        return self.header[4] == 0

    def caller(self, umask: int = 0) -> Caller:
        """Who sent the request in hand."""
        header = self.header
        return Caller(header[4], header[5], header[6], umask)

    def validity(self, nodeid: int) -> wire.Validity:
        """How long what is said of a node holds."""
        return self.valid._replace(attr_valid=0, attr_valid_nsec=0) if nodeid in self.unsettled else self.valid

    def entry(self, found: Found) -> bytes:
        """ENTRY_OUT of a lookup that succeeded; the kernel now counts one reference more."""
        nodeid, generation, attributes = found
        return wire.ENTRY_OUT.pack(nodeid, generation, *self.validity(nodeid), *wire.attr(*attributes))

    def attributes(self, nodeid: int, attributes: Attr) -> bytes:
        """ATTR_OUT."""
        valid = self.validity(nodeid)
        return wire.ATTR_OUT.pack(valid.attr_valid, valid.attr_valid_nsec, *wire.attr(*attributes))


def nothing(_: object) -> bytes:
    """The payload of an operation that only succeeds."""
    return b""
