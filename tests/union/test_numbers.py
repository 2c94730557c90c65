"""Inode numbers over layers on several file systems: unique, the same in listings, and kept."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator

import pytest

from tests.union.client import Client
from tests.union.stack import Stack, file_system, has_kernel_overlayfs, scratch_directory
from tests.union.trees import directory, join
from unionfsd.layers import _fold
from unionfsd.union import Union

pytestmark = pytest.mark.skipif(not has_kernel_overlayfs(), reason="mounts file systems")


@pytest.fixture
def stack() -> Iterator[Stack]:
    """An upper and three lowers, each on a file system of its own whose inode numbers are those of the others."""
    with scratch_directory() as path, contextlib.ExitStack() as mounted:
        made = Stack(path, [directory(), directory(), directory()], None)
        os.mkdir(path + b"/rw")
        for at in (*made.lowers, path + b"/rw"):
            mounted.enter_context(file_system(b"tmpfs", at))
            if at in made.lowers:
                fill(at, b"%d" % made.lowers.index(at))
        made.upper, made.work = path + b"/rw/upper", path + b"/rw/work"
        os.mkdir(made.upper)
        os.mkdir(made.work)
        yield made


def fill(layer: bytes, mark: bytes) -> None:
    for parent in (b"/", b"/d" + mark + b"/", b"/both/"):
        os.makedirs(layer + parent, exist_ok=True)
        for name in (b"f", b"g"):
            with open(layer + parent + name + mark, "wb") as file:
                file.write(mark)
    os.link(layer + b"/f" + mark, layer + b"/both/linked" + mark)


def numbers(union: Union) -> dict[bytes, int]:
    """st_ino by path; d_ino must agree."""
    found: dict[bytes, int] = {}

    def walk(nodeid: int, path: bytes) -> None:
        for name, ino, *_ in list(union.listdir(nodeid, 0)):
            if name in (b".", b".."):
                continue
            below = union.lookup(nodeid, name)
            at = join(path, name)
            assert ino == below.attr.ino, at
            found[at] = below.attr.ino
            if stat.S_ISDIR(below.attr.st.st_mode):
                walk(below.nodeid, at)
            union.forget(below.nodeid, 1)

    walk(union.root, b"")
    return found


def must_be_unique(found: dict[bytes, int]) -> None:
    for mark in (b"0", b"1", b"2"):
        assert found[b"f" + mark] == found[b"both/linked" + mark]
    single = [number for path, number in found.items() if b"linked" not in path]
    assert len(set(single)) == len(single)


def test_unique_and_kept(stack: Stack) -> None:
    raw = [os.stat(lower + b"/both").st_ino for lower in stack.lowers]
    assert len(set(raw)) == 1, "the file systems number alike, else this shows nothing"
    union = stack.union()
    before = numbers(union)
    must_be_unique(before)
    client = Client(union)
    for path in before:
        client.chown(tuple(path.split(b"/")), 1, 1)
    assert numbers(union) == before
    client.rename((b"g2",), (b"both", b"moved"), 0)
    client.create((b"both", b"new"), 0o600)
    before[b"both/moved"] = before.pop(b"g2")
    after = numbers(union)
    before[b"both/new"] = after[b"both/new"]
    assert after == before
    union.close()
    union = stack.union()
    assert numbers(union) == before
    must_be_unique(before)
    union.close()


def test_large_numbers_do_not_meet() -> None:
    """Numbers of a union below have their file system in the highest byte, and neighbours in the lowest bits."""
    given = [high << 56 | low for high in range(8) for low in range(5000)]
    assert len({_fold(ino) for ino in given}) == len(given)
