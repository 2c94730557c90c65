"""Compressed streams: recognised by their first bytes, decompressed in bounded memory, and verified as they pass.

gzip, zstd, xz and bzip2, with any number of members, or plain. What follows the last member, or a stream that ends in
the middle of one, is an error.
"""

from __future__ import annotations

import bz2
import contextlib
import lzma
import queue
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from functools import partial

from unionfsd.errors import UserError
from unionfsd.images import digest as digests
from unionfsd.images.frames import Frames
from unionfsd.typed import IO, Final, Protocol, cast

CHUNK: Final = 1 << 18
#: What one step may give: a bomb is met in pieces of this size, and the limit on the whole stops it.
_PIECE: Final = 1 << 20
_GZIP: Final = b"\x1f\x8b"
_ZSTD: Final = b"\x28\xb5\x2f\xfd"
_XZ: Final = b"\xfd7zXZ\0"
#: With what begins its first block, or its end: a tar may begin with the name "BZh1".
_BZIP2: Final = re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")
#: zstd windows of more than this are refused (8 MiB is what decoders must know, RFC 8878, 3.1.1.1.2).
_ZSTD_WINDOW: Final = 1 << 27
#: Of xz as much as its highest preset takes to be undone (xz(1), -9).
_XZ_MEMORY: Final = 100 << 20


class Readable(Protocol):
    """What `read` gives: at most so many bytes, b"" at the end."""

    def read(self, size: int, /) -> bytes: ...


class BrokenOffError(UserError):
    """The bytes stopped coming; those that came are good, for all we know, and can be gone on with."""


class Verified:
    """Reads a blob and refuses any other: `size` bytes, or any number when None, that have `digest`.

    `seen` is called with the number of bytes of every read. UserError at the end, or as soon as there are too many.
    """

    def __init__(
        self, stream: Readable, digest: str | None, size: int | None, seen: Callable[[int], None] | None = None
    ) -> None:
        self._stream = stream
        self._digest = digest
        self._size = size
        self._seen = seen
        self._hash = digests.hasher(digest or "sha256:")
        self._count = 0
        self._ended = False

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(size)
        self._count += len(data)
        if self._size is not None and self._count > self._size:
            raise UserError(f"{self._digest}: longer than the {self._size} bytes it should have")
        self._hash.update(data)
        if self._seen is not None and data:
            self._seen(len(data))
        if not data and not self._ended:
            self._ended = True
            self._judge()
        return data

    def _judge(self) -> None:
        if self._size is not None and self._count != self._size:
            raise UserError(f"{self._digest}: ends after {self._count} of {self._size} bytes")
        if self._digest is not None and self.digest != self._digest:
            raise UserError(f"{self._digest}: its content has another digest, {self.digest}")

    @property
    def digest(self) -> str:
        """The digest of what was read so far."""
        algorithm = digests.split(self._digest)[0] if self._digest else "sha256"
        return f"{algorithm}:{self._hash.hexdigest()}"

    @property
    def count(self) -> int:
        """Bytes read so far."""
        return self._count


class Ahead:
    """The items of `found`, made by a thread of its own that is a few of them ahead. Closed when it is left."""

    _DEPTH: Final = 6

    def __init__(self, found: Iterator[bytes]) -> None:
        self._found = found
        self._queue: queue.Queue[bytes | BaseException | None] = queue.Queue(self._DEPTH)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Iterator[bytes]:
        self._thread.start()
        return iter(self._take, None)

    def __exit__(self, *exc: object) -> None:
        self._stopped = True  # it puts one more item at most
        while self._thread.is_alive():
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=0.05)
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._found:
                self._queue.put(item)
                if self._is_stopped():
                    return
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)

    def _is_stopped(self) -> bool:
        return self._stopped

    def _take(self) -> bytes | None:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item


def is_compressed(head: bytes) -> bool:
    """Whether a stream that begins with `head` is one that `pieces` decompresses."""
    return _decompressor(head) is not None


def pieces(stream: Readable) -> Iterator[bytes]:
    """What is in `stream` once it is decompressed, in pieces of at most 1 MiB; UserError for a damaged stream."""
    head = stream.read(CHUNK)
    while head and len(head) < len(_XZ):
        more = stream.read(CHUNK)
        if not more:
            break
        head += more
    return (_decompressor(head) or _plain)(stream, head)


def _decompressor(head: bytes) -> Callable[[Readable, bytes], Iterator[bytes]] | None:
    if head.startswith(_GZIP):
        return _inflated
    if head.startswith(_ZSTD) or (head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50):  # or a skippable frame
        return _unzstd
    if head.startswith(_XZ):
        return partial(_members, "xz", _xz)
    return partial(_members, "bzip2", bz2.BZ2Decompressor) if _BZIP2.match(head) else None


def _plain(stream: Readable, data: bytes) -> Iterator[bytes]:
    while data:
        yield data
        data = stream.read(CHUNK)


def _inflated(stream: Readable, data: bytes) -> Iterator[bytes]:
    try:
        while data:
            member = zlib.decompressobj(wbits=31)
            yield from _member(stream, member, data)
            data = member.unused_data or stream.read(CHUNK)
    except zlib.error as error:
        raise UserError(f"gzip: the stream is damaged: {error}") from None


def _member(stream: Readable, member: zlib._Decompress, data: bytes) -> Iterator[bytes]:
    """One member of a gzip stream that begins with `data`."""
    while True:
        piece = member.decompress(data, _PIECE)
        if piece:
            yield piece
        if member.eof:
            return
        data = member.unconsumed_tail
        # A full piece: there may be more to come of what was taken already.
        if not data and len(piece) < _PIECE:
            data = stream.read(CHUNK)
            if not data:
                raise UserError("gzip: the stream ends too early")


def _xz() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)


def _members(
    kind: str, make: Callable[[], lzma.LZMADecompressor | bz2.BZ2Decompressor], stream: Readable, data: bytes
) -> Iterator[bytes]:
    """What is in a stream of members, each undone by an object of its own."""
    try:
        while data:
            member = make()
            while not member.eof:
                piece = member.decompress(data, _PIECE)
                if piece:
                    yield piece
                data = b""
                if member.needs_input and not (data := stream.read(CHUNK)):
                    raise UserError(f"{kind}: the stream ends too early")
            data = member.unused_data or stream.read(CHUNK)
            if kind == "xz":  # "Stream Padding" of its format
                data = data.lstrip(b"\0") or stream.read(CHUNK)
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{kind}: the stream is damaged: {error}") from None


def _unzstd(stream: Readable, data: bytes) -> Iterator[bytes]:
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    pushed = _Pushed(stream, data)
    source = cast("IO[bytes]", pushed)  # it only reads
    try:
        with decompressor.stream_reader(source, read_size=CHUNK, read_across_frames=True, closefd=False) as reader:
            while piece := reader.read(_PIECE):
                yield piece
    except zstandard.ZstdError as error:
        raise UserError(f"zstd: the stream is damaged: {error}") from None
    if not pushed.whole:
        raise UserError("zstd: the stream ends too early")


class _Pushed:
    """A stream of zstd with the bytes put back that were read to recognise it; `whole` when it can end here."""

    def __init__(self, stream: Readable, data: bytes) -> None:
        self._stream = stream
        self._data = data
        self._frames = Frames()

    def read(self, size: int, /) -> bytes:
        data, self._data = (self._data or self._stream.read(size)), b""
        if len(data) > size:
            data, self._data = data[:size], data[size:]
        self._frames.feed(data)
        return data

    @property
    def whole(self) -> bool:
        return self._frames.whole


class Source:
    """Pieces as a stream of bytes, counted, hashed, and cut off by an error after `limit` bytes.

    `digest` is that of everything read so far: of a tar, the DiffID once `drain` has read it to its end.
    """

    def __init__(self, found: Iterator[bytes], limit: int | None = None, *, algorithm: str | None = "sha256") -> None:
        self._pieces = found
        self._limit = limit
        self._algorithm = algorithm
        self._hash = digests.hasher(algorithm) if algorithm else None
        self._rest = memoryview(b"")
        self.count = 0

    def read(self, size: int, /) -> bytes:
        """At most `size` bytes, b"" at the end."""
        if not self._rest and not self._fill():
            return b""
        data = bytes(self._rest[:size])
        self._rest = self._rest[len(data) :]
        return data

    def view(self, size: int) -> memoryview:
        """The same without a copy; the view is good until the next call."""
        if not self._rest and not self._fill():
            return memoryview(b"")
        data = self._rest[:size]
        self._rest = self._rest[len(data) :]
        return data

    def exactly(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end."""
        parts = []
        while size > 0 and (part := self.read(size)):
            parts.append(part)
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def skip(self, size: int) -> int:
        """Read `size` bytes and forget them; returns how many there were."""
        left = size
        while left > 0 and (part := self.view(min(left, _PIECE))):
            left -= len(part)
        return size - left

    def drain(self) -> None:
        """Read to the end."""
        while self.view(_PIECE):
            pass

    def _fill(self) -> bool:
        piece = next(filter(None, self._pieces), b"")  # an empty piece is not the end
        if not piece:
            return False
        self.count += len(piece)
        if self._limit is not None and self.count > self._limit:
            raise UserError(f"the stream unpacks to more than {self._limit} bytes", hint="--max-layer raises the limit")
        if self._hash is not None:
            self._hash.update(piece)
        self._rest = memoryview(piece)
        return True

    @property
    def digest(self) -> str:
        if self._hash is None:
            raise ValueError("a stream that is not hashed has no digest")
        return f"{self._algorithm}:{self._hash.hexdigest()}"
