"""Writing tar archives, the same bytes for the same objects: ustar headers, PAX where they do not suffice."""

from __future__ import annotations

import stat

from unionfsd.images.tarread import BLOCK, HARD_LINK, Member
from unionfsd.typed import Final

END: Final = bytes(2 * BLOCK)
_TYPES: Final = {
    HARD_LINK: b"1",
    stat.S_IFREG: b"0",
    stat.S_IFLNK: b"2",
    stat.S_IFCHR: b"3",
    stat.S_IFBLK: b"4",
    stat.S_IFDIR: b"5",
    stat.S_IFIFO: b"6",
}
_MAX_OCTAL_11: Final = 8**11 - 1
_MAX_OCTAL_7: Final = 8**7 - 1


def header(member: Member) -> bytes:
    """What stands before the data of an entry: its header, and an extended one before it if need be."""
    name = member.name + b"/" if member.kind == stat.S_IFDIR and not member.name.endswith(b"/") else member.name
    records: dict[bytes, bytes] = {}
    if len(name) > 100 or not name.isascii():
        records[b"path"] = name
    if len(member.target) > 100 or not member.target.isascii():
        records[b"linkpath"] = member.target
    for key, number, most in (
        (b"uid", member.uid, _MAX_OCTAL_7),
        (b"gid", member.gid, _MAX_OCTAL_7),
        (b"size", member.size, _MAX_OCTAL_11),
    ):
        if number > most:
            records[key] = b"%d" % number
    seconds, ns = divmod(member.mtime_ns, 1_000_000_000)
    if ns or not 0 <= seconds <= _MAX_OCTAL_11:
        records[b"mtime"] = _time(member.mtime_ns)
    for xattr, value in member.xattrs.items():
        records[b"SCHILY.xattr." + xattr] = value
    block = _ustar(member, name, min(max(seconds, 0), _MAX_OCTAL_11))
    return (_extended(name, records) if records else b"") + block


def padding(size: int) -> bytes:
    """What stands after `size` bytes of data."""
    return bytes(-size % BLOCK)


def _extended(name: bytes, records: dict[bytes, bytes]) -> bytes:
    body = b"".join(_record(key, records[key]) for key in sorted(records))
    short = b"PaxHeaders/" + name.rstrip(b"/").rpartition(b"/")[2][:80]
    block = _block(short, b"x", 0o644, 0, 0, len(body), 0, b"", (0, 0))
    return block + body + padding(len(body))


def _record(key: bytes, value: bytes) -> bytes:
    """``LENGTH KEY=VALUE\\n`` whose length counts its own digits."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _time(ns: int) -> bytes:
    sign, ns = (b"-", -ns) if ns < 0 else (b"", ns)
    seconds, fraction = divmod(ns, 1_000_000_000)
    return sign + b"%d.%09d" % (seconds, fraction) if fraction else sign + b"%d" % seconds


def _ustar(member: Member, name: bytes, seconds: int) -> bytes:
    return _block(
        name[:100],
        _TYPES[member.kind],
        member.mode,
        min(member.uid, _MAX_OCTAL_7),
        min(member.gid, _MAX_OCTAL_7),
        min(member.size, _MAX_OCTAL_11) if member.kind == stat.S_IFREG else 0,
        seconds,
        member.target[:100],
        member.rdev,
    )


def _block(
    name: bytes,
    kind: bytes,
    mode: int,
    uid: int,
    gid: int,
    size: int,
    seconds: int,
    target: bytes,
    rdev: tuple[int, int],
) -> bytes:
    head = b"".join(
        (
            name.ljust(100, b"\0"),
            b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (mode, uid, gid, size, seconds),
            b" " * 8,
            kind,
            target.ljust(100, b"\0"),
            b"ustar\x0000",
            bytes(64),
            b"%07o\0%07o\0" % rdev,
        )
    ).ljust(BLOCK, b"\0")
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]
