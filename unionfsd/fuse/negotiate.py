"""INIT: what the kernel offers, what this daemon wants, and the reply that settles it.

A feature is asked for only when offered, so one list serves every kernel from 5.4 (protocol 7.31) on. Not asked for:

- ATOMIC_O_TRUNC: truncation must arrive as SETATTR, because in cached mode no OPEN does.
- POSIX_LOCKS, FLOCK_LOCKS: the kernel's own locks are right, one kernel serves the mount.
- EXPORT_SUPPORT, unless nfs_export=on: a nodeid means nothing once forgotten. With NO_EXPORT_SUPPORT the kernel gives
  no file handles then, which an overlay on top of the mount would keep in its upper.
- CREATE_SUPP_GROUP: the union gives objects the group of a setgid parent and is not bound by the caller's groups.
- READDIRPLUS_AUTO: whether entries are looked up with a listing is decided in `dirs`.
- SPLICE_*: the payload passes through Python's hands once, as a view.
"""

from __future__ import annotations

from struct import Struct

from unionfsd.errors import MOUNT, UserError
from unionfsd.fuse import wire
from unionfsd.fuse.abi import FUSE_KERNEL_MINOR_VERSION, FUSE_KERNEL_VERSION, InitFlag
from unionfsd.typed import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from unionfsd.options import MountConfig

OLDEST_MINOR: Final = 31
"""Linux 5.4: everything the replies here take for granted (64-byte init_out, FALLOCATE, LSEEK, RENAME2) is there."""

MAX_WRITE: Final = 1 << 20
_PAGE: Final = 4096
_MAX_PAGES: Final = MAX_WRITE // _PAGE
"""The ceiling of fs.fuse.max_pages_limit as shipped; the kernel takes the smaller."""
_MAX_BACKGROUND: Final = 12
_CONGESTION: Final = 9

# Not ASYNC_DIO: when such a write is over the kernel does not drop what others read into the page cache meanwhile
# (fs/fuse/file.c, fuse_aio_complete), and readers go on seeing what was there before (xfstests generic/451).
_ALWAYS: Final = (
    InitFlag.ASYNC_READ
    | InitFlag.BIG_WRITES
    | InitFlag.DONT_MASK
    | InitFlag.HAS_IOCTL_DIR
    | InitFlag.DO_READDIRPLUS
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.ABORT_ERROR
    | InitFlag.MAX_PAGES
    | InitFlag.CACHE_SYMLINKS
    | InitFlag.NO_OPEN_SUPPORT
    | InitFlag.NO_OPENDIR_SUPPORT
    | InitFlag.HANDLE_KILLPRIV_V2
    | InitFlag.SETXATTR_EXT
    | InitFlag.INIT_EXT
    | InitFlag.HAS_RESEND
)

_SESSION: Final = Struct("=IQI")
"""minor, flags, max_readahead"""


class Wanted(NamedTuple):
    """What a mount wishes of the kernel."""

    writeback: bool
    """Writes gather in the page cache and arrive late; size and times are then the kernel's to say."""
    sole_writer: bool
    """Nothing changes behind the mount: cached data stay valid until this side says otherwise."""
    acl: bool
    """POSIX ACLs count."""
    passthrough: bool
    """The kernel reads and writes files itself, if it can. Opens are then sent; else they are declined, once."""
    export: bool
    """File handles of the mount mean the same after their nodes were forgotten."""

    @classmethod
    def of(cls, config: MountConfig) -> Wanted:
        """What a mount asks for. A timeout somebody set means that something else changes the layers."""
        sole_writer = "timeout" not in config.explicit
        return cls(
            writeback=config.writeback == "on" or (config.writeback == "auto" and sole_writer and not config.read_only),
            sole_writer=sole_writer,
            acl=not config.noacl,
            passthrough=config.io == "passthrough",
            export=config.nfs_export == "on",
        )


class Session(NamedTuple):
    """What was settled for one connection."""

    minor: int
    flags: InitFlag
    max_readahead: int

    def pack(self) -> bytes:
        """What `unpack` makes the same of."""
        return _SESSION.pack(self.minor, self.flags, self.max_readahead)

    @classmethod
    def unpack(cls, packed: bytes) -> Session:
        """What was settled by a process that is no more."""
        minor, flags, max_readahead = _SESSION.unpack(packed)
        return cls(minor, InitFlag(flags), max_readahead)

    @property
    def reply(self) -> bytes:
        """The INIT_OUT that says so. Time stamps are exact to the nanosecond (time_gran 1).

        Stack depth 1: what is passed through lies on no stacked file system, and overlayfs can still be put on top.
        """
        return wire.INIT_OUT.pack(
            FUSE_KERNEL_VERSION,
            FUSE_KERNEL_MINOR_VERSION,
            self.max_readahead,
            self.flags & 0xFFFFFFFF,
            _MAX_BACKGROUND,
            _CONGESTION,
            MAX_WRITE,
            1,
            _MAX_PAGES,
            0,
            self.flags >> 32,
            int(InitFlag.PASSTHROUGH in self.flags),
            0,
        )


def settle(offer: wire.InitIn, wanted: Wanted) -> Session:
    """The session that `offer` and `wanted` have in common. UserError: the kernel is too old."""
    if (offer.major, offer.minor) < (FUSE_KERNEL_VERSION, OLDEST_MINOR):
        raise UserError(
            f"kernel too old: FUSE {offer.major}.{offer.minor}, the channel needs 7.{OLDEST_MINOR} (Linux 5.4)",
            hint="use -o transport=pyfuse3",
            code=MOUNT,
        )
    flags = offer.flags & _wishes(wanted)
    if InitFlag.PASSTHROUGH in flags:
        # It excludes the one and needs the opens that the other does without.
        flags &= ~(InitFlag.WRITEBACK_CACHE | InitFlag.NO_OPEN_SUPPORT)
    return Session(min(offer.minor, FUSE_KERNEL_MINOR_VERSION), flags, offer.max_readahead)


def other_major() -> bytes:
    """The reply to a newer major version: the kernel then sends INIT again, in version 7."""
    return wire.INIT_OUT.pack(FUSE_KERNEL_VERSION, FUSE_KERNEL_MINOR_VERSION, *(0,) * 11)


def _wishes(wanted: Wanted) -> InitFlag:
    flags = _ALWAYS
    flags |= InitFlag.EXPLICIT_INVAL_DATA if wanted.sole_writer else InitFlag.AUTO_INVAL_DATA
    flags |= InitFlag.EXPORT_SUPPORT if wanted.export else InitFlag.NO_EXPORT_SUPPORT
    if wanted.acl:
        flags |= InitFlag.POSIX_ACL
    if wanted.writeback:
        flags |= InitFlag.WRITEBACK_CACHE
    if wanted.passthrough:
        flags |= InitFlag.PASSTHROUGH
    return flags
