"""What unionfsd writes, kernel overlayfs and fuse-overlayfs show, and the other way round.

One script of changes (`change`) is run over the same three lowers by each of the three; the two others must then show
the same tree: every path, type, mode, owner, size, time, xattr, link count and content.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import pytest

from tests.harness import Layers, Mount, MountFactory, run
from tests.trees import ACCESS, CAPABILITY, DEFAULT, KINDS, Snapshot, Tag, acl, capability, differences, make, snapshot

OLD_NS: Final = 1_400_000_000_123_456_789
NON_UTF8: Final = os.fsdecode(b"\xff\xfe\xe9")
LONGEST: Final = "n" * 250  # fuse-overlayfs keeps room for ".wh."

WhiteoutMaker = Callable[[Path, str], None]


def chardev_whiteout(parent: Path, name: str) -> None:
    os.mknod(parent / name, stat.S_IFCHR, 0)


def xattr_whiteout(parent: Path, name: str) -> None:
    (parent / name).touch()
    os.setxattr(parent / name, "trusted.overlay.whiteout", b"y")
    os.setxattr(parent, "trusted.overlay.opaque", b"x")


def wh_whiteout(parent: Path, name: str) -> None:
    (parent / f".wh.{name}").touch()


def opaque_xattr(directory: Path) -> None:
    os.setxattr(directory, "trusted.overlay.opaque", b"y")


def opaque_user_xattr(directory: Path) -> None:
    os.setxattr(directory, "user.overlay.opaque", b"y")


def opaque_fuse_overlayfs(directory: Path) -> None:
    os.setxattr(directory, "user.fuseoverlayfs.opaque", b"y")


def opaque_wh(directory: Path) -> None:
    (directory / ".wh..wh..opq").touch()


def populate(layers: Layers, kinds: Sequence[str] = KINDS) -> None:
    """Three lowers with objects of all `kinds`, and with merged, hidden and opaque directories."""
    bottom = layers.lower
    for directory in ("kept", "cut", "swept", "over", "deep/er/still", "opaque", "moved"):
        (bottom / directory).mkdir(parents=True)
        for kind in kinds:
            make(bottom / directory / kind, kind)
    for name in (NON_UTF8, LONGEST, "hidden", "replaced"):
        make(bottom / name, "file")
    with (bottom / "sparse").open("wb") as file:
        file.truncate(1 << 22)
        file.seek(1 << 21)
        file.write(b"island")
    os.setxattr(bottom / "kept/file", "user.tag", b"\0binary\xff")
    os.setxattr(bottom / "kept/symlink", "trusted.tag", b"of a symlink", follow_symlinks=False)
    os.setxattr(bottom / "kept/file", ACCESS, _ACL)
    os.setxattr(bottom / "kept", DEFAULT, _ACL)
    make(bottom / "program", "file")
    os.chmod(bottom / "program", 0o6755)
    os.setxattr(bottom / "program", CAPABILITY, capability(10))
    middle = layers.push()
    for directory in ("kept", "over", "opaque"):
        (middle / directory).mkdir()
        make(middle / directory / "middle", "file")
    chardev_whiteout(middle, "hidden")
    chardev_whiteout(middle / "over", "file")
    opaque_xattr(middle / "opaque")
    top = layers.push()
    (top / "kept").mkdir(mode=0o2750)
    make(top / "kept/top", "symlink")
    make(top / "replaced", "directory")
    for layer in layers.lowers:
        age(layer)


_ACL = acl((Tag.USER_OBJ, 6), (Tag.USER, 4, 4242), (Tag.GROUP_OBJ, 4), (Tag.MASK, 6), (Tag.OTHER, 0))


def age(layer: Path) -> None:
    """Give everything a time of its own, in the past, to the nanosecond."""
    for number, (directory, subdirectories, files) in enumerate(os.walk(layer, topdown=False)):
        for index, name in enumerate([*sorted(files), *sorted(subdirectories)]):
            then = OLD_NS + number * 10**9 + index
            os.utime(Path(directory, name), ns=(then, then), follow_symlinks=False)
    os.utime(layer, ns=(OLD_NS, OLD_NS))


def change(root: Path, kinds: Sequence[str] = KINDS) -> None:
    """Every change a union has its own way to record, on what `populate` made of the same `kinds`."""
    change_attributes(root, kinds)
    change_data(root)
    remove(root, kinds)
    replace(root)
    move(root, kinds)


def change_attributes(root: Path, kinds: Sequence[str] = KINDS) -> None:
    kept = root / "kept"
    for kind in kinds:
        os.chown(kept / kind, 1001, 1002, follow_symlinks=False)
    os.utime(kept / "top", ns=(OLD_NS + 1, OLD_NS + 2), follow_symlinks=False)
    os.setxattr(kept / "middle", "user.new", b"1")
    os.removexattr(kept / "file", "user.tag")
    os.chmod(root / "deep/er", 0o1711)
    os.chmod(root / "program", 0o755)


def change_data(root: Path) -> None:
    with (root / "sparse").open("r+b") as file:
        file.seek(1 << 20)
        file.write(b"another island")
    (root / NON_UTF8).write_bytes(b"shorter")
    with (root / LONGEST).open("ab") as file:
        file.write(b" and more")
    os.truncate(root / "deep/er/still/file", 3)
    for kind in KINDS:
        make(root / f"new-{kind}", kind)
    make(root / "kept/inherits", "file")
    make(root / "kept/inherits-too", "directory")
    os.link(root / "new-file", root / "kept/linked")
    os.link(root / "over/middle", root / "over/linked")


def remove(root: Path, kinds: Sequence[str] = KINDS) -> None:
    for kind in kinds:
        run("rm", "-r", root / "cut" / kind)
    run("rm", "-r", root / "swept")
    (root / "kept/middle").unlink()
    (root / "opaque/middle").unlink()


def replace(root: Path) -> None:
    """New objects over whiteouts, of the same and of other types."""
    (root / "swept").mkdir()
    make(root / "swept/new", "file")
    make(root / "cut/file", "directory")
    make(root / "cut/directory", "file")
    make(root / "cut/symlink", "fifo")
    make(root / "hidden", "file")
    make(root / "over/file", "symlink")


def move(root: Path, kinds: Sequence[str] = KINDS) -> None:
    os.rename(root / "moved/file", root / "moved/file-moved")
    os.rename(root / "moved/symlink", root / "kept/symlink-moved")
    if "fifo" in kinds:
        os.rename(root / "moved/fifo", root / "cut/fifo")
    os.rename(root / "new-directory", root / "cut/socket")
    (root / "fresh").mkdir()
    make(root / "fresh/file", "file")
    os.rename(root / "fresh", root / "moved/fresh")


def tree(mount: Mount, *, without: frozenset[str] = frozenset()) -> Snapshot:
    """What a mount shows, minus the facts named `without`."""
    return {
        path: {fact: value for fact, value in facts.items() if fact not in without}
        for path, facts in snapshot(mount.path).items()
    }


#: fuse-overlayfs drops nothing of these, but counts links of files in directories that it copied up its own way.
FUSE_OVERLAYFS_DIFFERS: Final = frozenset({"nlink"})


#: It opens what it changes or removes: ENXIO for a socket, and for a FIFO it waits for a writer.
FUSE_OVERLAYFS_COPIES: Final = ("file", "directory", "symlink")


def assert_same(seen: Snapshot, wanted: Snapshot) -> None:
    found = differences(seen, wanted)
    assert not found, "\n".join(found)


def spare_fuse_overlayfs(layers: Layers) -> None:
    """Take the origin from the FIFOs of the upper: fuse-overlayfs opens what it leads to, and waits for a writer."""
    for path in layers.upper.rglob("*"):
        if path.is_fifo() and "trusted.overlay.origin" in os.listxattr(path):
            os.removexattr(path, "trusted.overlay.origin")


def test_others_show_what_we_wrote(
    layers: Layers, mounted: MountFactory, overlayfs: MountFactory, fuse_overlayfs: MountFactory
) -> None:
    populate(layers)
    ours = mounted()
    change(ours.path)
    written = tree(ours)
    ours.unmount()
    kernel = overlayfs()
    assert_same(tree(kernel), written)
    kernel.unmount()
    spare_fuse_overlayfs(layers)
    fuse = fuse_overlayfs()
    seen = tree(fuse, without=FUSE_OVERLAYFS_DIFFERS)
    fuse.unmount()
    assert_same(seen, without(written, FUSE_OVERLAYFS_DIFFERS))


def without(found: Snapshot, facts: frozenset[str]) -> Snapshot:
    return {path: {f: v for f, v in record.items() if f not in facts} for path, record in found.items()}


def test_we_show_what_the_kernel_wrote(layers: Layers, mounted: MountFactory, overlayfs: MountFactory) -> None:
    populate(layers)
    kernel = overlayfs()
    change(kernel.path)
    written = tree(kernel)
    kernel.unmount()
    assert_same(tree(mounted()), written)


def test_we_show_what_fuse_overlayfs_wrote(layers: Layers, mounted: MountFactory, fuse_overlayfs: MountFactory) -> None:
    populate(layers, FUSE_OVERLAYFS_COPIES)
    fuse = fuse_overlayfs()
    change(fuse.path, FUSE_OVERLAYFS_COPIES)
    fuse.remount()  # until then its kernel shows times of its own for files that were just written
    written = tree(fuse, without=FUSE_OVERLAYFS_DIFFERS)
    fuse.unmount()
    run("rm", "-rf", layers.work / "work")
    assert_same(tree(mounted(), without=FUSE_OVERLAYFS_DIFFERS), written)


@pytest.mark.parametrize("option", ["redirect_dir=on", "index=on", "metacopy=on", "index=on,metacopy=on"])
def test_taking_turns(option: str, layers: Layers, mounted: MountFactory, overlayfs: MountFactory) -> None:
    """Each goes on where the other stopped."""
    populate(layers)
    if "index" in option:
        link_names(layers)
    ours = mounted(option)
    change_attributes(ours.path)
    change_data(ours.path)
    ours.unmount()
    kernel = overlayfs("redirect_dir=on", option)
    remove(kernel.path)
    kernel.unmount()
    ours.mount()
    replace(ours.path)
    ours.unmount()
    kernel.mount()
    move(kernel.path)
    written = tree(kernel)
    kernel.unmount()
    ours.mount()
    assert_same(tree(ours), written)
    in_turn(ours.path, 1)
    ours.unmount()
    kernel.mount()
    in_turn(kernel.path, 2)
    written = tree(kernel)
    kernel.unmount()
    ours.mount()
    assert_same(tree(ours), written)


def link_names(layers: Layers) -> None:
    """Further names of files that the script changes, deletes and moves, and of one that it leaves alone."""
    bottom = layers.lowers[-1]
    for name in ("kept/file", "deep/er/still/file", "replaced", "swept/file"):
        os.link(bottom / name, bottom / (name + "-also"))
        os.link(bottom / name, bottom / "cut" / name.replace("/", "-"))
    age(bottom)


def in_turn(root: Path, number: int) -> None:
    """Changes of files that may have other names, or no data of their own, by now."""
    for name in ("kept/file-also", "replaced-also", "swept/file-also"):
        if (root / name).exists():
            with (root / name).open("ab") as file:
                file.write(b"turn %d" % number)
            os.link(root / name, root / f"{name}-{number}")
    for path in sorted((root / "kept").iterdir()):
        os.chown(path, number, number, follow_symlinks=False)


WHITEOUTS: Final[dict[str, tuple[WhiteoutMaker, frozenset[str]]]] = {
    "chardev": (chardev_whiteout, frozenset({"kernel", "fuse-overlayfs"})),
    "xattr": (xattr_whiteout, frozenset({"kernel"})),  # in lowers: see `readers`
    "wh": (wh_whiteout, frozenset({"fuse-overlayfs"})),
}
OPAQUES: Final[dict[str, tuple[Callable[[Path], None], frozenset[str]]]] = {
    "trusted": (opaque_xattr, frozenset({"kernel", "fuse-overlayfs"})),
    "user": (opaque_user_xattr, frozenset({"fuse-overlayfs"})),
    "fuse-overlayfs": (opaque_fuse_overlayfs, frozenset({"fuse-overlayfs"})),
    "wh": (opaque_wh, frozenset({"fuse-overlayfs"})),
}


def hide(layers: Layers, where: str, whiteout: WhiteoutMaker, opaque: Callable[[Path], None]) -> None:
    """A layer that hides a file, a directory and the content of a directory of the one below it."""
    for directory in ("plain", "deleted", "opaque", "kept"):
        (layers.lower / directory).mkdir()
        for name in ("a", "b"):
            make(layers.lower / directory / name, "file")
    hiding = layers.upper if where == "upper" else layers.push()
    for directory in ("opaque", "kept"):
        (hiding / directory).mkdir()
        make(hiding / directory / "new", "file")
    opaque(hiding / "opaque")
    whiteout(hiding / "kept", "a")
    whiteout(hiding, "deleted")


def readers(where: str, whiteout: str, opaque: str) -> frozenset[str]:
    """Who else reads this form of whiteout and of opaque mark; the kernel lists xattr whiteouts of an upper."""
    found = WHITEOUTS[whiteout][1] & OPAQUES[opaque][1]
    return found - {"kernel"} if (where, whiteout) == ("upper", "xattr") else found


SHOWN: Final = {b".", b"plain", b"plain/a", b"plain/b", b"opaque", b"opaque/new", b"kept", b"kept/b", b"kept/new"}


@pytest.mark.parametrize("where", ["lower", "upper"])
@pytest.mark.parametrize("opaque", OPAQUES)
@pytest.mark.parametrize("whiteout", WHITEOUTS)
def test_every_form_is_read(
    layers: Layers,
    mounted: MountFactory,
    overlayfs: MountFactory,
    fuse_overlayfs: MountFactory,
    where: str,
    whiteout: str,
    opaque: str,
) -> None:
    """Whiteouts and opaque marks of every form, in a lower and in the upper, hide what they hide elsewhere."""
    hide(layers, where, WHITEOUTS[whiteout][0], OPAQUES[opaque][0])
    ours = mounted()
    seen = tree(ours)
    ours.unmount()
    assert set(seen) == SHOWN
    for name, factory in (("kernel", overlayfs), ("fuse-overlayfs", fuse_overlayfs)):
        if name in readers(where, whiteout, opaque):
            peer = factory()
            theirs = tree(peer, without=FUSE_OVERLAYFS_DIFFERS)
            peer.unmount()
            assert_same(theirs, without(seen, FUSE_OVERLAYFS_DIFFERS))


@pytest.mark.parametrize("form", ["xattr", "wh"])
def test_every_form_is_written(
    layers: Layers, mounted: MountFactory, overlayfs: MountFactory, fuse_overlayfs: MountFactory, form: str
) -> None:
    """An upper with our other whiteouts, used as a lower by whoever knows the form, is the same tree."""
    populate(layers)
    ours = mounted(f"whiteout={form}")
    change(ours.path)
    written = tree(ours, without=FUSE_OVERLAYFS_DIFFERS)
    ours.unmount()
    spare_fuse_overlayfs(layers)
    frozen = Layers(layers.root, lowers=[layers.upper, *layers.lowers])
    peer = (overlayfs if form == "xattr" else fuse_overlayfs)(layers=frozen, upper=False)
    assert_same(tree(peer, without=FUSE_OVERLAYFS_DIFFERS), written)
