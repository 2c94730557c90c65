"""Archives of images as files to reach into: members by name, in a plain tar that is looked through once."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator

from unionfsd import syscalls
from unionfsd.errors import UserError, reason
from unionfsd.images import compress, documents
from unionfsd.images.compress import Readable, Source
from unionfsd.images.tarread import BLOCK, HARD_LINK, Limits, TarReader
from unionfsd.images.unpack import path_of
from unionfsd.syscalls import Fd
from unionfsd.typed import Final, NamedTuple

_LIMITS: Final = Limits(entries=200_000, size=1 << 42)
_MAX_LINKS: Final = 8


class Slice:
    """`size` bytes of a file from `start` on, as a stream."""

    def __init__(self, fd: Fd, start: int, size: int) -> None:
        self._fd = fd
        self._at = start
        self._left = size

    def read(self, size: int, /) -> bytes:
        data = os.pread(self._fd.fd, min(size, self._left), self._at)
        self._at += len(data)
        self._left -= len(data)
        return data


class File(Source):
    """A plain file as the source of a tar reader that skips by seeking."""

    def __init__(self, fd: Fd) -> None:
        super().__init__(iter(()), algorithm=None)
        self._fd = fd
        self._size = os.fstat(fd.fd).st_size
        self.at = 0

    def view(self, size: int) -> memoryview:
        data = os.pread(self._fd.fd, size, self.at)
        self.at += len(data)
        return memoryview(data)

    def read(self, size: int, /) -> bytes:
        return bytes(self.view(size))

    def skip(self, size: int) -> int:
        taken = min(size, self._size - self.at)
        self.at += taken
        return taken


class Place(NamedTuple):
    """Where the data of a member lies in the archive."""

    start: int
    size: int


class Archive:
    """The members of the tar in `fd`, a plain file, by their names; of several of one name the last.

    What is no tar, or has names that lead out of it, is a UserError.
    """

    def __init__(self, fd: Fd) -> None:
        self._fd = fd
        self._places: dict[bytes, Place] = {}
        self._links: dict[bytes, bytes] = {}
        source = File(fd)
        for member in TarReader(source, _LIMITS):
            path = path_of(member.name)
            name = b"/".join(path)
            if member.kind == stat.S_IFREG and member.extents is None:
                self._places[name] = Place(source.at, member.size)
                self._links.pop(name, None)
            elif member.kind in (stat.S_IFLNK, HARD_LINK):
                self._links[name] = _target(path, member.target, hard=member.kind == HARD_LINK)

    def __contains__(self, name: str) -> bool:
        return self._place(name) is not None

    def names(self) -> Iterator[str]:
        return map(os.fsdecode, self._places)

    def _place(self, name: str) -> Place | None:
        wanted = name.encode()
        for _ in range(_MAX_LINKS):
            if wanted in self._places:
                return self._places[wanted]
            if wanted not in self._links:
                return None
            wanted = self._links[wanted]
        return None

    def size(self, name: str) -> int:
        """Bytes of a member; UserError when there is none of that name."""
        place = self._place(name)
        if place is None:
            raise UserError(f"the archive has no {name}")
        return place.size

    def open(self, name: str) -> Slice:
        """The data of a member; UserError."""
        place = self._place(name)
        if place is None:
            raise UserError(f"the archive has no {name}")
        return Slice(self._fd, *place)

    def document(self, name: str) -> bytes:
        """The data of a small member; UserError."""
        size = self.size(name)
        if size > documents.MAX_DOCUMENT:
            raise UserError(f"{name}: {size} bytes are too many for a document")
        data = self.open(name).read(size)
        if len(data) != size:
            raise UserError(f"{name}: the archive ends before its end")
        return data


def _target(path: tuple[bytes, ...], target: bytes, *, hard: bool) -> bytes:
    """What a link in the archive leads to, by its words: ``ID/layer.tar -> ../OTHER/layer.tar``."""
    found = [] if hard or target.startswith(b"/") else list(path[:-1])
    for part in target.split(b"/"):
        if part == b"..":
            if not found:
                return b""
            found.pop()
        elif part not in (b"", b"."):
            found.append(part)
    return b"/".join(found)


def open_plain(path: str, spool: Fd) -> Fd:
    """The tar in the file `path` (``-``: standard input), plain: decompressed into the directory `spool` if need be."""
    try:
        fd = Fd(os.dup(0)) if path == "-" else Fd(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from None
    st = os.fstat(fd.fd)
    if stat.S_ISDIR(st.st_mode):
        raise UserError(f"{path}: a directory, where an archive was to be")
    if stat.S_ISREG(st.st_mode) and path != "-" and not compress.is_compressed(os.pread(fd.fd, BLOCK, 0)):
        return fd
    return spooled(compress.pieces(_Stream(fd)), spool)


class _Stream:
    def __init__(self, fd: Fd) -> None:
        self._fd = fd

    def read(self, size: int, /) -> bytes:
        return os.read(self._fd.fd, size)


def stream(fd: Fd) -> Readable:
    """A file as a stream, from its beginning."""
    return Slice(fd, 0, os.fstat(fd.fd).st_size)


def spooled(found: Iterator[bytes], spool: Fd) -> Fd:
    """Pieces in a file without a name, in the directory `spool`."""
    made = _nameless(spool)
    at = 0
    for piece in found:
        view = memoryview(piece)
        while view:
            count = syscalls.pwrite(made.fd, view, at)
            at, view = at + count, view[count:]
    return made


def _nameless(spool: Fd) -> Fd:
    try:
        return syscalls.tmpfile_at(spool.fd, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    name = b"spool-" + secrets.token_hex(8).encode()
    made = syscalls.create_at(spool.fd, name, 0o600)
    syscalls.unlink_at(spool.fd, name)
    return made


def is_tar(path: str) -> bool:
    """Whether a file looks like a tar, or a compressed one."""
    with open(path, "rb") as file:
        head = file.read(BLOCK)
    return (
        compress.is_compressed(head)
        or head[257:262] == b"ustar"
        or (len(head) == BLOCK and head[148:156].strip(b" \0").isdigit())
    )
