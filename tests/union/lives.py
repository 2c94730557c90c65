"""A mount without the kernel whose processes die where a test wants it: at a store of the ledger, a call, an answer.

`Machine` is the kernel's side: it sends requests over a socket, knows which were not answered when a process died, and
sends those again when the next one asks for it, first, as fs/fuse/dev.c does. Each life is a fork of this process with
a union that was opened once, as the keeper's children are.
"""

from __future__ import annotations

import array
import fcntl
import gc
import logging
import mmap
import os
import select
import signal
import socket
import stat
import termios
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any, NamedTuple, Self

from tests.union.seam import CRASHED
from tests.union.stack import Stack
from unionfsd import filling, syscalls
from unionfsd.filling import Filling
from unionfsd.fuse import abi, notify, passthrough, wire
from unionfsd.fuse.abi import FUSE_UNIQUE_RESEND, InitFlag, Opcode
from unionfsd.fuse.channel import Channel
from unionfsd.ledger import Flag, Ledger, Record

_EVERYTHING = InitFlag((1 << 43) - 1)
_LONGEST = 20_000
"""Milliseconds that an answer may take."""
_READ = 64
#: More points than there are in any life.
NEVER = 1 << 20
Path = tuple[bytes, ...]


class Reply(NamedTuple):
    error: int
    payload: bytes


_resend = notify.resend


def _not_cached(fd: int, buffer: memoryview) -> bool:
    return False


def _cached(fd: int, buffer: memoryview) -> bool:
    return os.preadv(fd, [buffer], 0) == len(buffer)


def _for_ever(*_: object, **__: object) -> None:
    os.read(os.pipe()[0], 1)


def _seen(attributes: Reply, content: Reply) -> tuple[object, ...]:
    if attributes.error:
        return ("errno", attributes.error)
    # Of struct fuse_attr: ino, size, blocks, three times, their ns, mode, nlink.
    _, _, _, size, *_, mode, links = wire.ATTR_OUT.unpack(attributes.payload)[:13]
    return (oct(mode), links, size, content.error, content.payload) if stat.S_ISREG(mode) else (oct(mode), links)


class _Words:
    """The words of a ledger, where `point` is told of each store before it is made."""

    def __init__(self, words: Any, point: Callable[[], None]) -> None:
        self._words = words
        self._point = point

    def __getitem__(self, key: Any) -> Any:
        return self._words[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._point()
        self._words[key] = value

    def release(self) -> None:
        self._words.release()


class Machine:
    """One mount; `dooms` are the numbers of the points at which the coming processes die, each in its turn.

    With `passthrough` files are opened and released by messages; that they are passed through is made believe. With
    `hangs` the first process never gets so far as to fill a copy: an operation that does is under way when it dies.
    """

    def __init__(self, stack: Stack, *, passthrough: bool = False, hangs: bool = False, **options: Any) -> None:
        self.stack = stack
        self.union = stack.union(io="passthrough" if passthrough else "cached", **options)
        self.near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._there, self._told = socket.socketpair()
        for end in (self.near, self.far):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.dooms: list[int] = []
        self.lives = 0
        self.nodes: dict[Path, int] = {(): 1}
        self.lookups: Counter[int] = Counter()
        self.log = stack.path + b"/log"
        self._left = mmap.mmap(-1, 4096)
        self._doom = memoryview(self._left).cast("Q")
        self._waiting: dict[int, bytes] = {}
        self._unread: list[bytes] = []
        self._replies: dict[int, Reply] = {}
        self._unique = 0
        self._hangs = hangs
        self._pid = self._pidfd = -1
        self._start()
        flags = int(_EVERYTHING if passthrough else _EVERYTHING & ~InitFlag.PASSTHROUGH)
        self.call(Opcode.INIT, wire.INIT_IN_EXT.pack(7, 45, 131072, flags & 0xFFFF_FFFF, flags >> 32), nodeid=0)

    # Lives.

    def _start(self) -> None:
        self._doom[0] = self.dooms.pop(0) if self.dooms else 0
        self._pid = os.fork()
        if not self._pid:
            status = 70
            try:
                self._live()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        self._pidfd = os.pidfd_open(self._pid)
        self.lives += 1

    def _point(self) -> None:
        doom = self._doom
        if doom[0]:
            doom[0] -= 1
            if not doom[0]:
                os._exit(CRASHED)

    def _live(self) -> None:
        logging.getLogger("unionfsd").addHandler(logging.FileHandler(os.fsdecode(self.log), delay=True))
        gc.disable()
        self.far.close()
        ledger = self.union.ledger
        ledger._words = _Words(ledger._words, self._point)  # type: ignore[assignment]
        for name in syscalls.MUTATING:
            setattr(syscalls, name, self._between(getattr(syscalls, name)))
        os.writev = self._between(os.writev)
        if self._hangs:
            filling._read_cached = _cached if self.lives else _not_cached
            Filling.run = _for_ever  # type: ignore[assignment, method-assign]
        passthrough.backing_open = lambda *_: 1
        passthrough.backing_close = lambda *_: None
        notify.resend = self._resend  # type: ignore[assignment]
        serving = Channel(self.union, self.near.fileno(), self.union.config, lambda: None)
        if self.lives:
            serving.resume(self.union.resume())
        while not serving.gone:
            serving.begin(patience=60)

    def _resend(self, fd: int) -> bool:
        """All is there again when the kernel's call returns."""
        _resend(fd)
        return bool(self._there.recv(1))

    def _between(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._point()
            result = function(*args, **kwargs)
            self._point()
            return result

        return call

    def _buried(self) -> None:
        """The process is dead: what it had not read waits for the next one."""
        assert self._bury() == CRASHED, "a process failed by itself"
        while True:
            try:
                self._unread.append(self.near.recv(1 << 21, socket.MSG_DONTWAIT))
            except BlockingIOError:
                break
        self._start()

    # Requests.

    def send(self, opcode: int, body: bytes = b"", *, nodeid: int = 1, replied: bool = True) -> int:
        """Send a request; returns its unique. `replied`: it expects a reply, and is sent again until it has one."""
        self._unique += 2
        header = wire.IN_HEADER.pack(wire.BODY + len(body), opcode, self._unique, nodeid, 0, 0, 0, 0)
        if replied:
            self._waiting[self._unique] = header + body
        self.far.send(header + body)
        return self._unique

    def receive(self, unique: int) -> Reply:
        """The reply to the request `unique`, whoever gives it."""
        while unique not in self._replies:
            poll = select.poll()
            poll.register(self.far, select.POLLIN)
            poll.register(self._pidfd, select.POLLIN)
            ready = dict(poll.poll(_LONGEST))
            assert ready, f"nobody answers: {self.said()}"
            if self.far.fileno() in ready:
                self._take(self.far.recv(1 << 21))
            else:
                self._buried()
        return self._replies.pop(unique)

    def call(self, opcode: int, body: bytes = b"", *, nodeid: int = 1) -> Reply:
        """A request and its reply."""
        return self.receive(self.send(opcode, body, nodeid=nodeid))

    def _take(self, message: bytes) -> None:
        _, error, unique = wire.OUT_HEADER.unpack_from(message)
        if not unique:
            if error == abi.FUSE_NOTIFY_RESEND:
                self._send_again()
            return
        unique &= ~FUSE_UNIQUE_RESEND
        if self._waiting.pop(unique, None) is not None:  # else nobody waits: another process answered it
            self._replies[unique] = Reply(-error, message[wire.OUT_HEADER.size :])

    def _send_again(self) -> None:
        unread, self._unread = self._unread, []
        never = {wire.IN_HEADER.unpack_from(request)[2] & ~FUSE_UNIQUE_RESEND for request in unread}
        for unique, request in self._waiting.items():
            if unique not in never:
                header = list(wire.IN_HEADER.unpack_from(request))
                header[2] |= FUSE_UNIQUE_RESEND
                self.far.send(wire.IN_HEADER.pack(*header) + request[wire.BODY :])
        for request in unread:
            self.far.send(request)
        self._told.send(b"!")

    def settle(self) -> None:
        """Wait until whoever serves has read everything."""
        unread = array.array("i", [1])
        while unread[0]:
            fcntl.ioctl(self.far, termios.TIOCOUTQ, unread)

    # What a test says.

    def arm(self, *dooms: int) -> None:
        """The process that serves dies at the first of `dooms`, counted from now, its successors at the others."""
        self.dooms = list(dooms[1:])
        self._doom[0] = dooms[0] if dooms else 0

    def disarm(self) -> int:
        """Nobody dies from now on; the points that were left to who serves, 0 when everybody died who was to."""
        left = self._doom[0] if self._doom[0] or not self.dooms else NEVER
        self.dooms = []
        self._doom[0] = 0
        return left

    def know(self, paths: Iterable[Path]) -> None:
        """Look up `paths`, whose parents are known."""
        asked = {path: self.send(Opcode.LOOKUP, path[-1] + b"\0", nodeid=self.nodes[path[:-1]]) for path in paths}
        for path, unique in asked.items():
            self.nodes[path] = self.entered(self.receive(unique))
            assert self.nodes[path], path

    def entered(self, reply: Reply) -> int:
        """The nodeid of an ENTRY_OUT, whose lookup the kernel has counted; 0 for none."""
        if reply.error or len(reply.payload) < wire.ENTRY_OUT.size:
            return 0
        nodeid: int = wire.ENTRY_OUT.unpack_from(reply.payload)[0]
        if nodeid:
            self.lookups[nodeid] += 1
        return nodeid

    def forget(self, nodeid: int) -> None:
        """The kernel forgets a node altogether."""
        count = self.lookups.pop(nodeid)
        self.send(Opcode.FORGET, wire.FORGET_IN.pack(count), nodeid=nodeid, replied=False)

    def seen(self, nodeids: Iterable[int]) -> dict[int, tuple[object, ...]]:
        """What the kernel is told of nodes: type, links, and of files the size and the content; or the errno."""
        asked = {each: self.send(Opcode.GETATTR, wire.GETATTR_IN.pack(0, 0), nodeid=each) for each in nodeids}
        read = {each: self.send(Opcode.READ, wire.READ_IN.pack(0, 0, _READ, 0, 0, 0), nodeid=each) for each in asked}
        return {each: _seen(self.receive(asked[each]), self.receive(read[each])) for each in asked}

    def forget_all(self) -> None:
        """The kernel forgets everything."""
        for nodeid in list(self.lookups):
            self.forget(nodeid)
        self.call(Opcode.GETATTR, wire.GETATTR_IN.pack(0, 0))

    def records(self) -> list[Record]:
        """What the ledger has."""
        with closing(Ledger.adopt(syscalls.Fd(os.dup(self.union.ledger.fd.fd)))) as ledger:
            return list(ledger.records())

    def opens(self, nodeid: int) -> int:
        """How often a node is open, as far as is written down."""
        return sum(
            each.lookups & 0xFFFF_FFFF for each in self.records() if each.flags & Flag.OPENS and each.parent == nodeid
        )

    def said(self) -> str:
        """What the processes logged."""
        try:
            with open(self.log) as file:
                return file.read()
        except FileNotFoundError:
            return ""

    def end(self) -> None:
        """The mount ends, in order."""
        self.near.shutdown(socket.SHUT_RDWR)
        self._bury()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            self._bury()
        for end in (self.near, self.far, self._there, self._told):
            end.close()
        self._doom.release()
        self._left.close()
        self.union.close()

    def _bury(self) -> int:
        _, status = os.waitpid(self._pid, 0)
        os.close(self._pidfd)
        self._pid = 0
        return os.waitstatus_to_exitcode(status)
