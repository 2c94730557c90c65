"""Owners and modes: what layers record, what the mount shows, and the way between the two.

Rules this file obeys:

- From a layer to the mount: what the layer records (`recorded`: an override xattr counts more than the inode), then the
  mapping of ids, then what everything is squashed to. From the mount to the upper: the same way back.
- An id that no mapping has is shown as the overflow id. To give it to an object is EINVAL; what its owner makes belongs
  to the overflow id, as fuse-overlayfs has it.
- Where everything is shown as one owner's, nobody can see who owns it on disk, and a change of owner that the upper
  refuses is no failure.
- A mount with none of this pays nothing: `Owners.translates` is false and `form` is None.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable

from . import acl, mountinfo, syscalls
from . import format as fmt
from .errors import LAYER, UserError
from .layers import Layer, LayerStack, optional_xattr
from .options import IdTriples, MountConfig
from .typed import Final, Protocol

#: What an object kept by an override xattr is allowed on disk besides its mode: so much that we can use it.
_USABLE: Final = 0o755
_OVERFLOW: Final = 65534


class StatLike(Protocol):
    """The fields of os.stat_result that the mount shows."""

    @property
    def st_mode(self) -> int: ...
    @property
    def st_uid(self) -> int: ...
    @property
    def st_gid(self) -> int: ...
    @property
    def st_nlink(self) -> int: ...
    @property
    def st_size(self) -> int: ...
    @property
    def st_blocks(self) -> int: ...
    @property
    def st_blksize(self) -> int: ...
    @property
    def st_rdev(self) -> int: ...
    @property
    def st_atime_ns(self) -> int: ...
    @property
    def st_mtime_ns(self) -> int: ...
    @property
    def st_ctime_ns(self) -> int: ...


class Owned:
    """A stat whose owner, and perhaps whose mode and device number, are others."""

    __slots__ = ("_st", "st_gid", "st_mode", "st_rdev", "st_uid")

    def __init__(self, st: StatLike, uid: int, gid: int, mode: int | None = None, rdev: int = 0) -> None:
        self._st = st
        self.st_uid = uid
        self.st_gid = gid
        self.st_mode = st.st_mode if mode is None else mode
        self.st_rdev = st.st_rdev if mode is None else rdev

    def __getattr__(self, name: str) -> int:
        value: int = getattr(self._st, name)
        return value


# What layers record.


def recorded(fd: int, st: StatLike, form: fmt.OverrideForm | None) -> StatLike:
    """Owner and mode of the object `fd` (O_PATH allowed) of a layer of `form`, whose stat is `st`; EINVAL."""
    if form is None or not _bears(st.st_mode, form):
        return st
    try:
        value = syscalls.getxattr(fd, form.name)
    except OSError as exc:
        if exc.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return st
        raise
    said = fmt.decode_override(value, stat.S_IFMT(st.st_mode))
    return Owned(st, said.uid, said.gid, said.mode, said.rdev)


def _bears(mode: int, form: fmt.OverrideForm) -> bool:
    """Whether an object of that type can have the xattr: ``user.`` ones are for files and directories."""
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode) or form is fmt.OVERRIDE_PRIVILEGED


def disk_mode(mode: int, form: fmt.OverrideForm | None) -> int:
    """The permissions on disk of an object that the mount shows with `mode`."""
    return stat.S_IMODE(mode) if form is None else mode & 0o777 | _USABLE


def is_file_on_disk(mode: int, form: fmt.OverrideForm | None) -> bool:
    """Whether an object of that type is kept as an empty file, because no xattr could say whose it is."""
    special = not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode))
    return form is not None and form is not fmt.OVERRIDE_PRIVILEGED and special


def record(fd: int, form: fmt.OverrideForm, said: fmt.Override) -> None:
    """Write owner and mode of the object `fd` of an upper of `form`; what can have no such xattr goes without."""
    if _bears(os.fstat(fd).st_mode, form):
        syscalls.setxattr(fd, form.name, said.encode())


def change(fd: int, form: fmt.OverrideForm, uid: int, gid: int, mode: int | None) -> None:
    """chown(2), with -1 for an id to keep, then chmod(2) if `mode` is given, of an object of an upper of `form`.

    A change of owner drops setuid, setgid and capabilities of a file, as the kernel has it for its own.
    """
    st = recorded(fd, os.fstat(fd), form)
    bits = st.st_mode
    if (uid, gid) != (-1, -1) and stat.S_ISREG(bits):
        bits &= ~(stat.S_ISUID | (stat.S_ISGID if bits & stat.S_IXGRP else 0))
        _drop_capabilities(fd, form)
    if mode is not None:
        bits = stat.S_IFMT(bits) | stat.S_IMODE(mode)
    owner = st.st_uid if uid == -1 else uid, st.st_gid if gid == -1 else gid
    record(fd, form, fmt.Override(*owner, bits, st.st_rdev))
    if mode is not None and not stat.S_ISLNK(bits):
        _follow_mode(fd, form, mode)
        syscalls.chmod(fd, disk_mode(bits, form))


# Access control lists, which decide with the mode and so are kept where that is.


def read_xattr(fd: int, name: bytes, form: fmt.OverrideForm | None) -> bytes:
    """Value of what users of the mount call `name`, of the object `fd` (O_PATH allowed) of a layer of `form`; ENODATA.

    An ACL of the file system counts where none is recorded, as fuse-overlayfs has it.
    """
    kept = fmt.name_in_layer(name, form)
    try:
        return syscalls.getxattr(fd, kept)
    except OSError as exc:
        if exc.errno != errno.ENODATA or kept == name or name not in fmt.ACLS:
            raise
    return syscalls.getxattr(fd, name)


def set_acl(fd: int, form: fmt.OverrideForm, name: bytes, value: bytes, flags: int) -> None:
    """Record the ACL `value` of an object of an upper of `form`, and the mode that it means; EACCES, and see setxattr.

    One that says no more than the mode leaves none, as file systems have it.
    """
    st = recorded(fd, os.fstat(fd), form)
    kept = fmt.name_in_layer(name, form)
    if name == fmt.ACL_DEFAULT:
        if not stat.S_ISDIR(st.st_mode):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        syscalls.setxattr(fd, kept, value, flags)
        return
    bits, minimal = acl.access(value)
    if minimal:
        remove_xattr(fd, name, form, missing_ok=True)
    else:
        syscalls.setxattr(fd, kept, value, flags)
    mode = st.st_mode & ~0o777 | bits
    record(fd, form, fmt.Override(st.st_uid, st.st_gid, mode, st.st_rdev))
    syscalls.chmod(fd, disk_mode(mode, form))


def remove_xattr(fd: int, name: bytes, form: fmt.OverrideForm | None, *, missing_ok: bool = False) -> None:
    """Remove what users of the mount call `name`, wherever it is kept; ENODATA unless `missing_ok`."""
    kept = fmt.name_in_layer(name, form)
    for at in dict.fromkeys((kept, name) if name in fmt.ACLS else (kept,)):
        try:
            syscalls.removexattr(fd, at)
            missing_ok = True
        except OSError as exc:
            if exc.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise
    if not missing_ok:
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))


def _follow_mode(fd: int, form: fmt.OverrideForm, mode: int) -> None:
    """Have a recorded access ACL say what chmod(2) to `mode` makes of it."""
    name = fmt.name_in_layer(fmt.ACL_ACCESS, form)
    value = optional_xattr(fd, name)
    if value is not None:
        syscalls.setxattr(fd, name, acl.with_mode(value, mode))


def _drop_capabilities(fd: int, form: fmt.OverrideForm) -> None:
    try:
        syscalls.removexattr(fd, fmt.name_in_layer(fmt.CAPABILITY, form))
    except OSError as exc:
        if exc.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise


# What the mount shows.


class IdMap:
    """A mapping of user or of group ids: (on disk, in the mount, how many), the first that fits."""

    def __init__(self, triples: IdTriples, overflow: int) -> None:
        self._triples = triples
        self._overflow = overflow

    def shown(self, number: int) -> int:
        """What the mount shows for an id on disk."""
        for disk, mount, count in self._triples:
            if disk <= number < disk + count:
                return mount + number - disk
        return self._overflow

    def kept(self, number: int) -> int | None:
        """The id on disk for one of the mount, None when it has none."""
        for disk, mount, count in self._triples:
            if mount <= number < mount + count:
                return disk + number - mount
        return None

    def owner(self, number: int) -> int:
        """The id on disk of who makes something."""
        kept = self.kept(number)
        return self._overflow if kept is None else kept


def _id_map(triples: IdTriples | None, which: str) -> IdMap | None:
    if triples is None:
        return None
    try:
        with open(f"/proc/sys/kernel/overflow{which}", "rb") as file:
            return IdMap(triples, int(file.read()))
    except OSError:
        return IdMap(triples, _OVERFLOW)


class Owners:
    """How one mount shows owners. `translates`: whether otherwise than the layers have them."""

    def __init__(self, config: MountConfig) -> None:
        self._uids = _id_map(config.uidmapping, "uid")
        self._gids = _id_map(config.gidmapping, "gid")
        self._uid = config.uid
        self._gid = config.gid
        self._maps = self._uids is not None or self._gids is not None
        self.lenient = self._uid is not None or self._gid is not None
        self.translates = self._maps or self.lenient

    def show(self, st: StatLike, *, mapped: bool = False) -> StatLike:
        """`st` with the owner that the mount shows; `mapped`: the kernel has mapped it already."""
        uids, gids = (None, None) if mapped else (self._uids, self._gids)
        return Owned(st, _shown(st.st_uid, self._uid, uids), _shown(st.st_gid, self._gid, gids), st.st_mode, st.st_rdev)

    def keep(self, st: StatLike) -> StatLike:
        """`st`, which the kernel has mapped, with the owner that the upper is to have."""
        return Owned(st, self.uid_of_maker(st.st_uid), self.gid_of_maker(st.st_gid), st.st_mode, st.st_rdev)

    def uid_of_maker(self, number: int) -> int:
        """The user id on disk of what the caller `number` makes; likewise `gid_of_maker`."""
        return number if self._uids is None else self._uids.owner(number)

    def gid_of_maker(self, number: int) -> int:
        return number if self._gids is None else self._gids.owner(number)

    def new_owner(self, uid: int | None, gid: int | None) -> tuple[int, int]:
        """The ids on disk that chown(2) to `uid` and `gid`, None to keep, is to give, -1 to keep; EINVAL."""
        return _kept(self._uids, uid, lenient=self.lenient), _kept(self._gids, gid, lenient=self.lenient)

    def forgive(self, give: Callable[[], None]) -> None:
        """Call `give`, which changes an owner on disk; where nobody sees owners it may be refused."""
        try:
            give()
        except OSError as exc:
            if not self.lenient or exc.errno not in (errno.EPERM, errno.EINVAL):
                raise

    # Ids in xattrs: ACLs, and capabilities that count below one root only.

    def show_xattr(self, name: bytes, value: bytes) -> bytes:
        """A value of a layer as the mount shows it."""
        if self._maps and name in fmt.ACLS:
            return acl.with_ids(value, self._show_in(self._uids), self._show_in(self._gids))
        if self._uids is not None and name == fmt.CAPABILITY:
            return _with_root(value, self._uids.shown)
        return value

    def keep_xattr(self, name: bytes, value: bytes) -> bytes:
        """A value that a user of the mount sets, as the upper keeps it; EINVAL for ids that it cannot keep."""
        if self._maps and name in fmt.ACLS:
            return acl.with_ids(value, self._keep_in(self._uids), self._keep_in(self._gids))
        if self._uids is not None and name == fmt.CAPABILITY:
            return _with_root(value, self._keep_in(self._uids))
        return value

    def _show_in(self, ids: IdMap | None) -> Callable[[int], int]:
        return _same if ids is None else ids.shown

    def _keep_in(self, ids: IdMap | None) -> Callable[[int], int]:
        return _same if ids is None else lambda number: _kept(ids, number, lenient=False)


def _shown(number: int, everybody: int | None, ids: IdMap | None) -> int:
    if everybody is not None:
        return everybody
    return number if ids is None else ids.shown(number)


def _same(number: int) -> int:
    return number


def _kept(ids: IdMap | None, number: int | None, *, lenient: bool) -> int:
    if number is None:
        return -1
    kept = number if ids is None else ids.kept(number)
    if kept is not None:
        return kept
    if lenient:
        return -1
    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


#: struct vfs_ns_cap_data (include/uapi/linux/capability.h), whose last member is the root that the capabilities need.
_CAP: Final = struct.Struct("<5I")
_CAP_ROOT: Final = struct.Struct("<I")
_CAP_REVISION_3: Final = 0x03
_CAP_REVISION_SHIFT: Final = 24


def _with_root(value: bytes, translate: Callable[[int], int]) -> bytes:
    if len(value) != _CAP.size + _CAP_ROOT.size or _CAP.unpack_from(value)[0] >> _CAP_REVISION_SHIFT != _CAP_REVISION_3:
        return value
    (root,) = _CAP_ROOT.unpack_from(value, _CAP.size)
    return value[: _CAP.size] + _CAP_ROOT.pack(translate(root))


# At mount.


def keep_owners(stack: LayerStack, config: MountConfig) -> None:
    """See that the upper keeps owners as `config` asks. Its root says so from then on; UserError where it cannot.

    Lowers on idmapped mounts are found out: containers/storage maps ids twice when root asks it to.

    The root's owner and mode are those of the topmost lower that keeps them so, else its own (fuse-overlayfs has
    0:0:0555 then).
    """
    if config.uidmapping is not None or config.gidmapping is not None:
        idmapped = {line.mount_id for line in mountinfo.read() if b"idmapped" in line.options.split(b",")}
        for layer in stack.lowers if idmapped else ():
            layer.idmapped = _mount_id(layer.path) in idmapped
    upper = stack.upper
    if upper is None or config.xattr_permissions == "0":
        return
    privileged = config.xattr_permissions == "1"
    wanted = (fmt.OVERRIDE_PRIVILEGED,) if privileged else (fmt.OVERRIDE_CONTAINERS, fmt.OVERRIDE_LEGACY)
    if upper.override not in wanted:
        try:
            _mark_root(stack, upper, wanted[0])
        except OSError as exc:
            raise UserError(
                f"xattr_permissions={config.xattr_permissions}: upperdir {os.fsdecode(upper.path)} cannot keep "
                f"{os.fsdecode(wanted[0].name)}: {exc.strerror}",
                hint="1 needs privileges, 2 a file system with user xattrs",
                code=LAYER,
            ) from exc


def _mount_id(path: bytes) -> int:
    with syscalls.Fd(os.open(path, os.O_PATH | os.O_CLOEXEC)) as fd, open(f"/proc/self/fdinfo/{fd.fd}", "rb") as info:
        return next(int(line.split()[1]) for line in info if line.startswith(b"mnt_id:"))


def _mark_root(stack: LayerStack, upper: Layer, form: fmt.OverrideForm) -> None:
    top = next((layer for layer in stack.lowers if layer.override is not None), upper)
    st = recorded(top.root.fd, os.fstat(top.root.fd), top.override)
    record(upper.root.fd, form, fmt.Override(st.st_uid, st.st_gid, st.st_mode))
    upper.override = form
    stack.overrides = True
