"""File systems in files: made, mounted over a loop device, and put in the state that a loss of power left them in."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from tests.harness import run
from tests.power.recorder import FLUSH, NOTE, WRITE, Record
from unionfsd import syscalls

#: How each is made: small, and with nothing done later in the background.
MAKERS: Final = {
    "ext4": ("mkfs.ext4", "-q", "-m", "0", "-b", "4096", "-J", "size=4", "-E", "lazy_itable_init=0,nodiscard"),
    "xfs": ("mkfs.xfs", "-q", "-K"),
}
#: The last one of the same name may linger for a moment.
_OPTIONS: Final = {"ext4": "", "xfs": "nouuid"}
_MEGABYTES: Final = {"ext4": 48, "xfs": 320}

#: linux/loop.h.
_LOOP_CTL_GET_FREE: Final = 0x4C82
_LOOP_CONFIGURE: Final = 0x4C0A
_LO_FLAGS_AUTOCLEAR: Final = 4
_CONFIG: Final = struct.Struct("=II 52x I 236x")
"""struct loop_config: fd, block_size, of its loop_info64 the flags"""

_BLOCK: Final = 4096
_MNT_DETACH: Final = 2


def make(kind: str, path: Path) -> None:
    """A new, empty file system of the `kind` in the sparse file `path`."""
    with path.open("wb") as file:
        file.truncate(_MEGABYTES[kind] << 20)
    run(*MAKERS[kind], path)
    run("fallocate", "--dig-holes", path)


@contextlib.contextmanager
def mounted(kind: str, image: Path, mountpoint: Path) -> Iterator[Path]:
    """The file system in `image` at `mountpoint`, which is made if it is not there."""
    mountpoint.mkdir(exist_ok=True)
    with _loop_device(image) as device:
        syscalls.mount(device, str(mountpoint), kind, 0, _OPTIONS[kind])
    try:
        yield mountpoint
    finally:
        _unmount(mountpoint)


def _unmount(mountpoint: Path) -> None:
    try:
        syscalls.umount2(str(mountpoint), 0)
    except OSError as exc:
        # Another process that copies the mount table at this moment makes it busy.
        if exc.errno != errno.EBUSY:
            raise
        syscalls.umount2(str(mountpoint), _MNT_DETACH)


@contextlib.contextmanager
def _loop_device(image: Path) -> Iterator[str]:
    """A device for as long as `with` lasts or it is mounted."""
    fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        device, name = _attach(fd)
    finally:
        os.close(fd)
    try:
        yield name
    finally:
        os.close(device)


def _attach(fd: int) -> tuple[int, str]:
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        while True:
            name = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            device = os.open(name, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, _CONFIG.pack(fd, 0, _LO_FLAGS_AUTOCLEAR))
                return device, name
            except OSError as exc:
                os.close(device)
                if exc.errno != errno.EBUSY:  # somebody else was faster
                    raise
    finally:
        os.close(control)


def commit(path: Path) -> None:
    """Have the file system at `path` write everything back, as it does by itself every few seconds."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        syscalls.syncfs(fd)
    finally:
        os.close(fd)


class Loss(NamedTuple):
    """When the power fails, and what of the last writes gets lost.

    `at`: so many records of the log have come to pass. Of the writes after the last flush in them the disk keeps all,
    or if it is `lossy` only some blocks; which, `seed` says. A block is kept whole, as every file system demands.
    """

    at: int
    lossy: bool
    seed: int


def flushes(records: Sequence[Record]) -> list[int]:
    """Every number of records after which the disk keeps all."""
    return [index + 1 for index, record in enumerate(records) if record.kind == FLUSH]


class Replay:
    """Disks as losses of power left them, from a log; losses are to be asked for in the order of their `at`."""

    def __init__(self, image: Path, records: Sequence[Record], scratch: Path) -> None:
        self._records = records
        self._kept = scratch / "kept"
        self._scratch = scratch
        self._done = 0
        _copy_sparse(image, self._kept)

    def disk(self, loss: Loss) -> Path:
        """A fresh image; the caller removes it."""
        last = max((i + 1 for i in range(self._done, loss.at) if self._records[i].kind == FLUSH), default=self._done)
        with self._kept.open("r+b") as file:
            for record in self._records[self._done : last]:
                _apply(file.fileno(), record)
        self._done = last
        image = self._scratch / "lost"
        _copy_sparse(self._kept, image)
        pending = [record for record in self._records[last : loss.at] if record.kind == WRITE]
        with image.open("r+b") as file:
            for record in _some(pending, loss.seed) if loss.lossy else pending:
                _apply(file.fileno(), record)
        return image

    def notes(self, at: int) -> list[str]:
        """What had been noted by then."""
        return [record.data.decode() for record in self._records[:at] if record.kind == NOTE]


def _some(pending: Sequence[Record], seed: int) -> Iterator[Record]:
    """Some of the blocks of the writes; of two writes of one block the later one counts, or the earlier one alone."""
    rng = random.Random(seed)
    share = rng.choice((0.1, 0.5, 0.9))
    blocks = [
        Record(WRITE, offset + start, data[start : start + _BLOCK])
        for _, offset, data in pending
        for start in range(0, len(data), _BLOCK)
    ]
    return (block for block in blocks if rng.random() < share)


def _apply(fd: int, record: Record) -> None:
    if record.kind == WRITE:
        os.pwrite(fd, record.data, record.offset)


def _copy_sparse(source: Path, target: Path) -> None:
    """Copy a file with its holes."""
    with source.open("rb") as old, target.open("wb") as new:
        size = os.fstat(old.fileno()).st_size
        new.truncate(size)
        end = 0
        while end < size:
            try:
                start = os.lseek(old.fileno(), end, os.SEEK_DATA)
            except OSError as exc:
                if exc.errno == errno.ENXIO:
                    break
                raise
            end = os.lseek(old.fileno(), start, os.SEEK_HOLE)
            while start < end:
                start += os.pwrite(new.fileno(), os.pread(old.fileno(), min(end - start, 1 << 20), start), start)
