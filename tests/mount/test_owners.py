"""Owners that are not those of the layers: mapped, squashed, or kept in xattrs, as fuse-overlayfs has it."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Layers, Mount, MountFactory, in_child
from tests.trees import Tag, acl, errno_of

pytestmark = pytest.mark.owners


MAPPED = ("uidmapping=:0:1000:1:1:110000:65535", "gidmapping=:0:2000:1:1:220000:65535")
CONTAINERS = "user.containers.override_stat"
PRIVILEGED = "security.fuseoverlayfs.override_stat"
CAPABILITY = "security.capability"


def owner(path: Path) -> tuple[int, int, int]:
    """uid, gid and permissions."""
    st = path.lstat()
    return st.st_uid, st.st_gid, stat.S_IMODE(st.st_mode)


def owners(root: Path) -> dict[str, tuple[int, int, int]]:
    """The same of everything beneath `root`."""
    return {str(path.relative_to(root)): owner(path) for path in sorted(root.rglob("*"))}


def make(path: Path, uid: int, gid: int, mode: int = 0o644) -> Path:
    path.write_bytes(b"data")
    os.chown(path, uid, gid)
    path.chmod(mode)
    return path


@contextlib.contextmanager
def once(mount: Mount) -> Iterator[Mount]:
    """A mount for a part of a test."""
    yield mount
    mount.unmount()


# Mapped.


@pytest.fixture
def mapped(layers: Layers, mounted: MountFactory) -> Path:
    (layers.lower / "d").mkdir()
    for name, ids in (("root", (0, 0)), ("one", (1, 1)), ("none", (65536, 65536)), ("d/setuid", (5, 6))):
        make(layers.lower / name, *ids, mode=0o4755 if name == "d/setuid" else 0o644)
    return mounted(*MAPPED).path


@pytest.mark.privileged
def test_ids_are_shown_mapped_and_kept_as_they_were(layers: Layers, mapped: Path) -> None:
    assert owner(mapped / "root") == (1000, 2000, 0o644)
    assert owner(mapped / "one") == (110000, 220000, 0o644)
    assert owner(mapped / "none") == (65534, 65534, 0o644)
    with (mapped / "d/setuid").open("ab") as file:
        file.write(b"more")
    assert owner(layers.upper / "d/setuid")[:2] == (5, 6)
    assert owner(mapped / "d/setuid")[:2] == (110004, 220005)


@pytest.mark.privileged
def test_ids_are_given_mapped(layers: Layers, mapped: Path) -> None:
    os.chown(mapped / "root", 110004, 2000)
    assert owner(layers.upper / "root") == (5, 0, 0o644)
    assert owner(mapped / "root") == (110004, 2000, 0o644)
    assert [errno_of(os.chown, mapped / "one", *ids) for ids in ((7, -1), (-1, 7), (0, 0))] == ["EINVAL"] * 3
    assert not (layers.upper / "one").exists() or owner(layers.upper / "one")[:2] == (1, 1)


@pytest.mark.privileged
def test_what_somebody_makes_is_theirs(layers: Layers, mapped: Path) -> None:
    os.chown(mapped, 110000, 220000)
    mapped.chmod(0o755)

    def everything() -> None:
        (mapped / "file").write_bytes(b"")
        (mapped / "dir").mkdir()
        (mapped / "link").symlink_to("target")
        os.mkfifo(mapped / "fifo")

    in_child(everything, uid=110000, gid=220000)
    for name in ("file", "dir", "link", "fifo"):
        assert owner(layers.upper / name)[:2] == (1, 1)
        assert owner(mapped / name)[:2] == (110000, 220000)
    (mapped / "by-nobody").write_bytes(b"")  # root here has no id on disk: kept as overflow, as fuse-overlayfs has it
    assert owner(layers.upper / "by-nobody")[:2] == (65534, 65534)


@pytest.mark.privileged
def test_acls_and_capabilities_are_mapped(layers: Layers, mapped: Path) -> None:
    here = acl((Tag.USER_OBJ, 6), (Tag.USER, 7, 110004), (Tag.GROUP_OBJ, 4), (Tag.MASK, 7), (Tag.OTHER, 0))
    disk = acl((Tag.USER_OBJ, 6), (Tag.USER, 7, 5), (Tag.GROUP_OBJ, 4), (Tag.MASK, 7), (Tag.OTHER, 0))
    os.setxattr(mapped / "one", "system.posix_acl_access", here)
    assert os.getxattr(layers.upper / "one", "system.posix_acl_access") == disk
    assert os.getxattr(mapped / "one", "system.posix_acl_access") == here
    alien = here.replace(struct.pack("<I", 110004), struct.pack("<I", 7))
    assert errno_of(os.setxattr, mapped / "one", "system.posix_acl_access", alien) == "EINVAL"
    assert in_child((mapped / "one").read_bytes, uid=110004, gid=220004) == b"data"


@pytest.mark.privileged
def test_fuse_overlayfs_shows_the_same_owners(
    layers: Layers, mounted: MountFactory, fuse_overlayfs: MountFactory
) -> None:
    for name, ids in (("root", (0, 0)), ("one", (1, 1)), ("none", (65536, 65536))):
        make(layers.lower / name, *ids)
    with once(mounted(*MAPPED)) as union:
        os.chown(union / "root", 110004, 220004)
        os.chown(union / "one", 1000, -1)
        ours = owners(union.path)
    with once(fuse_overlayfs(*MAPPED)) as peer:
        assert owners(peer.path) == ours


# Squashed.


def test_everything_is_roots(layers: Layers, mounted: MountFactory) -> None:
    make(layers.lower / "file", 5, 6)
    union = mounted("squash_to_root", "static_nlink")
    os.chown(union / "file", 7, 8)
    (union / "dir" / "sub").mkdir(parents=True)
    assert owners(union.path) == {"file": (0, 0, 0o644), "dir": (0, 0, 0o755), "dir/sub": (0, 0, 0o755)}
    assert owner(layers.upper / "file")[:2] == (7, 8)
    assert (union / "dir").stat().st_nlink == 1


def test_one_id_counts_more_than_roots(layers: Layers, mounted: MountFactory) -> None:
    make(layers.lower / "file", 5, 6)
    union = mounted("squash_to_uid=1234", "squash_to_root", "static_nlink")
    assert owner(union / "file") == (1234, 0, 0o644)


# Kept in xattrs.


def change_everything(root: Path) -> None:
    """What an installation does: owners, modes, setuid, objects of every type."""
    (root / "new").mkdir(mode=0o2770)
    (root / "new").chmod(0o2770)
    os.chown(root / "new", 10, 20)
    make(root / "new/program", 11, 21, 0o4711)
    (root / "new/program").chmod(0o4711)
    make(root / "new/secret", 12, 22, 0o000)
    os.chown(root / "below", 13, 23)
    (root / "below").chmod(0o600)
    (root / "dir").chmod(0o711)


EXPECTED = {
    "below": (13, 23, 0o600),
    "dir": (0, 0, 0o711),
    "dir/inside": (3, 4, 0o640),
    "new": (10, 20, 0o2770),
    "new/program": (11, 21, 0o4711),
    "new/secret": (12, 22, 0o000),
}


@pytest.fixture
def populated(layers: Layers) -> Layers:
    make(layers.lower / "below", 1, 2)
    (layers.lower / "dir").mkdir(mode=0o755)
    make(layers.lower / "dir/inside", 3, 4, 0o640)
    return layers


@pytest.mark.parametrize(
    ("permissions", "name"), [pytest.param("1", PRIVILEGED, marks=pytest.mark.privileged), ("2", CONTAINERS)]
)
def test_owners_are_kept_in_an_xattr(
    populated: Layers, mounted: MountFactory, fuse_overlayfs: MountFactory, permissions: str, name: str
) -> None:
    with once(mounted(f"xattr_permissions={permissions}")) as union:
        change_everything(union.path)
        shown = owners(union.path)
        assert shown == EXPECTED
    for path in ("below", "new/program", "new/secret"):
        st = (populated.upper / path).stat()
        assert (st.st_uid, st.st_gid, st.st_mode & 0o7000) == (0, 0, 0)
    assert os.getxattr(populated.upper / "new/program", name) == b"11:21:4711:file"
    with once(mounted()) as union:
        assert owners(union.path) == shown
    if permissions == "1":  # what fuse-overlayfs 1.10 takes 2 for is user.fuseoverlayfs.override_stat
        with once(fuse_overlayfs("xattr_permissions=1")) as peer:
            assert owners(peer.path) == shown


@pytest.mark.parametrize("permissions", [pytest.param("1", marks=pytest.mark.privileged), "2"])
def test_what_fuse_overlayfs_keeps_is_understood(
    populated: Layers, mounted: MountFactory, fuse_overlayfs: MountFactory, permissions: str
) -> None:
    with once(fuse_overlayfs(f"xattr_permissions={permissions}")) as peer:
        change_everything(peer.path)
        shown = owners(peer.path)
    with once(mounted(f"xattr_permissions={permissions}")) as union:
        assert owners(union.path) == shown
        os.chown(union / "new/program", 1, -1)
        assert owner(union / "new/program") == (1, shown["new/program"][1], 0o711)


@pytest.mark.privileged
def test_special_files_and_capabilities_need_no_privileges_on_disk(layers: Layers, mounted: MountFactory) -> None:
    capability = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)
    with once(mounted("xattr_permissions=2")) as union:
        os.mknod(union / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.mknod(union / "disk", stat.S_IFBLK | 0o660, os.makedev(8, 1))
        os.mkfifo(union / "fifo")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.fspath(union / "socket"))
        os.chown(union / "null", 5, 6)
        make(union / "ping", 0, 0)
        os.setxattr(union / "ping", CAPABILITY, capability)
        assert os.listxattr(union / "ping") == [CAPABILITY]
    on_disk = {path.name: path.lstat() for path in layers.upper.iterdir()}
    assert all(stat.S_ISREG(st.st_mode) for st in on_disk.values())
    assert os.getxattr(layers.upper / "null", CONTAINERS) == b"5:6:0644:char-1-3"
    assert os.listxattr(layers.upper / "ping") == [CONTAINERS, f"user.containers.override_{CAPABILITY}"]
    with once(mounted()) as union:
        kinds = {path.name: stat.S_IFMT(path.lstat().st_mode) for path in union.path.iterdir()}
        assert kinds == {
            "null": stat.S_IFCHR,
            "disk": stat.S_IFBLK,
            "fifo": stat.S_IFIFO,
            "socket": stat.S_IFSOCK,
            "ping": stat.S_IFREG,
        }
        assert (union / "null").stat().st_rdev == os.makedev(1, 3)
        assert os.getxattr(union / "ping", CAPABILITY) == capability
        os.chown(union / "ping", 5, 5)
        assert os.listxattr(union / "ping") == []


ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"
FRIEND = 54321
_FRIENDS = ((Tag.USER_OBJ, 7), (Tag.USER, 6, FRIEND), (Tag.GROUP_OBJ, 5), (Tag.MASK, 7), (Tag.OTHER, 0))


def with_acls(root: Path) -> None:
    """What a lower may have."""
    (root / "given").mkdir()
    make(root / "given/old", 0, 0, 0o600)
    os.setxattr(root / "given/old", ACCESS, acl(*_FRIENDS))
    os.setxattr(root / "given", DEFAULT, acl(*_FRIENDS))


def use_acls(root: Path) -> None:
    """Lists set, inherited, changed by chmod, made needless and removed."""
    os.utime(root / "given/old")
    (root / "made").mkdir()
    for directory in ("given", "made"):
        os.setxattr(root / directory, DEFAULT, acl(*_FRIENDS))
        (root / directory / "sub").mkdir(0o750)
        for name in ("kept", "narrowed", "freed", "minimal"):
            os.close(os.open(root / directory / name, os.O_CREAT | os.O_WRONLY, 0o664))
        os.chmod(root / directory / "narrowed", 0o640)
        os.removexattr(root / directory / "freed", ACCESS)
        os.setxattr(root / directory / "minimal", ACCESS, acl((Tag.USER_OBJ, 6), (Tag.GROUP_OBJ, 4), (Tag.OTHER, 1)))
    os.removexattr(root / "made", DEFAULT)


def lists(root: Path) -> dict[str, tuple[int, dict[str, bytes]]]:
    """Permissions and ACLs of everything beneath `root`, and whether somebody in them may read it."""
    return {
        str(path.relative_to(root)): (
            stat.S_IMODE(path.stat().st_mode),
            {name: os.getxattr(path, name) for name in os.listxattr(path) if name in (ACCESS, DEFAULT)},
        )
        for path in sorted(root.rglob("*"))
    }


@pytest.mark.parametrize("permissions", [pytest.param(1, marks=pytest.mark.privileged), 2])
def test_lists_are_kept_with_the_mode(permissions: int, layers: Layers, mounted: MountFactory, plain: Path) -> None:
    for root in (layers.lower, plain):
        with_acls(root)
    use_acls(plain)
    with once(mounted(f"xattr_permissions={permissions}")) as union:
        use_acls(union.path)
        assert lists(union.path) == lists(plain)
    assert not [path for path in layers.upper.rglob("*") for name in os.listxattr(path) if name in (ACCESS, DEFAULT)]
    with once(mounted()) as union:
        assert lists(union.path) == lists(plain)


@pytest.mark.privileged
def test_lists_kept_with_the_mode_decide(layers: Layers, mounted: MountFactory) -> None:
    with once(mounted("xattr_permissions=2")) as union:
        secret = make(union / "secret", 0, 0, 0o600)
        assert in_child(lambda: errno_of(secret.read_bytes), uid=FRIEND) == "EACCES"
        os.setxattr(secret, ACCESS, acl(*_FRIENDS))
        assert in_child(lambda: errno_of(secret.read_bytes), uid=FRIEND) == "ok"
        os.chmod(secret, 0o600)
        assert in_child(lambda: errno_of(secret.read_bytes), uid=FRIEND) == "EACCES"


@pytest.mark.privileged
def test_a_layer_says_by_its_root_that_owners_are_in_xattrs(layers: Layers, mounted: MountFactory) -> None:
    os.setxattr(layers.lower, CONTAINERS, b"0:0:0755")
    for name, said in (("file", b"5:6:4750:file"), ("tty", b"0:5:620:char-4-1"), ("plain", b"")):
        (layers.lower / name).write_bytes(b"")
        if said:
            os.setxattr(layers.lower / name, CONTAINERS, said)
    with once(mounted()) as union:
        assert owner(union / "file") == (5, 6, 0o4750)
        assert owner(union / "plain")[:2] == (0, 0)
        assert stat.S_ISCHR((union / "tty").stat().st_mode)
        assert {entry.name: entry.is_char_device() for entry in union.path.iterdir()}["tty"]
        for name in ("file", "tty"):
            os.utime(union / name)
    assert owner(layers.upper / "file") == (5, 6, 0o4750)
    assert (layers.upper / "tty").stat().st_rdev == os.makedev(4, 1)
    assert not [name for path in layers.upper.iterdir() for name in os.listxattr(path) if "override" in name]


def test_a_record_that_makes_no_sense_is_refused(layers: Layers, mounted: MountFactory) -> None:
    os.setxattr(layers.lower, CONTAINERS, b"0:0:0755")
    (layers.lower / "file").write_bytes(b"")
    os.setxattr(layers.lower / "file", CONTAINERS, b"root")
    assert errno_of(os.stat, mounted() / "file") == "EINVAL"


# Less than everything.


def test_without_acls_and_without_xattrs(layers: Layers, mounted: MountFactory) -> None:
    path = make(layers.lower / "file", 0, 0, 0o600)
    entries = (
        (Tag.USER_OBJ, 6),
        (Tag.USER, 7, 54321),
        (Tag.GROUP_OBJ, 0),
        (Tag.MASK, 7),
        (Tag.OTHER, 0),
    )
    os.setxattr(path, "system.posix_acl_access", acl(*entries))
    os.setxattr(path, "user.a", b"b")
    with once(mounted("noacl")) as union:
        assert os.listxattr(union / "file") == ["user.a"]
        assert errno_of(os.getxattr, union / "file", "system.posix_acl_access") == "ENOTSUP"
    with once(mounted("noxattrs=1")) as union:
        assert errno_of(os.getxattr, union / "file", "user.a") == "ENOTSUP"
        assert errno_of(os.setxattr, union / "file", "user.a", b"c") == "ENOTSUP"
