"""Everything of an object but its data, to be given to another: by copy-up, and by what takes an object's place.

Rules this file obeys:

- Everything comes along or it fails. What the upper cannot keep and nobody's security depends on is left out.
- Marks of the format stay where they are. Owners and modes are kept as the upper keeps them (`owners`).
"""

from __future__ import annotations

import errno
import os
import stat

from . import format as fmt
from . import owners, syscalls
from .layers import xattr_names
from .logger import get_logger
from .owners import Owners, StatLike
from .typed import NamedTuple

log = get_logger(__name__)


class Metadata:
    """Everything but the data of an object; immutable. `xattrs` are those that go along, by name.

    `elsewhere`: it is a file that says that its data is in another layer (metacopy).
    """

    __slots__ = ("elsewhere", "st", "xattrs")

    def __init__(self, st: StatLike, xattrs: dict[bytes, bytes], *, elsewhere: bool = False) -> None:
        self.st = st
        self.xattrs = xattrs
        self.elsewhere = elsewhere


class Keeping(NamedTuple):
    """How the upper keeps owners and modes: in xattrs of `form` or, None, as its file system does."""

    owners: Owners
    form: fmt.OverrideForm | None


def read_metadata(fd: int, form: fmt.OverrideForm | None) -> Metadata:
    """Metadata of the object `fd` (O_PATH allowed) of a layer of `form`, without the format's own xattrs."""
    xattrs = {}
    names = xattr_names(fd)
    for name in names:
        shown = fmt.name_in_mount(name, form)
        if shown is not None:
            xattrs[shown] = owners.read_xattr(fd, shown, form)
    elsewhere = any(name in names for name in fmt.METACOPY_NAMES)
    return Metadata(owners.recorded(fd, syscalls.fstat(fd), form), xattrs, elsewhere=elsewhere)


def apply_metadata(fd: int, metadata: Metadata, keeping: Keeping) -> None:
    """Give the object `fd` (O_PATH allowed) all of `metadata`.

    The order matters: chown drops capabilities and the suid bit, and everything moves the times.
    """
    st, form = metadata.st, keeping.form
    own = syscalls.fstat(fd)
    moved = form is None and (own.st_uid, own.st_gid) != (st.st_uid, st.st_gid)
    if moved:
        keeping.owners.forgive(lambda: syscalls.chown(fd, st.st_uid, st.st_gid))
    for name, value in metadata.xattrs.items():
        _copy_xattr(fd, name, value, form)
    if form is not None:
        owners.record(fd, form, fmt.Override(st.st_uid, st.st_gid, st.st_mode, st.st_rdev))
    mode = owners.disk_mode(st.st_mode, form)
    if not stat.S_ISLNK(st.st_mode) and (moved or metadata.xattrs or stat.S_IMODE(own.st_mode) != mode):
        syscalls.chmod(fd, mode)
    syscalls.utimens(fd, st.st_atime_ns, st.st_mtime_ns)


def _copy_xattr(fd: int, name: bytes, value: bytes, form: fmt.OverrideForm | None) -> None:
    try:
        syscalls.setxattr(fd, fmt.name_in_layer(name, form), value)
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP or name.startswith(b"security.") or name in fmt.ACLS:
            raise
        log.debug("copy-up: the upper keeps no xattr %s", os.fsdecode(name))
