"""Extended attributes: every namespace a user may write, on every kind of object, before and after copy-up."""

from __future__ import annotations

import os

import pytest

from tests.harness import ROOTLESS, Layers, MountFactory
from tests.trees import CAPABILITY, KINDS, capability, errno_of, make

NAMES = ("user.a", *(() if ROOTLESS else ("trusted.b", "security.c")), "user." + "n" * 250)


@pytest.mark.parametrize("where", ["lower", "upper"])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_attributes_are_set_read_listed_and_removed(
    kind: str, where: str, layers: Layers, mounted: MountFactory
) -> None:
    if where == "lower":
        make(layers.lower / "x", kind)
        os.setxattr(layers.lower / "x", "user.old", b"old")
    mount = mounted()
    path = mount / "x"
    if where == "upper":
        make(path, kind)
        os.setxattr(path, "user.old", b"old")
    values = {"user.old": b"old"} | {name: name.encode() * 2 for name in NAMES} | {"user.empty": b""}
    for name, value in values.items():
        os.setxattr(path, name, value)
    for _ in range(2):
        assert sorted(os.listxattr(path)) == sorted(values)
        assert {name: os.getxattr(path, name) for name in values} == values
        mount.remount()
    for name in values:
        os.removexattr(path, name)
    assert os.listxattr(path) == []
    assert errno_of(os.getxattr, path, "user.old") == "ENODATA"
    assert errno_of(os.removexattr, path, "user.old") == "ENODATA"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("file", "directory")])
@pytest.mark.privileged
def test_other_objects_have_no_user_attributes_but_trusted_ones(
    kind: str, layers: Layers, mounted: MountFactory
) -> None:
    make(layers.lower / "x", kind)
    mount = mounted()
    path = mount / "x"
    assert errno_of(lambda: os.setxattr(path, "user.a", b"1", follow_symlinks=False)) == "EPERM"
    os.setxattr(path, "trusted.a", b"1", follow_symlinks=False)
    for _ in range(2):
        assert os.getxattr(path, "trusted.a", follow_symlinks=False) == b"1"
        assert os.listxattr(path, follow_symlinks=False) == ["trusted.a"]
        mount.remount()


@pytest.mark.parametrize("where", ["lower", "upper"])
def test_creating_and_replacing_are_told_apart(where: str, layers: Layers, mounted: MountFactory) -> None:
    if where == "lower":
        (layers.lower / "x").touch()
    mount = mounted()
    path = mount / "x"
    path.touch()
    assert errno_of(os.setxattr, path, "user.a", b"1", os.XATTR_REPLACE) == "ENODATA"
    os.setxattr(path, "user.a", b"1", os.XATTR_CREATE)
    assert errno_of(os.setxattr, path, "user.a", b"2", os.XATTR_CREATE) == "EEXIST"
    os.setxattr(path, "user.a", b"3", os.XATTR_REPLACE)
    assert os.getxattr(path, "user.a") == b"3"


@pytest.mark.deviates
def test_what_fails_copies_nothing_up(layers: Layers, mounted: MountFactory) -> None:
    (layers.lower / "x").touch()
    os.setxattr(layers.lower / "x", "user.a", b"1")
    mount = mounted()
    path = mount / "x"
    assert errno_of(os.removexattr, path, "user.absent") == "ENODATA"
    assert errno_of(os.setxattr, path, "user.a", b"2", os.XATTR_CREATE) == "EEXIST"
    assert errno_of(os.setxattr, path, "user.b", b"2", os.XATTR_REPLACE) == "ENODATA"
    assert errno_of(os.setxattr, path, "nonsense.a", b"1") == "ENOTSUP"
    assert errno_of(os.getxattr, path, "nonsense.a") == "ENOTSUP"
    assert os.listdir(layers.upper) == []


def test_large_values(layers: Layers, mounted: MountFactory) -> None:
    """As large as the upper's file system takes; ext4 keeps them in one block."""
    (layers.lower / "x").touch()
    mount = mounted()
    value = os.urandom(3000)
    os.setxattr(mount / "x", "user.large", value)
    assert os.getxattr(mount / "x", "user.large") == value
    (layers.upper / "probe").touch()
    expected = errno_of(os.setxattr, layers.upper / "probe", "user.huge", bytes(65536))
    (layers.upper / "probe").unlink()
    assert errno_of(os.setxattr, mount / "x", "user.huge", bytes(65536)) == expected
    assert errno_of(os.setxattr, mount / "x", "user.huge", bytes(65537)) == "E2BIG"
    assert os.listxattr(mount / "x") == ["user.large"]


@pytest.mark.owners
def test_file_capabilities_are_kept(layers: Layers, mounted: MountFactory) -> None:
    (layers.lower / "x").write_bytes(b"#!/bin/true\n")
    os.setxattr(layers.lower / "x", CAPABILITY, capability(10))
    mount = mounted()
    assert os.getxattr(mount / "x", CAPABILITY) == capability(10)
    os.chmod(mount / "x", 0o755)
    assert os.getxattr(mount / "x", CAPABILITY) == capability(10)
    os.setxattr(mount / "x", CAPABILITY, capability(12))
    mount.remount()
    assert os.getxattr(mount / "x", CAPABILITY) == capability(12)


@pytest.mark.privileged
def test_a_namespace_of_the_format_is_no_name(layers: Layers, mounted: MountFactory) -> None:
    (layers.lower / "x").touch()
    path = mounted() / "x"
    for name in ("trusted.overlay.", "user.overlay."):
        assert errno_of(os.setxattr, path, name, b"1") == "EINVAL"
        assert errno_of(os.getxattr, path, name) == "EINVAL"
        assert errno_of(os.removexattr, path, name) == "EINVAL"
    os.setxattr(path, "trusted.overlay", b"1")
    assert os.listxattr(path) == ["trusted.overlay"]
