"""System calls: the only ctypes in the project, the owning `Fd`, and the seam where tests crash or fail a call.

Rules this file obeys:

- Names inside a layer are single components of type bytes (`component` refuses the others), always relative to a
  directory fd and never followed when they are symlinks.
- Every call that changes a file system is a function named in `MUTATING` and is called as ``syscalls.NAME(...)``:
  a test that replaces the attribute sees every change the core makes.
- An object that may be of any type is held by an O_PATH fd. What an O_PATH fd does not take (EBADF) goes through
  `proc_path`, whose magic link resolves to the object itself, a symlink included; what is open goes the shorter way.
- Errors are plain OSError with errno; nothing is retried here except EINTR, which Python does.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Callable
from types import TracebackType

from unionfsd.typed import Any, Final, TypeVar

T = TypeVar("T")

_libc = ctypes.CDLL(None, use_errno=True)

AT_FDCWD: Final = -100
AT_SYMLINK_NOFOLLOW: Final = 0x100
AT_EMPTY_PATH: Final = 0x1000

RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
RENAME_WHITEOUT: Final = 4

#: For times in nanoseconds what utimensat(2) has for tv_nsec; outside of what a timespec can say.
UTIME_NOW: Final = 1 << 100
UTIME_OMIT: Final = UTIME_NOW + 1
_TV_NSEC = {UTIME_NOW: (1 << 30) - 1, UTIME_OMIT: (1 << 30) - 2}

MNT_FORCE: Final = 1
MNT_DETACH: Final = 2
UMOUNT_NOFOLLOW: Final = 8

_NR_OPEN_TREE: Final = 428
_NR_MOUNT_SETATTR: Final = 442
_OPEN_TREE_CLONE: Final = 1
MOUNT_ATTR_RDONLY: Final = 1
MOUNT_ATTR_NOATIME: Final = 0x10
_MOUNT_ATTR__ATIME: Final = 0x70

FICLONE: Final = 0x40049409
_SYNC_FILE_RANGE_WRITE: Final = 2

#: Functions of this module that change a file system; the core calls them through the module, always.
MUTATING: Final = (
    "create_at",
    "tmpfile_at",
    "mkdir_at",
    "mknod_at",
    "symlink_at",
    "link_at",
    "link_fd",
    "unlink_at",
    "rmdir_at",
    "renameat2",
    "chown",
    "chmod",
    "utimens",
    "setxattr",
    "removexattr",
    "truncate",
    "pwrite",
    "clone",
    "copy_range",
    "fallocate",
    "flag_ioctl",
    "fsync",
    "fdatasync",
    "syncfs",
)


class Fd:
    """An owned file descriptor: `fd` is the number, -1 once closed; closed at the latest when the object goes."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def fileno(self) -> int:
        return self.fd

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Fd:
        return self

    def __exit__(self, et: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Fd({self.fd})"


def component(name: bytes) -> bytes:
    """Return `name` if it is one path component, else raise EINVAL (or ENOENT for the empty name)."""
    if b"/" in name or b"\0" in name or name == b".." or name == b".":
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), os.fsdecode(name))
    if not name:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    return name


def proc_path(fd: int) -> bytes:
    """The path whose magic link is the object that `fd` refers to; needs /proc."""
    return b"/proc/self/fd/%d" % fd


# Opening and reading. Where it may be done in a lower it is done through this module, always: `remote` replaces it.

fstat, fstatvfs, lseek, preadv = os.fstat, os.fstatvfs, os.lseek, os.preadv


def open_dir(dirfd: int, name: bytes) -> Fd:
    """O_PATH fd of the directory `name` beneath `dirfd`; ENOTDIR or ELOOP for anything else."""
    return Fd(os.open(component(name), os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dirfd))


def open_object(dirfd: int, name: bytes) -> Fd:
    """O_PATH fd of whatever `name` is beneath `dirfd`, a symlink included."""
    return Fd(os.open(component(name), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dirfd))


_DATA_FLAGS: Final = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def open_data(dirfd: int, name: bytes, flags: int) -> Fd:
    """fd for the data of the regular file `name`; `flags` are O_RDONLY or O_RDWR and O_NOATIME."""
    return Fd(os.open(component(name), flags | _DATA_FLAGS, dir_fd=dirfd))


def reopen(fd: int, flags: int) -> Fd:
    """A new open file description, with `flags`, of the object that `fd` (O_PATH or not) refers to."""
    return Fd(os.open(proc_path(fd), flags | os.O_CLOEXEC))


def stat_at(dirfd: int, name: bytes) -> os.stat_result:
    """lstat of `name` beneath `dirfd`."""
    return os.stat(name, dir_fd=dirfd, follow_symlinks=False)


def stat_or_none(dirfd: int, name: bytes) -> os.stat_result | None:
    """lstat of `name` beneath `dirfd`, None when there is nothing."""
    try:
        return stat_at(dirfd, name)
    except FileNotFoundError:
        return None


def _on(call: Callable[..., T], fd: int, *args: object) -> T:
    try:
        return call(fd, *args)
    except OSError as exc:
        if exc.errno != errno.EBADF:
            raise
    return call(proc_path(fd), *args)


def getxattr(fd: int, name: bytes) -> bytes:
    """Value of an xattr of the object `fd` (O_PATH allowed); ENODATA when there is none."""
    return _on(os.getxattr, fd, name)


def getxattr_at(dirfd: int, name: bytes, xattr: bytes) -> bytes:
    """Value of an xattr of `name` beneath `dirfd`, a symlink included, or with no name of `dirfd` itself; ENODATA."""
    if not name:
        return getxattr(dirfd, xattr)
    return os.getxattr(proc_path(dirfd) + b"/" + component(name), xattr, follow_symlinks=False)


def listxattr(fd: int) -> list[bytes]:
    """Names of the xattrs of the object `fd` (O_PATH allowed)."""
    return [os.fsencode(name) for name in _on(os.listxattr, fd)]


def listxattr_at(dirfd: int, name: bytes) -> list[str]:
    """Names of the xattrs of `name` beneath `dirfd`, a symlink included, as the file system decodes them."""
    return os.listxattr(proc_path(dirfd) + b"/" + component(name), follow_symlinks=False)


def readlink(fd: int) -> bytes:
    """Target of the symlink that the O_PATH `fd` refers to."""
    return os.readlink(b"", dir_fd=fd)


# Changing. Every function below is in MUTATING.

truncate, fsync, fdatasync = os.ftruncate, os.fsync, os.fdatasync


def create_at(dirfd: int, name: bytes, mode: int) -> Fd:
    """Create the regular file `name`, O_EXCL, opened O_RDWR; EEXIST when anything is there."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    return Fd(os.open(component(name), flags, mode, dir_fd=dirfd))


def tmpfile_at(dirfd: int, mode: int) -> Fd:
    """An unnamed regular file in the file system of the directory `dirfd` (O_TMPFILE); EOPNOTSUPP where it has none."""
    return Fd(os.open(b".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, mode, dir_fd=dirfd))


def mkdir_at(dirfd: int, name: bytes, mode: int) -> None:
    os.mkdir(component(name), mode, dir_fd=dirfd)


def mknod_at(dirfd: int, name: bytes, mode: int, rdev: int) -> None:
    os.mknod(component(name), mode, rdev, dir_fd=dirfd)


def symlink_at(target: bytes, dirfd: int, name: bytes) -> None:
    os.symlink(target, component(name), dir_fd=dirfd)


def link_at(dirfd: int, name: bytes, newdirfd: int, newname: bytes) -> None:
    os.link(component(name), component(newname), src_dir_fd=dirfd, dst_dir_fd=newdirfd, follow_symlinks=False)


_linkat = _libc.linkat
_linkat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_int)


def link_fd(fd: int, newdirfd: int, newname: bytes) -> None:
    """Give the object that `fd` refers to (an O_TMPFILE, too) a name; EEXIST when it is taken."""
    if _linkat(fd, b"", newdirfd, component(newname), AT_EMPTY_PATH):
        if ctypes.get_errno() != errno.ENOENT:
            raise _error(newname)
        # That takes CAP_DAC_READ_SEARCH before Linux 6.10.
        os.link(proc_path(fd), newname, dst_dir_fd=newdirfd, follow_symlinks=True)


def unlink_at(dirfd: int, name: bytes) -> None:
    os.unlink(component(name), dir_fd=dirfd)


def rmdir_at(dirfd: int, name: bytes) -> None:
    os.rmdir(component(name), dir_fd=dirfd)


_renameat2 = _libc.renameat2
_renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)


def renameat2(dirfd: int, name: bytes, newdirfd: int, newname: bytes, flags: int = 0) -> None:
    """renameat2(2); EINVAL where the file system lacks a flag."""
    if _renameat2(dirfd, component(name), newdirfd, component(newname), flags):
        raise _error(newname)


def chown(fd: int, uid: int, gid: int) -> None:
    """Change the owner of the object `fd` (O_PATH allowed); -1 leaves one as it is."""
    _on(os.chown, fd, uid, gid)


def chmod(fd: int, mode: int) -> None:
    """Change the permission bits of the object `fd` (O_PATH allowed); EOPNOTSUPP for a symlink."""
    _on(os.chmod, fd, mode)


_utimensat = _libc.utimensat
_utimensat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)
_TIMES: Final = struct.Struct("@qqqq")


def utimens(fd: int, atime_ns: int, mtime_ns: int) -> None:
    """Set the times of the object `fd` (O_PATH allowed), in ns since the epoch, or UTIME_NOW or UTIME_OMIT."""
    times = _TIMES.pack(*_timespec(atime_ns), *_timespec(mtime_ns))
    # The first is understood from Linux 5.8 on.
    if _utimensat(fd, b"", times, AT_EMPTY_PATH) and _utimensat(AT_FDCWD, proc_path(fd), times, 0):
        raise _error()


def _timespec(ns: int) -> tuple[int, int]:
    special = _TV_NSEC.get(ns)
    return divmod(ns, 1_000_000_000) if special is None else (0, special)


def setxattr(fd: int, name: bytes, value: bytes, flags: int = 0) -> None:
    """Set an xattr of the object `fd` (O_PATH allowed); `flags` are XATTR_CREATE or XATTR_REPLACE."""
    _on(os.setxattr, fd, name, value, flags)


def removexattr(fd: int, name: bytes) -> None:
    _on(os.removexattr, fd, name)


def pwrite(fd: int, data: Any, offset: int) -> int:
    """pwrite(2); returns the bytes written, which may be fewer than given."""
    return os.pwrite(fd, data, offset)


def clone(dst: int, src: int) -> None:
    """Make `dst` share all data of `src` (FICLONE); EOPNOTSUPP, EXDEV or EINVAL where it cannot be."""
    fcntl.ioctl(dst, FICLONE, src)


def copy_range(src: int, dst: int, count: int, offset: int, to: int, *, write_out: bool = False) -> int:
    """copy_file_range(2); returns the bytes copied, 0 at end of file. `write_out`: the disk begins with them."""
    done = os.copy_file_range(src, dst, count, offset, to)
    if write_out:  # no promise is made: whoever needs one calls fsync, which tells what failed
        _libc.sync_file_range(dst, ctypes.c_int64(to), ctypes.c_int64(done), _SYNC_FILE_RANGE_WRITE)
    return done


_fallocate = _libc.fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with its FALLOC_FL_* modes."""
    if _fallocate(fd, mode, offset, length):
        raise _error()


FS_IOC_GETFLAGS: Final = 0x80086601
FS_IOC_SETFLAGS: Final = 0x40086602
FS_IOC_GETVERSION: Final = 0x80087601
FS_IOC_FSGETXATTR: Final = 0x801C581F
FS_IOC_FSSETXATTR: Final = 0x401C5820
#: The ioctls about the flags of an inode (include/uapi/linux/fs.h), and those of them that change something.
FLAG_IOCTLS: Final = (FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IOC_GETVERSION, FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR)
FLAG_CHANGES: Final = (FS_IOC_SETFLAGS, FS_IOC_FSSETXATTR)
_FLAG_SIZES: Final = {FS_IOC_FSGETXATTR: 28, FS_IOC_FSSETXATTR: 28}


def flag_ioctl(fd: int, command: int, data: bytes) -> bytes:
    """One of FLAG_IOCTLS on `fd` (readable); `data` is its argument, the result what the file system answered.

    The argument is an int, or struct fsxattr; EINVAL when `data` is too short for it.
    """
    size = _FLAG_SIZES.get(command, 4)
    if command in FLAG_CHANGES and len(data) < size:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    argument = bytearray(data[:size].ljust(8 if size == 4 else size, b"\0"))
    fcntl.ioctl(fd, command, argument)
    return b"" if command in FLAG_CHANGES else bytes(argument[:size])


_statx = _libc.statx
_statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_char_p)
_STATX_BTIME: Final = 0x800
_Statx = ctypes.c_char * 256  # made once: create_string_buffer makes a type and an audit event at every call
_STATX_BTIME_AT: Final = 0x50
_STATX_DEV_AT: Final = 0x88
_AT_STATX_DONT_SYNC: Final = 0x4000
_STATX_ATTRIBUTES_AT: Final = 0x08


def _statx_of(dirfd: int, path: bytes, flags: int, mask: int = 0) -> ctypes.Array[ctypes.c_char]:
    buf = _Statx()
    if _statx(dirfd, path, flags, mask, buf):
        raise _error(path)
    return buf


def attributes_at(dirfd: int, name: bytes) -> int:
    """STATX_ATTR_* of `name` beneath `dirfd`, or with no name of `dirfd` itself: 0x10 immutable, 0x20 append-only."""
    buf = _statx_of(dirfd, component(name) if name else b"", AT_SYMLINK_NOFOLLOW if name else AT_EMPTY_PATH)
    return int(struct.unpack_from("=Q", buf, _STATX_ATTRIBUTES_AT)[0])


def birth_time(fd: int) -> int | None:
    """When the object `fd` (O_PATH allowed) was made, in ns since the epoch; None where that is not known."""
    buf = _statx_of(fd, b"", AT_EMPTY_PATH, _STATX_BTIME)
    if not struct.unpack_from("=I", buf)[0] & _STATX_BTIME:
        return None
    seconds, nanoseconds = struct.unpack_from("=qI", buf, _STATX_BTIME_AT)
    return int(seconds) * 1_000_000_000 + int(nanoseconds)


def device_of(path: bytes) -> tuple[int, int]:
    """(major, minor) of what `path` is, symlinks followed, as the kernel knows it: its file system is not asked."""
    major, minor = struct.unpack_from("=II", _statx_of(AT_FDCWD, path, _AT_STATX_DONT_SYNC), _STATX_DEV_AT)
    return int(major), int(minor)


def syncfs(fd: int) -> None:
    """Write back the file system that `fd` lies on."""
    if _libc.syncfs(fd):
        raise _error()


# Mounts and handles.


def mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    """mount(2)."""
    args = (os.fsencode(source), os.fsencode(target), os.fsencode(fstype), ctypes.c_ulong(flags), os.fsencode(data))
    if _libc.mount(*args):
        raise _error(os.fsencode(target))


def umount2(target: str | bytes, flags: int) -> None:
    """umount2(2)."""
    if _libc.umount2(os.fsencode(target), flags):
        raise _error(os.fsencode(target))


def clone_mount(path: bytes, attributes: int) -> Fd:
    """O_PATH root of a private, detached copy of the mount at `path`, without its submounts, with MOUNT_ATTR_* set.

    `path` is a directory. EPERM without CAP_SYS_ADMIN, ENOSYS before Linux 5.12.
    """
    tree = Fd(_syscall(_NR_OPEN_TREE, AT_FDCWD, path, _OPEN_TREE_CLONE | os.O_CLOEXEC))
    if attributes:
        cleared = _MOUNT_ATTR__ATIME if attributes & _MOUNT_ATTR__ATIME else 0
        attr = struct.pack("=QQQQ", attributes, cleared, 0, 0)
        _syscall(_NR_MOUNT_SETATTR, tree.fd, b"", AT_EMPTY_PATH, attr, len(attr))
    return tree


_AF_UNIX: Final = 1
_SOCK_STREAM: Final = 1 | os.O_NONBLOCK | os.O_CLOEXEC


def listen_unix(path: bytes, mode: int, backlog: int) -> Fd:
    """A non-blocking unix stream socket that listens on `path`, of at most 107 bytes, with the permissions `mode`.

    Here and not by `socket`, whose import takes longer than a mount does.
    """
    fd = Fd(_libc.socket(_AF_UNIX, _SOCK_STREAM, 0))
    if fd.fd < 0:
        raise _error()
    # Before it is bound: the file is never there with a wider mode (net/unix/af_unix.c), only a narrower one by umask.
    os.fchmod(fd.fd, mode)
    address = struct.pack("=H", _AF_UNIX) + path + b"\0"
    if _libc.bind(fd.fd, address, len(address)) or _libc.listen(fd.fd, backlog):
        raise _error(path)
    os.chmod(path, mode)
    return fd


_MAX_HANDLE_SZ: Final = 128
_FileHandle = ctypes.c_char * (8 + _MAX_HANDLE_SZ)


def file_handle(dirfd: int, name: bytes) -> tuple[int, bytes]:
    """(type, opaque bytes) of the file handle of `name` beneath `dirfd`, or of `dirfd` itself when `name` is empty.

    name_to_handle_at(2); EOPNOTSUPP where the file system has none.
    """
    buf = _FileHandle()
    struct.pack_into("=Ii", buf, 0, _MAX_HANDLE_SZ, 0)
    mount_id = ctypes.c_int()
    if _libc.name_to_handle_at(dirfd, name, buf, ctypes.byref(mount_id), 0 if name else AT_EMPTY_PATH):
        raise _error(name)
    size, kind = struct.unpack_from("=Ii", buf)
    return kind, buf.raw[8 : 8 + size]


def open_by_handle(mount_fd: int, kind: int, handle: bytes) -> Fd:
    """O_PATH fd of what a file handle means in the file system of `mount_fd` (not O_PATH).

    open_by_handle_at(2); EPERM without CAP_DAC_READ_SEARCH, ESTALE when the object is gone.
    """
    packed = struct.pack("=Ii", len(handle), kind) + handle
    fd = _libc.open_by_handle_at(mount_fd, packed, os.O_PATH | os.O_CLOEXEC)
    if fd < 0:
        raise _error()
    return Fd(fd)


def fs_type(fd: int) -> int:
    """The magic number of the file system of `fd` (O_PATH allowed), as statfs(2) has it."""
    buf = _Statx()  # larger than a struct statfs
    if _libc.fstatfs64(fd, buf):
        raise _error()
    return int(struct.unpack_from("@l", buf)[0])


def _syscall(number: int, *args: int | bytes) -> int:
    words = [ctypes.c_long(a) if isinstance(a, int) else ctypes.c_char_p(a) for a in args]
    result: int = _libc.syscall(ctypes.c_long(number), *words)
    if result < 0:
        raise _error()
    return result


def _error(name: bytes = b"") -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), os.fsdecode(name)) if name else OSError(number, os.strerror(number))
