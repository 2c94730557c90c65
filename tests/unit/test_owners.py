"""Owners without a file system: mappings of ids, and the value of the xattr that keeps owner and mode."""

from __future__ import annotations

import errno
import os
import stat
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trees import errno_of
from unionfsd import acl
from unionfsd import format as fmt
from unionfsd.options import MountConfig
from unionfsd.owners import IdMap, Owners

IDS = st.integers(0, 2**32 - 2)
KINDS = [stat.S_IFREG, stat.S_IFDIR, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK]


@given(IDS, IDS, st.integers(0, 0o7777), st.sampled_from(KINDS), st.integers(1, 255))
def test_a_record_says_what_was_recorded(uid: int, gid: int, bits: int, kind: int, minor: int) -> None:
    rdev = os.makedev(8, minor) if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0
    said = fmt.Override(uid, gid, kind | bits, rdev)
    on_disk = kind if kind == stat.S_IFDIR else stat.S_IFREG
    assert fmt.decode_override(said.encode(), on_disk) == said


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        (b"1:2:644", stat.S_IFREG, fmt.Override(1, 2, stat.S_IFREG | 0o644)),
        (b"1:2:100644", stat.S_IFREG, fmt.Override(1, 2, stat.S_IFREG | 0o644)),
        (b"0:0:0755:dir", stat.S_IFDIR, fmt.Override(0, 0, stat.S_IFDIR | 0o755)),
        (b"0:5:620:char4:1", stat.S_IFREG, fmt.Override(0, 5, stat.S_IFCHR | 0o620, os.makedev(4, 1))),
        (b"0:5:620:char-4-1", stat.S_IFREG, fmt.Override(0, 5, stat.S_IFCHR | 0o620, os.makedev(4, 1))),
        (b"0:0:755:dir", stat.S_IFREG, fmt.Override(0, 0, stat.S_IFREG | 0o755)),
        (b"0:0:600:pipe", stat.S_IFDIR, fmt.Override(0, 0, stat.S_IFDIR | 0o600)),
    ],
)
def test_what_others_write_is_read(value: bytes, kind: int, said: fmt.Override) -> None:
    assert fmt.decode_override(value, kind) == said


@pytest.mark.parametrize("value", [b"", b"root:0:755", b"0:0", b"0:0:888", b"4294967295:0:755", b"0:0:600:char"])
def test_a_damaged_record_is_einval(value: bytes) -> None:
    assert errno_of(fmt.decode_override, value, stat.S_IFREG) == "EINVAL"


def test_ids_go_there_and_back() -> None:
    ids = IdMap(((0, 1000, 1), (1, 110000, 65535)), 65534)
    assert [ids.shown(number) for number in (0, 1, 65535, 65536)] == [1000, 110000, 175534, 65534]
    assert [ids.kept(number) for number in (1000, 110000, 175534, 0, 1001)] == [0, 1, 65535, None, None]
    assert ids.owner(0) == 65534


@given(st.lists(st.tuples(st.sampled_from([1, 2, 4, 8, 0x10, 0x20]), st.integers(0, 7), IDS)))
def test_an_acl_translated_back_is_the_same(entries: list[tuple[int, int, int]]) -> None:
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)

    def flip(number: int) -> int:
        return number ^ 1

    assert acl.with_ids(acl.with_ids(value, flip, flip), flip, flip) == value
    if any(tag in (2, 8) for tag, _, _ in entries):
        assert acl.with_ids(value, flip, flip) != value


def test_the_root_of_a_capability_is_mapped() -> None:
    config = MountConfig(lowerdirs=(), mountpoint=b"/", uidmapping=((0, 1000, 1),))
    owners = Owners(config)
    on_disk = struct.pack("<6I", 0x03000001, 1 << 13, 0, 0, 0, 0)
    shown = owners.show_xattr(fmt.CAPABILITY, on_disk)
    assert shown == on_disk[:-4] + struct.pack("<I", 1000)
    assert owners.keep_xattr(fmt.CAPABILITY, shown) == on_disk
    with pytest.raises(OSError) as refused:
        owners.keep_xattr(fmt.CAPABILITY, on_disk)
    assert refused.value.errno == errno.EINVAL
    plain = struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0)
    assert owners.show_xattr(fmt.CAPABILITY, plain) == plain
