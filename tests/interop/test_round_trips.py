"""Random programs over one upper that changes hands: ours, the kernel's, ours again, with the same options.

At every change of hands the next one must show what the one before showed: every path, type, mode, owner, size, time,
xattr and content, which names are one file and how many they are, and the same inode numbers. What the operations
themselves must do is the business of tests/union/test_model.py and test_differential.py.

UNIONFSD_SOAK_SECONDS=N runs other random programs until N seconds have passed.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.union.client import RENAME_EXCHANGE, UMASK, Client, FileSystem, Path, Plain, union_snapshot
from tests.union.stack import Stack, has_kernel_overlayfs, overlay, scratch_directory
from tests.union.strategies import NAMES, contents, modes, stacks
from tests.union.test_model import SOAK_SECONDS
from tests.union.trees import OLD, Obj, Tree, diff, join, snapshot
from unionfsd.union import Union

pytestmark = pytest.mark.skipif(not has_kernel_overlayfs(), reason="needs the kernel's overlayfs")


class Options(NamedTuple):
    """Options of both; `linked` is index."""

    redirect_dir: str = "on"
    metacopy: str = "off"
    linked: str = "off"
    xino: str = "off"

    @property
    def of_kernel(self) -> bytes:
        redirect_dir, metacopy, index, xino = map(str.encode, self)
        return b",redirect_dir=%s,metacopy=%s,index=%s,xino=%s" % (redirect_dir, metacopy, index, xino)


OPTIONS: Final = {
    "plain": Options("off"),
    "redirect": Options(),
    "metacopy": Options(metacopy="on"),
    "index": Options(linked="on"),
    "xino": Options(linked="on", xino="on"),
    "all": Options(metacopy="on", linked="on", xino="on"),
}

#: Path -> (inode number, link count; 0 for directories).
Numbers = dict[bytes, tuple[int, int]]

picks = st.integers(0, 63)
names = st.sampled_from(NAMES)
owners = st.sampled_from([-1, 0, 1000])
kinds = st.sampled_from([stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK])
tags = st.sampled_from([b"user.tag", b"trusted.tag", b"user.other"])


class Machine(RuleBasedStateMachine):
    """`at` is whoever has the upper: a client of our union, or system calls on the kernel's mount."""

    options = Options()
    ours_first = True

    def __init__(self) -> None:
        super().__init__()
        self.resources = contextlib.ExitStack()
        self.mounted = contextlib.ExitStack()
        self.owner: Union | None = None
        self.at: FileSystem | None = None

    @initialize(layers=stacks())
    def set_up(self, layers: list[Obj]) -> None:
        scratch = self.resources.enter_context(scratch_directory())
        self.stack = Stack(scratch, layers[1:], layers[0])
        if self.options.linked == "on":
            self.link_names()
        self.take(ours=self.ours_first)

    def link_names(self) -> None:
        """A file with three names in the bottom lower, which nothing hides."""
        root = self.stack.lowers[-1]
        with open(root + b"/linked", "wb") as file:
            file.write(b"linked")
        for name in (b"/again", b"/third"):
            os.link(root + b"/linked", root + name)

    def take(self, *, ours: bool) -> None:
        """The upper is ours, or the kernel's, from now on."""
        stack, options = self.stack, self.options
        if ours:
            redirect_dir, metacopy, index, _ = options
            union = stack.union(redirect_dir=redirect_dir, metacopy=metacopy, index=index)
            self.owner = self.mounted.enter_context(contextlib.closing(union))
            self.at = Client(union)
        else:
            lowers = b":".join(stack.lowers)
            layers = b"lowerdir=%s,upperdir=%s,workdir=%s" % (lowers, stack.upper, stack.work)
            self.mounted.enter_context(overlay(stack.mountpoint, layers + options.of_kernel))
            self.owner, self.at = None, Plain(stack.mountpoint)

    def leave(self) -> None:
        """Nobody has the upper. The kernel leaves its whiteout in work until it mounts again."""
        self.forget_all()
        self.mounted.close()
        assert self.owner is None or self.stack.litter() == []

    def tree(self) -> Tree:
        return snapshot(self.stack.mountpoint) if self.owner is None else union_snapshot(self.owner)

    def numbers(self) -> Numbers:
        return {
            path: self.number(path)
            for path in self.tree()
            if path  # of the root the kernel shows the upper's number, we the lower's, as of any merged directory
        }

    def number(self, path: bytes) -> tuple[int, int]:
        if isinstance(self.at, Client):
            attr = self.at.getattr(tuple(path.split(b"/")))
            ino, nlink, mode = attr.ino, attr.nlink, attr.st.st_mode
        else:
            seen = os.lstat(join(self.stack.mountpoint, path))
            ino, nlink, mode = seen.st_ino, seen.st_nlink, seen.st_mode
        return ino, 0 if stat.S_ISDIR(mode) else nlink

    def hand_over(self, *, ours: bool) -> None:
        tree, numbers = self.tree(), self.numbers()
        self.leave()
        self.take(ours=ours)
        assert diff(self.tree(), tree) == []
        after = self.numbers()
        assert groups(after) == groups(numbers)
        if self.options.xino == "on":
            assert {path: (numbers[path], after[path]) for path in after if numbers[path] != after[path]} == {}

    @rule()
    def turn(self) -> None:
        self.hand_over(ours=self.owner is None)

    @rule()
    def remount(self) -> None:
        self.hand_over(ours=self.owner is not None)

    @rule()
    def forget_all(self) -> None:
        if isinstance(self.at, Client):
            self.at.forget_all()

    def teardown(self) -> None:
        with self.resources, self.mounted:
            if self.at is not None:
                self.turn()
                self.forget_all()

    # What is done.

    def do(self, operation: Callable[[FileSystem], Any]) -> None:
        assert self.at is not None
        with contextlib.suppress(OSError):
            operation(self.at)

    def paths(self, *, directories: bool = False) -> list[Path]:
        assert self.at is not None
        found: list[Path] = []
        pending: list[tuple[Path, bool]] = [((), True)]
        while pending:
            path, is_directory = pending.pop()
            if is_directory:
                pending += [((*path, name), kind == stat.S_IFDIR >> 12) for name, kind in self.at.listdir(path)]
            if is_directory or not directories:
                found.append(path)
        return found

    def some(self, pick: int) -> Path:
        """Something that is there, but not the root."""
        paths = self.paths()[1:] or [(NAMES[0],)]
        return paths[pick % len(paths)]

    def place(self, pick: int, name: bytes) -> Path:
        """A name in some directory, used or not."""
        directories = self.paths(directories=True)
        return (*directories[pick % len(directories)], name)

    @rule(pick=picks, name=names, mode=modes, kind=kinds)
    def make(self, pick: int, name: bytes, mode: int, kind: int) -> None:
        path = self.place(pick, name)
        self.do(lambda fs: fs.mknod(path, kind | mode, 0))

    @rule(pick=picks, name=names, mode=modes)
    def make_directory(self, pick: int, name: bytes, mode: int) -> None:
        path = self.place(pick, name)
        self.do(lambda fs: fs.mkdir(path, mode))

    @rule(pick=picks, name=names)
    def symlink(self, pick: int, name: bytes) -> None:
        path = self.place(pick, name)
        self.do(lambda fs: fs.symlink(b"nowhere", path))

    @rule(pick=picks)
    def remove(self, pick: int) -> None:
        top = self.some(pick)
        below = [path for path in self.paths() if path[: len(top)] == top]
        for path in sorted(below, key=len, reverse=True):
            self.do(lambda fs, path=path: fs.unlink(path))  # type: ignore[misc]
            self.do(lambda fs, path=path: fs.rmdir(path))  # type: ignore[misc]

    @rule(pick=picks, to=picks, name=names)
    def link(self, pick: int, to: int, name: bytes) -> None:
        path, newpath = self.some(pick), self.place(to, name)
        self.do(lambda fs: fs.link(path, newpath))

    @rule(pick=picks, to=picks, name=names)
    def rename(self, pick: int, to: int, name: bytes) -> None:
        path, newpath = self.some(pick), self.place(to, name)
        self.do(lambda fs: fs.rename(path, newpath, 0))

    @rule(pick=picks, to=picks, flags=st.sampled_from([0, RENAME_EXCHANGE]))
    def rename_over(self, pick: int, to: int, flags: int) -> None:
        path, newpath = self.some(pick), self.some(to)
        self.do(lambda fs: fs.rename(path, newpath, flags))

    @rule(pick=picks, mode=modes)
    def chmod(self, pick: int, mode: int) -> None:
        path = self.some(pick)
        self.do(lambda fs: fs.chmod(path, mode))

    @rule(pick=picks, uid=owners, gid=owners)
    def chown(self, pick: int, uid: int, gid: int) -> None:
        path = self.some(pick)
        self.do(lambda fs: fs.chown(path, uid, gid))

    @rule(pick=picks, age=st.integers(0, 10**6))
    def utimens(self, pick: int, age: int) -> None:
        path = self.some(pick)
        self.do(lambda fs: fs.utimens(path, OLD, OLD - age))

    @rule(pick=picks, data=contents, offset=st.sampled_from([0, 1, 4095]))
    def write(self, pick: int, data: bytes, offset: int) -> None:
        path = self.some(pick)
        self.do(lambda fs: fs.write(path, data, offset))

    @rule(pick=picks, size=st.sampled_from([0, 1, 10_000]))
    def truncate(self, pick: int, size: int) -> None:
        path = self.some(pick)
        self.do(lambda fs: fs.truncate(path, size))

    @rule(pick=picks, name=tags, value=contents)
    def setxattr(self, pick: int, name: bytes, value: bytes) -> None:
        path = self.some(pick)
        self.do(lambda fs: fs.setxattr(path, name, value, 0))

    @rule(pick=picks, name=tags)
    def removexattr(self, pick: int, name: bytes) -> None:
        path = self.some(pick)
        self.do(lambda fs: fs.removexattr(path, name))


def groups(numbers: Numbers) -> list[tuple[int, list[bytes]]]:
    """Which names are one object, with the link count that they have."""
    found: dict[tuple[int, int], list[bytes]] = {}
    for path, number in sorted(numbers.items()):
        found.setdefault(number, []).append(path)
    return sorted((nlink, paths) for (_, nlink), paths in found.items())


PROGRAMS = settings(
    max_examples=6,
    stateful_step_count=30,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


@pytest.mark.timeout(SOAK_SECONDS + 300)
@pytest.mark.parametrize("first", ["ours", "kernel"])
@pytest.mark.parametrize("name", OPTIONS)
def test_an_upper_changes_hands(name: str, first: str) -> None:
    machine = type("Machine", (Machine,), {"options": OPTIONS[name], "ours_first": first == "ours"})
    before = os.umask(UMASK)
    deadline = time.monotonic() + SOAK_SECONDS / (2 * len(OPTIONS))
    try:
        run_state_machine_as_test(machine, settings=PROGRAMS)
        while time.monotonic() < deadline:
            run_state_machine_as_test(machine, settings=PROGRAMS)
    finally:
        os.umask(before)
