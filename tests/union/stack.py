"""A stack of layers on disk, and the two unions over it: ours, without a mount, and the kernel's.

Everything lies in a directory of a memory file system where there is one, because the tests sync and crash a lot;
UNIONFSD_TEST_SCRATCH names another place, to test on another file system.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from tests.harness import ROOTLESS
from tests.union.trees import Obj, Tree, build, directory, merged, snapshot
from unionfsd.options import MountConfig
from unionfsd.union import Union

MS_RDONLY = 1

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

    def kernel_tree(self, options: bytes = b"") -> Tree:
        """What kernel overlayfs shows of the same layers, all of them as lowers, so that it writes nothing."""
        lowers = b":".join(self.layers if len(self.layers) > 1 else [*self.layers, self._empty()])
        with overlay(self.mountpoint, b"lowerdir=" + lowers + options, flags=MS_RDONLY):
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


_libc = ctypes.CDLL(None, use_errno=True)
_MNT_DETACH = 2


@contextlib.contextmanager
def overlay(mountpoint: bytes, options: bytes, *, flags: int = 0) -> Iterator[None]:
    """Kernel overlayfs at `mountpoint` with MS_* `flags`; by system calls, for it is done thousands of times."""
    with file_system(b"overlay", mountpoint, options, flags=flags):
        yield


@contextlib.contextmanager
def file_system(kind: bytes, mountpoint: bytes, options: bytes = b"", *, flags: int = 0) -> Iterator[None]:
    """A file system of the type `kind`, which needs no device, at `mountpoint`."""
    if _libc.mount(kind, mountpoint, kind, ctypes.c_ulong(flags), options):
        raise OSError(ctypes.get_errno(), f"{kind!r} refuses {options!r}")
    try:
        yield
    finally:
        # Lazily: another process that copies the mount table at this moment would make it busy.
        if _libc.umount2(mountpoint, _MNT_DETACH):
            raise OSError(ctypes.get_errno(), "stays mounted", os.fsdecode(mountpoint))


def has_kernel_overlayfs() -> bool:
    """Whether this process may mount kernel overlayfs with all it can do."""
    if os.geteuid() or ROOTLESS:
        return False
    try:
        with stacked([directory(), directory()], None) as stack:
            stack.kernel_tree()
    except OSError:
        return False
    return True
