"""Places with blobs by digest: an OCI layout, as a directory or in an archive, and skopeo's directories."""

from __future__ import annotations

import os
from collections.abc import Iterator

from unionfsd import syscalls
from unionfsd.errors import UserError, reason
from unionfsd.images import archives, beneath, documents
from unionfsd.images import digest as digests
from unionfsd.images.archives import Archive
from unionfsd.images.compress import Readable
from unionfsd.syscalls import Fd
from unionfsd.typed import Final, Protocol

_MAX_SIGNATURES: Final = 100


class Blobs(Protocol):
    """A place with blobs by digest."""

    def open(self, digest: str) -> Readable: ...

    def document(self, digest: str) -> bytes: ...

    def nested(self, digest: str) -> bytes:
        """A manifest that an index names, which registries keep apart from blobs."""


class DirectoryBlobs:
    """Blobs in a directory of an OCI layout, reached without following a symlink."""

    def __init__(self, path: str) -> None:
        self.fd = open_directory(path)

    def open(self, digest: str) -> Readable:
        algorithm, name = digests.split(digest)
        try:
            directory = beneath.Tree(self.fd).directory((b"blobs", algorithm.encode()))
            return archives.stream(syscalls.open_data(directory.fd, name.encode(), os.O_RDONLY))
        except OSError as error:
            raise UserError(f"{digest}: {reason(error)}") from None

    def document(self, digest: str) -> bytes:
        return small(self.open(digest), digest)

    nested = document


class ArchiveBlobs:
    """Blobs of an OCI layout in an archive."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive

    def open(self, digest: str) -> Readable:
        return self._archive.open("blobs/" + digest.replace(":", "/"))

    def document(self, digest: str) -> bytes:
        return small(self.open(digest), digest)

    nested = document


class FlatBlobs:
    """Blobs of ``dir:``, files by the digits of their digests."""

    def __init__(self, fd: Fd) -> None:
        self._fd = fd

    def open(self, digest: str) -> Readable:
        try:
            return archives.stream(syscalls.open_data(self._fd.fd, digests.split(digest)[1].encode(), os.O_RDONLY))
        except OSError as error:
            raise UserError(f"{digest}: {reason(error)}") from None

    def document(self, digest: str) -> bytes:
        return small(self.open(digest), digest)

    nested = document

    def signatures(self) -> Iterator[bytes]:
        """The files ``signature-1`` and so on."""
        for number in range(1, _MAX_SIGNATURES + 1):
            try:
                yield beneath.read_file(self._fd.fd, b"signature-%d" % number, documents.MAX_DOCUMENT)
            except FileNotFoundError:
                return


def small(stream: Readable, what: str) -> bytes:
    """All of a small stream; UserError for a large one."""
    data = b""
    while len(data) <= documents.MAX_DOCUMENT:
        piece = stream.read(documents.MAX_DOCUMENT + 1 - len(data))
        if not piece:
            return data
        data += piece
    raise UserError(f"{what}: too large for a document")


def open_directory(path: str) -> Fd:
    """A directory outside of the store; UserError."""
    try:
        return Fd(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        raise UserError(f"{path}: {reason(error)}") from None
