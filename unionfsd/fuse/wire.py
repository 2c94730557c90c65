"""The codec of the kernel's FUSE protocol: bytes to tuples and back, and nothing else.

Source of every layout: ``linux/fuse.h`` 7.45; structs have its names in capitals, integers are in host byte order.
Rules of this file:

- Pure: no I/O, no state, no knowledge of what a union is.
- A request is ``fuse_in_header``, then the opcode's fixed struct, then names or data. `check` comes first: after it the
  fixed struct is known to lie within the message, so every ``unpack_from`` at `BODY` is safe. What varies in length is
  checked by the functions that copy it out of the buffer.
- Whatever the bytes, only `WireError` is raised.
- Times are ``u64`` seconds in the header and two's complement in fact (the kernel casts), hence ``q``.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from struct import Struct

from unionfsd.fuse.abi import FUSE_EXPIRE_ONLY, InitFlag, Opcode
from unionfsd.typed import Final, NamedTuple, Protocol, TypeAlias

Buffer: TypeAlias = mmap.mmap | bytes
"""What requests are parsed from: slices of it are ``bytes``, items of it are integers."""


class WireError(Exception):
    """The bytes are not a message of the protocol."""


# --- headers ---------------------------------------------------------------------------------------------

IN_HEADER: Final = Struct("=IIQQIIIHxx")
"""len, opcode, unique, nodeid, uid, gid, pid, total_extlen"""
OUT_HEADER: Final = Struct("=IiQ")
"""len, error (a negative errno, or a notify code when unique is 0), unique"""
BODY: Final = IN_HEADER.size
"""Where the opcode's own struct starts in a request."""

# --- requests --------------------------------------------------------------------------------------------

FORGET_IN: Final = Struct("=Q")
BATCH_FORGET_IN: Final = Struct("=I4x")
FORGET_ONE: Final = Struct("=QQ")
GETATTR_IN: Final = Struct("=I4xQ")
SETATTR_IN: Final = Struct("=I4xQQQqqqIIII4xII4x")
"""valid, fh, size, lock_owner, atime, mtime, ctime, atimensec, mtimensec, ctimensec, mode, uid, gid"""
MKNOD_IN: Final = Struct("=III4x")
MKDIR_IN: Final = Struct("=II")
RENAME_IN: Final = Struct("=Q")
RENAME2_IN: Final = Struct("=QI4x")
LINK_IN: Final = Struct("=Q")
OPEN_IN: Final = Struct("=II")
OPEN_FLAGS: Final = Struct("=I")
"""The open(2) flags, which OPEN_IN and CREATE_IN begin with."""
CREATE_IN: Final = Struct("=IIII")
"""flags, mode, umask, open_flags"""
RELEASE_IN: Final = Struct("=QIIQ")
FLUSH_IN: Final = Struct("=Q8xQ")
READ_IN: Final = Struct("=QQIIQI4x")
"""fh, offset, size, read_flags, lock_owner, flags; of READ, READDIR and READDIRPLUS"""
WRITE_IN: Final = Struct("=QQIIQI4x")
"""fh, offset, size, write_flags, lock_owner, flags; the data follow"""
FSYNC_IN: Final = Struct("=QI4x")
SETXATTR_IN: Final = Struct("=III4x")
SETXATTR_IN_COMPAT: Final = Struct("=II")
"""size, flags: the form without SETXATTR_EXT"""
GETXATTR_IN: Final = Struct("=I4x")
ACCESS_IN: Final = Struct("=I4x")
INIT_IN: Final = Struct("=IIII")
INIT_IN_EXT: Final = Struct("=IIIII44x")
INTERRUPT_IN: Final = Struct("=Q")
IOCTL_IN: Final = Struct("=QIIQII")
FALLOCATE_IN: Final = Struct("=QQQI4x")
LSEEK_IN: Final = Struct("=QqI4x")
COPY_FILE_RANGE_IN: Final = Struct("=QQQQQQQ")
"""fh_in, off_in, nodeid_out, fh_out, off_out, len, flags"""
STATX_IN: Final = Struct("=I4xQII")
"""getattr_flags, fh, sx_flags, sx_mask"""
SYNCFS_IN: Final = Struct("=8x")

_O: Final = Opcode
_NAME: Final = 2
"""The shortest name: one character and its NUL."""

_SHORTEST: Final[dict[Opcode, int]] = {
    _O.LOOKUP: _NAME,
    _O.FORGET: FORGET_IN.size,
    _O.GETATTR: GETATTR_IN.size,
    _O.SETATTR: SETATTR_IN.size,
    _O.READLINK: 0,
    _O.SYMLINK: _NAME + 1,
    _O.MKNOD: MKNOD_IN.size + _NAME,
    _O.MKDIR: MKDIR_IN.size + _NAME,
    _O.UNLINK: _NAME,
    _O.RMDIR: _NAME,
    _O.RENAME: RENAME_IN.size + 2 * _NAME,
    _O.LINK: LINK_IN.size + _NAME,
    _O.OPEN: OPEN_IN.size,
    _O.READ: READ_IN.size,
    _O.WRITE: WRITE_IN.size,
    _O.STATFS: 0,
    _O.RELEASE: RELEASE_IN.size,
    _O.FSYNC: FSYNC_IN.size,
    _O.SETXATTR: SETXATTR_IN_COMPAT.size + _NAME,
    _O.GETXATTR: GETXATTR_IN.size + _NAME,
    _O.LISTXATTR: GETXATTR_IN.size,
    _O.REMOVEXATTR: _NAME,
    _O.FLUSH: FLUSH_IN.size,
    _O.INIT: INIT_IN.size,
    _O.OPENDIR: OPEN_IN.size,
    _O.READDIR: READ_IN.size,
    _O.RELEASEDIR: RELEASE_IN.size,
    _O.FSYNCDIR: FSYNC_IN.size,
    _O.ACCESS: ACCESS_IN.size,
    _O.CREATE: CREATE_IN.size + _NAME,
    _O.INTERRUPT: INTERRUPT_IN.size,
    _O.DESTROY: 0,
    _O.IOCTL: IOCTL_IN.size,
    _O.BATCH_FORGET: BATCH_FORGET_IN.size,
    _O.FALLOCATE: FALLOCATE_IN.size,
    _O.READDIRPLUS: READ_IN.size,
    _O.RENAME2: RENAME2_IN.size + 2 * _NAME,
    _O.LSEEK: LSEEK_IN.size,
    _O.COPY_FILE_RANGE: COPY_FILE_RANGE_IN.size,
    _O.SYNCFS: SYNCFS_IN.size,
    _O.TMPFILE: CREATE_IN.size,
    _O.STATX: STATX_IN.size,
    _O.COPY_FILE_RANGE_64: COPY_FILE_RANGE_IN.size,
}

OPCODES: Final = 64
"""Length of tables indexed by opcode; an opcode at or past it is unknown."""
MIN_LENGTH: Final[tuple[int, ...]] = tuple(
    BODY + (_SHORTEST[Opcode(code)] if code in _SHORTEST else 0) for code in range(OPCODES)
)
"""By opcode: the length in bytes below which a request cannot be whole."""


def check(length: int, opcode: int, received: int) -> None:
    """Refuse a request whose header says another length than was received, or that is too short for its opcode."""
    if length != received or (opcode < OPCODES and received < MIN_LENGTH[opcode]):
        raise WireError(f"opcode {opcode}: {received} bytes received, {length} announced")


def name(buf: Buffer, start: int, end: int) -> bytes:
    """The one file name, NUL-terminated, that fills ``buf[start:end]``, without its NUL.

    A file name is one component: no slash, and neither ``.`` nor ``..``, which are looked up only after EXPORT_SUPPORT.
    """
    raw = buf[start:end]
    if raw.find(0) != len(raw) - 1 or b"/" in raw or raw in _NOT_NAMES:
        raise WireError(f"not a file name: {raw[:64]!r}")
    return raw[:-1]


def looked_up(buf: Buffer, start: int, end: int) -> bytes:
    """The same of a LOOKUP after EXPORT_SUPPORT: a file name, or ``.`` or ``..``."""
    raw = buf[start:end]
    return raw[:-1] if raw in _DOTS else name(buf, start, end)


_DOTS: Final = (b".\0", b"..\0")
_NOT_NAMES: Final = frozenset((b"", b"\0", b".\0", b"..\0"))


def names(buf: Buffer, start: int, end: int) -> tuple[bytes, bytes]:
    """The two file names, each NUL-terminated, that fill ``buf[start:end]``."""
    middle = buf.find(b"\0", start, end) + 1
    if not middle:
        raise WireError("one name where two are due")
    return name(buf, start, middle), name(buf, middle, end)


def symlink(buf: Buffer, start: int, end: int) -> tuple[bytes, bytes]:
    """Name and target of a SYMLINK request: any bytes but NUL are a target."""
    middle = buf.find(b"\0", start, end) + 1
    target = buf[middle:end]
    if not middle or len(target) < _NAME or target.find(0) != len(target) - 1:
        raise WireError("not a symlink target")
    return name(buf, start, middle), target[:-1]


def tail(buf: Buffer, start: int, end: int) -> tuple[bytes, int]:
    """The NUL-terminated extended attribute name at `start`, and where what follows it begins."""
    stop = buf.find(b"\0", start, end)
    if stop <= start:
        raise WireError("not an attribute name")
    return buf[start:stop], stop + 1


def setxattr(buf: Buffer, end: int, extended: bool) -> tuple[bytes, bytes, int, int]:
    """Name, value, flags and setxattr_flags of a SETXATTR request; `extended` when SETXATTR_EXT was negotiated."""
    start = BODY + (SETXATTR_IN if extended else SETXATTR_IN_COMPAT).size
    if end < start + _NAME:
        raise WireError("SETXATTR cut short")
    size, flags, more = (
        SETXATTR_IN.unpack_from(buf, BODY) if extended else (*SETXATTR_IN_COMPAT.unpack_from(buf, BODY), 0)
    )
    attribute, at = tail(buf, start, end)
    if end - at != size:
        raise WireError("SETXATTR value is not of the announced size")
    return attribute, buf[at:end], flags, more


def batch_forget(buf: Buffer, end: int) -> Iterator[tuple[int, int]]:
    """The (nodeid, nlookup) pairs of a BATCH_FORGET request."""
    (count,) = BATCH_FORGET_IN.unpack_from(buf, BODY)
    start = BODY + BATCH_FORGET_IN.size
    if end - start != count * FORGET_ONE.size:
        raise WireError(f"BATCH_FORGET of {count} in {end} bytes")
    return FORGET_ONE.iter_unpack(buf[start:end])


class InitIn(NamedTuple):
    """What the kernel offers."""

    major: int
    minor: int
    max_readahead: int
    flags: InitFlag


def init(buf: Buffer, end: int) -> InitIn:
    """The body of an INIT request, in the short form (before 7.36) or the long one."""
    major, minor, readahead, flags = INIT_IN.unpack_from(buf, BODY)
    if flags & InitFlag.INIT_EXT and end >= BODY + INIT_IN_EXT.size:
        flags |= INIT_IN_EXT.unpack_from(buf, BODY)[4] << 32
    return InitIn(major, minor, readahead, InitFlag(flags))


# --- replies ---------------------------------------------------------------------------------------------

_ATTR: Final = "QQQqqqIIIIIIIIII"
"""struct fuse_attr: ino, size, blocks, [amc]time, [amc]timensec, mode, nlink, uid, gid, rdev, blksize, flags"""

ENTRY_OUT: Final = Struct("=QQQQII" + _ATTR)
"""nodeid, generation, entry_valid, attr_valid, entry_valid_nsec, attr_valid_nsec, attr"""
ATTR_OUT: Final = Struct("=QI4x" + _ATTR)
"""attr_valid, attr_valid_nsec, attr"""
OPEN_OUT: Final = Struct("=QIi")
"""fh, open_flags, backing_id"""
WRITE_OUT: Final = Struct("=I4x")
STATFS_OUT: Final = Struct("=QQQQQIII28x")
"""blocks, bfree, bavail, files, ffree, bsize, namelen, frsize"""
GETXATTR_OUT: Final = Struct("=I4x")
INIT_OUT: Final = Struct("=IIIIHHIIHHIIH22x")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages,
map_alignment, flags2, max_stack_depth, request_timeout"""
LSEEK_OUT: Final = Struct("=Q")
IOCTL_OUT: Final = Struct("=iIII")
COPY_FILE_RANGE_OUT: Final = Struct("=Q")
_SX_TIME: Final = "qI4x"
STATX_OUT: Final = Struct("=QII16x" + "IIQIIIHxxQQQQ" + 4 * _SX_TIME + "IIII112x")
"""attr_valid, attr_valid_nsec, flags; then struct fuse_statx: mask, blksize, attributes, nlink, uid, gid, mode, ino,
size, blocks, attributes_mask, (sec, nsec) of atime, btime, ctime and mtime, rdev and dev as major and minor"""

DIRENT: Final = Struct("=QQII")
"""ino, off, namelen, type; the name follows, padded to 8 bytes"""
DIRENTPLUS: Final = Struct(ENTRY_OUT.format + DIRENT.format[1:])


def direntplus(length: int) -> Struct:
    """A fuse_direntplus whose name has `length` bytes: ENTRY_OUT as packed, then as DIRENT, name and padding."""
    return Struct(f"={ENTRY_OUT.size}s{DIRENT.format[1:]}{length + 7 & ~7}s")


_NS: Final = 1_000_000_000


class Stat(Protocol):
    """What is read of an ``os.stat_result`` or its like."""

    @property
    def st_mode(self) -> int: ...
    @property
    def st_uid(self) -> int: ...
    @property
    def st_gid(self) -> int: ...
    @property
    def st_size(self) -> int: ...
    @property
    def st_blocks(self) -> int: ...
    @property
    def st_rdev(self) -> int: ...
    @property
    def st_blksize(self) -> int: ...
    @property
    def st_atime_ns(self) -> int: ...
    @property
    def st_mtime_ns(self) -> int: ...
    @property
    def st_ctime_ns(self) -> int: ...


Attr: TypeAlias = tuple[int, int, int, int, int, int, int, int, int, int, int, int, int, int, int, int]
"""The members of struct fuse_attr, in order."""


def attr(st: Stat, ino: int, nlink: int) -> Attr:
    """struct fuse_attr for an object: `st` except for its inode number and link count.

    glibc's ``dev_t`` and the kernel's 32-bit encoding agree in their low 32 bits, all that Linux's devices use.
    """
    atime, atimensec = divmod(st.st_atime_ns, _NS)
    mtime, mtimensec = divmod(st.st_mtime_ns, _NS)
    ctime, ctimensec = divmod(st.st_ctime_ns, _NS)
    return (
        ino,
        st.st_size,
        st.st_blocks,
        atime,
        mtime,
        ctime,
        atimensec,
        mtimensec,
        ctimensec,
        st.st_mode,
        nlink,
        st.st_uid,
        st.st_gid,
        st.st_rdev & 0xFFFFFFFF,
        st.st_blksize,
        0,
    )


_STATX_BASIC: Final = 0x7FF
_STATX_BTIME: Final = 0x800


def statx(valid: Validity, st: Stat, ino: int, nlink: int, *, birth_ns: int | None) -> bytes:
    """STATX_OUT of an object: `st` as in `attr`, and when it was made, in ns since the epoch, if that is known."""
    return STATX_OUT.pack(
        valid.attr_valid,
        valid.attr_valid_nsec,
        0,
        _STATX_BASIC if birth_ns is None else _STATX_BASIC | _STATX_BTIME,
        st.st_blksize,
        0,
        nlink,
        st.st_uid,
        st.st_gid,
        st.st_mode,
        ino,
        st.st_size,
        st.st_blocks,
        0,
        *divmod(st.st_atime_ns, _NS),
        *divmod(birth_ns or 0, _NS),
        *divmod(st.st_ctime_ns, _NS),
        *divmod(st.st_mtime_ns, _NS),
        os.major(st.st_rdev),
        os.minor(st.st_rdev),
        0,
        0,
    )


class Validity(NamedTuple):
    """How long the kernel may believe a name and its attributes, in the order of ENTRY_OUT."""

    entry_valid: int
    attr_valid: int
    entry_valid_nsec: int
    attr_valid_nsec: int

    @classmethod
    def of(cls, entry: float, attributes: float) -> Validity:
        """From seconds."""
        entry_ns, attr_ns = round(entry * _NS), round(attributes * _NS)
        return cls(entry_ns // _NS, attr_ns // _NS, entry_ns % _NS, attr_ns % _NS)


def negative_entry(valid: Validity) -> bytes:
    """The ENTRY_OUT that says: no such name, and remember so."""
    return ENTRY_OUT.pack(0, 0, *valid, *_NO_ATTR)


_NO_ATTR: Final[Attr] = (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def statfs(result: os.statvfs_result) -> bytes:
    """STATFS_OUT from what statvfs(3) says."""
    return STATFS_OUT.pack(
        result.f_blocks,
        result.f_bfree,
        result.f_bavail,
        result.f_files,
        result.f_ffree,
        result.f_bsize,
        result.f_namemax,
        result.f_frsize,
    )


def error(unique: int, errno: int) -> bytes:
    """The whole reply to a request that failed with the positive `errno`."""
    return OUT_HEADER.pack(OUT_HEADER.size, -errno, unique)


# --- notifications ---------------------------------------------------------------------------------------

INVAL_INODE_OUT: Final = Struct("=Qqq")
"""ino, off, len"""
INVAL_ENTRY_OUT: Final = Struct("=QII")
"""parent, namelen, flags; name and NUL follow"""
DELETE_OUT: Final = Struct("=QQI4x")
"""parent, child, namelen; name and NUL follow"""
PRUNE_OUT: Final = Struct("=I12x")
"""count; that many nodeids follow"""


def notification(code: int, body: bytes = b"") -> bytes:
    """An unsolicited message: unique is 0 and the notify code, not negated, stands where replies have their error."""
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), code, 0) + body


def inval_entry(parent: int, entry: bytes, *, expire: bool = False) -> bytes:
    """Body of NOTIFY_INVAL_ENTRY; with `expire` the kernel revalidates the name rather than dropping it."""
    return INVAL_ENTRY_OUT.pack(parent, len(entry), FUSE_EXPIRE_ONLY if expire else 0) + entry + b"\0"


def delete(parent: int, child: int, entry: bytes) -> bytes:
    """Body of NOTIFY_DELETE."""
    return DELETE_OUT.pack(parent, child, len(entry)) + entry + b"\0"


def prune(nodeids: list[int]) -> bytes:
    """Body of NOTIFY_PRUNE: nodeids the kernel may forget if nobody uses them."""
    return PRUNE_OUT.pack(len(nodeids)) + Struct(f"={len(nodeids)}Q").pack(*nodeids)
