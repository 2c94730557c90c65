"""Project ids: whose quota pays for what is in the upper (xfs, ext4; podman and Docker limit containers by them).

Rules this file obeys:

- What is made in a directory that hands its project on (FS_XFLAG_PROJINHERIT) is of that project. ext4 and xfs let
  nothing of another be linked or renamed into it: EXDEV (fs/ext4/namei.c, ext4_rename; fs/xfs/xfs_inode.c, xfs_rename).
- So work hands on what the root of the upper does, and what is staged for a directory with a project of its own gets
  that, as if it had been made there. Kernel overlayfs makes new objects in place, and fails with EXDEV to copy up.
"""

from __future__ import annotations

import errno
import os
import stat
import struct

from . import syscalls
from .logger import get_logger
from .typed import Final

log = get_logger(__name__)

#: struct fsxattr: fsx_xflags, fsx_extsize, fsx_nextents, fsx_projid, fsx_cowextsize, and room.
_FSXATTR: Final = struct.Struct("=IIIII8x")
_PROJINHERIT: Final = 0x200
_NO_PROJECTS: Final = frozenset((errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EACCES, errno.EPERM))


def handed_on(fd: int) -> int | None:
    """The project of which is what is made in the directory `fd` (O_PATH allowed); None where it says nothing."""
    try:
        flags, number = _read(fd)
    except OSError as exc:
        if exc.errno in _NO_PROJECTS:
            return None
        raise
    return number if flags & _PROJINHERIT else None


def give(fd: int, number: int | None) -> bool:
    """Make a regular file or a directory, which then hands it on, of project `number`; None: of none, and no more.

    False where that may not be: of other objects, and outside of the initial user namespace. EDQUOT.
    """
    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    if kind not in (stat.S_IFREG, stat.S_IFDIR):
        return False  # there is no ioctl for them, and opening a device does something
    try:
        with syscalls.reopen(fd, os.O_RDONLY | os.O_NONBLOCK) as opened:
            flags, extsize, nextents, _, cowextsize = _FSXATTR.unpack(
                syscalls.flag_ioctl(opened.fd, syscalls.FS_IOC_FSGETXATTR, b"")
            )
            if kind == stat.S_IFDIR:
                flags = flags & ~_PROJINHERIT if number is None else flags | _PROJINHERIT
            wanted = _FSXATTR.pack(flags, extsize, nextents, number or 0, cowextsize)
            syscalls.flag_ioctl(opened.fd, syscalls.FS_IOC_FSSETXATTR, wanted)
    except OSError as exc:
        if exc.errno in _NO_PROJECTS:
            return False
        raise
    return True


def match(fd: int, like: int) -> None:
    """See that the directory `fd` of work hands on what the root `like` of the upper does."""
    wanted = handed_on(like)
    if handed_on(fd) != wanted and not give(fd, wanted):
        log.warning("workdir cannot be of the upper's project, %s: what is made or copied up fails (EXDEV)", wanted)


def make_again(fd: int, dirfd: int, name: bytes) -> syscalls.Fd:
    """Make a second symlink, FIFO, socket or device like `fd` (O_PATH) as `name` in `dirfd`; returns its O_PATH fd."""
    st = os.fstat(fd)
    if stat.S_ISLNK(st.st_mode):
        syscalls.symlink_at(syscalls.readlink(fd), dirfd, name)
    else:
        syscalls.mknod_at(dirfd, name, st.st_mode, st.st_rdev)
    again = syscalls.open_object(dirfd, name)
    own = os.fstat(again.fd)
    if (own.st_uid, own.st_gid) != (st.st_uid, st.st_gid):
        syscalls.chown(again.fd, st.st_uid, st.st_gid)
    for xattr, value in _xattrs(fd).items():
        syscalls.setxattr(again.fd, xattr, value)
    if not stat.S_ISLNK(st.st_mode):
        syscalls.chmod(again.fd, stat.S_IMODE(st.st_mode))
    syscalls.utimens(again.fd, st.st_atime_ns, st.st_mtime_ns)
    return again


def _xattrs(fd: int) -> dict[bytes, bytes]:
    try:
        return {name: syscalls.getxattr(fd, name) for name in syscalls.listxattr(fd)}
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:
            raise
        return {}


def _read(fd: int) -> tuple[int, int]:
    """Flags and project of an object."""
    with syscalls.reopen(fd, os.O_RDONLY | os.O_NONBLOCK) as opened:
        answer = syscalls.flag_ioctl(opened.fd, syscalls.FS_IOC_FSGETXATTR, b"")
    flags, _, _, number, _ = _FSXATTR.unpack(answer)
    return flags, number
