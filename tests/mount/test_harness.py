"""The harness notices what it is there to notice: differences, loud logs, hung mounts."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import MODES, Daemon, FuseOverlayFS, Layers, LogPolicy, OverlayFS, Watchdog, run
from tests.trees import KINDS, compare_trees, delete, errno_of, getdents, make


def changed_content(tree: Path) -> None:
    st = os.stat(tree / "file")
    (tree / "file").write_bytes(b"Content of file")
    os.utime(tree / "file", ns=(st.st_atime_ns, st.st_mtime_ns))


def another_target(tree: Path) -> None:
    st = os.lstat(tree / "symlink")
    (tree / "symlink").unlink()
    (tree / "symlink").symlink_to("A/target")
    os.utime(tree / "symlink", ns=(st.st_atime_ns, st.st_mtime_ns), follow_symlinks=False)


def another_device(tree: Path) -> None:
    st = os.stat(tree / "chardev")
    (tree / "chardev").unlink()
    os.mknod(tree / "chardev", st.st_mode, os.makedev(1, 5))
    os.utime(tree / "chardev", ns=(st.st_atime_ns, st.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": changed_content,
    "target": another_target,
    "rdev": another_device,
    "mode": lambda tree: (tree / "fifo").chmod(0o600),
    "owner": lambda tree: os.lchown(tree / "symlink", 1, 0),
    "mtime_ns": lambda tree: os.utime(tree / "directory", ns=(0, os.stat(tree / "directory").st_mtime_ns + 1)),
    "nlink": lambda tree: os.link(tree / "blockdev", tree.parent / "second"),
    "xattrs": lambda tree: os.setxattr(tree / "socket", "trusted.a", b"", follow_symlinks=False),
    "size": lambda tree: os.truncate(tree / "file", 1),
    "only in the first": lambda tree: delete(tree / "file"),
    "only in the second": lambda tree: make(tree / "new", "file"),
}


@pytest.mark.parametrize("fact", CHANGES)
@pytest.mark.privileged
def test_every_difference_between_trees_is_found(fact: str, disk: Path) -> None:
    (disk / "a").mkdir()
    for kind in KINDS:
        make(disk / "a" / kind, kind)
    run("cp", "-a", disk / "a", disk / "b")
    assert compare_trees(disk / "a", disk / "b") == []
    CHANGES[fact](disk / "b")
    assert any(fact in line for line in compare_trees(disk / "a", disk / "b"))


def test_getdents_is_what_listdir_says(disk: Path) -> None:
    for number in range(3000):
        (disk / f"name {number}").touch()
    fd = os.open(disk, os.O_RDONLY)
    found = [os.fsdecode(dirent.name) for dirent in getdents(fd)]
    os.close(fd)
    assert sorted(found) == sorted([".", "..", *os.listdir(disk)])


def test_loud_lines_are_told_from_quiet_ones() -> None:
    policy = LogPolicy()
    policy.expect("no xattrs here")
    policy.expect("never said")
    quiet = ["unionfsd: info: mounted on /mnt", "unionfsd: debug: an error: nothing"]
    loud = ["unionfsd: warning: something", "Traceback (most recent call last):", "unionfsd: error: broken"]
    assert policy.undeclared([*quiet, "unionfsd: warning: no xattrs here", *loud]) == loud
    assert policy.missing() == ["never said"]


def test_a_watchdog_called_off_does_nothing(tmp_path: Path) -> None:
    assert Watchdog(30, f"touch {tmp_path}/barked").call_off()
    late = Watchdog(0.1, f"touch {tmp_path}/barked")
    time.sleep(0.5)
    assert not late.call_off()
    assert (tmp_path / "barked").exists()


@pytest.mark.privileged
def test_a_daemon_that_hangs_is_forced_off(layers: Layers) -> None:
    mount = Daemon(layers, MODES[0].options, patience=2)
    mount.mount()
    os.kill(mount.pid, signal.SIGSTOP)
    assert errno_of(os.stat, mount / "x") in ("ENOTCONN", "ECONNABORTED")  # nobody but the watchdog could bring this
    with pytest.raises(AssertionError, match="hung"):
        mount.detach()
    assert not mount.mounted


def test_a_peer_that_hangs_is_forced_off(layers: Layers) -> None:
    mount = FuseOverlayFS(layers, patience=2)
    mount.mount()
    (peer,) = _processes(f"fuse-overlayfs.*{re.escape(str(layers.root))}/")
    os.kill(peer, signal.SIGSTOP)
    assert errno_of(os.stat, mount / "x") in ("ENOTCONN", "ECONNABORTED")
    os.kill(peer, signal.SIGKILL)
    with pytest.raises(AssertionError, match="hung"):
        mount.detach()
    assert not mount.mounted


def _processes(pattern: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # ended meanwhile
                continue
            if re.search(pattern, command):
                found.append(int(entry.name))
    return found


def test_what_the_daemon_did_to_a_lower_is_noticed(layers: Layers) -> None:
    (layers.lower / "f").write_bytes(b"data")
    with pytest.raises(AssertionError, match="was changed"), Daemon(layers, MODES[0].options):
        (layers.lower / "f").write_bytes(b"DATA")


def test_nothing_stays_mounted(disk: Path) -> None:
    layers = Layers(disk)
    mount = OverlayFS(layers)
    mount.mount()
    held = os.open(mount.path, os.O_RDONLY)
    mount.detach()
    assert not mount.mounted
    os.close(held)
