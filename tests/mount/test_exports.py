"""File handles of a mount: none without nfs_export=on, with it good for as long as the object is there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import DaemonFactory, Layers, Mode, Mount
from tests.trees import errno_of
from unionfsd import syscalls
from unionfsd.syscalls import Fd

# The kernel's handles are of another kind, and open_by_handle_at(2) is for root.
pytestmark = [pytest.mark.deviates, pytest.mark.privileged]


def handle(path: Path) -> tuple[int, bytes]:
    with Fd(os.open(path.parent, os.O_PATH)) as fd:
        return syscalls.file_handle(fd.fd, os.fsencode(path.name))


def by_handle(mount: Mount, wanted: tuple[int, bytes], flags: int = os.O_RDONLY) -> int:
    """A descriptor of what a handle means."""
    with Fd(os.open(mount.path, os.O_RDONLY)) as root, syscalls.open_by_handle(root.fd, *wanted) as fd:
        return os.open(syscalls.proc_path(fd.fd), flags)


def drop_caches() -> None:
    """Have the kernel forget the nodes that nobody uses."""
    Path("/proc/sys/vm/drop_caches").write_text("2")


@pytest.fixture
def filled(layers: Layers) -> Layers:
    (layers.lower / "d/sub").mkdir(parents=True)
    (layers.lower / "d/sub/deep").write_text("deep")
    (layers.lower / "f").write_text("lower")
    return layers


def test_without_it_there_are_none(filled: Layers, daemon: DaemonFactory, mode: Mode) -> None:
    """An overlay on top of the mount would keep them, and find other objects by them later. libfuse cannot say so."""
    mount = daemon()
    assert errno_of(handle, mount / "f") == ("ok" if mode.transport == "pyfuse3" else "ENOTSUP")


@pytest.mark.parametrize("again", [drop_caches, None], ids=["forgotten", "remounted"])
def test_they_lead_to_the_object_after(filled: Layers, daemon: DaemonFactory, again: Callable[[], None] | None) -> None:
    mount = daemon("nfs_export=on")
    (mount / "new").mkdir()
    (mount / "new/file").write_text("upper")
    handles = {name: handle(mount / name) for name in ("f", "d", "d/sub/deep", "new", "new/file", "d/sub")}
    (mount / "f").write_text("changed")
    (mount / "d/sub").rename(mount / "moved")
    (mount / "new/file").rename(mount / "there")
    if again is None:
        mount.remount()
    else:
        again()
    for name, data in (("f", b"changed"), ("d/sub/deep", b"deep"), ("new/file", b"upper")):
        fd = by_handle(mount, handles[name])
        assert os.read(fd, 100) == data
        os.close(fd)
    fd = by_handle(mount, handles["d/sub"])
    assert os.listdir(fd) == ["deep"]
    assert os.path.samestat(os.stat("..", dir_fd=fd), os.stat(mount.path))
    os.close(fd)
    fd = by_handle(mount, handles["d/sub/deep"], os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"er")
    os.close(fd)
    assert (mount / "moved/deep").read_text() == "deeper"
    assert {name: handle(mount / now) for name, now in (("d/sub", "moved"), ("new/file", "there"))} == {
        name: handles[name] for name in ("d/sub", "new/file")
    }


def test_they_are_stale_when_it_is_gone(filled: Layers, daemon: DaemonFactory) -> None:
    mount = daemon("nfs_export=on")
    kept, gone = handle(mount / "d"), handle(mount / "f")
    (mount / "f").unlink()
    (mount / "f").write_text("another")
    for _ in range(2):
        with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
            by_handle(mount, gone)
        os.close(by_handle(mount, kept))
        mount.remount()


def test_a_directory_far_below_is_reached_by_its_parents(filled: Layers, daemon: DaemonFactory) -> None:
    """The kernel asks for ".." until it comes to something that it knows."""
    path = filled.lower.joinpath(*["deep"] * 30)
    path.mkdir(parents=True)
    mount = daemon("nfs_export=on")
    wanted = handle(mount.path / path.relative_to(filled.lower))
    mount.remount()
    fd = by_handle(mount, wanted)
    assert os.readlink(f"/proc/self/fd/{fd}") == str(mount.path / path.relative_to(filled.lower))
    os.close(fd)
