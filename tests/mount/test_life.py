"""The life of a mount: it ends cleanly, dies safely, holds nothing longer than needed, and answers while it works."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.harness import DaemonFactory, Layers, MountFactory, litter, run, wait_for
from tests.trees import describe, differences, errno_of, snapshot
from unionfsd.fuse import mounting
from unionfsd.syscalls import Fd

pytestmark = pytest.mark.deviates  # each of them is about a daemon


def populate(layers: Layers) -> None:
    (layers.lower / "d/sub").mkdir(parents=True)
    for number in range(20):
        (layers.lower / "d" / f"f{number}").write_text(f"content {number}")


def write_large(path: Path) -> None:
    """A file whose copying, and putting on disk, takes a while."""
    block = os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(500):
            file.write(block)


def test_a_dead_daemon_leaves_a_union_that_mounts_again(layers: Layers, daemon: DaemonFactory) -> None:
    """Killed in the middle: the mount answers ENOTCONN until it is unmounted; what was done before is there again."""
    populate(layers)
    mount = daemon()
    (mount / "d/f1").write_text("changed")
    (mount / "d/f2").unlink()
    (mount / "d/new").mkdir()
    expected = snapshot(mount.path)
    fd = os.open(mount / "d/f3", os.O_RDWR)
    mount.kill()
    assert errno_of(os.fchmod, fd, 0o600) == "ENOTCONN"
    os.close(fd)
    assert errno_of(os.stat, mount / "d/not asked for before") == "ENOTCONN"
    mount.detach()
    again = daemon()
    assert differences(expected, snapshot(again.path)) == []
    assert litter(layers.work) == []


def test_a_daemon_killed_while_it_copies_up_loses_nothing(layers: Layers, daemon: DaemonFactory) -> None:
    write_large(layers.lower / "big")
    mount = daemon()
    before = describe(layers.lower / "big")
    pid = os.fork()
    if pid == 0:
        try:
            os.chmod(mount / "big", 0o600)
        finally:
            os._exit(0)
    staged = f"{layers.work}/work/"
    wait_for(lambda: any(path.startswith(staged) for path in mount.open_files()), "the copy does not begin")
    mount.kill()
    os.waitpid(pid, 0)
    mount.detach()
    assert os.listdir(layers.upper) == []
    again = daemon()
    assert litter(layers.work) == []
    assert describe(again / "big") == before


def test_termination_unmounts(layers: Layers, daemon: DaemonFactory) -> None:
    populate(layers)
    for number in (signal.SIGTERM, signal.SIGINT):
        mount = daemon()
        (mount / f"made before {number.name}").touch()
        os.kill(mount.pid, number)
        wait_for(lambda mount=mount: not mount.mounted, "not unmounted")  # type: ignore[misc]
    assert len(os.listdir(layers.upper)) == 2


@pytest.mark.privileged
def test_who_is_about_to_leave_is_waited_for(layers: Layers) -> None:
    """The same for every file system: here nobody has to serve it."""
    run("mount", "-t", "tmpfs", "tmpfs", layers.mnt)
    (layers.mnt / "file").touch()
    (place,) = (place for place in mounting.mounts() if place.path == os.fsencode(layers.mnt))
    mount = mounting.Mount(Fd(os.open("/dev/null", os.O_RDONLY)), place)
    with (layers.mnt / "file").open():
        assert mount.unmount(lazy=False) is mounting.Unmounted.BUSY
        assert mount.unmount(lazy=False, patience=0.1) is mounting.Unmounted.BUSY
    leaving = subprocess.Popen(["sleep", "0.3"], cwd=layers.mnt)
    assert mount.unmount(patience=60) is mounting.Unmounted.GONE
    assert leaving.wait() == 0
    mount.close()


def test_the_mountpoint_is_not_held(layers: Layers, daemon: DaemonFactory) -> None:
    """It can be renamed and removed the moment it is unmounted."""
    mount = daemon()
    mount.unmount()
    moved = layers.mnt.with_name("moved")
    layers.mnt.rename(moved)
    moved.rmdir()


@pytest.mark.privileged
def test_the_daemon_holds_no_descriptor_of_what_was_closed(layers: Layers, daemon: DaemonFactory) -> None:
    populate(layers)
    mount = daemon()

    def use() -> None:
        for path in (mount / "d").iterdir():
            if path.is_file():
                path.read_bytes()
                path.write_text("changed")
        for number in range(20):
            (mount / "d" / f"f{number}").unlink()
            (mount / "d" / f"f{number}").write_text("again")
        snapshot(mount.path)

    use()
    forget_everything()
    start = mount.fds()
    for _ in range(3):
        use()
        forget_everything()
    wait_for(lambda: mount.fds() <= start, f"{mount.fds()} descriptors, {start} at first", 5)


def forget_everything() -> None:
    """Have the kernel drop every dentry and inode nobody uses, and tell the file systems so."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("2")


@pytest.mark.timeout(300)
@pytest.mark.privileged
def test_thirty_thousand_files_walked_and_forgotten(layers: Layers, daemon: DaemonFactory) -> None:
    """Descriptors return to where they were, memory nearly so: what remains are pools of the allocator, which a second
    walk uses again."""
    for directory in range(30):
        (layers.lower / f"{directory}").mkdir()
        for number in range(1000):
            os.close(os.open(layers.lower / f"{directory}/{number}", os.O_CREAT | os.O_WRONLY))
    mount = daemon()
    mount.settle()
    start = mount.fds()
    resident = []
    for _ in range(2):
        assert sum(len(files) for _, _, files in os.walk(mount.path)) == 30_000
        assert len(run("find", mount.path, "-size", "0", seconds=200).splitlines()) == 30_000
        forget_everything()
        wait_for(lambda: mount.fds() <= start, "descriptors did not come back")
        resident.append(mount.resident())
    assert resident[1] < resident[0] * 1.2


def test_a_large_copy_up_does_not_stop_others(layers: Layers, daemon: DaemonFactory) -> None:
    """While 500 MB are copied up, another process looks files up that nobody looked at before."""
    write_large(layers.lower / "big")
    (layers.lower / "d").mkdir()
    for number in range(20_000):
        (layers.lower / f"d/{number}").touch()
    mount = daemon()
    pid = os.fork()
    if pid == 0:
        try:
            os.chmod(mount / "big", 0o600)
        finally:
            os._exit(0)
    begin, waits = time.monotonic(), []
    for number in range(20_000):
        start = time.monotonic()
        os.stat(mount / f"d/{number}")
        waits.append(time.monotonic() - start)
        if os.waitpid(pid, os.WNOHANG)[0]:
            break
    else:
        os.waitpid(pid, 0)
    copying = time.monotonic() - begin
    assert (mount / "big").stat().st_mode & 0o777 == 0o600
    assert len(waits) > 20
    assert max(waits) < copying / 3


def test_two_unions_over_one_lower(layers: Layers, mounted: MountFactory) -> None:
    populate(layers)
    (layers.root / "second").mkdir()
    second = Layers(layers.root / "second", lowers=layers.lowers)
    one, two = mounted(), mounted(layers=second)
    (one / "d/f1").write_text("one")
    (two / "d/f1").unlink()
    assert (one / "d/f1").read_text() == "one"
    assert not (two / "d/f1").exists()
    assert (one / "d/f2").read_text() == (two / "d/f2").read_text() == "content 2"
