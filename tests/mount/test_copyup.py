"""Copy-up: whole or not at all, unseen by whoever looks at the union."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import ROOTLESS, WRITETHROUGH, Layers, MountFactory, as_user, in_child, small_disk, wait_for
from tests.trees import (
    ACCESS,
    CAPABILITY,
    DEFAULT,
    KINDS,
    Tag,
    acl,
    capability,
    delete,
    describe,
    differences,
    errno_of,
    is_whiteout,
    make,
    snapshot,
)

MORE_MODES = (WRITETHROUGH,)

MINUTE = 60 * 1_000_000_000
#: An xattr that few may see, where there is such a thing.
SECRET = "user.secret" if ROOTLESS else "trusted.secret"

ACL = acl((Tag.USER_OBJ, 7), (Tag.USER, 5, 4242), (Tag.GROUP_OBJ, 5), (Tag.MASK, 7), (Tag.OTHER, 0))


def rich_tree(root: Path) -> Path:
    """`a/b/x` beneath `root`, each of the three with an owner, a mode, times, xattrs and an ACL of its own."""
    (root / "a/b").mkdir(parents=True)
    (root / "a/b/x").write_bytes(os.urandom(200_000))
    for number, name in enumerate(("a/b/x", "a/b", "a"), start=1):
        path = root / name
        os.chown(path, 100 + number, 200 + number)
        path.chmod(0o750)
        os.setxattr(path, ACCESS, ACL)
        if path.is_dir():
            os.setxattr(path, DEFAULT, ACL)
        os.setxattr(path, "user.colour", b"blue %d" % number)
        os.setxattr(path, SECRET, bytes(range(256)))
        os.utime(path, ns=(number * MINUTE + 1, number * MINUTE + 2))
    os.setxattr(root / "a/b/x", CAPABILITY, capability(10))
    return root / "a/b/x"


def by_chmod(path: Path) -> None:
    os.chmod(path, 0o711)


def by_chown(path: Path) -> None:
    os.chown(path, 9, 9)


def by_utime(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def by_write(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"x")


def by_append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def by_truncate(path: Path) -> None:
    os.truncate(path, 100)


def by_truncating_open(path: Path) -> None:
    path.write_bytes(b"")


def by_setxattr(path: Path) -> None:
    os.setxattr(path, "user.new", b"1")


def by_removexattr(path: Path) -> None:
    os.removexattr(path, "user.colour")


def by_mapping(path: Path) -> None:
    def write() -> None:
        with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as view:
            view[0:1] = b"x"

    in_child(write)


def by_link(path: Path) -> None:
    os.link(path, path.parent.parent.parent / "linked")


def by_rename(path: Path) -> None:
    os.rename(path, path.with_name("y"))
    os.rename(path.with_name("y"), path)


IN_PLACE = [
    by_chmod,
    by_chown,
    by_utime,
    by_write,
    by_append,
    by_truncate,
    by_truncating_open,
    by_setxattr,
    by_removexattr,
    by_mapping,
    by_link,
]

Way = Callable[[Path], None]

#: What each way may change of the object itself.
CHANGES: dict[Way, set[str]] = {
    by_chmod: {"mode", "xattrs"},
    by_chown: {"owner", "xattrs"},
    by_utime: {"mtime_ns"},
    by_setxattr: {"xattrs"},
    by_removexattr: {"xattrs"},
    by_link: {"nlink"},
}
_WRITES = {"content", "size", "mtime_ns", "xattrs"}


@pytest.mark.parametrize("way", IN_PLACE, ids=lambda way: str(way.__name__))
@pytest.mark.owners
def test_copy_up_keeps_everything_it_was_not_asked_to_change(way: Way, layers: Layers, mounted: MountFactory) -> None:
    """Of the object, of the directories above it, and in upper as in the union; the mode may follow a removed ACL."""
    rich_tree(layers.lower)
    mount = mounted()
    path = mount / "a/b/x"
    before = {name: describe(mount / name) for name in ("a", "a/b", "a/b/x")}
    way(path)
    for name in ("a", "a/b"):
        assert describe(mount / name) == before[name]
        assert describe(layers.upper / name) == before[name]
    after = describe(path)
    changed = {fact for fact in after if after[fact] != before["a/b/x"][fact]}
    assert changed <= CHANGES.get(way, _WRITES)
    assert describe(layers.upper / "a/b/x") == after
    mount.remount()
    assert describe(path) == after


@pytest.mark.owners
def test_the_other_xattrs_survive_a_change_of_one(layers: Layers, mounted: MountFactory) -> None:
    rich_tree(layers.lower)
    mount = mounted()
    path = mount / "a/b/x"
    os.setxattr(path, "user.new", b"1")
    assert os.getxattr(path, SECRET) == bytes(range(256))
    assert os.getxattr(path, "user.colour") == b"blue 1"
    assert os.getxattr(path, ACCESS) == ACL
    assert os.getxattr(path, CAPABILITY) == capability(10)


@pytest.mark.parametrize("way", [*IN_PLACE, by_rename], ids=lambda way: str(way.__name__))
@pytest.mark.owners
def test_one_inode_for_life(way: Way, layers: Layers, mounted: MountFactory) -> None:
    """st_ino and st_dev, by name, through open descriptors and in the listing, before and after."""
    rich_tree(layers.lower)
    mount = mounted()
    path = mount / "a/b/x"
    names = ("a", "a/b", "a/b/x")
    before = [os.stat(mount / name).st_ino for name in names]
    device = os.stat(path).st_dev
    fd, directory = os.open(path, os.O_RDONLY), os.open(path.parent, os.O_RDONLY)
    try:
        way(path)
        assert [os.stat(mount / name).st_ino for name in names] == before
        assert (os.fstat(fd).st_ino, os.fstat(directory).st_ino) == (before[2], before[1])
        assert os.fstat(fd).st_dev == os.stat(path).st_dev == device
        with os.scandir(path.parent) as entries:
            assert [(entry.name, entry.inode()) for entry in entries] == [("x", before[2])]
    finally:
        os.close(fd)
        os.close(directory)


@pytest.mark.parametrize("kind", KINDS)
def test_unlink_never_copies_up(kind: str, layers: Layers, mounted: MountFactory) -> None:
    """Only the parent is copied up, and the whiteout is all there is in it."""
    (layers.lower / "d").mkdir()
    make(layers.lower / "d/x", kind)
    if kind == "file":
        with (layers.lower / "d/x").open("r+b") as file:
            file.truncate(1 << 40)  # a copy of which, holes and all, would take a while
    mount = mounted()
    delete(mount / "d/x")
    assert os.listdir(layers.upper) == ["d"]
    assert os.listdir(layers.upper / "d") == ["x"]
    assert is_whiteout(layers.upper / "d/x")


@pytest.mark.owners
def test_reading_never_copies_up(layers: Layers, mounted: MountFactory) -> None:
    rich_tree(layers.lower)
    mount = mounted()
    path = mount / "a/b/x"
    snapshot(mount.path)
    fd = os.open(path, os.O_RDONLY)
    os.read(fd, 10)
    os.fsync(fd)
    os.close(fd)
    os.access(path, os.W_OK)
    assert errno_of(os.mkdir, path) == "EEXIST"
    assert as_user(lambda: errno_of(os.chmod, path, 0)) == "EACCES"
    assert os.listdir(layers.upper) == []


@pytest.mark.deviates
def test_sparse_files_stay_sparse(layers: Layers, mounted: MountFactory) -> None:
    """Data at three places of a gigabyte: as many blocks after copy-up. Overlayfs fills holes next to data."""
    lower = layers.lower / "x"
    with lower.open("wb", buffering=0) as file:
        for offset in (0, 300 << 20, (1 << 30) - 4096):
            os.pwrite(file.fileno(), os.urandom(4096), offset)
        file.truncate(1 << 30)
    expected = _data_of(lower)
    mount = mounted()
    os.chmod(mount / "x", 0o600)
    assert os.stat(layers.upper / "x").st_blocks <= os.stat(lower).st_blocks + 8
    assert _data_of(layers.upper / "x") == expected
    assert os.stat(mount / "x").st_size == 1 << 30


def _data_of(path: Path) -> list[tuple[int, bytes]]:
    """Each stretch of data in a file that has holes: where it begins and what it is."""
    found = []
    with path.open("rb", buffering=0) as file:
        fd, end = file.fileno(), 0
        while errno_of(os.lseek, fd, end, os.SEEK_DATA) == "ok":
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
            found.append((start, os.pread(fd, end - start, start)))
    return found


def test_large_files_are_copied_exactly(layers: Layers, mounted: MountFactory) -> None:
    with (layers.lower / "x").open("wb") as file:
        for _ in range(70):
            file.write(os.urandom(1 << 20))
        file.write(b"tail")
    mount = mounted()
    before = describe(mount / "x")
    os.chmod(mount / "x", 0o600)
    assert describe(layers.upper / "x")["content"] == before["content"]
    assert describe(mount / "x") == {**before, "mode": "0o600"}


@pytest.mark.owners
def test_files_of_the_middle_layer_are_copied_up(layers: Layers, mounted: MountFactory) -> None:
    """The directory's attributes are the topmost layer's, the file comes from wherever it is."""
    rich_tree(layers.lower)
    top = layers.push()
    (top / "a").mkdir(mode=0o711)
    os.chown(top / "a", 77, 77)
    mount = mounted()
    before = snapshot(mount.path)
    os.setxattr(mount / "a/b/x", "user.new", b"1")
    os.removexattr(mount / "a/b/x", "user.new")
    assert differences(before, snapshot(mount.path)) == []
    assert stat.S_IMODE(os.stat(layers.upper / "a").st_mode) == 0o711


def test_two_processes_copy_one_file_up(layers: Layers, mounted: MountFactory) -> None:
    with (layers.lower / "x").open("wb") as file:
        file.write(os.urandom(30 << 20))
    data = bytearray((layers.lower / "x").read_bytes())
    mount = mounted()
    writers = []
    for number in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                with (mount / "x").open("r+b", buffering=0) as file:
                    os.pwrite(file.fileno(), b"writer %d" % number, number * 1000)
                os._exit(0)
            finally:
                os._exit(1)
        writers.append(pid)
        data[number * 1000 : number * 1000 + 8] = b"writer %d" % number
    assert [os.waitpid(pid, 0)[1] for pid in writers] == [0] * 4
    assert (mount / "x").read_bytes() == data


# Copy-up that fails.


@pytest.fixture
def cramped(disk: Path) -> Iterator[Layers]:
    """Upper and work on a disk of 16 MiB, a file of 32 MiB in the lower: it cannot be copied up."""
    with small_disk(disk, 16) as small:
        layers = Layers(disk, lowers=[disk / "lower"], upper_root=small)
        (disk / "lower/d").mkdir(parents=True)
        with (disk / "lower/d/big").open("wb") as file:
            for _ in range(32):
                file.write(os.urandom(1 << 20))
        (disk / "lower/d/small").write_bytes(b"small")
        os.utime(disk / "lower/d", ns=(1, 1))
        yield layers


def _change(way: str, path: Path) -> None:
    """Change a file and wait until the change must be on its way to the disk."""
    if way == "chmod":
        os.chmod(path, 0o600)
    elif way == "link":
        os.link(path, path.with_name("link"))
    elif way == "rename":
        os.rename(path, path.with_name("renamed"))
    elif way == "truncate":
        os.truncate(path, 30 << 20)
    elif way == "setxattr":
        os.setxattr(path, "user.a", b"1")
    else:
        with path.open("r+b", buffering=0) as file:
            file.write(b"x")
            os.fsync(file.fileno())


@pytest.mark.parametrize("way", ["chmod", "link", "rename", "truncate", "setxattr", "write"])
@pytest.mark.privileged
def test_a_copy_up_without_space_changes_nothing(way: str, cramped: Layers, mounted: MountFactory) -> None:
    mount = mounted(layers=cramped)
    before = snapshot(mount.path)
    for _ in range(2):
        assert errno_of(_change, way, mount / "d/big") == "ENOSPC"
        # What was written is in the kernel's cache already, which hears of the failure a moment later than the writer.
        wait_for(lambda: differences(before, snapshot(mount.path)) == [], "the view is not what it was", seconds=5)
        assert [path for path in cramped.upper.rglob("*") if path.is_file()] == []
        assert (cramped.work / "work").exists()
        assert os.listdir(cramped.work / "work") == []
    mount.remount()
    assert differences(before, snapshot(mount.path)) == []
    _change(way, mount / "d/small")
    assert (mount / "d").is_dir()


@pytest.mark.privileged
def test_a_full_disk_is_told_to_the_writer(cramped: Layers, mounted: MountFactory) -> None:
    mount = mounted(layers=cramped)

    def fill() -> None:
        with (mount / "d/new").open("wb", buffering=0) as file:
            for _ in range(40):
                file.write(bytes(1 << 20))
            os.fsync(file.fileno())

    assert errno_of(fill) == "ENOSPC"
    (mount / "d/new").unlink()
    (mount / "d/small").write_bytes(b"fits again")
    assert (mount / "d/small").read_bytes() == b"fits again"
