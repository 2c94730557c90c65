"""Trees of files for the tests: objects of every kind made, described, compared; xattr values of ACLs and the like."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias


def fingerprint(root: Path) -> dict[bytes, tuple[object, ...]]:
    """Everything of a tree that a union must leave alone in a lower, the time of the last access excepted.

    The change time stands in for content and xattrs: nothing can change those and leave it.
    """
    found: dict[bytes, tuple[object, ...]] = {}
    for path, directories, files, fd in os.fwalk(
        os.fsencode(root)
    ):  # by descriptors: paths may be longer than PATH_MAX
        for name in (b".", *directories, *files):
            st = os.lstat(name, dir_fd=fd)
            identity = st.st_ino, st.st_mode, st.st_nlink, st.st_uid, st.st_gid
            found[os.path.join(path, name)] = (*identity, st.st_size, st.st_ctime_ns)
    return found


def walk(root: Path) -> Iterator[bytes]:
    """Every path beneath `root`, and `root`, without following symlinks."""
    pending = [os.fsencode(root)]
    while pending:
        path = pending.pop()
        yield path
        if stat.S_ISDIR(os.lstat(path).st_mode):
            with os.scandir(path) as entries:
                pending.extend(entry.path for entry in entries)


#: What the union keeps for itself in a layer, and overlayfs in its own.
INTERNAL_XATTRS: Final = ("trusted.overlay.", "user.overlay.", "user.fuseoverlayfs.", "user.containers.")


def describe(path: str | bytes | Path) -> dict[str, object]:
    """What a user can tell of one object, by name. A directory's size and links are the file system's own affair."""
    path = os.fsencode(path)
    st = os.lstat(path)
    kind = stat.S_IFMT(st.st_mode)
    facts: dict[str, object] = {
        "type": kind,
        "mode": oct(stat.S_IMODE(st.st_mode)),
        "owner": (st.st_uid, st.st_gid),
        "mtime_ns": st.st_mtime_ns,
        "xattrs": xattrs(path),
    }
    if kind != stat.S_IFDIR:
        facts |= {"size": st.st_size, "nlink": st.st_nlink}
    if kind in (stat.S_IFCHR, stat.S_IFBLK):
        facts["rdev"] = (os.major(st.st_rdev), os.minor(st.st_rdev))
    if kind == stat.S_IFLNK:
        facts["target"] = os.readlink(path)
    if kind == stat.S_IFREG:
        facts["content"] = digest(path)
    return facts


def xattrs(path: str | bytes | Path) -> dict[str, bytes]:
    """The xattrs of an object, those of union file systems left out."""
    names = os.listxattr(path, follow_symlinks=False)
    return {n: os.getxattr(path, n, follow_symlinks=False) for n in names if not n.startswith(INTERNAL_XATTRS)}


def digest(path: str | bytes | Path) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


#: Facts of every object of a tree by its path in it.
Snapshot: TypeAlias = dict[bytes, dict[str, object]]


def snapshot(root: Path) -> Snapshot:
    """What a user can tell of a whole tree."""
    return {os.path.relpath(path, os.fsencode(root)): describe(path) for path in walk(root)}


def differences(a: Snapshot, b: Snapshot) -> list[str]:
    """Every difference between two trees that a user could see, as lines to read; empty when there is none."""
    found = [f"{name!r}: only in the {'first' if name in a else 'second'}" for name in sorted(a.keys() ^ b.keys())]
    for name in sorted(a.keys() & b.keys()):
        found += [
            f"{name!r}: {fact}: {a[name].get(fact)!r} != {b[name].get(fact)!r}"
            for fact in sorted(a[name].keys() | b[name].keys())
            if a[name].get(fact) != b[name].get(fact)
        ]
    return found


def compare_trees(a: Path, b: Path) -> list[str]:
    """`differences` of two trees on disk."""
    return differences(snapshot(a), snapshot(b))


# Directories as the kernel lists them.


class Dirent(NamedTuple):
    """One struct linux_dirent64; `cookie` is d_off, the position behind the entry."""

    ino: int
    cookie: int
    type: int
    name: bytes


_libc: Final = ctypes.CDLL(None, use_errno=True)
_DIRENT: Final = struct.Struct("=QqHB")


def getdents(fd: int) -> list[Dirent]:
    """Every entry from the directory's present position on, in the kernel's order; Python's listdir hides positions."""
    buffer = ctypes.create_string_buffer(32768)
    found: list[Dirent] = []
    while (size := _libc.getdents64(fd, buffer, len(buffer))) > 0:
        raw, start = buffer.raw[:size], 0
        while start < size:
            ino, cookie, length, type_ = _DIRENT.unpack_from(raw, start)
            name = raw[start + _DIRENT.size : start + length].split(b"\0", 1)[0]
            found.append(Dirent(ino, cookie, type_, name))
            start += length
    if size < 0:
        raise OSError(ctypes.get_errno(), "getdents64")
    return found


# Objects.


#: Every kind of object a union holds.
KINDS: Final = (
    *("file", "directory", "symlink", "fifo", "socket"),
    # Which only root's rights over the machine make.
    *(() if os.environ.get("UNIONFSD_TEST_ROOTLESS") else ("chardev", "blockdev")),
)

_NODES: Final = {
    "fifo": (stat.S_IFIFO, 0),
    "socket": (stat.S_IFSOCK, 0),
    "chardev": (stat.S_IFCHR, os.makedev(1, 3)),
    "blockdev": (stat.S_IFBLK, os.makedev(7, 300)),
}


def make(path: Path, kind: str) -> None:
    """Create an object of one of `KINDS`."""
    if kind == "file":
        path.write_bytes(b"content of " + os.fsencode(path.name))
    elif kind == "directory":
        path.mkdir()
    elif kind == "symlink":
        path.symlink_to("a/target")
    else:
        type_, device = _NODES[kind]
        os.mknod(path, type_ | 0o644, device)


def delete(path: Path) -> None:
    """Remove an object of any kind; a directory must be empty."""
    if stat.S_ISDIR(os.lstat(path).st_mode):
        path.rmdir()
    else:
        path.unlink()


def is_whiteout(path: Path) -> bool:
    """Whether an object of a layer is the kernel's whiteout, a character device 0:0."""
    st = os.lstat(path)
    return stat.S_ISCHR(st.st_mode) and st.st_rdev == 0


def errno_of(fn: Callable[..., object], *args: object) -> str:
    """Name of the errno that `fn(*args)` fails with, `ok` when it does not."""
    try:
        fn(*args)
    except OSError as exc:
        return errno.errorcode[exc.errno or 0]
    return "ok"


# Values of xattrs.


class Tag:
    """e_tag of an ACL entry (linux/posix_acl.h)."""

    USER_OBJ: Final = 0x01
    USER: Final = 0x02
    GROUP_OBJ: Final = 0x04
    GROUP: Final = 0x08
    MASK: Final = 0x10
    OTHER: Final = 0x20


ACCESS: Final = "system.posix_acl_access"
DEFAULT: Final = "system.posix_acl_default"
CAPABILITY: Final = "security.capability"

_UNDEFINED_ID: Final = 0xFFFFFFFF


def acl(*entries: tuple[int, int] | tuple[int, int, int]) -> bytes:
    """The value of a POSIX ACL xattr: version 2, then (tag, permissions, id) entries (linux/posix_acl_xattr.h)."""
    packed = [
        struct.pack("<HHI", entry[0], entry[1], entry[2] if len(entry) > 2 else _UNDEFINED_ID) for entry in entries
    ]
    return struct.pack("<I", 2) + b"".join(packed)


def capability(number: int) -> bytes:
    """The value of security.capability, revision 2, that permits one capability and makes it effective."""
    return struct.pack("<5I", 0x02000001, 1 << number, 0, 0, 0)
