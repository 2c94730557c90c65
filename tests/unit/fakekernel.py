"""The kernel's side of the FUSE protocol on a socket, and a union that does what a test tells it."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any, NamedTuple

import trio

from unionfsd.events import Events
from unionfsd.fuse import wire
from unionfsd.fuse.abi import InitFlag, Opcode
from unionfsd.fuse.channel import Channel
from unionfsd.ledger import Ledger
from unionfsd.metrics import Counters, Holdings
from unionfsd.options import MountConfig
from unionfsd.steps import Op
from unionfsd.union import Attr, Caller, Dirent, Found, SetAttr

EVERYTHING = InitFlag((1 << 43) - 1)
CONFIG = MountConfig(lowerdirs=(b"/lower",), mountpoint=b"/nowhere")


class Reply(NamedTuple):
    unique: int
    error: int
    payload: bytes


class Kernel:
    """Sends requests and receives replies, one message each."""

    def __init__(self, end: socket.socket) -> None:
        self._end = trio.socket.from_stdlib_socket(end)
        self._unique = 0

    async def send(self, opcode: int, body: bytes = b"", *, nodeid: int = 1, uid: int = 0, gid: int = 0) -> int:
        """Send one request; returns its unique."""
        self._unique += 2
        header = wire.IN_HEADER.pack(wire.BODY + len(body), opcode, self._unique, nodeid, uid, gid, 0, 0)
        await self._end.send(header + body)
        return self._unique

    async def send_raw(self, message: bytes) -> None:
        await self._end.send(message)

    async def receive(self) -> Reply:
        message = await self._end.recv(1 << 20)
        length, error, unique = wire.OUT_HEADER.unpack_from(message)
        assert length == len(message)
        return Reply(unique, -error, message[wire.OUT_HEADER.size :])

    async def call(self, opcode: int, body: bytes = b"", *, nodeid: int = 1, uid: int = 0) -> Reply:
        """One request and its reply, which must be the next message."""
        unique = await self.send(opcode, body, nodeid=nodeid, uid=uid)
        reply = await self.receive()
        assert reply.unique == unique
        return reply

    async def init(self, flags: InitFlag = EVERYTHING, *, major: int = 7, minor: int = 45) -> Reply:
        low, high = flags & 0xFFFFFFFF, flags >> 32
        return await self.call(Opcode.INIT, wire.INIT_IN_EXT.pack(major, minor, 131072, low, high))

    def hang_up(self) -> None:
        self._end.close()


@contextlib.asynccontextmanager
async def served(union: Any, *, config: MountConfig = CONFIG) -> AsyncIterator[Kernel]:
    """A channel that serves `union` to the kernel yielded; ends with it, and must end by itself."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near:
        kernel = Kernel(far)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Channel(union, near.fileno(), config, lambda: None).run)
            try:
                yield kernel
            finally:
                kernel.hang_up()


STAT = os.stat_result(
    (0o100644, 7, 1, 1, 10, 20, 30, 40, 50, 60),
    {"st_atime_ns": 40, "st_mtime_ns": 50, "st_ctime_ns": 60, "st_blocks": 8, "st_blksize": 4096, "st_rdev": 0},
)
ATTR = Attr(STAT, 77, 3)


class FakeUnion:
    """Every object is the same file; `calls` is what was asked for. A test replaces the methods it is about."""

    exports = False

    def __init__(self) -> None:
        self.counters = Counters()
        self.ledger = Ledger.new()
        self.events = Events()
        self.calls: list[tuple[Any, ...]] = []
        self.entries: list[Dirent] = [(b".", 1, 4, 1), (b"..", 1, 4, 2)]

    def _note(self, *call: Any) -> None:
        self.calls.append(call)

    def lookup(self, parent: int, name: bytes) -> Found:
        if name.startswith(b"absent"):
            raise FileNotFoundError(2, "absent")
        self._note("lookup", parent, name)
        return Found(5, 0, ATTR)

    def forget(self, nodeid: int, count: int) -> None:
        self._note("forget", nodeid, count)

    def getattr(self, nodeid: int) -> Attr:
        return ATTR

    def setattr(self, nodeid: int, change: SetAttr, caller: Caller) -> Op[Attr]:
        self._note("setattr", nodeid, change)
        yield from ()
        return ATTR

    def readlink(self, nodeid: int) -> bytes:
        return b"target"

    def _make(self, *args: Any) -> Found:
        self._note("make", *args)
        return Found(6, 0, ATTR)

    mknod = mkdir = symlink = _make

    def rmdir(self, parent: int, name: bytes) -> None:
        self._note("remove", parent, name)

    def unlink(self, parent: int, name: bytes) -> Op[None]:
        self._note("remove", parent, name)
        yield from ()

    def link(self, nodeid: int, parent: int, name: bytes) -> Op[Found]:
        yield from ()
        return Found(nodeid, 0, ATTR)

    def _opened(self, *args: Any) -> Op[Found]:
        self._note("create", *args)
        yield from ()
        return Found(9, 0, ATTR)

    create = tmpfile = _opened

    def _nothing(self, *args: Any, late: bool = False) -> Op[None]:
        self._note("op", *args)
        yield from ()

    rename = open = flush = fsync = fsyncdir = setxattr = removexattr = fallocate = syncfs = _nothing

    def release(self, nodeid: int) -> None:
        self._note("release", nodeid)

    def opendir(self, nodeid: int) -> None:
        self._note("opendir", nodeid)

    def releasedir(self, nodeid: int) -> None:
        self._note("releasedir", nodeid)

    def eager(self, nodeid: int) -> bool:
        return True

    def listdir(self, nodeid: int, cookie: int) -> Iterator[Dirent]:
        return iter([entry for entry in self.entries if entry[3] > cookie])

    def readinto(self, nodeid: int, buffer: memoryview, offset: int) -> Op[int]:
        yield from ()
        count = min(len(buffer), 5)
        buffer[:count] = b"bytes"[:count]
        return count

    def write(self, nodeid: int, data: memoryview, offset: int) -> Op[int]:
        self._note("write", nodeid, bytes(data), offset)
        yield from ()
        return len(data)

    def write_late(self, nodeid: int, data: memoryview, offset: int) -> Op[int]:
        return self.write(nodeid, data, offset)

    def lseek(self, nodeid: int, offset: int, whence: int) -> Op[int]:
        yield from ()
        return offset & 0xFFFF

    def copy_file_range(self, source: int, at: int, target: int, target_at: int, length: int, *, late: bool) -> Op[int]:
        yield from ()
        return length

    def getxattr(self, nodeid: int, name: bytes) -> bytes:
        return b"value"

    def listxattr(self, nodeid: int, *, trusted: bool) -> list[bytes]:
        return [b"user.a", b"user.b"]

    def known(self) -> int:
        return 1

    def holdings(self) -> Holdings:
        return Holdings(1, 0, 64, fd_hits=0, fd_misses=0, fd_evictions=0, lists=0, names=0, lists_read=0)

    def birth_time(self, nodeid: int) -> int | None:
        return 70

    def ioctl(self, nodeid: int, command: int, data: bytes) -> Op[bytes]:
        self._note("ioctl", nodeid, command, data)
        yield from ()
        return b"flag"

    def statfs(self, nodeid: int) -> os.statvfs_result:
        return os.statvfs_result((4096, 512, 1000, 900, 800, 70, 60, 50, 0, 255))
