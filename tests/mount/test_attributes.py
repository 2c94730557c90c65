"""getattr and setattr: modes, owners, sizes, times to the nanosecond, statfs."""

from __future__ import annotations

import os
import stat
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.harness import ROOTLESS, Layers, Mode, Mount, MountFactory, as_user, in_child
from tests.trees import CAPABILITY, KINDS, capability, describe, errno_of, make
from unionfsd import syscalls

#: Times that no file system we care about rounds: before 1970, in it, and past 32 bits.
TIMES = [
    (1, 1),
    (-1_000_000_000, -1),
    (1_500_000_000_123_456_789, 1_600_000_000_987_654_321),
    (5_000_000_000_000_000_001, 5_000_000_000_999_999_999),
]

WHERE = ("lower", "upper")


def place(kind: str, where: str, layers: Layers, mounted: MountFactory) -> Mount:
    """A mount with an object `x` of that kind, in the lower or new."""
    if where == "lower":
        make(layers.lower / "x", kind)
        return mounted()
    mount = mounted()
    make(mount / "x", kind)
    return mount


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", KINDS)
def test_times_are_kept_to_the_nanosecond(kind: str, where: str, layers: Layers, mounted: MountFactory) -> None:
    mount = place(kind, where, layers, mounted)
    for times in TIMES:
        os.utime(mount / "x", ns=times, follow_symlinks=False)
        st = os.lstat(mount / "x")
        assert (st.st_atime_ns, st.st_mtime_ns) == times
    mount.remount()
    st = os.lstat(mount / "x")
    assert (st.st_atime_ns, st.st_mtime_ns) == TIMES[-1]


@pytest.mark.parametrize("where", WHERE)
def test_one_time_can_be_set_without_the_other(where: str, layers: Layers, mounted: MountFactory) -> None:
    mount = place("file", where, layers, mounted)
    path = mount / "x"
    os.utime(path, ns=(111_000_000_111, 222_000_000_222))
    subprocess.run(["touch", "-c", "-m", "-d", "@333.000000333", path], check=True)  # UTIME_OMIT for the access time
    st = os.stat(path)
    assert (st.st_atime_ns, st.st_mtime_ns) == (111_000_000_111, 333_000_000_333)
    subprocess.run(["touch", "-c", "-a", "-d", "@444.000000444", path], check=True)
    st = os.stat(path)
    assert (st.st_atime_ns, st.st_mtime_ns) == (444_000_000_444, 333_000_000_333)


@pytest.mark.parametrize("where", WHERE)
def test_now_is_the_time_of_day(where: str, layers: Layers, mounted: MountFactory) -> None:
    mount = place("file", where, layers, mounted)
    path = mount / "x"
    os.utime(path, ns=(1, 1))
    before = time.time_ns() - 20_000_000  # the kernel's clock of file times is coarse
    os.utime(path)
    after = time.time_ns()
    st = os.stat(path)
    assert before <= st.st_mtime_ns <= after
    assert before <= st.st_atime_ns <= after
    os.utime(path, ns=(1, 1))
    subprocess.run(["touch", "-c", "-m", path], check=True)
    assert os.stat(path).st_atime_ns == 1


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "symlink"])
def test_every_mode_bit_can_be_set(kind: str, where: str, layers: Layers, mounted: MountFactory) -> None:
    mount = place(kind, where, layers, mounted)
    for mode in (0o7777, 0, 0o1644, 0o2711, 0o4755):
        os.chmod(mount / "x", mode)
        assert stat.S_IMODE(os.stat(mount / "x").st_mode) == mode
    mount.remount()
    assert stat.S_IMODE(os.stat(mount / "x").st_mode) == 0o4755


#: A user and a group with high numbers; a user namespace has no higher ones.
LAST = (65534, 65535) if ROOTLESS else (2**31, 2**32 - 2)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.owners
def test_owner_and_group_can_be_set_one_by_one(kind: str, where: str, layers: Layers, mounted: MountFactory) -> None:
    mount = place(kind, where, layers, mounted)
    for uid, gid, expected in (
        (1, -1, (1, 0)),
        (-1, 2, (1, 2)),
        (*LAST, LAST),
        (0, 0, (0, 0)),
    ):
        os.lchown(mount / "x", uid, gid)
        assert describe(mount / "x")["owner"] == expected


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.owners
def test_a_change_moves_the_change_time(where: str, layers: Layers, mounted: MountFactory) -> None:
    mount = place("file", where, layers, mounted)
    path = mount / "x"
    changes: list[Callable[[], None]] = [
        lambda: os.chmod(path, 0o600),
        lambda: os.chown(path, 5, 5),
        lambda: os.utime(path, ns=(1, 1)),
        lambda: os.truncate(path, 3),
        lambda: os.setxattr(path, "user.a", b"1"),
        lambda: os.removexattr(path, "user.a"),
        lambda: os.link(path, mount / "y"),
        lambda: os.unlink(mount / "y"),
    ]
    for change in changes:
        before = os.stat(path).st_ctime_ns
        time.sleep(0.01)  # more than a tick of the clock of file times
        change()
        assert os.stat(path).st_ctime_ns > before


@pytest.mark.parametrize("by", ["path", "descriptor"])
@pytest.mark.parametrize("where", WHERE)
def test_truncation_cuts_and_extends_with_zeros(by: str, where: str, layers: Layers, mounted: MountFactory) -> None:
    data = os.urandom(300_000)
    (layers.lower / "x").write_bytes(data)
    mount = mounted()
    path = mount / "x"
    if where == "upper":
        path.unlink()
        path.write_bytes(data)
    for size in (299_999, 131_072, 500_000, 4097, 0, 10):
        data = data[:size].ljust(size, b"\0")
        if by == "path":
            os.truncate(path, size)
        else:
            with path.open("r+b") as file:
                file.truncate(size)
                assert os.fstat(file.fileno()).st_size == size
        assert os.stat(path).st_size == size
        assert path.read_bytes() == data
    mount.remount()
    assert path.read_bytes() == data


def test_truncation_moves_the_time_of_modification(layers: Layers, mounted: MountFactory) -> None:
    (layers.lower / "x").write_bytes(b"data")
    os.utime(layers.lower / "x", ns=(1, 1))
    mount = mounted()
    os.truncate(mount / "x", 2)
    assert os.stat(mount / "x").st_mtime_ns > 1


def test_only_files_are_truncated(layers: Layers, mounted: MountFactory) -> None:
    (layers.lower / "d").mkdir()
    mount = mounted()
    assert errno_of(os.truncate, mount / "d", 0) == "EISDIR"
    assert errno_of(os.truncate, mount / "absent", 0) == "ENOENT"
    assert errno_of(os.truncate, mount.path, -1) == "EINVAL"


def test_statfs_is_that_of_the_upper_file_system(layers: Layers, mounted: MountFactory) -> None:
    mount = mounted()
    expected, shown = os.statvfs(layers.upper), os.statvfs(mount.path)
    for fact in ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax"):
        assert getattr(shown, fact) == getattr(expected, fact)
    assert 0 < shown.f_bavail <= shown.f_bfree <= shown.f_blocks


def test_blocks_of_a_sparse_file_are_few(layers: Layers, mounted: MountFactory) -> None:
    with (layers.lower / "x").open("wb") as file:
        file.truncate(1 << 30)
    mount = mounted()
    assert os.stat(mount / "x").st_blocks == os.stat(layers.lower / "x").st_blocks
    assert os.stat(mount / "x").st_size == 1 << 30


@pytest.mark.owners
def test_the_root_of_the_mount_can_be_changed(layers: Layers, mounted: MountFactory) -> None:
    layers.upper.chmod(0o711)
    mount = mounted()
    assert stat.S_IMODE(os.stat(mount.path).st_mode) == 0o711
    os.chmod(mount.path, 0o750)
    os.chown(mount.path, 7, 8)
    os.utime(mount.path, ns=(5, 6))
    os.setxattr(mount.path, "user.a", b"1")
    mount.remount()
    st = os.stat(mount.path)
    assert (stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid, st.st_mtime_ns) == (0o750, 7, 8, 6)
    assert os.getxattr(mount.path, "user.a") == b"1"


# What takes privileges off a file: expected is what a plain directory does.


def privileged(directory: Path, permissions: int = 0o6777, *, capable: bool = True) -> Path:
    """An executable with setuid, setgid and a capability, that anyone may write."""
    path = directory / "x"
    path.write_bytes(b"#!/bin/true\n")
    os.chown(path, 0, 7)
    path.chmod(permissions)
    if capable:
        os.setxattr(path, CAPABILITY, capability(13))
    return path


def _write(path: Path) -> None:
    with path.open("r+b", buffering=0) as file:
        file.write(b"!")


def _append(path: Path) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(b"!")


def _chown(path: Path) -> None:
    os.chown(path, 3, 4)


def _truncate(path: Path) -> None:
    os.truncate(path, 1)


def _open_truncated(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))


def _allocate(path: Path) -> None:
    with path.open("r+b") as file:
        syscalls.fallocate(file.fileno(), 0, 0, 8192)


def _copy(path: Path) -> None:
    with path.open("r+b") as file:
        os.copy_file_range(file.fileno(), file.fileno(), 2, 0, 8)


STRIPPING = {
    "write": _write,
    "append": _append,
    "allocate": _allocate,
    "copy": _copy,
    "truncate": _truncate,
    "open-truncated": _open_truncated,
    "chown": _chown,
}


#: Permissions, and whether there is a capability, too: with one the kernel asks anew what is left.
PRIVILEGES = {
    "all": partial(privileged, permissions=0o6777, capable=True),
    "ids": partial(privileged, permissions=0o6777, capable=False),
    "ids not executable": partial(privileged, permissions=0o6666, capable=False),
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("who", ["root", "user"])
@pytest.mark.parametrize("what", STRIPPING)
@pytest.mark.parametrize("which", PRIVILEGES)
@pytest.mark.owners
def test_privileges_are_dropped_as_on_a_plain_directory(
    which: str, what: str, who: str, where: str, mode: Mode, layers: Layers, plain: Path, mounted: MountFactory
) -> None:
    kernels = which == "ids not executable" and who == "user" and what in {"write", "append", "copy", "truncate"}
    if mode.transport == "pyfuse3" and (what == "allocate" or kernels):
        return  # docs/deviations.md
    act, furnish = STRIPPING[what], PRIVILEGES[which]
    if where == "lower":
        furnish(layers.lower)
    mount = mounted()
    if where == "upper":
        furnish(mount.path)
    furnish(plain)
    outcomes = []
    for path in (plain / "x", mount / "x"):
        attempt = partial(errno_of, act, path)
        result = as_user(attempt) if who == "user" else in_child(attempt)
        facts = describe(path)
        outcomes.append((result, facts["mode"], facts["owner"], facts["xattrs"], facts["content"]))
    assert outcomes[1] == outcomes[0]
    mount.remount()
    facts = describe(mount / "x")
    assert (facts["mode"], facts["xattrs"]) == outcomes[0][1:4:2]


@pytest.mark.parametrize("who", ["root", "user"])
@pytest.mark.owners
def test_a_chown_to_nobody_drops_privileges(
    who: str, mode: Mode, layers: Layers, plain: Path, mounted: MountFactory
) -> None:
    """chown(path, -1, -1). Over the channel it changes nothing: the kernel leaves it to the daemon to take setuid off
    (FUSE_HANDLE_KILLPRIV_V2), but the request it sends asks for nothing at all."""
    for directory in (layers.lower, plain):
        privileged(directory)
    mount = mounted()
    run_by = as_user if who == "user" else in_child
    expected, found = (
        (run_by(partial(errno_of, os.chown, path, -1, -1)), describe(path)["mode"])
        for path in (plain / "x", mount / "x")
    )
    assert found == (("ok", "0o6777") if mode.transport == "channel" else expected)
