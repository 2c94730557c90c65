"""What only the kernel channel does: messages never sent, the backing device, what goes on during a copy-up."""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import mmap
import os
import re
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Daemon, Layers, in_child, run, wait_for
from tests.trees import errno_of

CHANNEL = ["transport=channel", "io=cached"]


@pytest.fixture
def traced(layers: Layers) -> Iterator[Daemon]:
    """A mount whose log says which messages came."""
    (layers.lower / "d").mkdir()
    (layers.lower / "d/file").write_bytes(b"content")
    with Daemon(layers, [*CHANNEL, "debug"]) as daemon:
        yield daemon


def messages(daemon: Daemon) -> Counter[str]:
    """How often each kind of message came so far."""
    return Counter(re.findall(r"#\d+ ([A-Z0-9_]+) node", daemon.log.read_text()))


def test_opening_again_sends_no_message(traced: Daemon) -> None:
    path = traced / "d/file"
    _read(path)
    before = messages(traced)
    for _ in range(20):
        assert _read(path) == b"content"
        os.close(os.open(path, os.O_RDWR))
    assert messages(traced) == before


def _read(path: Path) -> bytes:
    # Not open(), which asks whether the file is a terminal: an ioctl, and a message.
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 100)
    finally:
        os.close(fd)


def test_nothing_is_opened_twice(traced: Daemon) -> None:
    for name in ("one", "two", "three"):
        (traced / "d" / name).write_bytes(b"new")
        assert (traced / "d" / name).read_bytes() == b"new"
        assert name in os.listdir(traced / "d")
    seen = messages(traced)
    assert seen["CREATE"] == 3
    assert max(seen["OPEN"], seen["OPENDIR"], seen["FLUSH"]) == 1
    assert seen["RELEASEDIR"] == 0


def test_listing_again_sends_no_message_until_something_changes(traced: Daemon) -> None:
    assert os.listdir(traced / "d") == ["file"]
    os.listdir(traced / "d")
    before = messages(traced)
    for _ in range(5):
        assert os.listdir(traced / "d") == ["file"]
    assert messages(traced) == before
    (traced / "d/more").touch()
    assert sorted(os.listdir(traced / "d")) == ["file", "more"]


def test_an_absent_name_is_asked_for_once(traced: Daemon) -> None:
    assert not (traced / "absent").exists()
    before = messages(traced)
    assert not any((traced / "absent").exists() for _ in range(10))
    assert messages(traced) == before
    (traced / "absent").write_bytes(b"present")
    assert (traced / "absent").read_bytes() == b"present"


def test_writing_asks_for_no_extended_attribute(traced: Daemon) -> None:
    """Without HANDLE_KILLPRIV_V2 the kernel asks for security.capability before each write."""
    with (traced / "log").open("wb", buffering=0) as log:
        for _ in range(50):
            log.write(b"a line\n")
            os.fdatasync(log.fileno())
    seen = messages(traced)
    assert seen["WRITE"] == 50
    assert seen["GETXATTR"] <= 1


def test_small_writes_are_gathered_and_there_when_the_file_is_closed(traced: Daemon) -> None:
    with (traced / "log").open("wb", buffering=0) as log:
        for _ in range(50):
            log.write(b"a line\n")
    assert messages(traced)["WRITE"] == 1
    assert (traced.layers.upper / "log").read_bytes() == b"a line\n" * 50


def test_the_time_of_a_change_through_a_mapping_is_when_it_was_made(traced: Daemon) -> None:
    with (traced / "d/file").open("r+b", buffering=0) as file, mmap.mmap(file.fileno(), 0) as view:
        view[0:1] = b"x"
        written = os.fstat(file.fileno()).st_mtime_ns
        time.sleep(0.02)
    traced.remount()
    assert (traced / "d/file").stat().st_mtime_ns == written


def test_emptying_what_is_empty_is_a_change(traced: Daemon) -> None:
    stamp = traced / "d/stamp"
    stamp.touch()
    os.utime(stamp, ns=(1, 1))
    os.close(os.open(stamp, os.O_WRONLY | os.O_TRUNC))
    wait_for(lambda: stamp.stat().st_mtime_ns > 1, "the time is the old one", seconds=5)


def test_what_is_still_kept_by_the_kernel_is_no_hole(traced: Daemon) -> None:
    with (traced / "new").open("wb", buffering=0) as new:
        new.write(b"data")
        assert os.lseek(new.fileno(), 0, os.SEEK_DATA) == 0
        assert os.lseek(new.fileno(), 0, os.SEEK_HOLE) == 4


@pytest.mark.privileged
def test_readahead_is_wide(traced: Daemon) -> None:
    device = os.stat(traced.path).st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    assert setting.read_text() == "512\n"


def test_the_kernel_is_asked_to_forget_when_very_much_is_known(
    layers: Layers, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FUSE_NOTIFY_PRUNE, here from 1,000 nodes on. What is in use stays known, and all is there as before."""
    for number in range(3000):
        (layers.lower / f"file{number}").touch()
    monkeypatch.setattr(sys, "executable", str(_with_bound(disk, 1000)))
    with Daemon(layers, [*CHANNEL, "debug"]) as daemon:
        with (daemon / "file7").open() as used:
            for number in range(3000):
                os.stat(daemon / f"file{number}")
            asked = itertools.count()
            # It looks once a second, and only when there is something to do.
            wait_for(lambda: not (daemon / f"absent{next(asked)}").exists() and _forgotten(daemon) > 2000, "kept")
            assert os.fstat(used.fileno()).st_size == 0
        assert len(os.listdir(daemon.path)) == 3000


def _forgotten(daemon: Daemon) -> int:
    """How many nodes the kernel gave up when it was asked to."""
    said = re.search(r"(\d+) of \d+ nodes were forgotten", daemon.log.read_text())
    return int(said[1]) if said else 0


def _with_bound(disk: Path, nodes: int) -> Path:
    """An interpreter that runs the daemon with a smaller bound on what it knows."""
    script = disk / "python"
    code = (
        f"import sys; from unionfsd.fuse import pressure; pressure.MOST_NODES = {nodes};"
        " from unionfsd.cli import main; sys.exit(main(sys.argv[3:]))"
    )
    script.write_text(f"#!/bin/sh\nexec '{sys.executable}' -c '{code}' \"$@\"\n")
    script.chmod(0o755)
    return script


def test_stats_go_on_while_a_file_is_copied_up(layers: Layers) -> None:
    """None waits for the copy, and deferred requests of others are served too."""
    with (layers.lower / "big").open("wb") as big:
        for _ in range(256):
            big.write(os.urandom(1 << 20))
    for number in range(2000):
        (layers.lower / f"small{number}").touch()
    with Daemon(layers, CHANNEL) as daemon:
        waits: list[float] = []
        done = threading.Event()

        def copy_up() -> None:
            in_child(lambda: os.truncate(daemon / "big", (256 << 20) - 1))
            done.set()

        thread = threading.Thread(target=copy_up)
        thread.start()
        start = time.monotonic()
        for number in range(2000):
            if done.is_set():
                break
            before = time.monotonic()
            os.stat(daemon / f"small{number}")
            waits.append(time.monotonic() - before)
        thread.join()
        took = time.monotonic() - start
    assert len(waits) > 20
    assert max(waits) < took / 2
    assert statistics.median(waits) < 0.01


_IO_SETUP, _IO_DESTROY, _IO_GETEVENTS, _IO_SUBMIT = 206, 207, 208, 209
"""Of x86_64 (asm/unistd_64.h)."""


def test_direct_writes_are_seen_by_readers_who_fill_the_page_cache(layers: Layers) -> None:
    (layers.upper / "file").write_bytes(bytes(64 * 4096))
    with Daemon(layers, CHANNEL) as daemon:
        path = daemon / "file"
        reader = subprocess.Popen(["sh", "-c", 'while cat "$0" >/dev/null; do :; done', path])
        try:
            assert in_child(lambda: _direct_writer(path, 1000)) == []
        finally:
            reader.kill()
            reader.wait()


def _direct_writer(path: Path, rounds: int) -> list[int]:
    """Rounds after whose write, by io_submit(2) with O_DIRECT, somebody who reads sees what was there before."""
    libc = ctypes.CDLL(None, use_errno=True)
    context, size = ctypes.c_ulong(0), 64 * 4096
    assert libc.syscall(_IO_SETUP, 1, ctypes.byref(context)) == 0
    stale = []
    with mmap.mmap(-1, size) as memory:
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        for number in range(rounds):
            wanted = bytes([number % 255 + 1]) * size
            memory[:] = wanted
            # struct iocb (linux/aio_abi.h) of IOCB_CMD_PWRITE
            block = ctypes.create_string_buffer(
                struct.pack("=QIiHhIQQqQII", 0, 0, 0, 1, 0, fd, address, size, 0, 0, 0, 0)
            )
            blocks = (ctypes.c_void_p * 1)(ctypes.addressof(block))
            assert libc.syscall(_IO_SUBMIT, context, 1, blocks) == 1
            done = ctypes.create_string_buffer(32)
            assert libc.syscall(_IO_GETEVENTS, context, 1, 1, done, None) == 1
            if path.read_bytes() != wanted:
                stale.append(number)
        os.close(fd)
    libc.syscall(_IO_DESTROY, context)
    return stale


def test_a_shared_mapping_and_writes_agree_across_copy_up(layers: Layers) -> None:
    (layers.lower / "file").write_bytes(bytes(8192))
    with Daemon(layers, CHANNEL) as daemon:
        in_child(lambda: _write_both_ways(daemon / "file"))
        daemon.remount()
        data = (daemon / "file").read_bytes()
    assert (data[0:1], data[4096:4097]) == (b"W", b"M")
    assert (layers.lower / "file").read_bytes() == bytes(8192)


def _write_both_ways(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    with mmap.mmap(fd, 8192) as mapping:
        assert mapping[0] == 0
        os.pwrite(fd, b"W", 0)
        assert mapping[0:1] == b"W"
        mapping[4096:4097] = b"M"
        assert os.pread(fd, 1, 4096) == b"M"


def test_a_hole_is_found_and_punched(traced: Daemon) -> None:
    path = traced / "sparse"
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        os.pwrite(fd, b"x" * 65536, 0)
        os.pwrite(fd, b"x" * 65536, 1 << 20)
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 65536
        assert os.lseek(fd, 65536, os.SEEK_DATA) == 1 << 20
        _punch(fd, 0, 65536)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 1 << 20
        assert os.pread(fd, 65536, 0) == bytes(65536)
        os.posix_fallocate(fd, 0, 2 << 20)
        assert os.fstat(fd).st_size == 2 << 20
    finally:
        os.close(fd)


def _punch(fd: int, offset: int, length: int) -> None:
    """FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, which Python does not have."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, 3, ctypes.c_long(offset), ctypes.c_long(length)):
        raise OSError(ctypes.get_errno(), "fallocate")


@pytest.mark.parametrize("where", ["lower", "upper"])
def test_the_time_of_birth_is_known(where: str, traced: Daemon) -> None:
    path = traced / "d/file" if where == "lower" else traced / "new"
    if where == "upper":
        path.touch()
    layer = traced.layers.lower if where == "lower" else traced.layers.upper
    assert _birth(path) == _birth(layer / path.relative_to(traced.path)) > 0
    assert messages(traced)["STATX"] == 1


def _birth(path: Path) -> float:
    return float(run("stat", "-c", "%.9W", path))


def test_inode_flags_can_be_read_and_set(traced: Daemon) -> None:
    """Through FUSE's own calls for them (chattr, lsattr), from which the kernel makes ioctls."""
    path = traced / "d/file"
    assert "A" not in _flags(path)
    assert not (traced.layers.upper / "d").exists()
    run("chattr", "+A", path)
    assert "A" in _flags(path)
    assert "A" in _flags(traced.layers.upper / "d/file")
    run("chattr", "-A", path)
    assert "A" not in _flags(path)
    assert run("lsattr", "-d", traced / "d").endswith("d\n")


def _flags(path: Path) -> str:
    return run("lsattr", path).split()[0]


@pytest.mark.parametrize("option", ["io=passthrough", "writeback=off", "writeback=on"])
def test_chattr_changes_the_ctime_that_is_shown(option: str, layers: Layers) -> None:
    """Of a regular file the kernel believes its own with a writeback cache, until it has forgotten the file."""
    (layers.upper / "file").touch()
    (layers.upper / "d").mkdir()
    with Daemon(layers, ["transport=channel", option]) as daemon:
        for name in ("d",) if option == "writeback=on" else ("d", "file"):
            before = (daemon / name).stat().st_ctime_ns
            time.sleep(0.02)  # more than a tick of the clock of file times
            run("chattr", "+A", daemon / name)
            assert (daemon / name).stat().st_ctime_ns > before
            assert (daemon / name).stat().st_ctime_ns == (layers.upper / name).stat().st_ctime_ns


def test_ioctls_are_answered_as_by_the_layer(traced: Daemon) -> None:
    for name in ("d/file", "d"):
        path, below = traced / name, traced.layers.lower / name
        for command, size in ((0x80087601, 8), (0x801C581F, 28)):  # FS_IOC_GETVERSION, FS_IOC_FSGETXATTR
            assert _ioctl(path, command, bytes(size)) == _ioctl(below, command, bytes(size))
        assert errno_of(_ioctl, path, 0x80045430, bytes(4)) == "ENOTTY"  # TIOCGPTN
        assert errno_of(_ioctl, path, 0x40087602, bytes(8)) == "ENOTTY"  # FS_IOC_SETVERSION


def _ioctl(path: Path, command: int, argument: bytes) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return fcntl.ioctl(fd, command, argument)
    finally:
        os.close(fd)


def test_a_file_without_a_name_can_be_given_one(traced: Daemon) -> None:
    """O_TMPFILE, in a directory of a lower; then a link from /proc, as open(2) shows it."""
    fd = os.open(traced / "d", os.O_TMPFILE | os.O_RDWR, 0o640)
    try:
        os.write(fd, b"content")
        assert (os.fstat(fd).st_nlink, os.fstat(fd).st_size) == (0, 7)
        assert os.listdir(traced / "d") == ["file"]
        _name(fd, traced / "d/named")
        os.write(fd, b" and more")
        assert os.fstat(fd).st_nlink == 1
        assert (traced / "d/named").read_bytes() == b"content and more"
        assert os.path.samestat(os.fstat(fd), os.stat(traced / "d/named"))
    finally:
        os.close(fd)
    assert (traced.layers.upper / "d/named").read_bytes() == b"content and more"
    assert messages(traced)["TMPFILE"] == 1


def _name(fd: int, path: Path) -> None:
    # With a directory given, os.link is linkat(2), which can follow the link that /proc has.
    os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=fd, follow_symlinks=True)


def test_a_file_that_never_had_a_name_is_gone_when_it_is_closed(traced: Daemon) -> None:
    before = traced.fds()
    for _ in range(20):
        fd = os.open(traced.path, os.O_TMPFILE | os.O_RDWR | os.O_EXCL)
        os.write(fd, b"x")
        assert errno_of(_name, fd, traced / "named") == "ENOENT"
        os.close(fd)
    wait_for(lambda: traced.fds() <= before + 3, "descriptors of closed files stay open")
    assert os.listdir(traced.path) == ["d"]


def test_a_copy_within_the_mount_needs_no_data_of_the_caller(traced: Daemon) -> None:
    (traced / "source").write_bytes(b"0123456789" * 1000)
    before = messages(traced)
    source, target = os.open(traced / "source", os.O_RDONLY), os.open(traced / "target", os.O_CREAT | os.O_RDWR)
    try:
        assert os.copy_file_range(source, target, 5000, 10, 0) == 5000
        assert os.pread(target, 6000, 0) == (b"0123456789" * 1000)[10:5010]
    finally:
        os.close(source)
        os.close(target)
    seen = messages(traced) - before
    assert seen["COPY_FILE_RANGE"] + seen["COPY_FILE_RANGE_64"] == 1
    assert seen["WRITE"] == 0
