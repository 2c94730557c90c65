"""Two file systems with one face: a union driven as the kernel drives it, and a plain directory.

`Client` is the part of the kernel that stands before a FUSE file system: it walks paths through a cache of names,
checks types in the order of fs/namei.c, counts lookups and gives them back. `Plain` does the same with system calls.
Paths are tuples of names from the root; the caller is root; symlinks are taken to dangle, and are followed nowhere
except where the error is then ENOENT. Both raise OSError.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from typing import Protocol, TypeAlias

from tests.union.trees import Record, Tree, join
from unionfsd import steps
from unionfsd.union import Attr, Caller, Found, SetAttr, Union

Path: TypeAlias = tuple[bytes, ...]

UMASK = 0o022
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2


def fail(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class FileSystem(Protocol):
    """The operations that both sides have; see the system calls of the same names."""

    def create(self, path: Path, mode: int) -> None: ...
    def mkdir(self, path: Path, mode: int) -> None: ...
    def mknod(self, path: Path, mode: int, rdev: int) -> None: ...
    def symlink(self, target: bytes, path: Path) -> None: ...
    def unlink(self, path: Path) -> None: ...
    def rmdir(self, path: Path) -> None: ...
    def link(self, path: Path, newpath: Path) -> None: ...
    def rename(self, path: Path, newpath: Path, flags: int) -> None: ...
    def chmod(self, path: Path, mode: int) -> None: ...
    def chown(self, path: Path, uid: int, gid: int) -> None: ...
    def utimens(self, path: Path, atime_ns: int, mtime_ns: int) -> None: ...
    def truncate(self, path: Path, size: int) -> None: ...
    def write(self, path: Path, data: bytes, offset: int) -> int: ...
    def append(self, path: Path, data: bytes) -> int: ...
    def read(self, path: Path, size: int, offset: int) -> bytes: ...
    def readlink(self, path: Path) -> bytes: ...
    def setxattr(self, path: Path, name: bytes, value: bytes, flags: int) -> None: ...
    def getxattr(self, path: Path, name: bytes) -> bytes: ...
    def removexattr(self, path: Path, name: bytes) -> None: ...
    def listxattr(self, path: Path) -> list[bytes]: ...
    def listdir(self, path: Path) -> list[tuple[bytes, int]]: ...
    def fallocate(self, path: Path, offset: int, length: int) -> None: ...
    def link_unnamed(self, data: bytes, path: Path) -> None: ...
    def stat(self, path: Path) -> tuple[int, int]: ...
    def open(self, path: Path) -> int: ...
    def fread(self, handle: int, size: int, offset: int) -> bytes: ...
    def fwrite(self, handle: int, data: bytes, offset: int) -> int: ...
    def ftruncate(self, handle: int, size: int) -> None: ...
    def fchmod(self, handle: int, mode: int) -> None: ...
    def fstat(self, handle: int) -> tuple[int, int, int]: ...
    def close(self, handle: int) -> None: ...


def _is_user_xattr_refused(kind: int, name: bytes) -> bool:
    return name.startswith(b"user.") and kind not in (stat.S_IFREG, stat.S_IFDIR)


class Dentry:
    """A name that the kernel knows: the node behind it, its type, and how many lookups it owes."""

    __slots__ = ("children", "kind", "lookups", "name", "nodeid", "parent", "pins")

    def __init__(self, parent: Dentry | None, name: bytes, nodeid: int, kind: int) -> None:
        self.parent = parent
        self.name = name
        self.nodeid = nodeid
        self.kind = kind
        self.lookups = 1
        self.pins = 0
        self.children: dict[bytes, Dentry] = {}


class Client:
    """A union as the kernel sees it.

    With `revalidate` every use of a name asks the union again, as with a timeout of 0, and the node must stay the same.
    """

    def __init__(self, union: Union, *, revalidate: bool = False, caller: Caller | None = None) -> None:
        self.union = union
        self.revalidate = revalidate
        self.caller = caller or Caller(uid=0, gid=0, pid=os.getpid(), umask=UMASK)
        self.root = Dentry(None, b"", union.root, stat.S_IFDIR)
        self._handles: dict[int, Dentry] = {}
        self._next_handle = 1

    # Names.

    def _lookup(self, parent: Dentry, name: bytes) -> Dentry:
        if parent.kind == stat.S_IFLNK:
            raise fail(errno.ENOENT)
        if parent.kind != stat.S_IFDIR:
            raise fail(errno.ENOTDIR)
        known = parent.children.get(name)
        if known is None:
            return self._enter(parent, name, self.union.lookup(parent.nodeid, name))
        if self.revalidate:
            found = self.union.lookup(parent.nodeid, name)
            known.lookups += 1
            assert found.nodeid == known.nodeid, f"{name!r} was node {known.nodeid} and is {found.nodeid}"
        return known

    def _enter(self, parent: Dentry, name: bytes, found: Found) -> Dentry:
        assert name not in parent.children
        dentry = Dentry(parent, name, found.nodeid, stat.S_IFMT(found.attr.st.st_mode))
        parent.children[name] = dentry
        return dentry

    def _walk(self, path: Path) -> Dentry:
        dentry = self.root
        for name in path:
            dentry = self._lookup(dentry, name)
        return dentry

    def _follow(self, path: Path) -> Dentry:
        dentry = self._walk(path)
        if dentry.kind == stat.S_IFLNK:
            raise fail(errno.ENOENT)
        return dentry

    def _parent(self, path: Path) -> tuple[Dentry, bytes]:
        parent = self._follow(path[:-1])
        if parent.kind != stat.S_IFDIR:
            raise fail(errno.ENOTDIR)
        return parent, path[-1]

    def _maybe(self, parent: Dentry, name: bytes) -> Dentry | None:
        try:
            return self._lookup(parent, name)
        except FileNotFoundError:
            return None

    def _absent(self, path: Path) -> tuple[Dentry, bytes]:
        parent, name = self._parent(path)
        if self._maybe(parent, name):
            raise fail(errno.EEXIST)
        return parent, name

    def _drop(self, dentry: Dentry) -> None:
        """The name is gone; the node stays known while a handle is open."""
        assert dentry.parent
        del dentry.parent.children[dentry.name]
        self._forget_unpinned(dentry)

    def _forget_unpinned(self, dentry: Dentry) -> None:
        attached = dentry.parent is not None and dentry.parent.children.get(dentry.name) is dentry
        if not dentry.pins and not attached and dentry.lookups:
            self.union.forget(dentry.nodeid, dentry.lookups)
            dentry.lookups = 0

    def leaves(self) -> list[Dentry]:
        """Names that the kernel could forget now, in a fixed order."""
        found: list[Dentry] = []
        pending = [self.root]
        while pending:
            dentry = pending.pop()
            pending += (dentry.children[name] for name in sorted(dentry.children))
            if not dentry.children and dentry is not self.root and not dentry.pins:
                found.append(dentry)
        return found

    def forget(self, dentry: Dentry) -> None:
        self._drop(dentry)

    def forget_all(self) -> None:
        """Memory pressure: everything that is not open goes, leaves first."""
        while leaves := self.leaves():
            for dentry in leaves:
                self.forget(dentry)

    # Objects.

    def create(self, path: Path, mode: int) -> None:
        parent, name = self._absent(path)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        found = steps.run(self.union.create(parent.nodeid, name, stat.S_IFREG | mode, flags, self.caller))
        self._enter(parent, name, found)
        self.union.release(found.nodeid)

    def mkdir(self, path: Path, mode: int) -> None:
        parent, name = self._absent(path)
        # vfs_mkdir lets nothing but permissions and the sticky bit through.
        self._enter(parent, name, self.union.mkdir(parent.nodeid, name, mode & 0o1777, self.caller))

    def mknod(self, path: Path, mode: int, rdev: int) -> None:
        parent, name = self._absent(path)
        self._enter(parent, name, self.union.mknod(parent.nodeid, name, mode, rdev, self.caller))

    def symlink(self, target: bytes, path: Path) -> None:
        parent, name = self._absent(path)
        self._enter(parent, name, self.union.symlink(parent.nodeid, name, target, self.caller))

    def unlink(self, path: Path) -> None:
        parent, name = self._parent(path)
        dentry = self._lookup(parent, name)
        if dentry.kind == stat.S_IFDIR:
            raise fail(errno.EISDIR)
        steps.run(self.union.unlink(parent.nodeid, name))
        self._drop(dentry)

    def rmdir(self, path: Path) -> None:
        parent, name = self._parent(path)
        dentry = self._lookup(parent, name)
        if dentry.kind != stat.S_IFDIR:
            raise fail(errno.ENOTDIR)
        self.union.rmdir(parent.nodeid, name)
        self._drop(dentry)

    def link(self, path: Path, newpath: Path) -> None:
        source = self._walk(path)
        parent, name = self._absent(newpath)
        if source.kind == stat.S_IFDIR:
            raise fail(errno.EPERM)
        self._enter(parent, name, steps.run(self.union.link(source.nodeid, parent.nodeid, name)))

    def link_unnamed(self, data: bytes, path: Path) -> None:
        """open(2) with O_TMPFILE, a write, and linkat(2): the file is whole before it has a name."""
        parent, _ = self._parent(path)
        found = steps.run(
            self.union.tmpfile(parent.nodeid, stat.S_IFREG | 0o600, os.O_RDWR | os.O_TMPFILE, self.caller)
        )
        try:
            steps.run(self.union.write(found.nodeid, data, 0))
            parent, name = self._absent(path)
            self._enter(parent, name, steps.run(self.union.link(found.nodeid, parent.nodeid, name)))
        finally:
            self.union.release(found.nodeid)
            self.union.forget(found.nodeid, 1)

    def rename(self, path: Path, newpath: Path, flags: int) -> None:
        parent, name = self._parent(path)
        newparent, newname = self._parent(newpath)
        source = self._lookup(parent, name)
        target = self._maybe(newparent, newname)
        self._check_rename(source, newparent, parent, target, flags)
        if target and target.nodeid == source.nodeid:
            return
        steps.run(self.union.rename(parent.nodeid, name, newparent.nodeid, newname, flags))
        if flags & RENAME_EXCHANGE:
            assert target
            self._move(target, parent, name, source, newparent, newname)
        else:
            if target:
                self._drop(target)
            del parent.children[name]
            source.parent, source.name = newparent, newname
            newparent.children[newname] = source

    def _move(
        self, target: Dentry, parent: Dentry, name: bytes, source: Dentry, newparent: Dentry, newname: bytes
    ) -> None:
        parent.children[name], newparent.children[newname] = target, source
        target.parent, target.name = parent, name
        source.parent, source.name = newparent, newname

    def _check_rename(
        self, source: Dentry, newparent: Dentry, parent: Dentry, target: Dentry | None, flags: int
    ) -> None:
        if flags & RENAME_NOREPLACE and target:
            raise fail(errno.EEXIST)
        if flags & RENAME_EXCHANGE and not target:
            raise fail(errno.ENOENT)
        if source in _ancestry(newparent):
            raise fail(errno.EINVAL)
        if target and target in _ancestry(parent):
            raise fail(errno.EINVAL if flags & RENAME_EXCHANGE else errno.ENOTEMPTY)
        if not target or flags & RENAME_EXCHANGE or target.nodeid == source.nodeid:
            return
        if source.kind == stat.S_IFDIR and target.kind != stat.S_IFDIR:
            raise fail(errno.ENOTDIR)
        if source.kind != stat.S_IFDIR and target.kind == stat.S_IFDIR:
            raise fail(errno.EISDIR)

    # Attributes.

    def _setattr(self, dentry: Dentry, change: SetAttr) -> None:
        steps.run(self.union.setattr(dentry.nodeid, change, self.caller))

    def chmod(self, path: Path, mode: int) -> None:
        self._setattr(self._follow(path), SetAttr(mode=mode))

    def chown(self, path: Path, uid: int, gid: int) -> None:
        change = SetAttr(uid=None if uid == -1 else uid, gid=None if gid == -1 else gid)
        self._setattr(self._walk(path), change)

    def utimens(self, path: Path, atime_ns: int, mtime_ns: int) -> None:
        self._setattr(self._walk(path), SetAttr(atime_ns=atime_ns, mtime_ns=mtime_ns))

    def truncate(self, path: Path, size: int) -> None:
        dentry = self._follow(path)
        if dentry.kind != stat.S_IFREG:
            raise fail(errno.EISDIR if dentry.kind == stat.S_IFDIR else errno.EINVAL)
        self._setattr(dentry, SetAttr(size=size))

    def getattr(self, path: Path) -> Attr:
        return self.union.getattr(self._walk(path).nodeid)

    def stat(self, path: Path) -> tuple[int, int]:
        attr = self.getattr(path)
        return attr.st.st_mode, attr.st.st_size if stat.S_ISREG(attr.st.st_mode) else 0

    def readlink(self, path: Path) -> bytes:
        dentry = self._walk(path)
        if dentry.kind != stat.S_IFLNK:
            raise fail(errno.EINVAL)
        return self.union.readlink(dentry.nodeid)

    def setxattr(self, path: Path, name: bytes, value: bytes, flags: int) -> None:
        dentry = self._walk(path)
        if _is_user_xattr_refused(dentry.kind, name):
            raise fail(errno.EPERM)
        steps.run(self.union.setxattr(dentry.nodeid, name, value, flags))

    def getxattr(self, path: Path, name: bytes) -> bytes:
        dentry = self._walk(path)
        if _is_user_xattr_refused(dentry.kind, name):
            raise fail(errno.ENODATA)
        return self.union.getxattr(dentry.nodeid, name)

    def removexattr(self, path: Path, name: bytes) -> None:
        dentry = self._walk(path)
        if _is_user_xattr_refused(dentry.kind, name):
            raise fail(errno.EPERM)
        steps.run(self.union.removexattr(dentry.nodeid, name))

    def listxattr(self, path: Path) -> list[bytes]:
        return sorted(self.union.listxattr(self._walk(path).nodeid))

    def listdir(self, path: Path) -> list[tuple[bytes, int]]:
        dentry = self._follow(path)
        if dentry.kind != stat.S_IFDIR:
            raise fail(errno.ENOTDIR)
        self.union.opendir(dentry.nodeid)
        entries = list(self.union.listdir(dentry.nodeid, 0))
        self.union.releasedir(dentry.nodeid)
        assert [name for name, *_ in entries[:2]] == [b".", b".."]
        return sorted((name, kind) for name, _, kind, _ in entries[2:])

    # Data.

    def _regular(self, path: Path) -> Dentry:
        dentry = self._walk(path)
        if dentry.kind == stat.S_IFLNK:
            raise fail(errno.ELOOP)
        if dentry.kind == stat.S_IFDIR:
            raise fail(errno.EISDIR)
        if dentry.kind != stat.S_IFREG:
            raise fail(errno.ENXIO)
        return dentry

    def write(self, path: Path, data: bytes, offset: int, flags: int = os.O_WRONLY) -> int:
        dentry = self._regular(path)
        steps.run(self.union.open(dentry.nodeid, flags))
        try:
            return steps.run(self.union.write(dentry.nodeid, data, offset))
        finally:
            self.union.release(dentry.nodeid)

    def append(self, path: Path, data: bytes) -> int:
        dentry = self._regular(path)
        return self.write(path, data, self.union.getattr(dentry.nodeid).st.st_size, os.O_WRONLY | os.O_APPEND)

    def read(self, path: Path, size: int, offset: int) -> bytes:
        dentry = self._regular(path)
        steps.run(self.union.open(dentry.nodeid, os.O_RDONLY))
        try:
            return bytes(steps.run(self.union.read(dentry.nodeid, size, offset)))
        finally:
            self.union.release(dentry.nodeid)

    def fallocate(self, path: Path, offset: int, length: int) -> None:
        dentry = self._regular(path)
        steps.run(self.union.open(dentry.nodeid, os.O_WRONLY))
        try:
            steps.run(self.union.fallocate(dentry.nodeid, 0, offset, length))
        finally:
            self.union.release(dentry.nodeid)

    def open(self, path: Path) -> int:
        dentry = self._regular(path)
        steps.run(self.union.open(dentry.nodeid, os.O_RDWR))
        dentry.pins += 1
        handle = self._next_handle
        self._next_handle += 1
        self._handles[handle] = dentry
        return handle

    def fread(self, handle: int, size: int, offset: int) -> bytes:
        return bytes(steps.run(self.union.read(self._handles[handle].nodeid, size, offset)))

    def fwrite(self, handle: int, data: bytes, offset: int) -> int:
        return steps.run(self.union.write(self._handles[handle].nodeid, data, offset))

    def ftruncate(self, handle: int, size: int) -> None:
        self._setattr(self._handles[handle], SetAttr(size=size))

    def fchmod(self, handle: int, mode: int) -> None:
        self._setattr(self._handles[handle], SetAttr(mode=mode))

    def fstat(self, handle: int) -> tuple[int, int, int]:
        attr = self.union.getattr(self._handles[handle].nodeid)
        return attr.st.st_mode, attr.st.st_size, attr.nlink

    def close(self, handle: int) -> None:
        dentry = self._handles.pop(handle)
        self.union.release(dentry.nodeid)
        dentry.pins -= 1
        self._forget_unpinned(dentry)

    def close_all(self) -> None:
        for handle in list(self._handles):
            self.close(handle)


def _ancestry(dentry: Dentry | None) -> Iterator[Dentry]:
    while dentry:
        yield dentry
        dentry = dentry.parent


class Plain:
    """The same face over a directory of the machine. The process's umask must be UMASK."""

    def __init__(self, root: bytes) -> None:
        self.root = root

    def _at(self, path: Path) -> bytes:
        return b"/".join((self.root, *path))

    def create(self, path: Path, mode: int) -> None:
        os.close(os.open(self._at(path), os.O_RDWR | os.O_CREAT | os.O_EXCL, mode))

    def mkdir(self, path: Path, mode: int) -> None:
        os.mkdir(self._at(path), mode)

    def mknod(self, path: Path, mode: int, rdev: int) -> None:
        os.mknod(self._at(path), mode, rdev)

    def symlink(self, target: bytes, path: Path) -> None:
        os.symlink(target, self._at(path))

    def unlink(self, path: Path) -> None:
        os.unlink(self._at(path))

    def rmdir(self, path: Path) -> None:
        os.rmdir(self._at(path))

    def link(self, path: Path, newpath: Path) -> None:
        os.link(self._at(path), self._at(newpath), follow_symlinks=False)

    def link_unnamed(self, data: bytes, path: Path) -> None:
        fd = os.open(self._at(path[:-1]), os.O_RDWR | os.O_TMPFILE, 0o600)
        try:
            os.pwrite(fd, data, 0)
            # With a descriptor it is linkat(2), which alone can follow the link in /proc.
            os.link(b"/proc/self/fd/%d" % fd, self._at(path), src_dir_fd=fd, follow_symlinks=True)
        finally:
            os.close(fd)

    def rename(self, path: Path, newpath: Path, flags: int) -> None:
        renameat2(self._at(path), self._at(newpath), flags)

    def chmod(self, path: Path, mode: int) -> None:
        os.chmod(self._at(path), mode)

    def chown(self, path: Path, uid: int, gid: int) -> None:
        os.chown(self._at(path), uid, gid, follow_symlinks=False)

    def utimens(self, path: Path, atime_ns: int, mtime_ns: int) -> None:
        os.utime(self._at(path), ns=(atime_ns, mtime_ns), follow_symlinks=False)

    def truncate(self, path: Path, size: int) -> None:
        os.truncate(self._at(path), size)

    def stat(self, path: Path) -> tuple[int, int]:
        st = os.lstat(self._at(path))
        return st.st_mode, st.st_size if stat.S_ISREG(st.st_mode) else 0

    def readlink(self, path: Path) -> bytes:
        return os.readlink(self._at(path))

    def setxattr(self, path: Path, name: bytes, value: bytes, flags: int) -> None:
        os.setxattr(self._at(path), name, value, flags, follow_symlinks=False)

    def getxattr(self, path: Path, name: bytes) -> bytes:
        return os.getxattr(self._at(path), name, follow_symlinks=False)

    def removexattr(self, path: Path, name: bytes) -> None:
        os.removexattr(self._at(path), name, follow_symlinks=False)

    def listxattr(self, path: Path) -> list[bytes]:
        return sorted(os.fsencode(name) for name in os.listxattr(self._at(path), follow_symlinks=False))

    def listdir(self, path: Path) -> list[tuple[bytes, int]]:
        with os.scandir(self._at(path)) as entries:
            return sorted(
                (entry.name, stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode) >> 12) for entry in entries
            )

    def _open(self, path: Path, flags: int) -> int:
        st = os.lstat(self._at(path))
        if stat.S_IFMT(st.st_mode) in (stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK):
            raise fail(errno.ENXIO)
        if stat.S_ISDIR(st.st_mode):
            raise fail(errno.EISDIR)
        return os.open(self._at(path), flags | os.O_NOFOLLOW)

    def write(self, path: Path, data: bytes, offset: int) -> int:
        fd = self._open(path, os.O_WRONLY)
        try:
            return os.pwrite(fd, data, offset)
        finally:
            os.close(fd)

    def append(self, path: Path, data: bytes) -> int:
        fd = self._open(path, os.O_WRONLY | os.O_APPEND)
        try:
            return os.write(fd, data)
        finally:
            os.close(fd)

    def read(self, path: Path, size: int, offset: int) -> bytes:
        fd = self._open(path, os.O_RDONLY)
        try:
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)

    def fallocate(self, path: Path, offset: int, length: int) -> None:
        fd = self._open(path, os.O_WRONLY)
        try:
            os.posix_fallocate(fd, offset, length)
        finally:
            os.close(fd)

    def open(self, path: Path) -> int:
        return self._open(path, os.O_RDWR)

    def fread(self, handle: int, size: int, offset: int) -> bytes:
        return os.pread(handle, size, offset)

    def fwrite(self, handle: int, data: bytes, offset: int) -> int:
        return os.pwrite(handle, data, offset)

    def ftruncate(self, handle: int, size: int) -> None:
        os.ftruncate(handle, size)

    def fchmod(self, handle: int, mode: int) -> None:
        os.fchmod(handle, mode)

    def fstat(self, handle: int) -> tuple[int, int, int]:
        st = os.fstat(handle)
        return st.st_mode, st.st_size, st.st_nlink

    def close(self, handle: int) -> None:
        os.close(handle)


_libc = ctypes.CDLL(None, use_errno=True)


def renameat2(path: bytes, newpath: bytes, flags: int) -> None:
    """renameat2(2) on paths, apart from the module under test."""
    at_fdcwd = ctypes.c_int(-100)
    if _libc.renameat2(at_fdcwd, path, at_fdcwd, newpath, ctypes.c_uint(flags)):
        raise fail(ctypes.get_errno())


def union_snapshot(union: Union) -> Tree:
    """Read everything the union shows, with lookups of its own, all given back."""
    tree: Tree = {}
    _read_node(union, union.root, b"", tree)
    return tree


def _read_node(union: Union, nodeid: int, path: bytes, tree: Tree) -> None:
    attr = union.getattr(nodeid)
    kind = stat.S_IFMT(attr.st.st_mode)
    tree[path] = _record(union, nodeid, attr)
    if kind != stat.S_IFDIR:
        return
    for name, _, listed, _ in list(union.listdir(nodeid, 0)):
        if name in (b".", b".."):
            continue
        found = union.lookup(nodeid, name)
        assert stat.S_IFMT(found.attr.st.st_mode) >> 12 == listed, name
        _read_node(union, found.nodeid, join(path, name), tree)
        union.forget(found.nodeid, 1)


def _record(union: Union, nodeid: int, attr: Attr) -> Record:
    st = attr.st
    kind = stat.S_IFMT(st.st_mode)
    data = b""
    if kind == stat.S_IFREG:
        steps.run(union.open(nodeid, os.O_RDONLY))
        data = bytes(steps.run(union.read(nodeid, st.st_size + 1, 0)))
        union.release(nodeid)
    elif kind == stat.S_IFLNK:
        data = union.readlink(nodeid)
    xattrs = tuple(sorted((name, union.getxattr(nodeid, name)) for name in union.listxattr(nodeid)))
    size = 0 if kind == stat.S_IFDIR else st.st_size
    return Record(kind, stat.S_IMODE(st.st_mode), st.st_uid, st.st_gid, st.st_rdev, size, st.st_mtime_ns, data, xattrs)
