"""The content of an overwritten lower file is exactly what was written.

fuse-overlayfs 1.16 returned the old content, padded with zeros to the new length, after a lower file had been
overwritten (containers/fuse-overlayfs issue 475): the kernel's page cache and the copied-up file disagreed. Here every
way to overwrite meets every pair of sizes, with the old content cached by the kernel and not, and the result is read
through the writing descriptor, through a new one, with the page cache dropped, and over a new mount.
"""

from __future__ import annotations

import itertools
import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import WRITETHROUGH, Layers, MountFactory, in_child, run

MORE_MODES = (WRITETHROUGH,)

#: Around a page, around a request of 128 KiB, and past the largest request of 1 MiB.
SIZES = (0, 1, 4095, 4096, 4097, 131_071, 131_073, 1_048_576 + 17)


def content(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def truncated(path: Path, new: bytes, old: bytes) -> bytes:
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    _write_all(fd, new)
    os.close(fd)
    return new


def truncated_read_write(path: Path, new: bytes, old: bytes) -> bytes:
    fd = os.open(path, os.O_RDWR | os.O_TRUNC)
    _write_all(fd, new)
    assert os.pread(fd, len(new) + 1, 0) == new
    os.close(fd)
    return new


def in_place(path: Path, new: bytes, old: bytes) -> bytes:
    fd = os.open(path, os.O_WRONLY)
    _write_all(fd, new)
    os.close(fd)
    return new + old[len(new) :]


def read_and_write(path: Path, new: bytes, old: bytes) -> bytes:
    fd = os.open(path, os.O_RDWR)
    assert os.pread(fd, len(old) + 1, 0) == old
    _write_all(fd, new)
    expected = new + old[len(new) :]
    assert os.pread(fd, len(expected) + 1, 0) == expected
    os.close(fd)
    return expected


def appended(path: Path, new: bytes, old: bytes) -> bytes:
    fd = os.open(path, os.O_WRONLY | os.O_APPEND)
    _write_all(fd, new)
    os.close(fd)
    return old + new


def cut_then_written(path: Path, new: bytes, old: bytes) -> bytes:
    os.truncate(path, 0)
    fd = os.open(path, os.O_WRONLY)
    _write_all(fd, new)
    os.close(fd)
    return new


def grown(path: Path, new: bytes, old: bytes) -> bytes:
    """Extended with zeros, then the new content behind the old."""
    fd = os.open(path, os.O_WRONLY)
    os.ftruncate(fd, len(old) + len(new))
    os.lseek(fd, len(old), os.SEEK_SET)
    _write_all(fd, new)
    os.close(fd)
    return old + new


def mapped(path: Path, new: bytes, old: bytes) -> bytes:
    """Through a shared mapping of the file cut or extended to the new size."""

    def write() -> None:
        fd = os.open(path, os.O_RDWR)
        os.ftruncate(fd, len(new))
        if new:
            with mmap.mmap(fd, len(new)) as view:
                view[:] = new
        os.close(fd)

    in_child(write)
    return new


def copied_over(path: Path, new: bytes, old: bytes) -> bytes:
    source = path.parent.parent / "source"
    source.write_bytes(new)
    run("cp", source, path)
    return new


def synced(path: Path, new: bytes, old: bytes) -> bytes:
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_SYNC)
    _write_all(fd, new)
    os.fsync(fd)
    os.close(fd)
    return new


def in_small_pieces(path: Path, new: bytes, old: bytes) -> bytes:
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    for start in range(0, len(new), 30_011):
        os.write(fd, new[start : start + 30_011])
    os.close(fd)
    return new


WAYS = [
    truncated,
    truncated_read_write,
    in_place,
    read_and_write,
    appended,
    cut_then_written,
    grown,
    mapped,
    copied_over,
    synced,
    in_small_pieces,
]


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


@pytest.mark.parametrize("cached", [False, True], ids=["cold", "cached"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: str(way.__name__))
def test_content_is_what_was_written(
    way: Callable[[Path, bytes, bytes], bytes], cached: bool, layers: Layers, mounted: MountFactory
) -> None:
    cases = {f"{old}-{new}": (old, new) for old, new in itertools.product(SIZES, SIZES)}
    for name, (size, _) in cases.items():
        (layers.lower / name).write_bytes(content(size, size))
    mount = mounted()
    expected = {}
    for name, (old_size, new_size) in cases.items():
        old, new = content(old_size, old_size), content(-new_size - 1, new_size)
        if cached:
            assert (mount / name).read_bytes() == old
        expected[name] = way(mount / name, new, old)
        assert (mount / name).read_bytes() == expected[name], name
        assert os.stat(mount / name).st_size == len(expected[name])
    for name, data in expected.items():
        _drop_pages(mount / name)
        assert (mount / name).read_bytes() == data, name
    mount.remount()
    for name, data in expected.items():
        assert (mount / name).read_bytes() == data, name
        if data != content(cases[name][0], cases[name][0]):
            assert (layers.upper / name).read_bytes() == data, name


def _drop_pages(path: Path) -> None:
    """Have the kernel forget what it cached of a file, after it is written back."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def test_scattered_writes_over_a_lower_file(layers: Layers, mounted: MountFactory) -> None:
    """A thousand writes of any size anywhere, reads and cuts between them, against the same on a bytearray."""
    rnd = random.Random(20)
    model = bytearray(rnd.randbytes(3_000_000))
    (layers.lower / "x").write_bytes(model)
    mount = mounted()
    fd = os.open(mount / "x", os.O_RDWR)
    reader = os.open(mount / "x", os.O_RDONLY)
    for step in range(1000):
        offset, size = rnd.randrange(len(model) + 5000), rnd.choice((1, 100, 4096, 70_000))
        if step % 100 == 99:
            cut = rnd.randrange(2_000_000, 3_000_000)
            os.ftruncate(fd, cut)
            model[:] = model[:cut].ljust(cut, b"\0")
        elif step % 3:
            data = rnd.randbytes(size)
            os.pwrite(fd, data, offset)
            if offset > len(model):
                model.extend(bytes(offset - len(model)))
            model[offset : offset + size] = data
        else:
            assert os.pread(reader, size, offset) == model[offset : offset + size]
    os.close(reader)
    os.close(fd)
    assert (mount / "x").read_bytes() == model
    mount.remount()
    assert (mount / "x").read_bytes() == model


def test_a_reader_during_the_overwrite_sees_old_or_new_only(layers: Layers, mounted: MountFactory) -> None:
    """The file replaced by rename, as editors do it: a reader never meets a mixture."""
    old, new = b"a" * 500_000, b"b" * 600_000
    (layers.lower / "x").write_bytes(old)
    mount = mounted()
    with (mount / "x").open("rb") as reader:
        assert reader.read(1000) == old[:1000]
        (mount / "x.new").write_bytes(new)
        os.rename(mount / "x.new", mount / "x")
        assert reader.read() == old[1000:]
    assert (mount / "x").read_bytes() == new
