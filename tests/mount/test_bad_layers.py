"""Layers on a file system that fails: a FUSE file system of our own that does so when it is told to."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import PROJECT, Layers, LogPolicy, MountFactory, litter, run, wait_for
from tests.trees import errno_of

pytestmark = pytest.mark.privileged

#: The union of an empty lower and a directory, which fails with the errno that a file named as the operation holds.
FAILING = """
import os, sys
from unionfsd import cli, format, union
format.is_reserved = lambda name: False
format.wh_target = lambda name: None
control = sys.argv.pop()
def failing(name, call):
    def wrapped(*args, **kwargs):
        try:
            with open(f"{control}/{name}") as file:
                number = int(file.read())
        except FileNotFoundError:
            return call(*args, **kwargs)
        raise OSError(number, os.strerror(number))
    return wrapped
for name in ("lookup", "getattr", "open", "listdir", "readinto", "write", "write_late", "create", "tmpfile", "mkdir",
             "rename", "link", "unlink", "setattr", "setxattr", "fsync"):
    setattr(union.Union, name, failing(name, getattr(union.Union, name)))
sys.exit(cli.main())
"""


class Failing:
    """That file system, mounted at `root`; `told` makes operations of it fail."""

    def __init__(self, place: Path) -> None:
        self._control = place / "control"
        self._control.mkdir(parents=True)
        self._below = Layers(place)
        self.root = self._below.mnt
        #: What it shows; the kernel has cached nothing of what is put here.
        self.behind = self._below.lower

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        options = f"{self._below.options()},timeout=0,writeback=off"
        command = [sys.executable, "-c", FAILING, "-f", "-o", options, str(self.root), str(self._control)]
        log = self._below.root / "log"
        with log.open("wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | {"PYTHONPATH": str(PROJECT)})
        try:
            wait_for(lambda: os.path.ismount(self.root) or process.poll() is not None, "the failing file system")
            assert process.poll() is None, log.read_text()
            yield
            run("umount", "--lazy", self.root)
            assert process.wait(20) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()

    @contextlib.contextmanager
    def told(self, number: int, *operations: str) -> Iterator[None]:
        """These operations fail with the errno `number`."""
        for name in operations:
            (self._control / name).write_text(str(number))
        yield
        for name in operations:
            (self._control / name).unlink()


@pytest.fixture
def failing(disk: Path) -> Iterator[Failing]:
    layer = Failing(disk / "failing")
    with layer.mounted():
        yield layer


def test_a_lower_that_fails(failing: Failing, disk: Path, mounted: MountFactory) -> None:
    for name in ("read", "changed", "looked-up"):
        (failing.behind / name).write_bytes(name.encode() * 1000)
    (disk / "union").mkdir()
    layers = Layers(disk / "union", lowers=[failing.root])
    union = mounted("timeout=0", layers=layers)
    number = errno.EIO
    with failing.told(number, "readinto", "open"):
        assert errno_of((union / "read").read_bytes) == "EIO"
        assert errno_of(os.truncate, union / "changed", 5) == "EIO"
        assert errno_of(os.chmod, union / "changed", 0o600) == "EIO"
    with failing.told(number, "lookup", "getattr"):
        assert errno_of(os.stat, union / "looked-up") == "EIO"
    assert os.listdir(layers.upper) == []
    assert litter(layers.work) == []
    (union / "other").write_bytes(b"the upper goes on")
    for name in ("read", "changed", "looked-up"):
        assert (union / name).read_bytes() == name.encode() * 1000
    os.truncate(union / "changed", 5)
    assert (union / "changed").read_bytes() == b"chang"
    union.unmount()


def test_an_upper_that_fails(failing: Failing, disk: Path, mounted: MountFactory, log_policy: LogPolicy) -> None:
    (disk / "union").mkdir()
    layers = Layers(disk / "union", upper_root=failing.root)
    for name in ("written", "moved", "chmod", "removed"):
        (layers.lower / name).write_bytes(name.encode())
    log_policy.expect("upper takes no device nodes 0:0")
    union = mounted(layers=layers)

    def write(name: str) -> Callable[[], object]:
        def call() -> None:
            fd = os.open(union / name, os.O_RDWR)
            try:
                os.write(fd, b"W")
                os.fsync(fd)
            finally:
                os.close(fd)

        return call

    calls: dict[str, tuple[tuple[str, ...], Callable[[], object]]] = {
        "written": (("write", "write_late"), write("written")),
        "moved": (("rename", "link", "create", "tmpfile"), lambda: os.rename(union / "moved", union / "elsewhere")),
        "chmod": (("setattr",), lambda: os.chmod(union / "chmod", 0o600)),
        "removed": (("rename", "link"), lambda: os.unlink(union / "removed")),
        "made": (("mkdir",), lambda: os.mkdir(union / "made")),
        "created": (("tmpfile", "create"), lambda: (union / "created").touch()),
    }
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
        for operations, call in calls.values():
            before = sorted(os.listdir(union.path))
            with failing.told(number, *operations):
                assert errno_of(call) == errno.errorcode[number]
            assert sorted(os.listdir(union.path)) == before
    for name in ("written", "moved", "chmod", "removed"):
        assert (union / name).read_bytes() == name.encode()
    assert [errno_of(call) for _, call in calls.values()] == ["ok"] * len(calls)
    assert (union / "written").read_bytes() == b"Written"
    assert sorted(os.listdir(union.path)) == ["chmod", "created", "elsewhere", "made", "written"]
    union.unmount()
