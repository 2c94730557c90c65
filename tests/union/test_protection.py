"""Immutable and append-only objects: they refuse what VFS refuses, through copy-up, and in the kernel's form."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Callable, Iterator

import pytest

from tests.trees import errno_of
from tests.union.client import Client
from tests.union.stack import Stack, has_kernel_overlayfs, overlay, stacked
from tests.union.trees import directory, regular
from unionfsd import steps, syscalls
from unionfsd.union import Union

IMMUTABLE, APPEND, NOATIME = 0x10, 0x20, 0x80
PROTATTR = "trusted.overlay.protattr"


def get_flags(path: bytes) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        value: int = struct.unpack("=I", fcntl.ioctl(fd, syscalls.FS_IOC_GETFLAGS, bytes(4)))[0]
        return value & (IMMUTABLE | APPEND | NOATIME)
    finally:
        os.close(fd)


def set_flags(path: bytes, flags: int) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.ioctl(fd, syscalls.FS_IOC_SETFLAGS, struct.pack("=I", flags))
    finally:
        os.close(fd)


@contextlib.contextmanager
def protected() -> Iterator[Stack]:
    """A lower with immutable `i` and `id`, append-only `a` and `ad`, and `n` whose access times are not kept."""
    inside = {b"f": regular(b"f")}
    flags = {b"i": IMMUTABLE, b"id": IMMUTABLE, b"a": APPEND, b"ad": APPEND, b"n": NOATIME}
    names = {name: directory(inside) if name.endswith(b"d") else regular(b"data") for name in flags}
    with stacked([directory({**names, b"plain": regular()})], directory({})) as stack:
        for name, value in flags.items():
            set_flags(stack.lowers[0] + b"/" + name, value)
        try:
            yield stack
        finally:
            for name in flags:
                set_flags(stack.lowers[0] + b"/" + name, 0)


def shown(union: Union, name: bytes) -> int:
    """Flags as the mount shows them."""
    nodeid = union.lookup(union.root, name).nodeid
    answer = steps.run(union.ioctl(nodeid, syscalls.FS_IOC_GETFLAGS, bytes(4)))
    union.forget(nodeid, 1)
    value: int = struct.unpack("=I", answer)[0]
    return value & (IMMUTABLE | APPEND | NOATIME)


def change_flags(union: Union, name: bytes, flags: int) -> None:
    nodeid = union.lookup(union.root, name).nodeid
    steps.run(union.ioctl(nodeid, syscalls.FS_IOC_SETFLAGS, struct.pack("=I", flags)))
    union.forget(nodeid, 1)


#: What is refused of which object.
CHANGES: dict[str, tuple[Callable[[Client], object], set[str]]] = {
    "write": (lambda c: c.write((b"X",), b"x", 0), {"i", "a"}),
    "append": (lambda c: c.append((b"X",), b"x"), {"i"}),
    "truncate": (lambda c: c.truncate((b"X",), 0), {"i", "a"}),
    "chmod": (lambda c: c.chmod((b"X",), 0o600), {"i", "a", "id", "ad"}),
    "utimens": (lambda c: c.utimens((b"X",), 1, 1), {"i", "a", "id", "ad"}),
    "setxattr": (lambda c: c.setxattr((b"X",), b"user.a", b"b", 0), {"i", "a", "id", "ad"}),
    "link": (lambda c: c.link((b"X",), (b"new",)), {"i", "a"}),
    "unlink": (lambda c: c.unlink((b"X",)), {"i", "a"}),
    "rename": (lambda c: c.rename((b"X",), (b"new",), 0), {"i", "a", "id", "ad"}),
    "rename over": (lambda c: c.rename((b"plain",), (b"X",), 0), {"i", "a"}),
    "create in": (lambda c: c.create((b"X", b"new"), 0o600), {"id"}),
    "unlink in": (lambda c: c.unlink((b"X", b"f")), {"id", "ad"}),
    "rename in": (lambda c: c.rename((b"plain",), (b"X", b"new"), 0), {"id"}),
    "write in": (lambda c: c.append((b"X", b"f"), b"x"), set()),
}


class Renaming:
    """A client for which the name X is another."""

    def __init__(self, client: Client, name: bytes) -> None:
        self._client = client
        self._name = name

    def __getattr__(self, call: str) -> Callable[..., object]:
        def named(*args: object) -> object:
            return getattr(self._client, call)(*map(self._named, args))

        return named

    def _named(self, value: object) -> object:
        return tuple(self._name if part == b"X" else part for part in value) if isinstance(value, tuple) else value


#: For files only; what ends in "in" is for directories only.
FILE_ONLY = {"write", "append", "truncate", "link", "unlink", "rename over"}
CASES = [
    (what, name)
    for what in CHANGES
    for name in ("i", "a", "id", "ad")
    if not (what in FILE_ONLY if name.endswith("d") else what.endswith(" in"))
]


@pytest.mark.parametrize("copied_up", [False, True], ids=["lower", "copied up"])
@pytest.mark.parametrize(("what", "name"), CASES)
def test_what_vfs_refuses_is_refused(what: str, name: str, copied_up: bool) -> None:
    change, refused = CHANGES[what]
    with protected() as stack:
        union = stack.union()
        raw = os.fsencode(name)
        if copied_up:
            change_flags(union, raw, shown(union, raw) | NOATIME)
        outcome = errno_of(change, Renaming(Client(union), raw))
        assert outcome == ("EPERM" if name in refused else "ok")
        union.close()


def test_flags_go_along_in_the_kernels_form() -> None:
    with protected() as stack:
        assert stack.upper is not None
        union = stack.union()
        client = Client(union)
        client.append((b"a",), b"more")
        client.create((b"ad", b"new"), 0o600)
        client.chmod((b"n",), 0o600)
        change_flags(union, b"i", IMMUTABLE | NOATIME)
        flags = {name: shown(union, name) for name in (b"a", b"ad", b"i", b"n")}
        assert flags == {b"a": APPEND, b"ad": APPEND, b"i": IMMUTABLE | NOATIME, b"n": NOATIME}
        union.close()
        for name, letters in ((b"a", b"a"), (b"ad", b"a"), (b"i", b"i")):
            assert os.getxattr(stack.upper + b"/" + name, PROTATTR) == letters
            assert not get_flags(stack.upper + b"/" + name) & (IMMUTABLE | APPEND)
        if has_kernel_overlayfs():
            options = b"lowerdir=%s,upperdir=%s,workdir=%s" % (stack.lowers[0], stack.upper, stack.work)
            with overlay(stack.mountpoint, options):
                assert {name: get_flags(stack.mountpoint + b"/" + name) for name in flags} == flags
                set_flags(stack.mountpoint + b"/plain", IMMUTABLE)
        union = stack.union()
        if has_kernel_overlayfs():
            assert shown(union, b"plain") == IMMUTABLE
            assert errno_of(Client(union).unlink, (b"plain",)) == "EPERM"
        change_flags(union, b"i", 0)
        Client(union).append((b"i",), b"more")
        assert PROTATTR not in os.listxattr(stack.upper + b"/i")
        union.close()


def test_a_writer_is_stopped_by_a_flag_that_comes_later() -> None:
    with protected() as stack:
        union = stack.union()
        client = Client(union)
        client.append((b"plain",), b"x")
        change_flags(union, b"plain", IMMUTABLE)
        assert errno_of(client.append, (b"plain",), b"y") == "EPERM"
        change_flags(union, b"plain", 0)
        client.append((b"plain",), b"z")
        assert client.read((b"plain",), 100, 0).endswith(b"xz")
        union.close()
