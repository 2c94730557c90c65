"""Immutable and append-only objects, and the other inode flags that copy-up takes along.

Rules this file obeys:

- As the kernel has it (fs/overlayfs/copy_up.c, ovl_copy_fileattr; util.c, ovl_set_protattr): in the upper the flags
  `i` and `a` are an xattr, for on the inode they would keep us from it; `S` and `A` are on the inode.
- A lower has them on its inodes. Who may change what is asked in `guard`, before anything is copied up.
"""

from __future__ import annotations

import errno
import os
import struct

from . import format as fmt
from . import syscalls
from .layers import optional_xattr
from .typed import Final
from .workdir import Workdir

IMMUTABLE: Final = 0x10
APPEND: Final = 0x20
_SYNC: Final = 0x08
_NOATIME: Final = 0x80
PROTECTED: Final = IMMUTABLE | APPEND
_CARRIED: Final = _SYNC | _NOATIME
_NO_FLAGS: Final = (errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

#: The same in fsx_xflags of struct fsxattr, its first member.
_XFLAGS: Final = {IMMUTABLE: 0x08, APPEND: 0x10}
_INT: Final = struct.Struct("=I")


def carry(source: int, target: int, work: Workdir) -> bool:
    """Give the staged object `target` the flags of the lower one `source`, both readable. EPERM where it cannot.

    Returns whether they protect it.
    """
    flags = _flags(source)
    if flags & PROTECTED:
        _mark(target, flags, work)
    if flags & _CARRIED:
        own = _flags(target)
        syscalls.flag_ioctl(target, syscalls.FS_IOC_SETFLAGS, _INT.pack(own | flags & _CARRIED))
    return bool(flags & PROTECTED)


def carry_object(source: int, target: int, work: Workdir) -> None:
    """The same by O_PATH fds; of an object that we may not read only what protects it."""
    flags = os.O_RDONLY | os.O_NONBLOCK
    try:
        with syscalls.reopen(source, flags) as readable, syscalls.reopen(target, flags) as staged:
            carry(readable.fd, staged.fd, work)
    except PermissionError:
        protected = syscalls.attributes_at(source, b"") & PROTECTED
        if protected:
            _mark(target, protected, work)


def foresee(source: int) -> None:
    """Ask of `source` what `carry_object` will."""
    try:
        with syscalls.reopen(source, os.O_RDONLY | os.O_NONBLOCK) as readable:
            _flags(readable.fd)
    except PermissionError:
        syscalls.attributes_at(source, b"")


def keep(old: int, new: int, work: Workdir) -> None:
    """Protect the staged object `new` as `old` of the upper is, whose place it takes."""
    name = work.xattr(fmt.PROTATTR)
    value = None if name is None else optional_xattr(old, name)
    if name is not None and value is not None:
        syscalls.setxattr(new, name, value)


def _flags(fd: int) -> int:
    try:
        answer = syscalls.flag_ioctl(fd, syscalls.FS_IOC_GETFLAGS, bytes(4))
    except OSError as exc:
        if exc.errno in _NO_FLAGS:
            return 0
        raise
    return int(_INT.unpack_from(answer)[0])


def _mark(fd: int, flags: int, work: Workdir) -> None:
    name = work.xattr(fmt.PROTATTR)
    if name is None:
        raise PermissionError(errno.EPERM, "the upper cannot keep immutable and append-only")
    value = (b"a" if flags & APPEND else b"") + (b"i" if flags & IMMUTABLE else b"")
    if value:
        syscalls.setxattr(fd, name, value)
    elif optional_xattr(fd, name) is not None:
        syscalls.removexattr(fd, name)


def decode(value: bytes) -> int:
    """The flags of a protattr xattr, letters up to the first that is unknown (util.c, ovl_check_protattr)."""
    flags = 0
    for letter in value:
        flag = {ord("a"): APPEND, ord("i"): IMMUTABLE}.get(letter)
        if flag is None:
            break
        flags |= flag
    return flags


# The ioctls about flags, on the mount.


def ioctl(fd: int, command: int, data: bytes, guarded: int, work: Workdir | None) -> bytes:
    """One of syscalls.FLAG_IOCTLS on `fd` of an object that `guarded` protects; `work` for those that change it."""
    if command in syscalls.FLAG_CHANGES and work is not None and work.xattr(fmt.PROTATTR) is not None:
        bits = _bits(command)
        (wanted,) = _INT.unpack_from(data.ljust(4, b"\0"))
        rest = _INT.pack(wanted & ~sum(bits.values())) + data[4:]
        answer = syscalls.flag_ioctl(fd, command, rest)
        _mark(fd, sum(flag for flag, bit in bits.items() if wanted & bit), work)
        return answer
    answer = syscalls.flag_ioctl(fd, command, data)
    bits = _bits(command)
    if not bits or command in syscalls.FLAG_CHANGES:
        return answer
    shown = _INT.unpack_from(answer)[0] | sum(bit for flag, bit in bits.items() if guarded & flag)
    return _INT.pack(shown) + answer[4:]


def _bits(command: int) -> dict[int, int]:
    if command in (syscalls.FS_IOC_FSGETXATTR, syscalls.FS_IOC_FSSETXATTR):
        return _XFLAGS
    if command in (syscalls.FS_IOC_GETFLAGS, syscalls.FS_IOC_SETFLAGS):
        return {IMMUTABLE: IMMUTABLE, APPEND: APPEND}
    return {}
