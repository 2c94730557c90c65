"""A random program run against a union and against a plain directory with the same content, step by step.

After every step both must have answered the same and show the same tree, times included; at the end kernel overlayfs
must show that tree of the layers, too. One difference is allowed: a directory that has a lower part is not renamed
(EXDEV) without redirect_dir, nor when its path makes too long a redirect.

UNIONFSD_SOAK_SECONDS=N runs other random programs until N seconds have passed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.harness import ROOTLESS
from tests.union.client import RENAME_EXCHANGE, RENAME_NOREPLACE, UMASK, Client, FileSystem, Path, Plain, union_snapshot
from tests.union.stack import Stack, has_kernel_overlayfs, scratch_directory
from tests.union.strategies import WANTED_NAMES, contents, modes, stacks
from tests.union.trees import OLD, Obj, Tree, diff, plant, settled, snapshot

SOAK_SECONDS = float(os.environ.get("UNIONFSD_SOAK_SECONDS", "0"))

names = st.sampled_from(WANTED_NAMES)
picks = st.integers(0, 63)
offsets = st.sampled_from([0, 0, 1, 5, 4095, 10_000])
sizes = st.sampled_from([0, 1, 5, 4096, 10_000])
times = st.integers(0, 10**6).map(lambda n: OLD - 10**12 + n)
devices = st.sampled_from([(stat.S_IFIFO, 0), (stat.S_IFSOCK, 0), (stat.S_IFCHR, os.makedev(1, 3)), (stat.S_IFREG, 0)])
# The kernel lets nobody near names in `trusted` who has no rights over the machine.
xattr_names = st.sampled_from([b"user.tag", b"user.other" if ROOTLESS else b"trusted.tag", b"user.other"])
rename_flags = st.sampled_from([0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE])


#: Bytes of a path from which on a redirect may be too long: it is made of the path in the lowers, which a rename of a
#: directory above may have made shorter since.
LONG = 100


class Outcome:
    """What an operation did: its result, or the errno it failed with."""

    def __init__(self, operation: Callable[[], Any]) -> None:
        self.errno = 0
        self.value = None
        try:
            self.value = operation()
        except OSError as exc:
            self.errno = exc.errno or -1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Outcome) and (self.errno, self.value) == (other.errno, other.value)

    def __hash__(self) -> int:
        return hash(self.errno)

    def __repr__(self) -> str:
        return errno.errorcode[self.errno] if self.errno else f"ok: {self.value!r}"


class UnionMachine(RuleBasedStateMachine):
    """The program: `client` is the union, `plain` the directory."""

    def __init__(self) -> None:
        super().__init__()
        self.resources = contextlib.ExitStack()
        self.kernel = KERNEL

    @initialize(
        layers=stacks(),
        redirect_dir=st.sampled_from(["on", "off"]),
        revalidate=st.booleans(),
        compare_always=st.booleans(),
    )
    def set_up(self, layers: list[Obj], redirect_dir: str, revalidate: bool, compare_always: bool) -> None:
        self.redirect_dir = redirect_dir
        self.since_ns = time.time_ns() - 10**9
        self.compare_always = compare_always
        self.revalidate = revalidate
        scratch = self.resources.enter_context(scratch_directory())
        self.stack = Stack(scratch, layers[1:], layers[0])
        self.plain_root = scratch + b"/plain"
        plant(self.plain_root, self.stack.expected)
        self.plain = Plain(self.plain_root)
        # Directories made by the program have no lower part; told by inode number, which a rename keeps.
        self.pure: set[int] = set()
        self.handles: list[tuple[int, int]] = []
        self.descriptors = len(os.listdir("/proc/self/fd"))
        self.mount()
        if self.kernel:
            assert diff(self.stack.kernel_tree(), self.stack.expected) == []

    def mount(self) -> None:
        self.union = self.stack.union(redirect_dir=self.redirect_dir)
        self.client = Client(self.union, revalidate=self.revalidate)

    def teardown(self) -> None:
        with self.resources:
            if not hasattr(self, "union"):
                return
            self.close_handles()
            seen = union_snapshot(self.union)
            self.client.forget_all()
            self.union.close()
            assert len(os.listdir("/proc/self/fd")) == self.descriptors
            assert self.stack.litter() == []
            self.compare(seen)
            if self.kernel:
                assert diff(self.stack.kernel_tree(), seen) == []

    def close_handles(self) -> None:
        for ours, plains in self.handles:
            self.client.close(ours)
            self.plain.close(plains)
        self.handles.clear()

    def compare(self, seen: Tree) -> None:
        wanted = settled(snapshot(self.plain_root), self.since_ns)
        assert diff(settled(seen, self.since_ns), wanted) == []

    @invariant()
    def same_tree(self) -> None:
        if hasattr(self, "union") and self.compare_always:
            self.compare(union_snapshot(self.union))

    # Choosing paths: mostly of what exists.

    def directories(self) -> list[Path]:
        return [path for path, st_ in self.walk() if stat.S_ISDIR(st_.st_mode)]

    def objects(self) -> list[Path]:
        return [path for path, _ in self.walk()]

    def walk(self) -> Iterator[tuple[Path, os.stat_result]]:
        pending: list[Path] = [()]
        while pending:
            path = pending.pop()
            st_ = os.lstat(b"/".join((self.plain_root, *path)))
            yield path, st_
            if stat.S_ISDIR(st_.st_mode):
                pending += [(*path, name) for name in sorted(os.listdir(b"/".join((self.plain_root, *path))))]

    def wanted(self, pick: int, name: bytes) -> Path:
        """A path that may or may not exist: `name` in some directory, at times in something that is none."""
        if pick == 63:
            objects = self.objects()
            return (*objects[len(objects) // 2], name)
        directories = self.directories()
        return (*directories[pick % len(directories)], name)

    def existing(self, pick: int) -> Path:
        objects = self.objects()
        return objects[pick % len(objects)]

    def both(self, operation: Callable[[FileSystem], Any]) -> Outcome:
        wanted = Outcome(lambda: operation(self.plain))
        got = Outcome(lambda: operation(self.client))
        assert got == wanted, f"union: {got}, plain directory: {wanted}"
        return got

    # The rules: one for every operation.

    @rule(pick=picks, name=names, mode=modes)
    def create(self, pick: int, name: bytes, mode: int) -> None:
        path = self.wanted(pick, name)
        self.both(lambda fs: fs.create(path, mode))

    @rule(pick=picks, name=names, mode=modes)
    def mkdir(self, pick: int, name: bytes, mode: int) -> None:
        path = self.wanted(pick, name)
        if not self.both(lambda fs: fs.mkdir(path, mode)).errno:
            self.pure.add(self.inode(path))

    def inode(self, path: Path) -> int:
        return os.lstat(b"/".join((self.plain_root, *path))).st_ino

    @rule(pick=picks, name=names, device=devices, mode=modes)
    def mknod(self, pick: int, name: bytes, device: tuple[int, int], mode: int) -> None:
        path = self.wanted(pick, name)
        self.both(lambda fs: fs.mknod(path, device[0] | mode, device[1]))

    @rule(pick=picks, name=names, to=st.sampled_from([b"nowhere", b"no/" * 1000]))
    def symlink(self, pick: int, name: bytes, to: bytes) -> None:
        path = self.wanted(pick, name)
        self.both(lambda fs: fs.symlink(to, path))

    @rule(pick=picks, name=names)
    def unlink(self, pick: int, name: bytes) -> None:
        path = self.wanted(pick, name)
        self.both(lambda fs: fs.unlink(path))

    @rule(pick=picks)
    def unlink_existing(self, pick: int) -> None:
        if path := self.existing(pick):
            self.both(lambda fs: fs.unlink(path))

    @rule(pick=picks)
    def rmdir(self, pick: int) -> None:
        if path := self.existing(pick):
            inode = self.inode(path)
            if not self.both(lambda fs: fs.rmdir(path)).errno:
                self.pure.discard(inode)

    @rule(pick=picks)
    def remove_tree(self, pick: int) -> None:
        """rm -rf, which leaves many whiteouts, or an empty directory full of them."""
        top = self.existing(pick)
        below = [path for path, _ in self.walk() if path[: len(top)] == top and path != top]
        for path in sorted(below, key=len, reverse=True):
            if stat.S_ISDIR(os.lstat(b"/".join((self.plain_root, *path))).st_mode):
                self.pure.discard(self.inode(path))
                self.both(lambda fs, path=path: fs.rmdir(path))  # type: ignore[misc]
            else:
                self.both(lambda fs, path=path: fs.unlink(path))  # type: ignore[misc]

    @rule(pick=picks, newpick=picks, name=names)
    def link(self, pick: int, newpick: int, name: bytes) -> None:
        path, newpath = self.existing(pick), self.wanted(newpick, name)
        self.both(lambda fs: fs.link(path, newpath))

    @rule(pick=picks, name=names, data=contents)
    def link_unnamed(self, pick: int, name: bytes, data: bytes) -> None:
        path = self.wanted(pick, name)
        self.both(lambda fs: fs.link_unnamed(data, path))

    @rule(pick=picks, newpick=picks, name=names, flags=rename_flags)
    def rename(self, pick: int, newpick: int, name: bytes, flags: int) -> None:
        path, newpath = self.existing(pick), self.wanted(newpick, name)
        if path:
            self.renamed(path, newpath, flags)

    @rule(pick=picks, newpick=picks, flags=rename_flags)
    def rename_over(self, pick: int, newpick: int, flags: int) -> None:
        path, newpath = self.existing(pick), self.existing(newpick)
        if path and newpath:
            self.renamed(path, newpath, flags)

    def renamed(self, path: Path, newpath: Path, flags: int) -> None:
        if self.moves_lower_directory(path) or (flags & RENAME_EXCHANGE and self.moves_lower_directory(newpath)):
            got = Outcome(lambda: self.client.rename(path, newpath, flags))
            if got.errno == errno.EXDEV:
                return
            wanted = Outcome(lambda: self.plain.rename(path, newpath, flags))
            assert got == wanted, f"union: {got}, plain directory: {wanted}"
            return
        self.both(lambda fs: fs.rename(path, newpath, flags))

    def moves_lower_directory(self, path: Path) -> bool:
        """Whether EXDEV is an answer to moving `path`."""
        if self.redirect_dir == "on" and sum(map(len, path)) < LONG:
            return False
        try:
            st_ = os.lstat(b"/".join((self.plain_root, *path)))
        except OSError:
            return False
        return stat.S_ISDIR(st_.st_mode) and st_.st_ino not in self.pure

    @rule(pick=picks, mode=modes)
    def chmod(self, pick: int, mode: int) -> None:
        path = self.existing(pick)
        self.both(lambda fs: fs.chmod(path, mode))

    @rule(pick=picks, uid=st.sampled_from([-1, 0, 1000]), gid=st.sampled_from([-1, 0, 1000]))
    def chown(self, pick: int, uid: int, gid: int) -> None:
        if (uid, gid) == (-1, -1):
            return  # which takes suid off: the business of transports, see docs/deviations.md
        path = self.existing(pick)
        self.both(lambda fs: fs.chown(path, uid, gid))

    @rule(pick=picks, atime_ns=times, mtime_ns=times)
    def utimens(self, pick: int, atime_ns: int, mtime_ns: int) -> None:
        path = self.existing(pick)
        self.both(lambda fs: fs.utimens(path, atime_ns, mtime_ns))

    @rule(pick=picks, size=sizes)
    def truncate(self, pick: int, size: int) -> None:
        path = self.existing(pick)
        st_ = os.lstat(b"/".join((self.plain_root, *path)))
        # truncate(2) to the very size leaves the times alone, ftruncate(2) does not, and FUSE cannot tell them apart.
        if not (stat.S_ISREG(st_.st_mode) and st_.st_size == size):
            self.both(lambda fs: fs.truncate(path, size))

    @rule(pick=picks, data=contents, offset=offsets)
    def write(self, pick: int, data: bytes, offset: int) -> None:
        path = self.existing(pick)
        self.both(lambda fs: fs.write(path, data, offset))

    @rule(pick=picks, data=contents)
    def append(self, pick: int, data: bytes) -> None:
        path = self.existing(pick)
        self.both(lambda fs: fs.append(path, data))

    @rule(pick=picks, offset=offsets, length=st.sampled_from([1, 4096]))
    def fallocate(self, pick: int, offset: int, length: int) -> None:
        path = self.existing(pick)
        self.both(lambda fs: fs.fallocate(path, offset, length))

    @rule(pick=picks, size=sizes, offset=offsets)
    def read(self, pick: int, size: int, offset: int) -> None:
        path = self.existing(pick)
        self.both(lambda fs: fs.read(path, size, offset))

    @rule(pick=picks)
    def readlink(self, pick: int) -> None:
        path = self.existing(pick)
        self.both(lambda fs: fs.readlink(path))

    @rule(pick=picks, name=names)
    def stat(self, pick: int, name: bytes) -> None:
        path = self.wanted(pick, name)
        self.both(lambda fs: fs.stat(path))

    @rule(pick=picks)
    def listdir(self, pick: int) -> None:
        path = self.existing(pick)
        self.both(lambda fs: fs.listdir(path))

    @rule(pick=picks, name=xattr_names, value=contents, flags=st.sampled_from([0, os.XATTR_CREATE, os.XATTR_REPLACE]))
    def setxattr(self, pick: int, name: bytes, value: bytes, flags: int) -> None:
        path = self.existing(pick)
        self.both(lambda fs: fs.setxattr(path, name, value, flags))

    @rule(pick=picks, name=xattr_names)
    def getxattr(self, pick: int, name: bytes) -> None:
        path = self.existing(pick)
        self.both(lambda fs: fs.getxattr(path, name))
        self.both(lambda fs: fs.listxattr(path))

    @rule(pick=picks, name=xattr_names)
    def removexattr(self, pick: int, name: bytes) -> None:
        path = self.existing(pick)
        self.both(lambda fs: fs.removexattr(path, name))

    # Open files outlive their names.

    @rule(pick=picks)
    def open(self, pick: int) -> None:
        path = self.existing(pick)
        wanted = Outcome(lambda: self.plain.open(path))
        got = Outcome(lambda: self.client.open(path))
        assert got.errno == wanted.errno
        if got.value is not None and wanted.value is not None:
            self.handles.append((got.value, wanted.value))

    def both_handles(self, pick: int, operation: Callable[[FileSystem, int], Any]) -> None:
        ours, plains = self.handles[pick % len(self.handles)]
        got, wanted = Outcome(lambda: operation(self.client, ours)), Outcome(lambda: operation(self.plain, plains))
        assert got == wanted, f"union: {got}, plain directory: {wanted}"

    @precondition(lambda self: bool(getattr(self, "handles", ())))
    @rule(pick=picks, size=sizes, offset=offsets)
    def read_open(self, pick: int, size: int, offset: int) -> None:
        self.both_handles(pick, lambda fs, handle: fs.fread(handle, size, offset))
        self.both_handles(pick, lambda fs, handle: fs.fstat(handle))

    @precondition(lambda self: bool(getattr(self, "handles", ())))
    @rule(pick=picks, data=contents, offset=offsets)
    def write_open(self, pick: int, data: bytes, offset: int) -> None:
        self.both_handles(pick, lambda fs, handle: fs.fwrite(handle, data, offset))

    @precondition(lambda self: bool(getattr(self, "handles", ())))
    @rule(pick=picks, size=sizes, mode=modes)
    def change_open(self, pick: int, size: int, mode: int) -> None:
        self.both_handles(pick, lambda fs, handle: fs.ftruncate(handle, size))
        self.both_handles(pick, lambda fs, handle: fs.fchmod(handle, mode))

    @precondition(lambda self: bool(getattr(self, "handles", ())))
    @rule(pick=picks)
    def close(self, pick: int) -> None:
        ours, plains = self.handles.pop(pick % len(self.handles))
        self.client.close(ours)
        self.plain.close(plains)

    # Forgetting and starting again.

    @rule(pick=picks)
    def forget(self, pick: int) -> None:
        if leaves := self.client.leaves():
            self.client.forget(leaves[pick % len(leaves)])

    @rule()
    def forget_all(self) -> None:
        self.client.forget_all()

    @rule()
    def remount(self) -> None:
        before = union_snapshot(self.union)
        self.close_handles()
        self.client.forget_all()
        self.union.close()
        assert self.stack.litter() == []
        self.mount()
        assert diff(union_snapshot(self.union), before) == []

    @rule()
    def same_links(self) -> None:
        """Names of one file, and only they, have one inode number and agree on how many they are."""
        ours: dict[int, set[Path]] = {}
        plains: dict[int, set[Path]] = {}
        for path, st_ in self.walk():
            attr = self.client.getattr(path)
            ours.setdefault(attr.ino, set()).add(path)
            plains.setdefault(st_.st_ino, set()).add(path)
            if not stat.S_ISDIR(st_.st_mode):
                assert attr.nlink == st_.st_nlink, path
        assert sorted(map(sorted, ours.values())) == sorted(map(sorted, plains.values()))


KERNEL = has_kernel_overlayfs()

PROGRAMS = settings(
    max_examples=60,
    stateful_step_count=30,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


@pytest.mark.timeout(SOAK_SECONDS + 300)
def test_random_programs() -> None:
    before = os.umask(UMASK)
    deadline = time.monotonic() + SOAK_SECONDS
    try:
        run_state_machine_as_test(UnionMachine, settings=PROGRAMS)
        while time.monotonic() < deadline:
            run_state_machine_as_test(UnionMachine, settings=PROGRAMS)
    finally:
        os.umask(before)
