"""The codec of the FUSE protocol: layouts as linux/fuse.h has them, round trips, and hostile bytes."""

from __future__ import annotations

import os
from struct import Struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfsd.fuse import abi, wire
from unionfsd.fuse.abi import InitFlag, Opcode

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
#: Seconds a file system can store, before 1970 included.
NANOSECONDS = st.integers(-(2**33) * 10**9, 2**34 * 10**9)
NAMES = st.binary(min_size=1, max_size=255).filter(
    lambda name: not {0, ord("/")} & set(name) and name not in (b".", b"..")
)
TARGETS = st.binary(min_size=1, max_size=4095).filter(lambda target: 0 not in target)


def request(opcode: Opcode, body: bytes, *, unique: int = 1, nodeid: int = 1) -> bytes:
    length = wire.BODY + len(body)
    return wire.IN_HEADER.pack(length, opcode, unique, nodeid, 0, 0, 0, 0) + body


@pytest.mark.parametrize(
    ("struct", "size"),
    [
        (wire.IN_HEADER, 40),
        (wire.OUT_HEADER, 16),
        (wire.SETATTR_IN, 88),
        (wire.MKNOD_IN, 16),
        (wire.RENAME2_IN, 16),
        (wire.CREATE_IN, 16),
        (wire.RELEASE_IN, 24),
        (wire.FLUSH_IN, 24),
        (wire.READ_IN, 40),
        (wire.WRITE_IN, 40),
        (wire.FSYNC_IN, 16),
        (wire.SETXATTR_IN, 16),
        (wire.SETXATTR_IN_COMPAT, 8),
        (wire.INIT_IN_EXT, 64),
        (wire.IOCTL_IN, 32),
        (wire.FALLOCATE_IN, 32),
        (wire.LSEEK_IN, 24),
        (wire.COPY_FILE_RANGE_IN, 56),
        (wire.STATX_IN, 24),
        (wire.ENTRY_OUT, 128),
        (wire.ATTR_OUT, 104),
        (wire.OPEN_OUT, 16),
        (wire.WRITE_OUT, 8),
        (wire.STATFS_OUT, 80),
        (wire.INIT_OUT, 64),
        (wire.IOCTL_OUT, 16),
        (wire.STATX_OUT, 288),
        (wire.DIRENT, 24),
        (wire.DIRENTPLUS, 152),
        (wire.INVAL_INODE_OUT, 24),
        (wire.INVAL_ENTRY_OUT, 16),
        (wire.DELETE_OUT, 24),
        (wire.PRUNE_OUT, 16),
    ],
)
def test_structs_have_the_size_that_the_header_gives_them(struct: Struct, size: int) -> None:
    assert struct.size == size


# --- requests --------------------------------------------------------------------------------------------------------


@given(NAMES)
def test_a_name_round_trips(name: bytes) -> None:
    message = request(Opcode.LOOKUP, name + b"\0")
    assert wire.name(message, wire.BODY, len(message)) == name


@pytest.mark.parametrize("body", [b"", b"\0", b"a", b"a\0b\0", b".\0", b"..\0", b"a/b\0", b"/\0", b"\0a\0"])
def test_what_is_not_one_component_is_refused(body: bytes) -> None:
    message = request(Opcode.LOOKUP, body)
    with pytest.raises(wire.WireError):
        wire.name(message, wire.BODY, len(message))


@given(NAMES, NAMES)
def test_two_names_round_trip(old: bytes, new: bytes) -> None:
    message = request(Opcode.RENAME2, wire.RENAME2_IN.pack(7, 1) + old + b"\0" + new + b"\0")
    start = wire.BODY + wire.RENAME2_IN.size
    assert wire.names(message, start, len(message)) == (old, new)


@given(NAMES, TARGETS)
def test_a_symlink_round_trips(name: bytes, target: bytes) -> None:
    message = request(Opcode.SYMLINK, name + b"\0" + target + b"\0")
    assert wire.symlink(message, wire.BODY, len(message)) == (name, target)


@pytest.mark.parametrize("body", [b"name", b"name\0", b"name\0\0", b"name\0target", b"name\0tar\0get\0"])
def test_a_symlink_without_a_target_is_refused(body: bytes) -> None:
    message = request(Opcode.SYMLINK, body)
    with pytest.raises(wire.WireError):
        wire.symlink(message, wire.BODY, len(message))


@given(name=NAMES, value=st.binary(max_size=300), flags=U32, more=U32, extended=st.booleans())
def test_setxattr_round_trips_in_both_forms(name: bytes, value: bytes, flags: int, more: int, extended: bool) -> None:
    if extended:
        head = wire.SETXATTR_IN.pack(len(value), flags, more)
    else:
        head = wire.SETXATTR_IN_COMPAT.pack(len(value), flags)
    message = request(Opcode.SETXATTR, head + name + b"\0" + value)
    assert wire.setxattr(message, len(message), extended) == (name, value, flags, more if extended else 0)


@given(st.lists(st.tuples(U64, U64), max_size=20))
def test_batch_forget_round_trips(forgotten: list[tuple[int, int]]) -> None:
    body = wire.BATCH_FORGET_IN.pack(len(forgotten)) + b"".join(wire.FORGET_ONE.pack(*one) for one in forgotten)
    message = request(Opcode.BATCH_FORGET, body)
    assert list(wire.batch_forget(message, len(message))) == forgotten


def test_batch_forget_that_counts_wrong_is_refused() -> None:
    message = request(Opcode.BATCH_FORGET, wire.BATCH_FORGET_IN.pack(2) + wire.FORGET_ONE.pack(5, 1))
    with pytest.raises(wire.WireError):
        wire.batch_forget(message, len(message))


@given(major=U32, minor=U32, readahead=U32, low=U32, high=U32)
def test_init_has_its_high_flags_only_when_it_says_so(
    major: int, minor: int, readahead: int, low: int, high: int
) -> None:
    message = request(Opcode.INIT, wire.INIT_IN_EXT.pack(major, minor, readahead, low, high))
    expected = low | high << 32 if low & InitFlag.INIT_EXT else low
    assert wire.init(message, len(message)) == (major, minor, readahead, expected)
    short = request(Opcode.INIT, wire.INIT_IN.pack(major, minor, readahead, low))
    assert wire.init(short, len(short)).flags == low


@given(st.integers(0, 60), st.integers(0, 200), st.integers(0, 200))
def test_a_request_is_whole_or_refused(opcode: int, length: int, received: int) -> None:
    whole = length == received and received >= wire.MIN_LENGTH[opcode]
    try:
        wire.check(length, opcode, received)
    except wire.WireError:
        assert not whole
    else:
        assert whole


VARIABLE = [
    lambda data: wire.name(data, wire.BODY, len(data)),
    lambda data: wire.names(data, wire.BODY, len(data)),
    lambda data: wire.names(data, wire.BODY + wire.RENAME2_IN.size, len(data)),
    lambda data: wire.symlink(data, wire.BODY, len(data)),
    lambda data: wire.tail(data, wire.BODY + wire.GETXATTR_IN.size, len(data)),
    lambda data: wire.setxattr(data, len(data), True),
    lambda data: wire.setxattr(data, len(data), False),
    lambda data: list(wire.batch_forget(data, len(data))),
    lambda data: wire.init(data, len(data)),
]


@pytest.mark.parametrize("parse", VARIABLE)
@given(body=st.binary(max_size=120))
def test_hostile_bytes_are_refused_and_nothing_worse(parse: Any, body: bytes) -> None:
    data = bytes(wire.BODY) + body.ljust(wire.INIT_IN.size, b"\0")
    try:
        parse(data)
    except wire.WireError:
        pass


# --- replies ---------------------------------------------------------------------------------------------------------


@st.composite
def stats(draw: st.DrawFn, modes: st.SearchStrategy[int] = U32) -> os.stat_result:
    """stat results with members that disagree with each other as little or as much as they like."""
    times = [draw(NANOSECONDS) for _ in range(3)]
    head = (draw(modes), 0, 0, 0, draw(U32), draw(U32), draw(st.integers(0, 2**63 - 1)), *(ns // 10**9 for ns in times))
    more = {
        "st_atime_ns": times[0],
        "st_mtime_ns": times[1],
        "st_ctime_ns": times[2],
        "st_blocks": draw(U64),
        "st_blksize": draw(U32),
        "st_rdev": os.makedev(draw(st.integers(0, 2**12 - 1)), draw(st.integers(0, 2**20 - 1))),
    }
    return os.stat_result(head, more)


@given(stat=stats(), ino=U64, nlink=U32)
def test_attributes_lose_nothing(stat: os.stat_result, ino: int, nlink: int) -> None:
    reply = wire.ATTR_OUT.pack(1, 2, *wire.attr(stat, ino, nlink))
    _, _, ino_, size, blocks, a, m, c, ans, mns, cns, mode, nlink_, uid, gid, rdev, blksize, _ = wire.ATTR_OUT.unpack(
        reply
    )
    assert (ino_, nlink_) == (ino, nlink)
    assert (size, blocks, blksize, mode, uid, gid) == (
        stat.st_size,
        stat.st_blocks,
        stat.st_blksize,
        stat.st_mode,
        stat.st_uid,
        stat.st_gid,
    )
    assert (a * 10**9 + ans, m * 10**9 + mns, c * 10**9 + cns) == (stat.st_atime_ns, stat.st_mtime_ns, stat.st_ctime_ns)
    assert max(ans, mns, cns) < 10**9
    assert rdev == stat.st_rdev


@given(stat=stats(modes=st.integers(0, 2**16 - 1)), ino=U64, nlink=U32, birth=st.none() | NANOSECONDS)
def test_statx_loses_nothing(stat: os.stat_result, ino: int, nlink: int, birth: int | None) -> None:
    reply = wire.STATX_OUT.unpack(wire.statx(wire.Validity.of(3, 5), stat, ino, nlink, birth_ns=birth))
    assert reply[:3] == (5, 0, 0)
    assert reply[3] == 0x7FF | (0 if birth is None else 0x800)
    assert reply[4:13] == (
        stat.st_blksize,
        0,
        nlink,
        stat.st_uid,
        stat.st_gid,
        stat.st_mode,
        ino,
        stat.st_size,
        stat.st_blocks,
    )
    times = [seconds * 10**9 + ns for seconds, ns in zip(reply[14:22:2], reply[15:22:2], strict=True)]
    assert times == [stat.st_atime_ns, birth or 0, stat.st_ctime_ns, stat.st_mtime_ns]
    assert os.makedev(reply[22], reply[23]) == stat.st_rdev


@given(major=st.integers(0, 2**12 - 1), minor=st.integers(0, 2**20 - 1))
def test_device_numbers_are_the_kernels_encoding(major: int, minor: int) -> None:
    """linux/kdev_t.h, new_encode_dev."""
    assert os.makedev(major, minor) & 0xFFFFFFFF == (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


@given(entry=st.floats(0, 2e9), attributes=st.floats(0, 2e9))
def test_validity_is_the_seconds_given(entry: float, attributes: float) -> None:
    valid = wire.Validity.of(entry, attributes)
    assert valid.entry_valid + valid.entry_valid_nsec / 1e9 == pytest.approx(entry, abs=1e-6)
    assert valid.attr_valid + valid.attr_valid_nsec / 1e9 == pytest.approx(attributes, abs=1e-6)
    assert max(valid.entry_valid_nsec, valid.attr_valid_nsec) < 10**9


def test_a_negative_entry_has_no_node_and_a_lifetime() -> None:
    nodeid, _, entry_valid, *_ = wire.ENTRY_OUT.unpack(wire.negative_entry(wire.Validity.of(60, 1)))
    assert (nodeid, entry_valid) == (0, 60)


@given(U64, st.integers(1, 133))
def test_an_error_is_a_header_alone(unique: int, errno: int) -> None:
    assert wire.OUT_HEADER.unpack(wire.error(unique, errno)) == (16, -errno, unique)


# --- notifications ---------------------------------------------------------------------------------------------------


@given(U64, NAMES, st.booleans())
def test_inval_entry_round_trips(parent: int, name: bytes, expire: bool) -> None:
    body = wire.inval_entry(parent, name, expire=expire)
    head = wire.INVAL_ENTRY_OUT.size
    assert wire.INVAL_ENTRY_OUT.unpack_from(body) == (parent, len(name), int(expire))
    assert body[head:] == name + b"\0"


@given(U64, U64, NAMES)
def test_delete_round_trips(parent: int, child: int, name: bytes) -> None:
    body = wire.delete(parent, child, name)
    assert wire.DELETE_OUT.unpack_from(body) == (parent, child, len(name))
    assert body[wire.DELETE_OUT.size :] == name + b"\0"


@given(st.lists(U64, max_size=10))
def test_prune_round_trips(nodeids: list[int]) -> None:
    body = wire.prune(nodeids)
    assert wire.PRUNE_OUT.unpack_from(body) == (len(nodeids),)
    assert [one for (one,) in Struct("=Q").iter_unpack(body[wire.PRUNE_OUT.size :])] == nodeids


def test_a_notification_carries_its_code_where_replies_have_their_error() -> None:
    message = wire.notification(abi.FUSE_NOTIFY_INVAL_INODE, wire.INVAL_INODE_OUT.pack(5, -1, 0))
    assert wire.OUT_HEADER.unpack_from(message) == (len(message), 2, 0)
