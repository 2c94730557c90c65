"""The on-disk format of overlayfs, as bytes: whiteouts, opaque marks, origins and the names of extended attributes.

Rules this file obeys:

- Pure: no descriptor, no system call. `layers` and `workdir` apply what is decided here.
- The format is kernel overlayfs's (fs/overlayfs/overlayfs.h, Documentation/filesystems/overlayfs.rst). The forms of
  fuse-overlayfs and of AUFS and OCI layers (``.wh.``) are read wherever they stand.
- Attributes of both namespaces, ``trusted.overlay.`` and ``user.overlay.``, are internal in every layer. A user of the
  mount who sets one gets it escaped, so that an overlay on top of the mount finds its own.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
from collections.abc import Collection

from unionfsd.typed import Final, NamedTuple

TRUSTED: Final = b"trusted.overlay."
USER: Final = b"user.overlay."
_NAMESPACES: Final = (TRUSTED, USER)
_ESCAPE: Final = b"overlay."
_FOREIGN: Final = (b"user.fuseoverlayfs.", b"user.containers.override_", b"security.fuseoverlayfs.")

OPAQUE: Final = b"opaque"
WHITEOUT: Final = b"whiteout"
ORIGIN: Final = b"origin"
IMPURE: Final = b"impure"
REDIRECT: Final = b"redirect"
UUID: Final = b"uuid"
PROTATTR: Final = b"protattr"
METACOPY: Final = b"metacopy"
NLINK: Final = b"nlink"
UPPER: Final = b"upper"

OPAQUE_YES: Final = b"y"
#: The directory is not opaque but may hold xattr whiteouts (Linux 6.7).
OPAQUE_XWHITEOUTS: Final = b"x"

#: Attributes that say a directory is opaque, most common first.
OPAQUE_NAMES: Final = (TRUSTED + OPAQUE, USER + OPAQUE, b"user.fuseoverlayfs.opaque")
WHITEOUT_NAMES: Final = (TRUSTED + WHITEOUT, USER + WHITEOUT)
ORIGIN_NAMES: Final = (TRUSTED + ORIGIN, USER + ORIGIN)
METACOPY_NAMES: Final = (TRUSTED + METACOPY, USER + METACOPY)
NLINK_NAMES: Final = (TRUSTED + NLINK, USER + NLINK)
UPPER_NAMES: Final = (TRUSTED + UPPER, USER + UPPER)
IMPURE_NAMES: Final = (TRUSTED + IMPURE, USER + IMPURE)
REDIRECT_NAMES: Final = (TRUSTED + REDIRECT, USER + REDIRECT)

#: AUFS and OCI whiteouts: an entry with this prefix hides the rest of its name in the layers below.
WH: Final = b".wh."
WH_OPAQUE: Final = b".wh..wh..opq"

#: The names of a work directory (fs/overlayfs/super.c): where entries are staged, and the index.
WORK: Final = b"work"
INDEX: Final = b"index"
#: Ours: what the nodeids of file handles mean (`exports`).
EXPORTS: Final = b"exports"
EXPORTS_STAGED: Final = b"exports#"
INCOMPAT: Final = b"incompat"
VOLATILE: Final = b"volatile"

#: Where an unprivileged unpacker keeps what it may not set (containers/storage pkg/idtools): owner, mode and type as
#: ``UID:GID:MODE:TYPE``, and other attributes under their name with this prefix.
OVERRIDE_STAT: Final = b"user.containers.override_stat"
OVERRIDE: Final = b"user.containers.override_"

ACL_ACCESS: Final = b"system.posix_acl_access"
ACL_DEFAULT: Final = b"system.posix_acl_default"
ACLS: Final = (ACL_ACCESS, ACL_DEFAULT)
CAPABILITY: Final = b"security.capability"


def is_whiteout_device(mode: int, rdev: int) -> bool:
    """Whether an object is the kernel's whiteout: a character device 0:0."""
    return stat.S_ISCHR(mode) and rdev == 0


def is_reserved(name: bytes) -> bool:
    """Whether `name` can never be an entry of the union because ``.wh.`` names are whiteouts in every layer."""
    return name.startswith(WH)


def wh_target(name: bytes) -> bytes | None:
    """The name that the ``.wh.`` entry `name` hides; None for aufs's own files (``.wh..wh.*``) and other names."""
    if not name.startswith(WH) or name.startswith(WH + WH):
        return None
    return name[len(WH) :] or None


def wh_name(name: bytes) -> bytes:
    """The ``.wh.`` entry that hides `name`."""
    return WH + name


class Marks(NamedTuple):
    """What the xattrs of a directory of a layer say.

    `opaque`: it hides the layers below. `xwhiteouts`: it may hold xattr whiteouts. `redirect`: what it is called in the
    layers below, None for its own name.
    """

    opaque: bool
    xwhiteouts: bool
    redirect: Redirect | None = None


NO_MARKS: Final = Marks(opaque=False, xwhiteouts=False)


def marks(values: Collection[bytes]) -> Marks:
    """Decode the values of a directory's opaque attributes; only the first byte counts, as in fuse-overlayfs."""
    firsts = {value[:1] for value in values}
    return Marks(opaque=OPAQUE_YES in firsts, xwhiteouts=OPAQUE_XWHITEOUTS in firsts)


class Redirect(NamedTuple):
    """Where a directory continues in the layers below (ovl.rst, "redirect_dir").

    One name beside its own if not `absolute`; else names from the root of the union of those layers.
    """

    absolute: bool
    names: tuple[bytes, ...]

    def encode(self) -> bytes:
        """The value of the xattr."""
        return b"/" + b"/".join(self.names) if self.absolute else self.names[0]


def decode_redirect(value: bytes) -> Redirect:
    """Decode a redirect xattr; EINVAL for one that could lead anywhere else than beneath a layer's root."""
    absolute = value.startswith(b"/")
    names = tuple(value[1:].split(b"/")) if absolute else (value,)
    if any(not name or b"/" in name or b"\0" in name or name in (b".", b"..") for name in names):
        raise OSError(errno.EINVAL, "invalid redirect in a layer", os.fsdecode(value))
    return Redirect(absolute, names)


class Digest(NamedTuple):
    """An fs-verity digest: `algorithm` is an FS_VERITY_HASH_ALG_*, 1 for SHA-256 and 2 for SHA-512."""

    algorithm: int
    value: bytes


class Nlink(NamedTuple):
    """How many names the union has of an object: its link count in the upper, or that `of_lower`, and `difference`."""

    of_lower: bool
    difference: int


def encode_nlink(nlink: Nlink) -> bytes:
    """The value of the nlink xattr (ovl_set_nlink_common)."""
    return b"%c%+d" % (b"L" if nlink.of_lower else b"U", nlink.difference)


def decode_nlink(value: bytes) -> Nlink | None:
    """Decode the nlink xattr; None for a value that is invalid (ovl_get_nlink)."""
    if value[:1] not in (b"U", b"L") or value[1:2] not in (b"+", b"-") or not value[2:].isdigit():
        return None
    return Nlink(value[:1] == b"L", int(value[1:]))


_METACOPY_HEAD: Final = struct.Struct("BBBB")


def encode_metacopy(digest: Digest | None) -> bytes:
    """The value of the metacopy xattr (struct ovl_metacopy); empty, as old kernels have it, without a digest."""
    if digest is None:
        return b""
    return _METACOPY_HEAD.pack(0, _METACOPY_HEAD.size + len(digest.value), 0, digest.algorithm) + digest.value


def decode_metacopy(value: bytes) -> Digest | None:
    """The digest in a metacopy xattr, None for none; EIO for a value that is invalid (ovl_check_metacopy_xattr)."""
    if not value:
        return None
    if len(value) < _METACOPY_HEAD.size:
        raise OSError(errno.EIO, "invalid metacopy xattr in a layer")
    version, size, flags, algorithm = _METACOPY_HEAD.unpack_from(value)
    if version or flags or size != len(value) or bool(algorithm) != (size > _METACOPY_HEAD.size):
        raise OSError(errno.EIO, "invalid metacopy xattr in a layer")
    return Digest(algorithm, value[_METACOPY_HEAD.size :]) if algorithm else None


def is_internal(name: bytes) -> bool:
    """Whether an xattr of a layer belongs to the format and is not shown to users of the mount."""
    if name.startswith(_NAMESPACES):
        return not _is_escaped(name)
    return name.startswith(_FOREIGN)


def is_forbidden(name: bytes) -> bool:
    """Whether users of the mount may not set an xattr: the marks of fuse-overlayfs, for which there is no escape."""
    return name.startswith(_FOREIGN)


def is_nameless(name: bytes) -> bool:
    """Whether it is no more than a namespace of the format, in which nothing can be escaped."""
    return name in _NAMESPACES


def escape(name: bytes) -> bytes:
    """The name under which a layer keeps what users of the mount call `name` (ovl.rst, "Nesting overlayfs mounts")."""
    for namespace in _NAMESPACES:
        if name.startswith(namespace):
            return namespace + _ESCAPE + name[len(namespace) :]
    return name


def unescape(name: bytes) -> bytes:
    """What users of the mount call the xattr that a layer keeps as `name`; `name` is not internal."""
    for namespace in _NAMESPACES:
        if name.startswith(namespace + _ESCAPE):
            return namespace + name[len(namespace) + len(_ESCAPE) :]
    return name


def _is_escaped(name: bytes) -> bool:
    return any(name.startswith(namespace + _ESCAPE) for namespace in _NAMESPACES)


class Origin(NamedTuple):
    """Where a copied-up object came from: a file handle in the file system `uuid` (struct ovl_fb).

    `kind` is the handle's type, `handle` its opaque bytes, `uuid` 16 bytes, all zero when unknown.
    """

    kind: int
    handle: bytes
    uuid: bytes


_ORIGIN_HEAD: Final = struct.Struct("BBBBB16s")
_ORIGIN_MAGIC: Final = 0xFB
_ORIGIN_BIG_ENDIAN: Final = 1
_ORIGIN_ANY_ENDIAN: Final = 2
#: The handle is of an object of the upper.
ORIGIN_OF_UPPER: Final = 4
_ORIGIN_FLAGS: Final = 7
_CPU_ENDIAN: Final = _ORIGIN_BIG_ENDIAN if sys.byteorder == "big" else 0


def encode_origin(origin: Origin, flags: int = 0) -> bytes:
    """The value of the origin xattr; `flags` are 0 or ORIGIN_OF_UPPER. ValueError when the handle is too long."""
    size = _ORIGIN_HEAD.size + len(origin.handle)
    if size > 0xFF or not 0 <= origin.kind <= 0xFF:
        raise ValueError("file handle does not fit an origin")
    return _ORIGIN_HEAD.pack(0, _ORIGIN_MAGIC, size, _CPU_ENDIAN | flags, origin.kind, origin.uuid) + origin.handle


def decode_origin(value: bytes) -> Origin | None:
    """Decode an origin xattr; None when it is empty, of another version or byte order, or damaged: it says nothing."""
    if len(value) < _ORIGIN_HEAD.size:
        return None
    version, magic, size, flags, kind, uuid = _ORIGIN_HEAD.unpack_from(value)
    if version != 0 or magic != _ORIGIN_MAGIC or size != len(value) or flags & ~_ORIGIN_FLAGS:
        return None
    if not flags & _ORIGIN_ANY_ENDIAN and flags & _ORIGIN_BIG_ENDIAN != _CPU_ENDIAN:
        return None
    return Origin(kind, value[_ORIGIN_HEAD.size :], uuid)


class OverrideForm(NamedTuple):
    """A way to keep owner and mode in an xattr, for layers whose file system or user cannot: fuse-overlayfs's.

    `name`: the xattr. `user`: for who may set ``user.`` xattrs only: ``security.`` ones are kept under other names, and
    objects that can have no ``user.`` xattrs are kept as empty files.
    """

    name: bytes
    user: bool

    @property
    def prefix(self) -> bytes:
        """What precedes the names of other attributes that are kept in this form."""
        return self.name.removesuffix(b"stat")


OVERRIDE_PRIVILEGED: Final = OverrideForm(b"security.fuseoverlayfs.override_stat", user=False)
OVERRIDE_CONTAINERS: Final = OverrideForm(b"user.containers.override_stat", user=True)
OVERRIDE_LEGACY: Final = OverrideForm(b"user.fuseoverlayfs.override_stat", user=False)
#: A layer is of the first of these that its root bears, as fuse-overlayfs and containers/storage have it.
OVERRIDE_FORMS: Final = (OVERRIDE_PRIVILEGED, OVERRIDE_CONTAINERS, OVERRIDE_LEGACY)

_SECURITY: Final = b"security."
_OVERRIDE_SECURITY: Final = b"user.containers.override_security."


def name_in_layer(name: bytes, form: OverrideForm | None) -> bytes:
    """The name under which a layer of `form` keeps what users of the mount call `name`."""
    if form is not None and name in ACLS:
        return form.prefix + name
    if form is not None and form.user and name.startswith(_SECURITY):
        return _OVERRIDE_SECURITY + name[len(_SECURITY) :]
    return escape(name)


def name_in_mount(name: bytes, form: OverrideForm | None) -> bytes | None:
    """What users of the mount call the xattr `name` of a layer of `form`; None for one that is not theirs."""
    if form is not None and name.removeprefix(form.prefix) in ACLS:
        return name.removeprefix(form.prefix)
    if form is not None and form.user:
        if name.startswith(_OVERRIDE_SECURITY):
            return _SECURITY + name[len(_OVERRIDE_SECURITY) :]
        if name.startswith(_SECURITY):
            return None
    return None if is_internal(name) else unescape(name)


class Override(NamedTuple):
    """Owner and mode of an object as an override xattr has them; `mode` with its type, `rdev` of device nodes."""

    uid: int
    gid: int
    mode: int
    rdev: int = 0

    def encode(self) -> bytes:
        """The value of the xattr: ``UID:GID:MODE:TYPE``, MODE octal."""
        kind = _OVERRIDE_TYPES[stat.S_IFMT(self.mode)]
        if stat.S_ISCHR(self.mode) or stat.S_ISBLK(self.mode):
            kind += b"-%d-%d" % (os.major(self.rdev), os.minor(self.rdev))
        return b"%d:%d:%04o:%s" % (self.uid, self.gid, stat.S_IMODE(self.mode), kind)


_OVERRIDE_TYPES: Final = {
    stat.S_IFREG: b"file",
    stat.S_IFDIR: b"dir",
    stat.S_IFLNK: b"symlink",
    stat.S_IFIFO: b"pipe",
    stat.S_IFSOCK: b"socket",
    stat.S_IFBLK: b"block",
    stat.S_IFCHR: b"char",
}
#: fuse-overlayfs 1.x writes no type, 2.0 reads ``char1:3``, containers/storage has ``char-1-3``.
_OVERRIDE: Final = rb"(\d+):(\d+):([0-7]+)(?::([a-z]+)(?:-?(\d+)[-:](\d+))?.*)?"


def decode_override(value: bytes, kind: int) -> Override:
    """Decode an override xattr of an object that on disk is of the type `kind` (S_IFMT); EINVAL for a damaged one.

    Only an empty-handed regular file can be said to be something else: a device node, a FIFO or a socket.
    """
    import re  # late: few layers have any

    match = re.fullmatch(_OVERRIDE, value, re.DOTALL)
    if match is None or max(int(match[1]), int(match[2])) >= 0xFFFFFFFF:
        raise OSError(errno.EINVAL, "invalid owner in a layer", os.fsdecode(value))
    said = next((mode for mode, word in _OVERRIDE_TYPES.items() if word == match[4]), kind)
    if kind != stat.S_IFREG or said in (stat.S_IFDIR, stat.S_IFLNK):
        said = kind
    device = said in (stat.S_IFBLK, stat.S_IFCHR)
    if device and match[5] is None:
        raise OSError(errno.EINVAL, "invalid device in a layer", os.fsdecode(value))
    rdev = os.makedev(int(match[5]), int(match[6])) if device else 0
    return Override(int(match[1]), int(match[2]), said | stat.S_IMODE(int(match[3], 8)), rdev)
