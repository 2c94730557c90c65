"""File data: every way to open, read and write, through descriptors and mappings, over copy-up and removal."""

from __future__ import annotations

import fcntl
import mmap
import os
import sqlite3
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import WRITETHROUGH, Layers, MountFactory, in_child, run
from tests.trees import errno_of

MORE_MODES = (WRITETHROUGH,)

WHERE = ("lower", "upper")


@pytest.fixture
def file_in(layers: Layers, mounted: MountFactory) -> Callable[[str, bytes], Path]:
    """Mount with a file `x` in the lower, or new; its path in the mount."""

    def make(where: str, data: bytes) -> Path:
        if where == "lower":
            (layers.lower / "x").write_bytes(data)
        path = mounted() / "x"
        if where == "upper":
            path.write_bytes(data)
        return path

    return make


FileIn = Callable[[str, bytes], Path]


@pytest.mark.parametrize("where", WHERE)
def test_flags_of_open(where: str, file_in: FileIn) -> None:
    path = file_in(where, b"old data")
    (path.parent / "link").symlink_to("x")
    assert errno_of(os.open, path, os.O_CREAT | os.O_EXCL) == "EEXIST"
    assert errno_of(os.open, path, os.O_DIRECTORY) == "ENOTDIR"
    assert errno_of(os.open, path.parent / "link", os.O_NOFOLLOW) == "ELOOP"
    assert errno_of(os.open, path.parent, os.O_WRONLY) == "EISDIR"
    assert errno_of(os.open, path.parent / "absent", os.O_RDWR) == "ENOENT"
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_CREAT, os.O_RDONLY | os.O_SYNC, os.O_RDONLY | os.O_NOATIME):
        fd = os.open(path, flags)
        assert os.read(fd, 100) == b"old data"
        os.close(fd)
    fd = os.open(path, os.O_WRONLY)
    assert errno_of(os.read, fd, 1) == "EBADF"
    os.close(fd)
    fd = os.open(path, os.O_RDONLY)
    assert errno_of(os.write, fd, b"x") == "EBADF"
    os.close(fd)


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR])
@pytest.mark.parametrize("where", WHERE)
def test_opening_truncated_empties_the_file(where: str, flags: int, file_in: FileIn) -> None:
    path = file_in(where, b"old data")
    reader = os.open(path, os.O_RDONLY)
    fd = os.open(path, flags | os.O_TRUNC)
    assert os.fstat(fd).st_size == os.stat(path).st_size == os.fstat(reader).st_size == 0
    assert os.read(reader, 10) == b""
    if flags != os.O_RDONLY:
        os.write(fd, b"new")
        assert os.pread(reader, 10, 0) == b"new"
    os.close(fd)
    os.close(reader)
    assert path.read_bytes() == (b"" if flags == os.O_RDONLY else b"new")


@pytest.mark.parametrize("where", WHERE)
def test_appends_of_two_writers_all_arrive(where: str, file_in: FileIn) -> None:
    path = file_in(where, b"0\n")
    first, second = (os.open(path, os.O_WRONLY | os.O_APPEND) for _ in range(2))
    for number in range(1, 100):
        os.lseek(first, 0, os.SEEK_SET)
        os.write(first if number % 2 else second, b"%d\n" % number)
    os.close(first)
    os.close(second)
    assert path.read_bytes() == b"".join(b"%d\n" % number for number in range(100))


@pytest.mark.parametrize("where", WHERE)
def test_what_one_descriptor_writes_another_reads(where: str, file_in: FileIn) -> None:
    path = file_in(where, bytes(100_000))
    with path.open("r+b", buffering=0) as one, path.open("r+b", buffering=0) as two:
        for offset in (0, 4095, 50_000, 99_999, 200_000):
            os.pwrite(one.fileno(), b"hello", offset)
            assert os.pread(two.fileno(), 5, offset) == b"hello"
            assert os.fstat(two.fileno()).st_size == max(100_000, offset + 5)


@pytest.mark.deviates
def test_a_file_open_for_reading_sees_what_is_written_after_copy_up(layers: Layers, mounted: MountFactory) -> None:
    """Kernel overlayfs keeps showing such a descriptor the lower file; one inode for life is ours."""
    (layers.lower / "x").write_bytes(b"old data" * 1000)
    mount = mounted()
    with (mount / "x").open("rb", buffering=0) as reader:
        assert reader.read(8) == b"old data"
        with (mount / "x").open("r+b", buffering=0) as writer:
            writer.write(b"NEW")
        assert os.pread(reader.fileno(), 8, 0) == b"NEW data"
        os.truncate(mount / "x", 5)
        assert os.fstat(reader.fileno()).st_size == 5
        assert os.pread(reader.fileno(), 100, 0) == b"NEW d"


@pytest.mark.deviates
def test_a_mapping_made_before_copy_up_sees_what_is_written(layers: Layers, mounted: MountFactory) -> None:
    (layers.lower / "x").write_bytes(b"old data" * 1000)
    path = mounted() / "x"

    def mapped() -> tuple[bytes, bytes]:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
            before = view[4096:4104]
            with path.open("r+b", buffering=0) as writer:
                os.pwrite(writer.fileno(), b"NEW", 4096)
            return before, view[4096:4104]

    assert in_child(mapped) == (b"old data", b"NEW data")


@pytest.mark.parametrize("where", WHERE)
def test_shared_mappings_write_to_the_file(where: str, file_in: FileIn) -> None:
    path = file_in(where, b"old data" * 2000)

    def through_mapping() -> bytes:
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            view[0:3] = b"NEW"
            view[9000:9004] = b"PAGE"
            os.pwrite(file.fileno(), b"write", 100)
            seen = view[100:105]
            view.flush()
            return seen

    assert in_child(through_mapping) == b"write"
    expected = bytearray(b"old data" * 2000)
    expected[0:3], expected[9000:9004], expected[100:105] = b"NEW", b"PAGE", b"write"
    assert path.read_bytes() == expected
    assert in_child(path.read_bytes) == expected


@pytest.mark.parametrize("where", WHERE)
def test_two_processes_share_a_mapping(where: str, file_in: FileIn) -> None:
    path = file_in(where, bytes(8192))

    def parent() -> bytes:
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:

            def child() -> None:
                with path.open("r+b") as again, mmap.mmap(again.fileno(), 0) as other:
                    other[5000:5005] = b"child"

            in_child(child)
            return view[5000:5005]

    assert in_child(parent) == b"child"


@pytest.mark.parametrize("where", WHERE)
def test_private_mappings_change_nothing(where: str, file_in: FileIn) -> None:
    path = file_in(where, b"old data")

    def private() -> bytes:
        with path.open("rb") as file:
            view = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            view[0:3] = b"NEW"
            return view[:]

    assert in_child(private) == b"NEW data"
    assert path.read_bytes() == b"old data"


# Unlinked, still open.


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
@pytest.mark.parametrize("where", WHERE)
def test_an_unlinked_file_lives_while_it_is_open(where: str, flags: int, file_in: FileIn) -> None:
    path = file_in(where, b"old data" * 10_000)
    fd = os.open(path, flags)
    path.unlink()
    try:
        assert os.fstat(fd).st_size == 80_000
        assert os.pread(fd, 8, 40_000) == b"old data"
        if flags == os.O_RDWR:
            os.pwrite(fd, b"NEW", 40_000)
            assert os.pread(fd, 8, 40_000) == b"NEW data"
            os.ftruncate(fd, 100_000)
            assert os.fstat(fd).st_size == 100_000
            os.fsync(fd)
    finally:
        os.close(fd)
    assert os.listdir(path.parent) == []


@pytest.mark.deviates
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR])
@pytest.mark.parametrize("where", WHERE)
def test_an_unlinked_open_file_has_no_links(where: str, flags: int, file_in: FileIn) -> None:
    """Kernel overlayfs says 1 of a lower file, which indeed still has its name there."""
    path = file_in(where, b"data")
    with os.fdopen(os.open(path, flags)) as unlinked, os.fdopen(os.open(path, flags)) as replaced:
        path.with_name("y").touch()
        os.rename(path.with_name("y"), path)
        assert os.fstat(replaced.fileno()).st_nlink == os.fstat(unlinked.fileno()).st_nlink == 0
    with os.fdopen(os.open(path, flags)) as unlinked:
        path.unlink()
        assert os.fstat(unlinked.fileno()).st_nlink == 0


def test_an_unlinked_file_lives_after_copy_up_too(layers: Layers, mounted: MountFactory) -> None:
    (layers.lower / "x").write_bytes(b"old data")
    path = mounted() / "x"
    reader, writer = os.open(path, os.O_RDONLY), os.open(path, os.O_RDWR)
    try:
        os.pwrite(writer, b"NEW", 0)
        path.unlink()
        assert os.fstat(writer).st_nlink == os.fstat(reader).st_nlink == 0
        os.pwrite(writer, b"DATA", 4)
        assert os.pread(writer, 100, 0) == b"NEW DATA"
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("where", WHERE)
def test_a_file_made_anew_is_not_the_unlinked_one(where: str, file_in: FileIn) -> None:
    path = file_in(where, b"old data")
    fd = os.open(path, os.O_RDWR)
    try:
        path.unlink()
        path.write_bytes(b"another")
        assert os.fstat(fd).st_ino != os.stat(path).st_ino
        os.pwrite(fd, b"OLD", 0)
        assert path.read_bytes() == b"another"
        assert os.pread(fd, 100, 0) == b"OLD data"
    finally:
        os.close(fd)


@pytest.mark.owners
def test_the_attributes_of_an_unlinked_file_can_be_changed(file_in: FileIn) -> None:
    path = file_in("upper", b"data")
    fd = os.open(path, os.O_RDWR)
    try:
        path.unlink()
        os.fchmod(fd, 0o600)
        os.fchown(fd, 3, 4)
        os.utime(fd, ns=(5, 6))
        st = os.fstat(fd)
        assert (stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid, st.st_mtime_ns) == (0o600, 3, 4, 6)
    finally:
        os.close(fd)


def test_one_of_two_links_unlinked_leaves_the_other(file_in: FileIn) -> None:
    path = file_in("lower", b"data")
    os.link(path, path.with_name("y"))
    fd = os.open(path, os.O_RDWR)
    try:
        path.unlink()
        assert os.fstat(fd).st_nlink == 1
        os.pwrite(fd, b"DATA", 0)
    finally:
        os.close(fd)
    assert path.with_name("y").read_bytes() == b"DATA"


# Syncing, holes, offsets.


@pytest.mark.parametrize("where", WHERE)
def test_syncing_succeeds_on_every_descriptor(where: str, file_in: FileIn) -> None:
    path = file_in(where, b"data")
    for flags in (os.O_RDONLY, os.O_RDWR):
        fd = os.open(path, flags)
        if flags == os.O_RDWR:
            os.write(fd, b"DATA")
        os.fsync(fd)
        os.fdatasync(fd)
        os.close(fd)
    fd = os.open(path.parent, os.O_RDONLY)
    os.fsync(fd)
    os.fdatasync(fd)
    os.close(fd)
    run("sync", "-f", path)


@pytest.mark.parametrize("where", WHERE)
def test_offsets_past_four_gigabytes(where: str, file_in: FileIn, layers: Layers) -> None:
    path = file_in(where, b"start")
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"end", 5 << 30)
        assert os.pread(file.fileno(), 8, (5 << 30) - 5) == b"\0\0\0\0\0end"
    st = os.stat(path)
    assert st.st_size == (5 << 30) + 3
    assert st.st_blocks < 1000
    assert os.stat(layers.upper / "x").st_blocks < 1000


def test_writing_past_the_end_leaves_zeros(file_in: FileIn) -> None:
    path = file_in("lower", b"x" * 100)
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"y", 10_000)
    assert path.read_bytes() == b"x" * 100 + bytes(9900) + b"y"


def test_reads_at_and_past_the_end(file_in: FileIn) -> None:
    path = file_in("lower", b"x" * 5000)
    with path.open("rb", buffering=0) as file:
        assert os.pread(file.fileno(), 100, 4990) == b"x" * 10
        assert os.pread(file.fileno(), 100, 5000) == b""
        assert os.pread(file.fileno(), 100, 1 << 40) == b""


# Programs.


def test_programs_run_from_the_mount(layers: Layers, mounted: MountFactory) -> None:
    run("cp", "/bin/true", layers.lower / "true")
    mount = mounted()
    run(mount / "true")
    run("cp", "/bin/true", mount / "new")
    run(mount / "new")
    os.chmod(mount / "true", 0o644)
    assert errno_of(run, mount / "true") == "EACCES"


def test_locks_are_seen_by_other_processes(file_in: FileIn) -> None:
    path = file_in("lower", b"data")
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        fcntl.lockf(file, fcntl.LOCK_EX)

        def attempt() -> tuple[str, str]:
            with path.open("r+b") as other:
                flags = fcntl.LOCK_EX | fcntl.LOCK_NB
                return errno_of(fcntl.flock, other, flags), errno_of(fcntl.lockf, other, flags)

        assert in_child(attempt) == ("EAGAIN", "EAGAIN")
    assert in_child(attempt) == ("ok", "ok")


def test_a_database_in_a_lower_is_updated_in_place(layers: Layers, plain: Path, mounted: MountFactory) -> None:
    """SQLite rewrites pages here and there, truncates, deletes its journal and syncs: what corrupted under others."""
    for directory in (layers.lower, plain):
        with sqlite3.connect(directory / "db") as database:
            database.execute("create table t (id integer primary key, text)")
            database.executemany("insert into t values (?, ?)", ((n, f"row {n} " * 20) for n in range(5000)))
        database.close()
    mount = mounted()
    for directory in (mount.path, plain):
        database = sqlite3.connect(directory / "db")
        database.execute("select sum(length(text)) from t").fetchone()
        for step in range(10):
            with database:
                database.execute("update t set text = ? where id % 10 = ?", (f"step {step} " * 40, step))
                database.execute("delete from t where id % 17 = ?", (step,))
        database.execute("vacuum")
        database.close()
    mount.remount()
    found = []
    for directory in (mount.path, plain):
        database = sqlite3.connect(directory / "db")
        assert database.execute("pragma integrity_check").fetchall() == [("ok",)]
        found.append(database.execute("select * from t").fetchall())
        database.close()
    assert found[0] == found[1]
    assert os.listdir(mount.path) == ["db"]


def test_the_time_of_a_change_is_when_it_was_written_however_late_it_arrives(
    layers: Layers, mounted: MountFactory
) -> None:
    mount = mounted()
    with (mount / "new").open("wb", buffering=0) as new:
        new.write(bytes(4 << 20))
        time.sleep(0.02)
        written = os.fstat(new.fileno()).st_mtime_ns
        os.fsync(new.fileno())
        assert (layers.upper / "new").stat().st_mtime_ns == written
    assert (mount / "new").stat().st_mtime_ns == written
    mount.remount()
    assert (mount / "new").stat().st_mtime_ns == written


@pytest.mark.privileged
def test_an_append_only_file_grows_and_does_not_change(layers: Layers, mounted: MountFactory) -> None:
    path = layers.upper / "log"
    path.write_bytes(b"line\n" * 400)
    os.setxattr(path, "trusted.overlay.protattr", b"a")
    mount = mounted()
    for _ in range(2):
        with (mount / "log").open("ab", buffering=0) as log:
            log.write(b"more\n")
            os.fsync(log.fileno())
    assert (mount / "log").read_bytes() == b"line\n" * 400 + b"more\n" * 2

    def overwrite() -> None:
        with (mount / "log").open("r+b", buffering=0) as log:
            log.write(b"X")
            os.fsync(log.fileno())

    assert errno_of(overwrite) == "EPERM"
    mount.remount()
    assert (mount / "log").read_bytes() == b"line\n" * 400 + b"more\n" * 2
