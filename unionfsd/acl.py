"""POSIX access control lists as the kernel keeps them in xattrs, and what a new object inherits.

Rules this file obeys: pure; the format is that of include/uapi/linux/posix_acl_xattr.h (version 2, little-endian), the
inheritance that of posix_acl_create_masq in fs/posix_acl.c.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable

from unionfsd.typed import Final, NamedTuple

_HEAD: Final = struct.Struct("<I")
_ENTRY: Final = struct.Struct("<HHI")
_VERSION: Final = 2

_USER_OBJ: Final = 0x01
_USER: Final = 0x02
_GROUP_OBJ: Final = 0x04
_GROUP: Final = 0x08
_MASK: Final = 0x10
_OTHER: Final = 0x20


class Inherited(NamedTuple):
    """What an object created in a directory with a default ACL starts with.

    `mode`: its permission bits. `access`: value of its access ACL, None when the bits say it all.
    """

    mode: int
    access: bytes | None


def inherit(default: bytes, mode: int) -> Inherited:
    """Apply the default ACL `default` (an xattr value) to the `mode` asked for, no umask; EIO for a damaged one."""
    entries = _decode(default)
    extended = len(entries) > 3
    shifts = _shifts(entries)
    result = _HEAD.pack(_VERSION)
    for tag, perm, who in entries:
        shift = shifts.get(tag)
        if shift is not None:
            perm &= mode >> shift & 7
            mode = mode & ~(7 << shift) | perm << shift
        result += _ENTRY.pack(tag, perm, who)
    return Inherited(mode, result if extended else None)


class Access(NamedTuple):
    """What an access ACL says: the permission bits of its object, and whether they are all that it says."""

    bits: int
    minimal: bool


def access(value: bytes) -> Access:
    """Read the access ACL `value` (posix_acl_equiv_mode); EIO for a damaged one."""
    entries = _decode(value)
    shifts = _shifts(entries)
    bits = sum(perm << shifts[tag] for tag, perm, _ in entries if tag in shifts)
    return Access(bits, len(entries) <= 3)


def with_mode(value: bytes, mode: int) -> bytes:
    """The access ACL `value` after chmod(2) to `mode` (posix_acl_chmod); EIO for a damaged one."""
    entries = _decode(value)
    shifts = _shifts(entries)
    result = _HEAD.pack(_VERSION)
    for tag, perm, who in entries:
        result += _ENTRY.pack(tag, mode >> shifts[tag] & 7 if tag in shifts else perm, who)
    return result


def _shifts(entries: list[tuple[int, int, int]]) -> dict[int, int]:
    """Which entries are the permission bits, and where those are: those of the group are the mask, if there is one."""
    has_mask = any(tag == _MASK for tag, _, _ in entries)
    return {_USER_OBJ: 6, _MASK if has_mask else _GROUP_OBJ: 3, _OTHER: 0}


def with_ids(value: bytes, uid: Callable[[int], int], gid: Callable[[int], int]) -> bytes:
    """The ACL `value` with its users and groups translated; EIO for a damaged one, and what `uid` and `gid` raise."""
    result = _HEAD.pack(_VERSION)
    for tag, perm, who in _decode(value):
        translated = uid(who) if tag == _USER else gid(who) if tag == _GROUP else who
        result += _ENTRY.pack(tag, perm, translated)
    return result


def _decode(value: bytes) -> list[tuple[int, int, int]]:
    body = len(value) - _HEAD.size
    if body < 0 or body % _ENTRY.size or _HEAD.unpack_from(value)[0] != _VERSION:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
    return list(_ENTRY.iter_unpack(value[_HEAD.size :]))


class Heritage(NamedTuple):
    """What a directory passes on: the `gid` of a setgid directory and its default ACL (xattr value), or None."""

    gid: int | None
    default_acl: bytes | None
