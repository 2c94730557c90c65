"""Uppers on file systems that lack something: what is lost is known, warned of once, and nothing else is."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import DETACH, PROJECT, FuseOverlayFS, Layers, LogPolicy, Mode, MountFactory, run, wait_for
from tests.trees import errno_of

# The union of an empty lower and a directory, with names that are not its own business.
_FUSE = """
import sys
from unionfsd import cli, format
format.is_reserved = lambda name: False
format.wh_target = lambda name: None
sys.exit(cli.main())
"""

# The same as a file system that can do as little as FAT: names without flags, files and directories.
_POOR = """
import errno, os, stat, sys
from unionfsd import cli, format, union
format.is_reserved = lambda name: False
format.wh_target = lambda name: None
def refuse(number):
    def call(*args):
        raise OSError(number, os.strerror(number))
    return call
rename, mknod = union.Union.rename, union.Union.mknod
def plain_rename(self, parent, name, newparent, newname, flags):
    return refuse(errno.EINVAL)() if flags else rename(self, parent, name, newparent, newname, flags)
def plain_mknod(self, parent, name, mode, rdev, caller):
    return mknod(self, parent, name, mode, rdev, caller) if stat.S_ISREG(mode) else refuse(errno.EPERM)()
union.Union.rename, union.Union.mknod = plain_rename, plain_mknod
union.Union.link = union.Union.symlink = refuse(errno.EPERM)
sys.exit(cli.main())
"""


@contextlib.contextmanager
def fuse(root: Path, program: str, *options: str) -> Iterator[Path]:
    """A file system of our own to put an upper on; `program` makes it poorer."""
    below = Layers(root)
    command = [sys.executable, "-c", program, "-f", "-o", ",".join([below.options(), *options]), str(below.mnt)]
    with (root / "log").open("wb") as log:
        daemon = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": str(PROJECT)})
    wait_for(lambda: os.path.ismount(below.mnt) or daemon.poll() is not None, "the upper's file system")
    assert daemon.poll() is None, (root / "log").read_text()
    try:
        yield below.mnt
    finally:
        run(*DETACH, below.mnt)
        assert daemon.wait(20) == 0, (root / "log").read_text()


@contextlib.contextmanager
def memory(root: Path, kind: str) -> Iterator[Path]:
    run("mount", "-t", kind, "none", root)
    try:
        yield root
    finally:
        run("umount", "--lazy", root)


FileSystem = Callable[[Path], contextlib.AbstractContextManager[Path]]

XATTRS = r"upper keeps no xattrs"
WHITEOUTS = r"upper takes no device nodes 0:0"
TMPFILE = r"upper has no O_TMPFILE"
RENAME_WHITEOUT = r"upper has no RENAME_WHITEOUT"
EXCHANGE = r"upper has no RENAME_EXCHANGE"
NOREPLACE = r"upper has no RENAME_NOREPLACE"

#: What cannot be done over it and over a plain directory can, and the warnings.
CASES: dict[str, tuple[FileSystem, dict[str, str], list[str]]] = {
    "tmpfs": (lambda root: memory(root, "tmpfs"), {}, []),
    "ramfs": (
        lambda root: memory(root, "ramfs"),
        {"rename a lower directory": "EXDEV", "setxattr": "ENOTSUP"},
        [XATTRS, RENAME_WHITEOUT],
    ),
    "fuse": (lambda root: fuse(root, _FUSE), {}, [WHITEOUTS]),
    "fuse without xattrs": (
        lambda root: fuse(root, _FUSE, "transport=pyfuse3", "noxattrs=1"),
        {"rename a lower directory": "EXDEV", "setxattr": "ENOTSUP", "tmpfile": "ENOTSUP"},
        [XATTRS, WHITEOUTS, TMPFILE],
    ),
    "as poor as FAT": (
        lambda root: fuse(root, _POOR, "transport=pyfuse3", "noxattrs=1"),
        {
            "rename a lower directory": "EXDEV",
            "setxattr": "ENOTSUP",
            "tmpfile": "ENOTSUP",
            "exchange": "EXDEV",
            **dict.fromkeys(("symlink", "link", "mkfifo"), "EPERM"),
        },
        [XATTRS, WHITEOUTS, TMPFILE, EXCHANGE, NOREPLACE],
    ),
}


def build(root: Path) -> None:
    """What is in the lower, or in the plain directory."""
    for name in ("read", "write", "chmod", "gone", "back", "moved", "linked"):
        (root / name).write_bytes(name.encode())
    for name in ("dir", "emptied", "again", "moving"):
        (root / name).mkdir()
        (root / name / "inside").write_bytes(b"inside")


def exercise(root: Path) -> dict[str, str]:
    """One of every operation, and how it went."""

    def rewrite() -> None:
        with (root / "write").open("ab") as file:
            file.write(b"more")

    def emptied(name: str) -> None:
        (root / name / "inside").unlink()
        (root / name).rmdir()

    def again() -> None:
        emptied("again")
        (root / "again").mkdir()
        (root / "again/new").write_bytes(b"new")

    def back() -> None:
        (root / "back").unlink()
        (root / "back").write_bytes(b"is back")

    def made() -> None:
        (root / "made/sub").mkdir(parents=True)
        (root / "made").rename(root / "renamed")

    def tmpfile() -> None:
        os.close(os.open(root, os.O_TMPFILE | os.O_RDWR))

    return {
        "read": errno_of((root / "read").read_bytes),
        "write": errno_of(rewrite),
        "chmod": errno_of((root / "chmod").chmod, 0o600),
        "unlink": errno_of((root / "gone").unlink),
        "make again": errno_of(back),
        "rename a lower file": errno_of((root / "moved").rename, root / "there"),
        "rename over": errno_of((root / "dir/inside").rename, root / "renamed over"),
        "rmdir": errno_of(emptied, "emptied"),
        "mkdir again": errno_of(again),
        "rename a directory": errno_of(made),
        "rename a lower directory": errno_of((root / "moving").rename, root / "arrived"),
        "symlink": errno_of((root / "symlink").symlink_to, "target"),
        "link": errno_of(os.link, root / "linked", root / "link"),
        "mkfifo": errno_of(os.mkfifo, root / "fifo"),
        "setxattr": errno_of(os.setxattr, root / "read", "user.a", b"b"),
        "tmpfile": errno_of(tmpfile),
    }


def content(root: Path) -> dict[str, bytes | str]:
    """Every name, with what is in it."""
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else oct(path.lstat().st_mode)
        for path in sorted(root.rglob("*"))
    }


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.mounting) if name in ("tmpfs", "ramfs") else name for name in CASES]
)
def case(request: pytest.FixtureRequest, disk: Path) -> Iterator[tuple[Path, dict[str, str], list[str]]]:
    kind, losses, warnings = CASES[request.param]
    (disk / "upper-fs").mkdir()
    with kind(disk / "upper-fs") as root:
        yield root, losses, warnings


def test_what_it_lacks_and_nothing_more_is_lost(
    case: tuple[Path, dict[str, str], list[str]],
    disk: Path,
    plain: Path,
    mounted: MountFactory,
    log_policy: LogPolicy,
    mode: Mode,
) -> None:
    root, losses, warnings = case
    if mode.transport == "pyfuse3":
        losses = {**losses, "tmpfile": "ENOTSUP"}  # of the transport
    (disk / "union").mkdir()
    for pattern in warnings:
        log_policy.expect(pattern)
    layers = Layers(disk / "union", upper_root=root)
    build(layers.lower)
    build(plain)
    union = mounted(layers=layers)
    expected = exercise(plain)
    found = exercise(union.path)
    assert {name: how for name, how in found.items() if how != expected[name]} == {
        name: how for name, how in losses.items() if name in expected
    }
    if losses.get("rename a lower directory"):
        (plain / "arrived").rename(plain / "moving")
    for name in ("symlink", "link", "fifo"):
        if losses.get(name, losses.get(f"mk{name}")):
            (plain / name).unlink()
    assert content(union.path) == content(plain)
    union.remount()
    assert content(union.path) == content(plain)
    union.unmount()


def test_an_upper_that_cannot_record_deletions_is_refused(disk: Path) -> None:
    """On fuse-overlayfs every form of a whiteout is its own already."""
    for name in ("below", "union"):
        (disk / name).mkdir()
    with FuseOverlayFS(Layers(disk / "below")) as below:
        layers = Layers(disk / "union", upper_root=below.path)
        for _ in range(2):
            refused = subprocess.run(
                [sys.executable, "-m", "unionfsd", "-o", layers.options(), str(layers.mnt)],
                capture_output=True,
                text=True,
                check=False,
                cwd=PROJECT,
            )
            assert refused.returncode == 3
            assert "cannot record deletions" in refused.stderr
            assert "beneath that" in refused.stderr
