"""Uppers with project ids, for quotas: what is made or copied up is of its directory's project, as if made there.

On xfs, which keeps project ids and their rules also where the kernel enforces no quota.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import Layers, Mode, Mount, MountFactory, OverlayFS, litter, run
from tests.trees import errno_of
from unionfsd import syscalls

pytestmark = pytest.mark.privileged


@pytest.fixture
def xfs(disk: Path) -> Iterator[Path]:
    image, place = disk / "xfs.img", disk / "xfs"
    with image.open("wb") as file:
        file.truncate(320 << 20)
    run("mkfs.xfs", "-q", image)
    place.mkdir()
    run("mount", "-o", "loop", image, place)
    yield place
    run("umount", place)


def set_project(path: Path, number: int) -> None:
    run("chattr", "-p", str(number), "+P", path)


def projects(root: Path) -> dict[str, int]:
    """The project of every file and directory; the ioctl has no answer for others."""
    found = {}
    for line in run("lsattr", "-pR", root, seconds=60).splitlines() if any(root.iterdir()) else []:
        words = line.split()
        if len(words) == 3 and words[0].isdigit():
            found[str(Path(words[2]).relative_to(root))] = int(words[0])
    return found


def build(lower: Path) -> None:
    (lower / "d" / "gone").mkdir(parents=True)
    (lower / "d" / "moved").mkdir()
    for name in ("f", "g", "h"):
        (lower / "d" / name).write_bytes(b"lower")
    (lower / "d" / "sym").symlink_to("f")
    os.mkfifo(lower / "d" / "fifo")
    os.link(lower / "d" / "f", lower / "d" / "f2")


def work_in(root: Path) -> dict[str, str]:
    """Everything that puts something into the upper; how each went."""

    def append(name: str) -> None:
        with (root / name).open("ab", buffering=0) as file:
            file.write(b"more")

    def unnamed() -> None:
        fd = os.open(root / "d", os.O_TMPFILE | os.O_RDWR)
        with syscalls.open_dir(directory := os.open(root, os.O_PATH), b"d") as parent:
            syscalls.link_fd(fd, parent.fd, b"linked")
        os.close(directory)
        os.close(fd)

    calls: dict[str, Callable[[], object]] = {
        "create": (root / "d" / "new").touch,
        "mkdir": (root / "d" / "newdir").mkdir,
        "create in it": (root / "d" / "newdir" / "x").touch,
        "symlink": lambda: (root / "d" / "newsym").symlink_to("target"),
        "mkfifo": lambda: os.mkfifo(root / "d" / "newfifo", 0o640),
        "mknod": lambda: os.mknod(root / "d" / "null", stat.S_IFCHR | 0o622, os.makedev(1, 3)),
        "write": lambda: append("d/f"),
        "link": lambda: os.link(root / "d" / "f2", root / "d" / "f3"),
        "chmod": lambda: (root / "d" / "h").chmod(0o600),
        "chown": lambda: os.chown(root / "d" / "fifo", 5, 6),
        "lchown": lambda: os.chown(root / "d" / "sym", 5, 6, follow_symlinks=False),
        "unlink": (root / "d" / "g").unlink,
        "create again": (root / "d" / "g").touch,
        "unlink again": (root / "d" / "g").unlink,
        "rmdir": (root / "d" / "gone").rmdir,
        "mkdir again": (root / "d" / "gone").mkdir,
        "rmdir again": (root / "d" / "gone").rmdir,
        "rename": lambda: (root / "d" / "moved").rename(root / "d" / "there"),
        "rename over": lambda: (root / "d" / "new").rename(root / "d" / "h"),
        "tmpfile": unnamed,
    }
    return {what: errno_of(call) for what, call in calls.items()}


def whole_projects(mount: Mount, layers: Layers, wanted: int) -> None:
    """What is in `d` of the upper is of project `wanted`, and the union shows what was done."""
    root = mount.path
    assert sorted(os.listdir(root / "d")) == sorted(
        ["f", "f2", "f3", "fifo", "h", "linked", "newdir", "newfifo", "newsym", "null", "sym", "there"]
    )
    assert (root / "d" / "f2").read_bytes() == b"lowermore"
    st = os.lstat(root / "d" / "sym")
    assert (st.st_uid, st.st_gid, os.readlink(root / "d" / "sym")) == (5, 6, "f")
    assert stat.filemode(os.stat(root / "d" / "newfifo").st_mode) == "prw-r-----"
    assert os.stat(root / "d" / "null").st_rdev == os.makedev(1, 3)
    found = projects(layers.upper)
    assert {name: number for name, number in found.items() if name.startswith("d") and number != wanted} == {}
    assert {"d", "d/f", "d/h", "d/linked", "d/newdir", "d/newdir/x", "d/there"} <= found.keys()


@pytest.mark.parametrize("where", ["upper", "work", "both", "other"])
def test_of_the_upper_s_project(where: str, xfs: Path, mode: Mode, layers: Layers, mounted: MountFactory) -> None:
    layers = Layers(xfs)
    build(layers.lower)
    numbers = {"upper": (7, None), "work": (None, 8), "both": (7, 7), "other": (7, 8)}[where]
    for path, number in zip((layers.upper, layers.work), numbers, strict=True):
        if number is not None:
            set_project(path, number)
    mount = mounted(layers=layers)
    tmpfile = "EOPNOTSUPP" if mode.transport == "pyfuse3" else "ok"
    outcomes = work_in(mount.path)
    assert {what: how for what, how in outcomes.items() if how != "ok"} == (
        {} if tmpfile == "ok" else {"tmpfile": "ENOTSUP"}
    )
    if tmpfile != "ok":
        (mount / "d" / "linked").touch()
    for _ in range(2):
        whole_projects(mount, layers, numbers[0] or 0)
        mount.remount()


def test_of_the_project_of_a_directory(xfs: Path, layers: Layers, mode: Mode, mounted: MountFactory) -> None:
    """A directory that was given one, in the mount or beneath it; work hands on another."""
    layers = Layers(xfs)
    build(layers.lower)
    set_project(layers.upper, 7)
    set_project(layers.work, 7)
    (layers.upper / "d").mkdir()
    set_project(layers.upper / "d", 9)
    mount = mounted(layers=layers)
    outcomes = work_in(mount.path)
    assert {what for what, how in outcomes.items() if how != "ok"} <= {"tmpfile"}
    if outcomes["tmpfile"] != "ok":
        (mount / "d" / "linked").touch()
    (mount / "mine").touch()
    assert errno_of(os.rename, mount / "mine", mount / "d" / "mine") == "EXDEV"
    assert errno_of(os.link, mount / "mine", mount / "d" / "mine") == "EXDEV"
    for _ in range(2):
        whole_projects(mount, layers, 9)
        assert projects(layers.upper)["mine"] == 7
        mount.remount()
    mount.unmount()
    assert not litter(layers.work)
    with OverlayFS(layers, "index=on") as kernel:
        whole_projects(kernel, layers, 9)
    mount.mount()
