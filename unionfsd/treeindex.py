"""What a layer must hold, object by object, in a form that a mount can look things up in at once.

An index is made from the manifest of a layer's tree (`images.tree`) when the layer is. It has a record for every
object, and one for the root, whose path is empty::

    "unionfsd tree 1\n", then records in the order of their keys:
        key 16       BLAKE2b of the path from the layer's root
        metadata 16  BLAKE2b of `describe`
        content 32   of a regular file the SHA-256 of its data, of a directory `children`, else zeros

So a lookup is a search in a table that fits in memory: 64 bytes for an object, whatever its name.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from _blake2 import blake2b  # hashlib's own; hashlib itself loads OpenSSL, a twentieth of the start
from bisect import bisect_left
from collections.abc import Iterator, Mapping

from . import syscalls
from .errors import LAYER, UserError, reason
from .typed import Final, NamedTuple

MAGIC: Final = b"unionfsd tree 1\n"
RECORD: Final = 64
_KEY: Final = 16
_CONTENT: Final = 32
NO_CONTENT: Final = bytes(_CONTENT)
_FIELDS: Final = struct.Struct("<IIIQqQ")
_LENGTH: Final = struct.Struct("<I")
#: Of a name in `children`: it is a whiteout.
WHITEOUT: Final = 255


class Record(NamedTuple):
    """What an index says of an object."""

    metadata: bytes
    content: bytes


def key(path: bytes) -> bytes:
    return blake2b(path, digest_size=_KEY).digest()


def describe(st: os.stat_result, target: bytes, xattrs: Mapping[bytes, bytes]) -> bytes:
    """Digest of what an object is but for its content: `target` of a symlink, all `xattrs` that its layer has."""
    mode = st.st_mode
    size = st.st_size if stat.S_ISREG(mode) else 0
    device = st.st_rdev if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else 0
    return metadata(mode, st.st_uid, st.st_gid, size, st.st_mtime_ns, device, target, xattrs)


def metadata(
    mode: int, uid: int, gid: int, size: int, mtime_ns: int, device: int, target: bytes, xattrs: Mapping[bytes, bytes]
) -> bytes:
    """The same of the parts; `size` is 0 but for regular files, `device` but for devices."""
    made = blake2b(_FIELDS.pack(mode, uid, gid, size, mtime_ns, device), digest_size=_KEY)
    for part in (target, *(part for name in sorted(xattrs) for part in (name, xattrs[name]))):
        made.update(_LENGTH.pack(len(part)))
        made.update(part)
    return made.digest()


def describe_object(fd: int, st: os.stat_result) -> bytes:
    """`describe` of the object that the O_PATH `fd` refers to."""
    target = syscalls.readlink(fd) if stat.S_ISLNK(st.st_mode) else b""
    try:
        names = syscalls.listxattr(fd)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        names = []
    return describe(st, target, {name: syscalls.getxattr(fd, name) for name in names})


class Children:
    """Digest of the names in a directory, given in the order of their bytes, each with its DT_* type or `WHITEOUT`."""

    def __init__(self) -> None:
        self._made = blake2b(digest_size=_CONTENT)

    def add(self, name: bytes, kind: int) -> None:
        self._made.update(name + bytes((0, kind)))

    def digest(self) -> bytes:
        return self._made.digest()


class Writer:
    """Gathers records in any order; `pieces` gives the index, and empties it."""

    def __init__(self) -> None:
        # By the first byte of the key: each part is sorted by itself, and no record is an object of its own for long.
        self._parts = [bytearray() for _ in range(256)]

    def add(self, path: bytes, record: Record) -> None:
        found = key(path)
        self._parts[found[0]] += found + record.metadata + record.content

    def pieces(self) -> Iterator[bytes]:
        yield MAGIC
        for part in self._parts:
            records = sorted(bytes(part[at : at + RECORD]) for at in range(0, len(part), RECORD))
            part.clear()
            yield b"".join(records)


class TreeIndex:
    """An index in memory."""

    def __init__(self, data: bytes) -> None:
        """ValueError for what is none."""
        if not data.startswith(MAGIC) or (len(data) - len(MAGIC)) % RECORD:
            raise ValueError("not the index of a tree")
        self._data = data
        self._places = range(len(MAGIC), len(data), RECORD)

    def __len__(self) -> int:
        return len(self._places)

    def find(self, path: bytes) -> Record | None:
        """What the layer must have at `path`; None for nothing."""
        data, wanted = self._data, key(path)
        at = bisect_left(self._places, wanted, key=lambda place: data[place : place + _KEY])
        if at == len(self._places):
            return None
        place = self._places[at]
        if data[place : place + _KEY] != wanted:
            return None
        middle = place + 2 * _KEY
        return Record(data[place + _KEY : middle], data[middle : place + RECORD])


def read(path: bytes, digest: bytes | None) -> TreeIndex:
    """Read an index all at once, so that what was checked is what is used; UserError for one that is not as it was.

    `digest` is its SHA-256, None for whoever trusts the file as it is.
    """
    shown = os.fsdecode(path)
    try:
        with open(path, "rb") as stream:
            data = stream.read()
    except OSError as error:
        raise UserError(f"verify {shown}: {reason(error)}", code=LAYER) from None
    if digest is not None:
        import hashlib  # late: see above

        if hashlib.sha256(data).digest() != digest:
            raise UserError(f"verify {shown}: it has been changed: its digest is another", code=LAYER)
    try:
        return TreeIndex(data)
    except ValueError as error:
        raise UserError(f"verify {shown}: {error}", code=LAYER) from None
