"""Objects of every kind: shown from a lower, made, changed, deleted, replaced; and names of every shape."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from tests.harness import Layers, MountFactory
from tests.trees import KINDS, delete, describe, differences, errno_of, is_whiteout, make, snapshot

SECOND = 1_000_000_000


def dress(path: Path) -> None:
    """Give an object an owner, a mode and times of its own."""
    os.lchown(path, 1234, 5678)
    if not path.is_symlink():
        path.chmod(0o2751)
    os.utime(
        path, ns=(1_000_000_001 * SECOND + 123_456_789, 1_100_000_001 * SECOND + 987_654_321), follow_symlinks=False
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.owners
def test_a_lower_object_is_shown_as_it_is(kind: str, layers: Layers, mounted: MountFactory) -> None:
    make(layers.lower / "x", kind)
    dress(layers.lower / "x")
    mount = mounted()
    assert describe(mount / "x") == describe(layers.lower / "x")
    assert os.listdir(mount.path) == ["x"]
    assert os.listdir(layers.upper) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.owners
def test_a_new_object_lands_in_upper(kind: str, layers: Layers, mounted: MountFactory) -> None:
    (layers.lower / "d").mkdir()
    mount = mounted()
    for name in ("x", "d/x"):
        make(mount / name, kind)
        dress(mount / name)
        shown = describe(mount / name)
        mount.remount()
        assert describe(mount / name) == shown
        assert describe(layers.upper / name) == shown


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.owners
def test_a_change_of_owner_copies_the_object_up(kind: str, layers: Layers, mounted: MountFactory) -> None:
    make(layers.lower / "x", kind)
    dress(layers.lower / "x")
    mount = mounted()
    before = describe(mount / "x")
    os.lchown(mount / "x", 4321, 5678)
    after = {**before, "owner": (4321, 5678)}
    if kind not in ("directory", "symlink"):
        after["mode"] = "0o751"  # chown takes setgid off what a group may execute
    assert describe(mount / "x") == after
    assert describe(layers.upper / "x") == after
    mount.remount()
    assert describe(mount / "x") == after


@pytest.mark.parametrize("kind", KINDS)
def test_deleting_a_lower_object_leaves_a_whiteout(kind: str, layers: Layers, mounted: MountFactory) -> None:
    make(layers.lower / "x", kind)
    mount = mounted()
    delete(mount / "x")
    for _ in range(2):
        assert not os.path.lexists(mount / "x")
        assert os.listdir(mount.path) == []
        assert is_whiteout(layers.upper / "x")
        mount.remount()


@pytest.mark.parametrize("kind", KINDS)
def test_deleting_a_new_object_leaves_nothing(kind: str, layers: Layers, mounted: MountFactory) -> None:
    mount = mounted()
    make(mount / "x", kind)
    delete(mount / "x")
    assert os.listdir(mount.path) == []
    assert os.listdir(layers.upper) == []


@pytest.mark.parametrize("old", KINDS)
def test_any_kind_takes_the_place_of_any_deleted_one(
    old: str, layers: Layers, plain: Path, mounted: MountFactory
) -> None:
    for new in KINDS:
        make(layers.lower / new, old)
        make(plain / new, new)
    mount = mounted()
    for new in KINDS:
        delete(mount / new)
        make(mount / new, new)
    same = ("type", "mode", "size", "content", "target", "rdev", "nlink")
    for _ in range(2):
        for new in KINDS:
            shown, expected = describe(mount / new), describe(plain / new)
            assert [shown.get(fact) for fact in same] == [expected.get(fact) for fact in same]
        mount.remount()


def test_creation_of_what_exists_fails(layers: Layers, mounted: MountFactory) -> None:
    for kind in KINDS:
        make(layers.lower / kind, kind)
    mount = mounted()
    before = snapshot(mount.path)
    for there, new in itertools.product(KINDS, KINDS):
        if new == "file":
            attempt = errno_of(os.open, mount / there, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        else:
            attempt = errno_of(make, mount / there, new)
        assert (there, new, attempt) == (there, new, "EEXIST")
    assert differences(before, snapshot(mount.path)) == []
    assert os.listdir(layers.upper) == []


def test_deletion_of_the_wrong_kind_fails(layers: Layers, mounted: MountFactory) -> None:
    for kind in KINDS:
        make(layers.lower / kind, kind)
    mount = mounted()
    assert errno_of((mount / "directory").unlink) == "EISDIR"
    for kind in KINDS:
        if kind != "directory":
            assert errno_of((mount / kind).rmdir) == "ENOTDIR"
    for call in (os.unlink, os.rmdir, os.stat, os.readlink, os.listdir):
        assert errno_of(call, mount / "absent") == "ENOENT"
    assert os.listdir(layers.upper) == []


NAMES = [
    b"n" * 255,
    "é".encode() * 127,
    b"\xff\xfe\x80 not utf-8",
    b"new\nline",
    b" ",
    b"...",
    b"back\\slash,comma:colon",
    b"-rf",
    b"\x01\x7f",
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_any_name_can_be_used(name: bytes, layers: Layers, mounted: MountFactory) -> None:
    make(layers.lower / os.fsdecode(name), "file")
    (layers.lower / "d").mkdir()
    mount = mounted()
    path = mount / name
    assert path.read_bytes().startswith(b"content of")
    path.write_bytes(b"changed")
    other = mount / b"d" / os.fsdecode(name)
    os.link(path, other)
    assert [os.fsencode(n) for n in os.listdir(mount / "d")] == [name]
    path.unlink()
    path.mkdir()
    path.rmdir()
    os.rename(other, path)
    assert os.listdir(mount / "d") == []
    mount.remount()
    assert sorted(os.listdir(os.fsencode(mount.path))) == sorted([b"d", name])
    assert path.read_bytes() == b"changed"


def test_a_name_too_long_is_refused(layers: Layers, mounted: MountFactory) -> None:
    mount = mounted()
    path = mount / ("n" * 256)
    assert errno_of(os.stat, path) == "ENAMETOOLONG"
    for kind in KINDS:
        assert errno_of(make, path, kind) == "ENAMETOOLONG"
    (mount / "f").touch()
    assert errno_of(os.rename, mount / "f", path) == "ENAMETOOLONG"
    assert errno_of(os.link, mount / "f", path) == "ENAMETOOLONG"


def test_paths_as_long_as_the_kernel_takes(layers: Layers, mounted: MountFactory) -> None:
    """A path of 4,095 bytes, the most there can be, in a lower, so that it is copied up."""
    component = "c" * 200
    longest = 4095 - len(f"{layers.mnt}/")
    directory = "/".join([component] * (longest // 201))
    leaf = "l" * (longest - len(directory) - 1)
    _make_deep(layers.lower, directory, leaf)
    mount = mounted()
    path = f"{mount.path}/{directory}/{leaf}"
    assert len(path) == 4095
    assert Path(path).read_bytes() == b"deep"
    os.chmod(path, 0o600)
    Path(path).write_bytes(b"changed")
    mount.remount()
    assert Path(path).read_bytes() == b"changed"
    assert os.stat(path).st_mode & 0o7777 == 0o600
    assert errno_of(os.stat, path + "l") == "ENAMETOOLONG"
    os.unlink(path)
    assert os.listdir(os.path.dirname(path)) == []


def _make_deep(root: Path, directory: str, leaf: str) -> None:
    fd = _descend(root, directory.split("/"), create=True)
    file = os.open(leaf, os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=fd)
    os.write(file, b"deep")
    os.close(file)
    os.close(fd)


def _descend(root: Path, names: list[str], *, create: bool) -> int:
    """A descriptor of the directory at the end of a path too long for one system call."""
    fd = os.open(root, os.O_RDONLY)
    for name in names:
        if create:
            os.mkdir(name, dir_fd=fd)
        below = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    return fd


def test_deeper_than_any_path(layers: Layers, mounted: MountFactory) -> None:
    """300 directories of 100 bytes: reached step by step only, copied up all the same."""
    names = ["d" * 100] * 300
    _make_deep(layers.lower, "/".join(names), "old")
    mount = mounted()
    fd = _descend(mount.path, names, create=False)
    os.close(os.open("new", os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=fd))
    assert sorted(os.listdir(fd)) == ["new", "old"]
    os.close(fd)
    fd = _descend(layers.upper, names, create=False)
    assert os.listdir(fd) == ["new"]
    os.close(fd)
