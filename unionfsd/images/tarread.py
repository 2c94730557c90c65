"""Reading tar archives from a stream: ustar, PAX, GNU and old ones, to the last byte a matter of suspicion.

Rules this file obeys:

- Names, targets and values are bytes as they stand in the archive; nothing is decoded and nothing resolved.
- Memory is bounded: what an archive announces is read in pieces, or refused when it is to be kept (`Limits`).
- What one reader takes for one thing and another for another is refused: a wrong checksum, a negative size, a record of
  PAX whose length is wrong, a NUL in a name.

Sources: pax(1) of POSIX.1-2017 ("ustar Interchange Format", "pax Header Block"), GNU tar's manual ("Basic Tar Format",
"Storing Sparse Files").
"""

from __future__ import annotations

import base64
import binascii
import stat
from collections.abc import Iterator, Mapping
from urllib.parse import unquote_to_bytes

from unionfsd.errors import UserError
from unionfsd.images.compress import Source
from unionfsd.typed import Final, NamedTuple

BLOCK: Final = 512
_ZERO: Final = bytes(BLOCK)
#: xattrs as star and most others write them, and in base64, with the name in %XX, as libarchive did and does, too.
_SCHILY: Final = b"SCHILY.xattr."
_LIBARCHIVE: Final = b"LIBARCHIVE.xattr."
#: What the system takes (xattr(7)): XATTR_NAME_MAX, XATTR_SIZE_MAX.
_MAX_XATTR_NAME: Final = 255
_MAX_XATTR: Final = 1 << 16

_KINDS: Final = {
    b"0": stat.S_IFREG,
    b"\0": stat.S_IFREG,
    b"7": stat.S_IFREG,
    b"S": stat.S_IFREG,
    b"1": 0,
    b"2": stat.S_IFLNK,
    b"3": stat.S_IFCHR,
    b"4": stat.S_IFBLK,
    b"5": stat.S_IFDIR,
    b"6": stat.S_IFIFO,
}
HARD_LINK: Final = 0
_LINKISH: Final = (HARD_LINK, stat.S_IFLNK)


class Limits(NamedTuple):
    """What an archive may ask for: bytes of one extended header, entries, bytes in all, bytes of a path."""

    header: int = 1 << 20
    entries: int = 4_000_000
    size: int = 64 << 30
    path: int = 4095


class Extent(NamedTuple):
    """Data of a sparse file: `length` bytes at `offset`."""

    offset: int
    length: int


class Member(NamedTuple):
    """An entry. `kind` is a file type of stat(7), or HARD_LINK; `size` is what the file will have, in bytes.

    `stored` is how many bytes follow in the archive; with `extents` they are a sparse file's data. Times are in ns.
    """

    name: bytes
    kind: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    target: bytes
    rdev: tuple[int, int]
    xattrs: dict[bytes, bytes]
    stored: int
    extents: tuple[Extent, ...] | None = None


class TarError(UserError):
    """The archive is not one that should be unpacked."""


class TarReader:
    """The entries of the archive in `source`, in their order; the data of one with `data`, while it is the current one.

    `finished` says whether the marks of the archive's end were seen.
    """

    def __init__(self, source: Source, limits: Limits | None = None) -> None:
        self._source = source
        self._limits = limits or Limits()
        self._left = 0
        self._padding = 0
        self._globals: dict[bytes, bytes] = {}
        self._count = 0
        self.finished = False

    def __iter__(self) -> Iterator[Member]:
        while (member := self._next()) is not None:
            yield member

    def data(self) -> Iterator[memoryview]:
        """The stored bytes of the current entry, in pieces; each is good until the next."""
        while self._left > 0:
            piece = self._source.view(min(self._left, 1 << 20))
            if not piece:
                raise TarError(f"the archive ends {self._left} bytes before the end of a file")
            self._left -= len(piece)
            yield piece

    def _next(self) -> Member | None:
        self._finish_entry()
        extended: dict[bytes, bytes] = {}
        while True:
            block = self._block()
            if block is None:
                if extended:
                    raise TarError("the archive ends after an extended header")
                return None
            if self._take_extension(block, extended):
                continue
            self._count += 1
            if self._count > self._limits.entries:
                raise TarError(f"the archive has more than {self._limits.entries} entries")
            found = {**self._globals, **extended}
            # An empty value is none, of its own or of the globals (POSIX); but an xattr can be empty.
            return self._member(block, {key: value for key, value in found.items() if value or _is_xattr(key)})

    def _finish_entry(self) -> None:
        wanted = self._left + self._padding
        if self._source.skip(wanted) != wanted:
            raise TarError("the archive ends in a file")
        self._left = self._padding = 0

    def _block(self) -> bytes | None:
        """The next header; None at the end of the archive."""
        block = self._source.exactly(BLOCK)
        if block == _ZERO:
            self.finished = True
            return None
        if not block:
            return None
        if len(block) != BLOCK:
            raise TarError("the archive ends in a header")
        _check_sum(block)
        return block

    def _take_extension(self, block: bytes, extended: dict[bytes, bytes]) -> bool:
        """Read the extended header that begins with `block`, if it is one."""
        kind = block[156:157]
        if kind in (b"x", b"X"):
            extended.update(_records(self._body(block)))
        elif kind == b"g":
            self._globals.update(_records(self._body(block)))
            if len(self._globals) > 1000 or any(map(_is_xattr, self._globals)):
                raise TarError("a global extended header that is about single files")
        elif kind == b"L":
            extended[b"path"] = _unterminated(self._body(block))
        elif kind == b"K":
            extended[b"linkpath"] = _unterminated(self._body(block))
        else:
            return False
        return True

    def _body(self, block: bytes) -> bytes:
        size = _number(block[124:136], "size")
        if size > self._limits.header:
            raise TarError(f"an extended header of {size} bytes is too large")
        body = self._source.exactly(size)
        padding = -size % BLOCK
        if len(body) != size or self._source.skip(padding) != padding:
            raise TarError("the archive ends in an extended header")
        return body

    def _member(self, block: bytes, extended: dict[bytes, bytes]) -> Member:
        flag = block[156:157]
        if flag not in _KINDS:
            raise TarError(f"an entry of unknown type {flag!r}: {_header_name(block)[:100]!r}")
        kind = _KINDS[flag]
        name = extended.get(b"path", _header_name(block))
        if flag in (b"0", b"\0", b"7") and name.endswith(b"/"):
            kind = stat.S_IFDIR  # archives from before there was a type for directories
        stored = _decimal(extended[b"size"]) if b"size" in extended else _number(block[124:136], "size")
        if kind != stat.S_IFREG:
            stored = 0 if kind in (*_LINKISH, stat.S_IFDIR) or stored == 0 else _refuse_size(name, stored)
        self._left, self._padding = stored, -stored % BLOCK
        size, extents, name = self._sparse(block, extended, name, stored)
        target = extended.get(b"linkpath", _field(block[157:257])) if kind in _LINKISH else b""
        for text in (name, target):
            if b"\0" in text or len(text) > self._limits.path:
                raise TarError(f"a name that no file can have: {text[:100]!r}")
        if size > self._limits.size:
            hint = "--max-layer raises the limit"
            raise TarError(f"{name[:100]!r}: a file of {size} bytes is too large", hint=hint)
        return Member(
            name=name,
            kind=kind,
            mode=_number(block[100:108], "mode") & 0o7777,
            uid=_owner(extended.get(b"uid"), block[108:116], "uid"),
            gid=_owner(extended.get(b"gid"), block[116:124], "gid"),
            size=size,
            mtime_ns=_time(extended[b"mtime"]) if b"mtime" in extended else _header_time(block),
            target=target,
            rdev=_device(block) if kind in (stat.S_IFCHR, stat.S_IFBLK) else (0, 0),
            xattrs=_xattrs(extended),
            stored=self._left,
            extents=extents,
        )

    # Sparse files: the old form of GNU tar, and its three in PAX.

    def _sparse(
        self, block: bytes, extended: dict[bytes, bytes], name: bytes, stored: int
    ) -> tuple[int, tuple[Extent, ...] | None, bytes]:
        """(size, where the data belongs, name): with no extents for a file that is not sparse."""
        if block[156:157] == b"S":
            extents = self._old_sparse(block)
            size = _number(block[483:495], "size of a sparse file")
        elif extended.get(b"GNU.sparse.major") == b"1":
            extents = self._sparse_in_data()
            size = _decimal(extended.get(b"GNU.sparse.realsize", b""))
            name = extended.get(b"GNU.sparse.name", name)
        elif b"GNU.sparse.map" in extended:
            numbers = [_decimal(text) for text in extended[b"GNU.sparse.map"].split(b",")]
            extents = _paired(numbers)
            size = _decimal(extended.get(b"GNU.sparse.size", b""))
            name = extended.get(b"GNU.sparse.name", name)
        elif b"GNU.sparse.size" in extended or b"GNU.sparse.major" in extended:
            raise TarError(f"{name[:100]!r}: a sparse file in a form that is not read")
        else:
            return stored, None, name
        _check_extents(extents, size, self._left, name)
        return size, extents, name

    def _old_sparse(self, block: bytes) -> tuple[Extent, ...]:
        found = _old_extents(block[386:482])
        more = block[482]
        while more:
            block = self._source.exactly(BLOCK)
            if len(block) != BLOCK:
                raise TarError("the archive ends in the map of a sparse file")
            found += _old_extents(block[:504])
            more = block[504]
            if len(found) * 24 > self._limits.header:
                raise TarError("the map of a sparse file is too large")
        return tuple(found)

    def _sparse_in_data(self) -> tuple[Extent, ...]:
        """The map of form 1.0: decimal numbers, a line each, before the data and padded to a block."""
        numbers: list[int] = []
        rest, wanted, taken = b"", 1, 0
        while len(numbers) < wanted:
            line, newline, tail = rest.partition(b"\n")
            if newline:
                numbers.append(_decimal(line))
                rest = tail
                if len(numbers) == 1:
                    wanted += 2 * numbers[0]
                continue
            block = self._source.exactly(BLOCK)
            taken += BLOCK
            if len(block) != BLOCK or taken > min(self._limits.header, self._left) or wanted * 2 > self._limits.header:
                raise TarError("the map of a sparse file is damaged")
            rest += block
        self._left -= taken
        return _paired(numbers[1:])


def _refuse_size(name: bytes, stored: int) -> int:
    raise TarError(f"{name[:100]!r}: {stored} bytes of data for what can hold none")


def _check_sum(block: bytes) -> None:
    said = _number(block[148:156], "checksum")
    plain = sum(block) - sum(block[148:156]) + 8 * 0x20
    if said == plain:
        return
    # Some old archives have the sum of signed characters.
    if said != plain - 256 * sum(1 for at, byte in enumerate(block) if byte > 127 and not 148 <= at < 156):
        raise TarError("not a tar archive, or a damaged one: the checksum of a header is wrong")


def _field(data: bytes) -> bytes:
    return data.partition(b"\0")[0]


def _unterminated(data: bytes) -> bytes:
    return data.removesuffix(b"\0")


def _header_name(block: bytes) -> bytes:
    name = _field(block[:100])
    prefix = _field(block[345:500]) if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _number(data: bytes, what: str) -> int:
    """A number of a header: octal, or base 256 when the first bit is set; never negative."""
    if data[0] & 0x80:
        if data[0] & 0x40:
            raise TarError(f"a negative {what}")
        return int.from_bytes(bytes([data[0] & 0x3F]) + data[1:], "big")
    text = data.replace(b"\0", b" ").strip()
    try:
        value = int(text, 8) if text else 0
    except ValueError:
        raise TarError(f"not a {what}: {data!r}") from None
    if value < 0 or (not text.isalnum() and text):
        raise TarError(f"not a {what}: {data!r}")
    return value


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 19:
        raise TarError(f"not a number: {text[:40]!r}")
    return int(text)


def _owner(extended: bytes | None, field: bytes, what: str) -> int:
    value = _number(field, what) if extended is None else _decimal(extended)
    if value >= (1 << 32) - 1:
        raise TarError(f"not a {what}: {value}")
    return value


def _device(block: bytes) -> tuple[int, int]:
    major, minor = _number(block[329:337], "device"), _number(block[337:345], "device")
    if major >= 1 << 12 or minor >= 1 << 20:
        raise TarError(f"not a device: {major}:{minor}")
    return major, minor


_FIRST_TIME: Final = -(1 << 62)
_LAST_TIME: Final = 1 << 62


def _header_time(block: bytes) -> int:
    field = block[136:148]
    if field[0] & 0x80:
        seconds = int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
        if field[0] & 0x40:
            seconds -= 1 << 95
    else:
        seconds = _number(field, "time")
    return _bounded(seconds * 1_000_000_000)


def _time(text: bytes) -> int:
    """A time of PAX: seconds, with a sign and decimals perhaps; what is finer than 1 ns is cut off."""
    whole, _, fraction = text.partition(b".")
    negative = whole.startswith(b"-")
    digits = whole[1:] if negative else whole
    if not digits.isdigit() or (fraction and not fraction.isdigit()) or len(digits) > 18:
        raise TarError(f"not a time: {text[:40]!r}")
    value = int(digits) * 1_000_000_000 + int(fraction[:9].ljust(9, b"0"))
    return _bounded(-value if negative else value)


def _bounded(ns: int) -> int:
    return min(max(ns, _FIRST_TIME), _LAST_TIME)


def _records(body: bytes) -> dict[bytes, bytes]:
    """The records of a PAX header: ``LENGTH KEY=VALUE\\n``, with the length of all of it."""
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(body):
        if body[at] == 0:  # some writers fill up with NULs
            break
        space = body.find(b" ", at, at + 20)
        length = _decimal(body[at:space]) if space > at else 0
        record = body[space + 1 : at + length]
        key, equals, value = record[:-1].partition(b"=")
        if length <= 0 or at + length > len(body) or not record.endswith(b"\n") or not equals or not key:
            raise TarError("an extended header is damaged")
        found[key] = value
        at += length
        _sparse_0_0(found, key, value)
    return found


def _is_xattr(key: bytes) -> bool:
    return key.startswith((_SCHILY, _LIBARCHIVE))


def _xattrs(extended: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """The xattrs of an entry; what star's form says counts, where both are there."""
    found: dict[bytes, bytes] = {}
    for key, value in extended.items():
        if key.startswith(_LIBARCHIVE):
            found.setdefault(unquote_to_bytes(key[len(_LIBARCHIVE) :]), _unpadded(value))
        elif key.startswith(_SCHILY):
            found[key[len(_SCHILY) :]] = value
    for name, value in found.items():
        if not name or b"\0" in name or len(name) > _MAX_XATTR_NAME or len(value) > _MAX_XATTR:
            raise TarError(f"an xattr that no file can have: {name[:100]!r} of {len(value)} bytes")
    return found


def _unpadded(text: bytes) -> bytes:
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        raise TarError(f"an xattr in a form that cannot be read: {text[:40]!r}") from None


def _sparse_0_0(found: dict[bytes, bytes], key: bytes, value: bytes) -> None:
    """Form 0.0 repeats two keys; gather them as form 0.1 has them."""
    if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
        gathered = found.get(b"GNU.sparse.map")
        found[b"GNU.sparse.map"] = value if gathered is None else gathered + b"," + value


def _old_extents(data: bytes) -> list[Extent]:
    found = []
    for at in range(0, len(data) - 23, 24):
        entry = data[at : at + 24]
        if entry[0] == 0:
            break
        found.append(Extent(_number(entry[:12], "offset"), _number(entry[12:], "length")))
    return found


def _paired(numbers: list[int]) -> tuple[Extent, ...]:
    if len(numbers) % 2:
        raise TarError("the map of a sparse file is damaged")
    return tuple(Extent(numbers[at], numbers[at + 1]) for at in range(0, len(numbers), 2))


def _check_extents(extents: tuple[Extent, ...], size: int, stored: int, name: bytes) -> None:
    end = 0
    for extent in extents:
        if extent.offset < end or extent.offset + extent.length > size:
            raise TarError(f"{name[:100]!r}: the map of a sparse file overlaps, or leads out of the file")
        end = extent.offset + extent.length
    if sum(extent.length for extent in extents) != stored:
        raise TarError(f"{name[:100]!r}: the map of a sparse file is not about its data")
