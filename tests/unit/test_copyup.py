"""Copy-up: the same object in the upper, with all that belongs to it, and nothing else that anybody could see."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import harness
from tests.harness import Layers, MountFactory
from tests.trees import ACCESS, CAPABILITY, DEFAULT, Tag, acl, capability
from tests.union.trees import OLD, Obj, build, directory, read_record, regular, symlink
from unionfsd import filecopy, steps, syscalls
from unionfsd.copyup import CopyUp
from unionfsd.fdcache import FdCache
from unionfsd.filecopy import copy_data, share_data
from unionfsd.inodes import DirNode, Node, NodeTable, child
from unionfsd.lookup import Resolver
from unionfsd.metadata import Keeping, Metadata, apply_metadata, read_metadata
from unionfsd.metrics import Counters
from unionfsd.opening import open_stack
from unionfsd.options import MountConfig
from unionfsd.owners import Owners
from unionfsd.steps import Blocking, Gate, Op
from unionfsd.workdir import open_workdir

PAGE = 4096


class Opened:
    """The parts of a union that copy up, over `layers`."""

    def __init__(self, layers: Layers, **options: Any) -> None:
        config = MountConfig(
            lowerdirs=tuple(os.fsencode(path) for path in layers.lowers),
            upperdir=os.fsencode(layers.upper),
            workdir=os.fsencode(layers.work),
            mountpoint=os.fsencode(layers.mnt),
            **options,
        )
        self.upper = layers.upper
        self.litter = layers.work / "work"
        self.stack = open_stack(config)
        self.fds = FdCache(FdCache.MINIMUM)
        self.resolver = Resolver(self.stack, self.fds, follow_redirects=False)
        root = self.resolver.root()
        self.work = open_workdir(self.stack, config)
        self.resolver.kept_in = self.work.fd
        self.table = NodeTable(root.entry, root.ino, self.fds, self.resolver.kept.released, let_go=self.work.let_go)
        self.counters = Counters()
        self.copy_up = CopyUp(self.resolver, self.work, self.fds, self.counters, Keeping(Owners(config), None))

    def node(self, path: str) -> Node:
        """The node of `path`, as after lookups of each of its names."""
        at: Node = self.table.root
        for name in os.fsencode(path).split(b"/"):
            assert isinstance(at, DirNode)
            known = child(at, name)
            if known is None:
                hit = self.resolver.find(at, name)
                assert hit is not None
                known = self.table.add(at, name, hit.entry, hit.ino, directory=stat.S_ISDIR(hit.st.st_mode))
                self.table.looked_up(known)
            at = known
        return at

    def up(self, path: str, size: int | None = None) -> Node:
        """Copy up what `path` is."""
        node = self.node(path)
        steps.run(self.copy_up.node(node, size))
        return node

    def close(self) -> None:
        self.table.close()
        self.fds.close()
        self.work.close()
        self.stack.close()


@contextlib.contextmanager
def opened(layers: Layers, **options: Any) -> Iterator[Opened]:
    union = Opened(layers, **options)
    try:
        yield union
    finally:
        union.close()


@pytest.fixture
def union(layers: Layers) -> Iterator[Opened]:
    with opened(layers) as union:
        yield union
        assert os.listdir(union.litter) == []


def errno_of(call: Callable[..., object], *args: Any) -> int | None:
    """errno that `call` fails with; keeps nothing of its frames, and so no descriptor."""
    try:
        call(*args)
    except OSError as exc:
        return exc.errno
    pytest.fail("it did not fail")


def lower_tree(layers: Layers, root: Obj) -> None:
    """Make the lower what `root` says."""
    layers.lower.rmdir()
    build(os.fsencode(layers.lower), root)


# Data.


@contextlib.contextmanager
def files(where: Path, content: Callable[[int], object]) -> Iterator[tuple[int, int]]:
    """Descriptors of a file made by `content`, and of an empty one."""
    source = os.open(where, os.O_TMPFILE | os.O_RDWR)
    target = os.open(where, os.O_TMPFILE | os.O_RDWR)
    try:
        content(source)
        yield source, target
    finally:
        os.close(source)
        os.close(target)


def data_map(fd: int) -> list[tuple[int, int]]:
    """Ranges of a file that hold data."""
    ranges: list[tuple[int, int]] = []
    end = 0
    with contextlib.suppress(OSError):  # ENXIO: no more data
        while True:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = os.lseek(fd, start, os.SEEK_HOLE)
            ranges.append((start, end))
    return ranges


def read_all(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size + 1, 0)


_layouts = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 3 * PAGE)), max_size=5)


@pytest.mark.parametrize("kernel_copies", [True, False])
@given(layout=_layouts, tail=st.integers(0, 3 * PAGE), share=st.floats(0, 1.2), sync=st.booleans())
@settings(deadline=None, max_examples=60)
def test_data_comes_along_and_holes_stay_holes(
    kernel_copies: bool, layout: list[tuple[int, int]], tail: int, share: float, sync: bool
) -> None:
    """Pieces of data anywhere, a hole at the end, and any length of it asked for; in strides if it is synced next."""

    def write(fd: int) -> None:
        for page, length in layout:
            os.pwrite(fd, os.urandom(length), page * PAGE)
        os.ftruncate(fd, os.fstat(fd).st_size + tail)

    with files(harness.DISK, write) as (source, target), pytest.MonkeyPatch.context() as patch:
        if not kernel_copies:
            refuse_call(patch, "copy_range", errno.EXDEV)
        found = os.fstat(source)
        length = min(found.st_size, int(found.st_size * share))
        patch.setattr(filecopy, "_STRIDE", PAGE)
        copied = copy_data(source, target, length, found, sync=sync)
        assert read_all(target) == read_all(source)[:length]
        assert copied <= length
        if copied < length:
            assert data_map(target) == [(start, min(end, length)) for start, end in data_map(source) if start < length]


def refuse_call(patch: pytest.MonkeyPatch, name: str, number: int) -> None:
    def call(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    patch.setattr(syscalls, name, call)


def test_a_hole_is_not_read() -> None:
    """A terabyte of nothing."""
    with files(harness.DISK, lambda fd: os.pwrite(fd, b"end", 1 << 40)) as (source, target):
        assert copy_data(source, target, (1 << 40) + 3, os.fstat(source), sync=True) <= PAGE
        assert os.fstat(target).st_size == (1 << 40) + 3
        assert os.pread(target, 10, 1 << 40) == b"end"


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_where_holes_cannot_be_found_everything_is_copied(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def lseek(fd: int, offset: int, whence: int) -> int:
        raise OSError(number, os.strerror(number))

    with files(harness.DISK, lambda fd: os.pwrite(fd, b"end", 10 * PAGE)) as (source, target):
        with monkeypatch.context() as patch:
            patch.setattr("os.lseek", lseek)
            assert copy_data(source, target, 10 * PAGE + 3, os.fstat(source), sync=True) == 10 * PAGE + 3
        assert read_all(target) == read_all(source)


@pytest.mark.parametrize("kernel_copies", [True, False])
def test_a_source_that_shrinks_is_an_error(kernel_copies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with files(harness.DISK, lambda fd: os.pwrite(fd, b"x" * 10 * PAGE, 0)) as (source, target):
        found = os.fstat(source)
        os.ftruncate(source, 5 * PAGE)
        if not kernel_copies:
            refuse_call(monkeypatch, "copy_range", errno.EXDEV)
        with pytest.raises(OSError) as caught:
            copy_data(source, target, found.st_size, found, sync=False)
        assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("name", ["clone", "copy_range"])
def test_a_failing_disk_is_not_taken_for_a_missing_feature(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with files(harness.DISK, lambda fd: os.pwrite(fd, b"x" * PAGE, 0)) as (source, target):
        refuse_call(monkeypatch, name, errno.ENOSPC)
        with pytest.raises(OSError) as caught:
            share_data(source, target) or copy_data(source, target, PAGE, os.fstat(source), sync=False)
        assert caught.value.errno == errno.ENOSPC


@pytest.fixture(scope="module")
def reflinks() -> Iterator[Path]:
    """A file system whose files can share blocks."""
    with tempfile.TemporaryDirectory(dir=harness.DISK, prefix="unionfsd-") as scratch:
        image, mountpoint = Path(scratch, "image"), Path(scratch, "mnt")
        with image.open("wb") as file:
            file.truncate(320 << 20)
        harness.run("mkfs.xfs", "-q", "-m", "reflink=1", image)
        mountpoint.mkdir()
        harness.run("mount", "-o", "loop", image, mountpoint)
        yield mountpoint
        harness.run("umount", mountpoint)


@pytest.mark.skipif(shutil.which("mkfs.xfs") is None, reason="needs mkfs.xfs (xfsprogs)")
def test_blocks_are_shared_where_that_can_be(reflinks: Path) -> None:
    size = 64 << 20
    with files(reflinks, lambda fd: [os.pwrite(fd, os.urandom(1 << 20), at << 20) for at in range(64)]) as (
        source,
        target,
    ):
        os.fsync(source)
        before = free_space(reflinks)
        assert share_data(source, target)
        os.fsync(target)
        assert before - free_space(reflinks) < size // 8
        assert os.pread(target, 1 << 20, size // 2) == os.pread(source, 1 << 20, size // 2)
        os.pwrite(target, b"changed", 0)
        assert os.pread(source, 7, 0) != b"changed"


def free_space(path: Path) -> int:
    found = os.statvfs(path)
    return found.f_bfree * found.f_frsize


# Metadata.

ACL = (ACCESS, acl((Tag.USER_OBJ, 6), (Tag.USER, 7, 5), (Tag.GROUP_OBJ, 0), (Tag.MASK, 7), (Tag.OTHER, 0)))

OBJECTS: dict[str, Obj] = {
    "file": Obj(stat.S_IFREG, b"data", 0o640, 1000, 2000, OLD, xattrs=((b"trusted.t", b"\0"), (b"user.u", b""))),
    "suid file": regular(b"program", mode=0o6755),
    "unreadable file": regular(b"secret", mode=0),
    "capable file": Obj(stat.S_IFREG, b"program", 0o755, 1000, 1000, xattrs=((CAPABILITY.encode(), capability(7)),)),
    "file with an ACL": Obj(stat.S_IFREG, mode=0o670, xattrs=((ACL[0].encode(), ACL[1]),)),
    "directory": Obj(
        stat.S_IFDIR,
        mode=0o3711,
        uid=12,
        gid=34,
        xattrs=((DEFAULT.encode(), acl((Tag.USER_OBJ, 7), (Tag.GROUP_OBJ, 5), (Tag.OTHER, 1))), (b"user.u", b"1")),
    ),
    "symlink": Obj(stat.S_IFLNK, b"to/where", 0o777, 12, 34, xattrs=((b"trusted.t", b"1"),)),
    "fifo": Obj(stat.S_IFIFO, mode=0o4600, uid=12),
    "socket": Obj(stat.S_IFSOCK, mode=0o777),
    "device": Obj(stat.S_IFCHR, mode=0o600, rdev=os.makedev(1, 3)),
    "nested": Obj(stat.S_IFREG, xattrs=((b"trusted.overlay.overlay.opaque", b"y"), (b"user.overlay.overlay.x", b"")))
}  # fmt: skip


@pytest.mark.parametrize("privately", [False, True], ids=["synced", "volatile"])
@pytest.mark.parametrize("kind", OBJECTS)
def test_everything_comes_along(kind: str, privately: bool, layers: Layers) -> None:
    lower_tree(layers, directory({b"d": directory({b"object": OBJECTS[kind]}, mode=0o751)}))
    before = {path: read_record(os.fsencode(layers.lower / path)) for path in ("d", "d/object")}
    with opened(layers, volatile=privately) as union:
        node = union.up("d/object")
        assert node.entry.upper
    after = {path: read_record(os.fsencode(layers.upper / path)) for path in ("d", "d/object")}
    ours = (b"trusted.overlay.origin", b"trusted.overlay.impure")
    for path, record in after.items():
        kept = tuple(pair for pair in record.xattrs if pair[0] not in ours)
        assert record._replace(xattrs=kept) == before[path]


def test_marks_of_the_lower_stay_behind(layers: Layers) -> None:
    marked = tuple(
        (namespace + name, b"y")
        for namespace in (b"trusted.overlay.", b"user.overlay.")
        for name in (b"opaque", b"impure", b"nlink", b"protattr")
    )
    foreign = ((b"user.fuseoverlayfs.opaque", b"y"), (b"user.containers.override_stat", b"0:0:755:dir"))
    lower_tree(layers, directory({b"d": Obj(stat.S_IFDIR, mode=0o755, xattrs=(*marked, *foreign))}))
    with opened(layers) as union:
        union.up("d")
    assert os.listxattr(layers.upper / "d") == ["trusted.overlay.origin"]


def test_what_decides_about_rights_must_come_along(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upper without ACLs must not open a file up; one without users' xattrs loses only those."""
    values = {"plain": ("user.tag", b""), "guarded": ACL, "capable": (CAPABILITY, capability(7))}
    for name, xattr in values.items():
        (layers.lower / name).touch()
        os.setxattr(layers.lower / name, *xattr)
    real = syscalls.setxattr

    def setxattr(fd: int, name: bytes, value: bytes, flags: int = 0) -> None:
        if not name.startswith(b"trusted.overlay."):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        real(fd, name, value, flags)

    monkeypatch.setattr(syscalls, "setxattr", setxattr)
    with opened(layers) as union:
        union.up("plain")
        assert os.listxattr(layers.upper / "plain") == ["trusted.overlay.origin"]
        for name in ("guarded", "capable"):
            assert errno_of(union.up, name) == errno.EOPNOTSUPP
    assert os.listdir(layers.upper) == ["plain"]


def test_metadata_is_read_and_applied_whole(disk: Path) -> None:
    build(os.fsencode(disk / "a"), Obj(stat.S_IFDIR, mode=0o1751, uid=3, gid=4, xattrs=((b"user.u", b"v"),)))
    (disk / "b").mkdir()
    with syscalls.Fd(os.open(disk / "a", os.O_PATH)) as a, syscalls.Fd(os.open(disk / "b", os.O_PATH)) as b:
        metadata: Metadata = read_metadata(a.fd, None)
        owners = Owners(MountConfig(lowerdirs=(), mountpoint=b"/"))
        apply_metadata(b.fd, metadata, Keeping(owners, None))
    assert read_record(os.fsencode(disk / "a")) == read_record(os.fsencode(disk / "b"))


# What nobody sees.


def test_parents_keep_their_times(union: Opened, layers: Layers) -> None:
    (layers.lower / "d/e").mkdir(parents=True)
    (layers.lower / "d/e/file").write_text("content")
    for path in (layers.lower / "d/e", layers.lower / "d", layers.upper):
        os.utime(path, ns=(OLD, OLD + 1))
    union.up("d/e/file")
    assert {(layers.upper / path).stat().st_mtime_ns for path in ("", "d", "d/e")} == {OLD + 1}


def test_a_copy_up_is_published_by_one_call(union: Opened, layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    """At no call before it does the upper show a part of the object."""
    (layers.lower / "file").write_text("content")
    seen: list[tuple[str, bool]] = []
    for name in syscalls.MUTATING:
        monkeypatch.setattr(syscalls, name, watched(name, getattr(syscalls, name), layers.upper / "file", seen))
    union.up("file")
    before = [name for name, there in seen if not there]
    assert before[-1] == "link_fd"
    assert "fsync" in before
    assert [there for _, there in seen] == [False] * len(before) + [True] * (len(seen) - len(before))
    assert (layers.upper / "file").read_text() == "content"


def watched(name: str, call: Callable[..., Any], path: Path, seen: list[tuple[str, bool]]) -> Callable[..., Any]:
    """`call`, which first notes its name and whether `path` is there."""

    def watching(*args: Any, **kwargs: Any) -> Any:
        seen.append((name, os.path.lexists(path)))
        return call(*args, **kwargs)

    return watching


def test_a_copy_up_for_which_there_is_no_room_leaves_nothing(disk: Path) -> None:
    """Not even the directories above it."""
    with harness.small_disk(disk, 16) as small:
        layers = Layers(disk, upper_root=small)
        (layers.lower / "d/e").mkdir(parents=True)
        (layers.lower / "d/e/large").write_bytes(os.urandom(20 << 20))
        (layers.lower / "d/e/small").write_text("content")
        with opened(layers) as union:
            for _ in range(2):
                assert errno_of(union.up, "d/e/large") == errno.ENOSPC
                assert not union.node("d/e/large").entry.upper
                assert list(layers.upper.iterdir()) == []
                assert os.listdir(union.litter) == []
            union.up("d/e/small")
            assert (layers.upper / "d/e/small").read_text() == "content"
            assert (union.counters.copy_ups, union.counters.copied_bytes) == (1, 7)


def test_what_was_there_first_is_not_replaced(union: Opened, layers: Layers) -> None:
    """Somebody put it into the upper behind our back."""
    (layers.lower / "file").write_text("lower")
    node = union.node("file")
    (layers.upper / "file").write_text("precious")
    with pytest.raises(FileExistsError):
        steps.run(union.copy_up.node(node))
    assert (layers.upper / "file").read_text() == "precious"


# How much of it.


@pytest.mark.parametrize(("size", "expected"), [(0, b""), (3, b"con"), (7, b"content"), (100, b"content")])
def test_what_is_about_to_be_cut_off_is_not_copied(size: int, expected: bytes, union: Opened, layers: Layers) -> None:
    (layers.lower / "file").write_bytes(b"content")
    os.utime(layers.lower / "file", ns=(OLD, OLD))
    union.up("file", size)
    found = (layers.upper / "file").stat()
    assert found.st_atime_ns == OLD
    assert found.st_mtime_ns > OLD
    assert (layers.upper / "file").read_bytes() == expected


# Marks.


def test_the_kernel_records_the_same(layers: Layers, disk: Path, overlayfs: MountFactory) -> None:
    """Origins of files, directories and others, and which directories are impure."""
    lower_tree(
        layers, directory({b"d": directory({b"file": regular(), b"link": symlink(), b"fifo": Obj(stat.S_IFIFO)})})
    )
    os.utime(layers.lower / "d", ns=(OLD, OLD))
    (disk / "kernel").mkdir()
    theirs = Layers(disk / "kernel", lowers=layers.lowers)
    with overlayfs(layers=theirs) as mount:
        for name in ("file", "link", "fifo"):
            os.utime(mount / "d" / name, ns=(OLD, OLD + 7), follow_symlinks=False)
    with opened(layers) as union:
        for name in ("file", "link", "fifo"):
            union.up(f"d/{name}")
    for path in ("", "d", "d/file", "d/link", "d/fifo"):
        ours, kernels = (dict(read_record(os.fsencode(side.upper / path)).xattrs) for side in (layers, theirs))
        kernels.pop(b"trusted.overlay.uuid", None)  # of the whole union, at its root
        assert ours == kernels, path


def test_marks_that_the_upper_does_not_take_are_counted(
    union: Opened, layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    (layers.lower / "file").write_text("content")
    refuse_call(monkeypatch, "setxattr", errno.ENOSPC)
    union.up("file")
    assert (layers.upper / "file").read_text() == "content"
    assert union.counters.skipped_marks == 2  # origin of the file, impure mark of the root


# Several at once.


def begin(op: Op[None]) -> steps.Step:
    """Run `op` to its first step."""
    step = op.send(None)
    assert isinstance(step, Blocking | Gate)
    return step


def end(op: Op[None], step: steps.Step) -> None:
    """Do `step` and run `op` from it to its end."""
    with pytest.raises(StopIteration):
        op.send(step.fn() if isinstance(step, Blocking) else None)


def test_two_copy_ups_of_one_file_are_one(union: Opened, layers: Layers) -> None:
    (layers.lower / "file").write_text("content")
    node = union.node("file")
    first, second = union.copy_up.node(node), union.copy_up.node(node)
    copying, waiting = begin(first), begin(second)
    assert isinstance(copying, Blocking)
    assert isinstance(waiting, Gate)
    before = waiting.opened
    end(first, copying)
    assert (before, waiting.opened) == (False, True)
    end(second, waiting)
    assert union.counters.copy_ups == 1


def test_copy_ups_in_a_row_leave_a_file_for_the_next_one(
    union: Opened, layers: Layers, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("zero", "one"):
        (layers.lower / name).write_text("1")
    (layers.lower / "two").write_text("two")
    (layers.lower / "two").chmod(0o755)
    (layers.lower / "three").write_text("3")
    union.up("zero")
    first = union.copy_up.node(union.node("one"))
    copying = begin(first)
    assert isinstance(copying, Blocking)
    assert copying.then is not None
    end(first, copying)
    copying.then()
    refuse_call(monkeypatch, "tmpfile_at", errno.ENOSPC)
    union.up("two")
    assert (layers.upper / "two").read_text() == "two"
    assert stat.S_IMODE((layers.upper / "two").stat().st_mode) == 0o755
    with pytest.raises(OSError, match="No space"):
        union.up("three")


def test_who_waited_for_a_copy_up_that_failed_tries_again(union: Opened, layers: Layers) -> None:
    (layers.lower / "file").write_text("content")
    node = union.node("file")
    first, second = union.copy_up.node(node), union.copy_up.node(node)
    begin(first)
    waiting = begin(second)
    with pytest.raises(OSError):
        first.throw(OSError(errno.ENOSPC, "full"))
    assert isinstance(waiting, Gate)
    assert waiting.opened
    copying = second.send(None)
    end(second, copying)
    assert node.entry.upper
    assert (layers.upper / "file").read_text() == "content"


def test_a_file_that_loses_its_name_meanwhile_gets_none(union: Opened, layers: Layers) -> None:
    """It lives on in work, for those who have it open, until the kernel forgets it."""
    (layers.lower / "d").mkdir()
    (layers.lower / "d/file").write_text("content")
    node = union.node("d/file")
    op = union.copy_up.node(node)
    copying = begin(op)
    parent = node.parent
    assert parent is not None
    union.table.unname(parent, b"file")
    end(op, copying)
    assert list(layers.upper.iterdir()) == []
    with union.resolver.open_object(node) as fd:
        assert os.pread(os.open(syscalls.proc_path(fd.fd), os.O_RDONLY), 100, 0) == b"content"
    assert [name.startswith("#o") for name in os.listdir(union.litter)] == [True]
    union.table.forget(node.nodeid, 1)
    assert os.listdir(union.litter) == []


def test_a_file_is_published_under_the_name_it_has_by_then(union: Opened, layers: Layers) -> None:
    (layers.lower / "file").write_text("content")
    (layers.upper / "e").mkdir()
    node, there = union.node("file"), union.node("e")
    assert isinstance(there, DirNode)
    op = union.copy_up.node(node)
    copying = begin(op)
    union.table.move(union.table.root, b"file", there, b"renamed")
    end(op, copying)
    assert (layers.upper / "e/renamed").read_text() == "content"
    assert not (layers.upper / "file").exists()


def test_a_node_is_kept_while_it_is_copied(union: Opened, layers: Layers) -> None:
    (layers.lower / "file").write_text("content")
    node = union.node("file")
    op = union.copy_up.node(node)
    copying = begin(op)
    union.table.forget(node.nodeid, 1)
    assert union.table.get(node.nodeid) is node
    end(op, copying)


def test_small_files_of_a_volatile_mount_are_copied_at_once(layers: Layers) -> None:
    (layers.lower / "small").write_bytes(b"x" * (64 << 10))
    (layers.lower / "large").write_bytes(b"x" * ((64 << 10) + 1))
    with opened(layers, volatile=True) as union:
        with pytest.raises(StopIteration):
            union.copy_up.node(union.node("small")).send(None)
        op = union.copy_up.node(union.node("large"))
        copying = begin(op)
        assert isinstance(copying, Blocking)
        end(op, copying)


def test_the_descriptor_of_the_copy_is_that_of_the_node(union: Opened, layers: Layers) -> None:
    """Whoever had the file open for reading reads what is written from then on."""
    (layers.lower / "file").write_text("content")
    node = union.up("file")
    state = node.state()
    assert state.writable
    assert state.fd is not None
    assert os.path.samestat(os.fstat(state.fd.fd), os.stat(layers.upper / "file"))
