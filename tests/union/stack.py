"""A stack of layers on disk, and the two unions over it: ours, without a mount, and the kernel's.

Everything lies in a directory of a memory file system where there is one, because the tests sync and crash a lot;
UNIONFSD_TEST_SCRATCH names another place, to test on another file system.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from unionfsd.union import Union

from tests.union.trees import Obj, Tree, build, directory, merged, snapshot
from unionfsd.options import MountConfig

SCRATCH = os.environ.get("UNIONFSD_TEST_SCRATCH") or ("/dev/shm" if os.path.isdir("/dev/shm") else None)


@contextlib.contextmanager
def scratch_directory() -> Iterator[bytes]:
    """A fresh directory, removed in the end."""
    path = tempfile.mkdtemp(prefix="unionfsd-test-", dir=SCRATCH)
    try:
        yield os.fsencode(path)
    finally:
        shutil.rmtree(path)


class Stack:
    """`lowers`, the top one first, and `upper`, built beneath the directory `path`; `upper` None: a read-only union."""

    def __init__(self, path: bytes, lowers: Sequence[Obj], upper: Obj | None) -> None:
        self.path = path
        self.specs = [upper, *lowers] if upper else list(lowers)
        self.lowers = [path + b"/lower%d" % index for index in range(len(lowers))]
        self.upper = path + b"/upper" if upper else None
        self.work = path + b"/work"
        self.mountpoint = path + b"/merged"
        for lower, spec in zip(self.lowers, lowers, strict=True):
            build(lower, spec)
        if upper:
            build(path + b"/upper", upper)
        os.mkdir(self.work)
        os.mkdir(self.mountpoint)

    @property
    def expected(self) -> Tree:
        """What the union must show before anything is changed."""
        return merged(self.specs)

    @property
    def layers(self) -> list[bytes]:
        return [self.upper, *self.lowers] if self.upper else self.lowers

    def union(self, **options: Any) -> Union:
        """Our union over the layers; `options` are fields of MountConfig."""
        return Union.mount(
            MountConfig(
                lowerdirs=tuple(self.lowers),
                upperdir=self.upper,
                workdir=self.work if self.upper else None,
                mountpoint=self.mountpoint,
                **options,
            )
        )

    def kernel_tree(self) -> Tree:
        """What kernel overlayfs shows of the same layers, all of them as lowers, so that it writes nothing."""
        lowers = b":".join(self.layers if len(self.layers) > 1 else [*self.layers, self._empty()])
        with overlay(self.mountpoint, f"ro,lowerdir={os.fsdecode(lowers)}"):
            return snapshot(self.mountpoint)

    def _empty(self) -> bytes:
        empty = self.path + b"/empty"
        if not os.path.isdir(empty):
            build(empty, directory())
        return empty

    def litter(self) -> list[str]:
        """What lies in the work directory where finished and aborted operations must leave nothing."""
        work = self.work + b"/work"
        return sorted(os.fsdecode(name) for name in os.listdir(work)) if os.path.isdir(work) else []


@contextlib.contextmanager
def stacked(lowers: Sequence[Obj], upper: Obj | None) -> Iterator[Stack]:
    with scratch_directory() as path:
        yield Stack(path, lowers, upper)


@contextlib.contextmanager
def overlay(mountpoint: bytes, options: str) -> Iterator[None]:
    """Kernel overlayfs at `mountpoint`; needs privileges."""
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, os.fsdecode(mountpoint)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", os.fsdecode(mountpoint)], check=True)


def has_kernel_overlayfs() -> bool:
    """Whether this process may mount kernel overlayfs."""
    if os.geteuid():
        return False
    try:
        with stacked([directory(), directory()], None) as stack:
            stack.kernel_tree()
    except subprocess.CalledProcessError:
        return False
    return True
