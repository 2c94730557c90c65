"""io=passthrough: what the kernel does without us, that it never does it to a lower, and when it must not."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import Daemon, Layers, LogPolicy, OverlayFS, in_child, wait_for
from tests.mount.test_channel import messages
from tests.trees import compare_trees, digest

pytestmark = pytest.mark.privileged  # the kernel opens files for no other

PASSTHROUGH = ["transport=channel", "io=passthrough"]


@pytest.fixture
def traced(layers: Layers) -> Iterator[Daemon]:
    """A mount whose log says which messages came."""
    (layers.lower / "file").write_bytes(b"content" * 1000)
    with Daemon(layers, [*PASSTHROUGH, "debug"]) as daemon:
        yield daemon


def read(path: Path) -> bytes:
    """Like path.read_bytes(), which asks whether the file is a terminal."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, 1 << 20)
    finally:
        os.close(fd)


# Who reads and writes.


def test_an_upper_file_is_read_and_written_without_a_message(traced: Daemon) -> None:
    path = traced / "new"
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    os.write(fd, b"0123456789")
    assert os.pread(fd, 5, 3) == b"34567"
    os.close(fd)
    assert in_child(lambda: _through_mapping(path)) == b"0123456789"
    assert read(path) == b"M123456789"
    seen = messages(traced)
    assert (seen["READ"], seen["WRITE"]) == (0, 0)


def _through_mapping(path: Path) -> bytes:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
        before = view[:]
        view[0:1] = b"M"
        return before


def test_a_lower_file_comes_through_the_daemon_until_it_is_copied_up(traced: Daemon) -> None:
    path = traced / "file"
    assert read(path) == b"content" * 1000
    seen = messages(traced)
    assert seen["READ"] == 1
    with path.open("r+b", buffering=0) as file:
        file.write(b"CONTENT")
    with path.open("r+b", buffering=0) as file:
        file.write(b"CONTENT")
    assert read(path) == b"CONTENT" + b"content" * 999
    assert messages(traced)["READ"] == 1


def test_without_an_upper_lower_files_are_passed_through(layers: Layers) -> None:
    (layers.lower / "file").write_bytes(b"content")
    with Daemon(layers, [*PASSTHROUGH, "debug"], upper=False) as daemon:
        assert read(daemon / "file") == b"content"
        assert messages(daemon)["READ"] == 0


def test_nothing_stays_open_when_files_are_closed(traced: Daemon) -> None:
    def work() -> None:
        for number in range(50):
            path = traced / f"file{number % 5}"
            fd = os.open(path, os.O_CREAT | os.O_RDWR)
            os.write(fd, b"x")
            os.close(fd)
            os.close(os.open(path, os.O_RDONLY))
            path.unlink()

    work()
    before = traced.fds()
    work()
    wait_for(lambda: traced.fds() <= before, "descriptors of closed files stay open")


# What attributes say.


def test_sizes_and_times_are_those_of_what_was_written(traced: Daemon) -> None:
    path = traced / "new"
    fd = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        for size in (10, 5000, 5001):
            os.utime(path, ns=(1, 1))
            os.pwrite(fd, b"x", size - 1)
            st = os.fstat(fd)
            assert (st.st_size, os.stat(path).st_size) == (size, size)
            assert time.time_ns() - st.st_mtime_ns < 60e9
            assert os.lseek(fd, 0, os.SEEK_END) == size
        os.ftruncate(fd, 100)
        assert os.fstat(fd).st_size == 100
        assert os.pread(fd, 1000, 0) == bytes(9) + b"x" + bytes(90)
    finally:
        os.close(fd)


def test_a_store_to_a_mapping_moves_the_time(traced: Daemon) -> None:
    """Nobody tells the daemon of it: while the file is open so, the kernel has to ask."""
    path = traced / "new"
    path.write_bytes(bytes(8192))

    def store() -> tuple[int, int]:
        os.utime(path, ns=(1, 1))
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            before = os.stat(path).st_mtime_ns
            view[0] = 1
            return before, os.stat(path).st_mtime_ns

    before, after = in_child(store)
    assert before == 1
    assert os.stat(path).st_mtime_ns == after > 10**18
    asked = messages(traced)["GETATTR"]
    os.stat(path)
    assert messages(traced)["GETATTR"] == asked


# The lower.


def test_an_open_lower_file_that_is_copied_up_keeps_its_readers_right(traced: Daemon) -> None:
    """The kernel fails an open that is not like those that are alive: all stay cached until the last is closed."""
    path = traced / "file"
    with path.open("rb", buffering=0) as reader:
        assert reader.read(7) == b"content"
        with path.open("r+b", buffering=0) as writer:
            writer.write(b"CONTENT")
            with path.open("r+b", buffering=0) as another:
                another.seek(7)
                another.write(b"CONTENT")
        assert os.pread(reader.fileno(), 21, 0) == b"CONTENTCONTENTcontent"
        assert read(path)[:21] == b"CONTENTCONTENTcontent"
    assert read(path)[:21] == b"CONTENTCONTENTcontent"


def test_a_mapping_of_a_lower_file_counts_as_open(traced: Daemon) -> None:
    path = traced / "file"

    def mapped() -> bytes:
        fd = os.open(path, os.O_RDONLY)
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as view:
            os.close(fd)
            assert view[0:7] == b"content"
            with path.open("r+b", buffering=0) as writer:
                writer.write(b"CONTENT")
            return view[0:7]

    assert in_child(mapped) == b"CONTENT"
    assert read(path)[:14] == b"CONTENTcontent"


class Mix:
    """Opens of every kind, kept open side by side, over a few files; the same calls on two trees see the same."""

    def __init__(self, root: Path, seed: int) -> None:
        self._root = root
        self._random = random.Random(seed)
        self._fds: list[tuple[int, int]] = []
        self._maps: list[mmap.mmap] = []
        self.seen: list[object] = []

    def run(self, steps: int) -> list[object]:
        """What each call gave."""
        actions: list[Callable[[Path], object]] = [
            self._open, self._open, self._open, self._read, self._read, self._write, self._write, self._map,
            self._store, self._truncate, self._close, self._close, self._unmap, self._replace, self._stat,
        ]  # fmt: skip
        for _ in range(steps):
            action = self._random.choice(actions)
            path = self._root / f"file{self._random.randrange(4)}"
            try:
                self.seen.append((action.__name__, path.name, action(path)))
            except OSError as exc:
                self.seen.append((action.__name__, path.name, exc.errno))
        while self._fds:
            os.close(self._fds.pop()[0])
        while self._maps:
            self._maps.pop().close()
        return self.seen

    def _open(self, path: Path) -> None:
        flags = self._random.choice([os.O_RDONLY, os.O_RDONLY, os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_TRUNC])
        append = self._random.choice([0, 0, os.O_APPEND])
        self._fds.append((os.open(path, flags | append), flags))

    def _read(self, path: Path) -> bytes | str:
        offset = self._random.randrange(20_000)
        return os.pread(self._one(), 5000, offset) if self._fds else path.read_bytes().hex()

    def _write(self, path: Path) -> int | None:
        data, offset = self._random.randbytes(self._random.choice([1, 100, 5000])), self._random.randrange(20_000)
        return os.pwrite(self._one(), data, offset) if self._fds else None

    def _map(self, path: Path) -> None:
        self._random.random()
        if self._fds:
            fd, flags = self._fds[self._random.randrange(len(self._fds))]
            access = mmap.PROT_READ | (mmap.PROT_WRITE if flags & os.O_RDWR else 0)
            with contextlib.suppress(ValueError):  # an empty file
                self._maps.append(mmap.mmap(fd, 0, prot=access))

    def _store(self, path: Path) -> bytes | None:
        """Store to a mapping, where that is allowed and still within the file."""
        at = self._random.randrange(4096)
        if not self._maps:
            return None
        view = self._maps[self._random.randrange(len(self._maps))]
        if at >= len(view) or view.size() < len(view):
            return None
        with contextlib.suppress(TypeError):
            view[at] = 77
        return view[at : at + 10]

    def _truncate(self, path: Path) -> None:
        # Never shorter than what is mapped: a touch of it would be SIGBUS.
        os.truncate(path, max(self._random.randrange(30_000), path.stat().st_size))

    def _close(self, path: Path) -> None:
        which = self._random.random()
        if self._fds:
            os.close(self._fds.pop(int(which * len(self._fds)))[0])

    def _unmap(self, path: Path) -> None:
        which = self._random.random()
        if self._maps:
            self._maps.pop(int(which * len(self._maps))).close()

    def _replace(self, path: Path) -> None:
        self._random.random()
        os.rename(path, path.with_suffix(".old"))
        path.write_bytes(b"replaced" * 500)

    def _stat(self, path: Path) -> tuple[int, int]:
        st = path.stat()
        return st.st_size, st.st_nlink

    def _one(self) -> int:
        return self._fds[self._random.randrange(len(self._fds))][0]


@pytest.mark.parametrize("seed", range(6))
def test_no_mix_of_opens_changes_a_lower_or_what_is_seen(seed: int, layers: Layers, plain: Path) -> None:
    content = random.Random(seed).randbytes(15_000)
    for number in range(4):
        for root in (layers.lower, plain):
            (root / f"file{number}").write_bytes(content)
    before = {path.name: digest(path) for path in layers.lower.iterdir()}
    with Daemon(layers, PASSTHROUGH) as daemon:
        expected = in_child(lambda: Mix(plain, seed).run(300))
        assert in_child(lambda: Mix(daemon.path, seed).run(300)) == expected
        assert _but_times(compare_trees(daemon.path, plain)) == []
        assert {path.name: digest(path) for path in layers.lower.iterdir()} == before
        daemon.remount()
        assert _but_times(compare_trees(daemon.path, plain)) == []
    assert {path.name: digest(path) for path in layers.lower.iterdir()} == before


def _but_times(differences: list[str]) -> list[str]:
    return [line for line in differences if "mtime_ns" not in line]


# Where it cannot be.


def test_over_a_stacked_file_system_files_are_cached(disk: Path, layers: Layers, log_policy: LogPolicy) -> None:
    """The kernel refuses to pass through to overlayfs (ELOOP): one warning, and opens are no longer sent."""
    (disk / "below").mkdir()
    below = Layers(disk / "below")
    (below.lower / "file").write_bytes(b"content")
    (below.lower / "other").write_bytes(b"content")
    log_policy.expect("io=passthrough is not possible: a layer lies on a stacked file system")
    with OverlayFS(below) as overlay:
        stacked = Layers(disk, lowers=[overlay.path])
        with Daemon(stacked, [*PASSTHROUGH, "debug"], upper=False, log_policy=log_policy) as daemon:
            for _ in range(5):
                assert read(daemon / "file") == read(daemon / "other") == b"content"
            assert messages(daemon)["OPEN"] == 2
