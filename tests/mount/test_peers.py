"""One format: what we write, kernel overlayfs and fuse-overlayfs show alike, and the other way round."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from tests.harness import Layers, MountFactory, run
from tests.trees import ACCESS, CAPABILITY, DEFAULT, KINDS, Tag, acl, capability, delete, differences, make, snapshot

pytestmark = pytest.mark.deviates  # kernel overlayfs need not be compared with itself

_ACL = acl((Tag.USER_OBJ, 7), (Tag.USER, 5, 4242), (Tag.GROUP_OBJ, 5), (Tag.MASK, 7), (Tag.OTHER, 0))


def three_layers(layers: Layers) -> None:
    """Every kind of object in each of three lowers, some of them hidden by those above."""
    for number in range(3):
        lower = layers.lower if number == 0 else layers.push()
        for name in ("shared", f"only{number}"):
            (lower / name / "deep").mkdir(parents=True)
            for kind in KINDS:
                make(lower / name / kind, kind)
                make(lower / name / f"{kind}{number}", kind)
                os.lchown(lower / name / f"{kind}{number}", number, number + 10)
            (lower / name / "text").write_text(f"layer {number}")
            (lower / name / "deep/er").write_bytes(os.urandom(5000))
            os.setxattr(lower / name / "text", "user.layer", b"%d" % number)
            os.setxattr(lower / name / "deep", DEFAULT, _ACL)
            os.setxattr(lower / name / "text", CAPABILITY, capability(number))
    os.mknod(layers.lower / "shared/file0", stat.S_IFCHR, 0)
    os.setxattr(layers.lower / "shared/deep", "trusted.overlay.opaque", b"y")


def change_everything(root: Path) -> None:
    """Each mutation there is, on objects of each layer."""
    for number in range(3):
        only = root / f"only{number}"
        for kind in KINDS:
            delete(root / "shared" / f"{kind}{number}") if (kind, number) != ("file", 0) else None
            os.lchown(only / kind, 50, 60)
        os.rename(only / "text", only / "renamed")
        os.link(only / "renamed", root / f"linked{number}")
        with (only / "file").open("ab") as file:
            file.write(b" and more")
        os.truncate(only / f"file{number}", 3)
        os.setxattr(only / "deep/er", "user.new", b"value")
        os.chmod(only / "deep", 0o2750)
        os.setxattr(only / "deep", ACCESS, _ACL)
    run("rm", "-r", root / "only1/deep")
    (root / "only1/deep").mkdir()
    (root / "only1/deep/new").write_text("in an opaque directory")
    run("rm", "-r", root / "only2")
    (root / "shared/file0").write_text("over a whiteout")
    (root / "new/tree").mkdir(parents=True)
    for kind in KINDS:
        make(root / "new/tree" / kind, kind)
    os.rename(root / "new", root / "moved")
    (root / "shared/text").unlink()
    os.mkdir(root / "shared/text")
    (root / "sparse").touch()
    os.truncate(root / "sparse", 10 << 20)
    os.utime(root / "moved", ns=(123, 456))


@pytest.mark.parametrize("peer", ["overlayfs", "fuse_overlayfs"])
def test_what_we_wrote_a_peer_shows(
    peer: str, layers: Layers, mounted: MountFactory, request: pytest.FixtureRequest
) -> None:
    three_layers(layers)
    mount = mounted()
    change_everything(mount.path)
    ours = snapshot(mount.path)
    mount.unmount()
    theirs = request.getfixturevalue(peer)()
    assert differences(ours, snapshot(theirs.path)) == []


@pytest.mark.parametrize("peer", ["overlayfs", "fuse_overlayfs"])
def test_what_a_peer_wrote_we_show(
    peer: str, layers: Layers, mounted: MountFactory, request: pytest.FixtureRequest
) -> None:
    three_layers(layers)
    mount = request.getfixturevalue(peer)()
    change_everything(mount.path)
    theirs = snapshot(mount.path)
    mount.unmount()
    assert differences(theirs, snapshot(mounted().path)) == []


def test_kernel_and_union_do_the_same(layers: Layers, mounted: MountFactory, overlayfs: MountFactory) -> None:
    """The same mutations on two copies of the layers: equal trees, but for the times of the mutations themselves."""
    three_layers(layers)
    copy = layers.copy("copy")
    ours, theirs = mounted(), overlayfs(layers=copy)
    assert differences(snapshot(ours.path), snapshot(theirs.path)) == []
    trees = []
    for mount in (ours, theirs):
        change_everything(mount.path)
        tree = snapshot(mount.path)
        for facts in tree.values():
            if isinstance(moment := facts["mtime_ns"], int) and moment > 10**12:
                del facts["mtime_ns"]
        trees.append(tree)
    assert differences(*trees) == []


def test_layers_taken_over_again_and_again(layers: Layers, mounted: MountFactory, overlayfs: MountFactory) -> None:
    """Three rounds of changes, ours and the kernel's by turns, each seeing what the one before left."""
    three_layers(layers)
    expected = None
    for turn in range(6):
        mount = (mounted if turn % 2 else overlayfs)()
        if expected is not None:
            assert differences(expected, snapshot(mount.path)) == []
        for name in ("shared", "only0"):
            path = mount / name / f"made{turn % 3}"
            path.unlink() if path.exists() else path.write_text(f"turn {turn}")
            os.rename(mount / name / "deep/er", mount / name / "deep/er2")
            os.rename(mount / name / "deep/er2", mount / name / "deep/er")
        (mount / f"d{turn}").mkdir()
        expected = snapshot(mount.path)
        mount.unmount()
