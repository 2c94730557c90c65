"""A block device that remembers in which order it was written: a file system of one file, for a loop device to lie on.

Everything is served by a process of its own (`python -m tests.power.recorder`), one request after the other: what is
in its log in front of a flush had been answered before the flush was asked for, so a disk would have to keep it.
Writes after the last flush may be lost, each by itself. Into `mark` a test writes what it has done so far, which comes
into the same log.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

from tests.harness import PROJECT, run, wait_for
from unionfsd import syscalls
from unionfsd.fuse import wire
from unionfsd.fuse.abi import FOPEN_DIRECT_IO, FUSE_ROOT_ID, InitFlag, Opcode

DISK: Final = b"disk"
MARK: Final = b"mark"
_NODES: Final = {DISK: 2, MARK: 3}

_RECORD: Final = struct.Struct("=cQI")
"""kind, offset in bytes, bytes that follow"""
WRITE: Final = b"w"
FLUSH: Final = b"f"
NOTE: Final = b"n"

_MAX_WRITE: Final = 1 << 20
_LONG: Final = 10**6
_FLAGS: Final = InitFlag.ASYNC_READ | InitFlag.BIG_WRITES | InitFlag.MAX_PAGES | InitFlag.INIT_EXT


class Record(NamedTuple):
    """One thing that happened: a WRITE of `data` at byte `offset`, a FLUSH, or a NOTE, whose text is `data`."""

    kind: bytes
    offset: int
    data: bytes


class Disk:
    """The content, in memory, and the log of what happened to it."""

    def __init__(self, image: str, log: BinaryIO) -> None:
        with open(image, "rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            self.content = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_COPY)
        self._log = log

    def write(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data
        self.record(WRITE, offset, data)

    def record(self, kind: bytes, offset: int = 0, data: bytes = b"") -> None:
        self._log.write(_RECORD.pack(kind, offset, len(data)))
        self._log.write(data)
        if kind != WRITE:
            self._log.flush()


class Server:
    """The file system's side of /dev/fuse."""

    def __init__(self, fd: int, disk: Disk) -> None:
        self._fd = fd
        self._disk = disk
        self._handlers = {
            Opcode.INIT: self._init,
            Opcode.LOOKUP: self._lookup,
            Opcode.GETATTR: self._getattr,
            Opcode.SETATTR: self._getattr,
            Opcode.OPEN: self._open,
            Opcode.READ: self._read,
            Opcode.WRITE: self._write,
            Opcode.FSYNC: self._fsync,
            Opcode.FLUSH: self._nothing,
            Opcode.RELEASE: self._nothing,
            Opcode.STATFS: self._statfs,
        }

    def serve(self) -> None:
        buffer = bytearray(_MAX_WRITE + 4096)
        while True:
            try:
                received = os.readv(self._fd, [buffer])
            except OSError as exc:
                if exc.errno == errno.ENODEV:
                    return
                if exc.errno in (errno.EINTR, errno.ENOENT):
                    continue
                raise
            header = wire.IN_HEADER.unpack_from(buffer)
            if header[1] not in (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT):
                self._answer(header[1], header[2], header[3], bytes(buffer[:received]))

    def _answer(self, opcode: int, unique: int, nodeid: int, request: bytes) -> None:
        handler = self._handlers.get(Opcode(opcode))
        reply = errno.ENOSYS if handler is None else handler(nodeid, request)
        if isinstance(reply, int):
            os.writev(self._fd, [wire.error(unique, reply)])
        else:
            os.writev(self._fd, [wire.OUT_HEADER.pack(wire.OUT_HEADER.size + len(reply), 0, unique), reply])

    def _init(self, nodeid: int, request: bytes) -> bytes:
        offer = wire.init(request, len(request))
        flags = offer.flags & _FLAGS
        pages = _MAX_WRITE // mmap.PAGESIZE
        return wire.INIT_OUT.pack(
            7, 38, offer.max_readahead, flags & 0xFFFFFFFF, 16, 12, _MAX_WRITE, 1, pages, 0, flags >> 32, 0, 0
        )

    def _attr(self, nodeid: int) -> wire.Attr:
        mode = stat.S_IFDIR | 0o700 if nodeid == FUSE_ROOT_ID else stat.S_IFREG | 0o600
        size = self._disk.size if nodeid == _NODES[DISK] else 0
        return (nodeid, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)

    def _lookup(self, nodeid: int, request: bytes) -> bytes | int:
        found = _NODES.get(wire.name(request, wire.BODY, len(request)))
        if found is None:
            return errno.ENOENT
        return wire.ENTRY_OUT.pack(found, 0, _LONG, _LONG, 0, 0, *self._attr(found))

    def _getattr(self, nodeid: int, request: bytes) -> bytes:
        return wire.ATTR_OUT.pack(_LONG, 0, *self._attr(nodeid))

    def _open(self, nodeid: int, request: bytes) -> bytes:
        return wire.OPEN_OUT.pack(0, FOPEN_DIRECT_IO if nodeid == _NODES[MARK] else 0, 0)

    def _read(self, nodeid: int, request: bytes) -> memoryview:
        _, offset, size, *_ = wire.READ_IN.unpack_from(request, wire.BODY)
        return memoryview(self._disk.content)[offset : offset + size]

    def _write(self, nodeid: int, request: bytes) -> bytes:
        _, offset, size, *_ = wire.WRITE_IN.unpack_from(request, wire.BODY)
        data = request[wire.BODY + wire.WRITE_IN.size :][:size]
        if nodeid == _NODES[MARK]:
            self._disk.record(NOTE, 0, data)
        else:
            self._disk.write(offset, data)
        return wire.WRITE_OUT.pack(size)

    def _fsync(self, nodeid: int, request: bytes) -> bytes:
        self._disk.record(FLUSH)
        return b""

    def _nothing(self, nodeid: int, request: bytes) -> bytes:
        return b""

    def _statfs(self, nodeid: int, request: bytes) -> bytes:
        return wire.STATFS_OUT.pack(1, 0, 0, 3, 0, 4096, 255, 4096)


def main(mountpoint: str, image: str, log: str) -> None:
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    with open(log, "wb") as file:
        disk = Disk(image, file)
        syscalls.mount("recorder", mountpoint, "fuse", 0, f"fd={fd},rootmode=40000,user_id=0,group_id=0")
        Server(fd, disk).serve()


def read_log(path: Path) -> list[Record]:
    """What was recorded, in order."""
    raw = path.read_bytes()
    records = []
    at = 0
    while at < len(raw):
        kind, offset, size = _RECORD.unpack_from(raw, at)
        at += _RECORD.size
        records.append(Record(kind, offset, raw[at : at + size]))
        at += size
    return records


class Recording:
    """A device that is recorded: `disk`, a file to put a loop device on, and its log."""

    def __init__(self, mountpoint: Path, log: Path) -> None:
        self.disk = mountpoint / os.fsdecode(DISK)
        self.log = log
        self._mark = os.open(mountpoint / os.fsdecode(MARK), os.O_WRONLY | os.O_CLOEXEC)

    def note(self, text: str) -> None:
        """Put `text` in the log: what happens from now on comes after it."""
        os.write(self._mark, text.encode())

    def close(self) -> None:
        os.close(self._mark)


@contextlib.contextmanager
def recording(root: Path, image: Path) -> Iterator[Recording]:
    """Serve `image`, which stays as it is, below the directory `root`; complete in the log afterwards."""
    mountpoint, log = root / "recorder", root / "log"
    mountpoint.mkdir()
    command = [sys.executable, "-m", "tests.power.recorder", str(mountpoint), str(image), str(log)]
    process: subprocess.Popen[Any] = subprocess.Popen(command, cwd=PROJECT)
    try:
        wait_for(lambda: os.path.ismount(mountpoint) or process.poll() is not None, "no recorder")
        recorder = Recording(mountpoint, log)
        try:
            yield recorder
        finally:
            recorder.close()
            run("umount", "--lazy", mountpoint)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
