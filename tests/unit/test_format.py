"""The codec of the on-disk format: laws that hold for every value, and agreement with the kernel's overlayfs."""

from __future__ import annotations

import errno
import os
import stat
import struct
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.harness import Layers, MountFactory
from unionfsd import format as fmt
from unionfsd import syscalls
from unionfsd.format import Origin, Redirect
from unionfsd.layers import fs_uuid

origins = st.builds(Origin, st.integers(0, 255), st.binary(max_size=234), st.binary(min_size=16, max_size=16))

_prefixes = st.sampled_from(
    [
        b"",
        b"user.",
        b"trusted.",
        b"trusted.overlay",
        b"trusted.overlay.",
        b"user.overlay.",
        b"trusted.overlay.overlay.",
        b"user.overlay.overlay.overlay.",
        b"user.fuseoverlayfs.",
        b"user.containers.override_",
        b"security.fuseoverlayfs.",
    ]
)
xattrs = st.builds(bytes.__add__, _prefixes, st.binary(max_size=12).filter(lambda name: b"\0" not in name))
#: What a directory of a layer may hold.
entries = st.builds(
    bytes.__add__,
    st.sampled_from([b"", b".", b".wh", b".wh.", b".wh..wh."]),
    st.binary(max_size=8).filter(lambda name: b"/" not in name and b"\0" not in name),
).filter(lambda name: name not in (b"", b".", b".."))


# Origins.


@given(origins)
def test_origins_survive_encoding(origin: Origin) -> None:
    assert fmt.decode_origin(fmt.encode_origin(origin)) == origin


@given(origins)
def test_an_origin_is_laid_out_as_struct_ovl_fb(origin: Origin) -> None:
    value = fmt.encode_origin(origin)
    big_endian = int(sys.byteorder == "big")
    assert value[:5] == bytes([0, 0xFB, len(value), big_endian, origin.kind])
    assert value[5:] == origin.uuid + origin.handle


@pytest.mark.parametrize("origin", [Origin(1, bytes(235), bytes(16)), Origin(256, b"", bytes(16))])
def test_what_fits_no_origin_is_refused(origin: Origin) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        fmt.encode_origin(origin)


@given(st.binary(max_size=300))
@example(b"")
@example(bytes(21))
def test_any_bytes_are_an_origin_or_nothing(value: bytes) -> None:
    origin = fmt.decode_origin(value)
    if origin is not None:
        again = fmt.encode_origin(origin)
        assert (again[:3], again[4:]) == (value[:3], value[4:])  # all but the flags, which only say how to read it


@given(origins, st.data())
def test_a_damaged_origin_says_nothing(origin: Origin, data: st.DataObject) -> None:
    value = fmt.encode_origin(origin)
    assert fmt.decode_origin(value[: data.draw(st.integers(0, len(value) - 1))]) is None
    assert fmt.decode_origin(value + b"\0") is None
    at, byte = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 255))
    assert value[at] == byte or fmt.decode_origin(value[:at] + bytes([byte]) + value[at + 1 :]) is None


@pytest.mark.parametrize(
    ("flags", "understood"),
    [
        (0, sys.byteorder == "little"),
        (1, sys.byteorder == "big"),
        (2, True),
        (3, True),
        (4, sys.byteorder == "little"),
        (8, False),
        (0x82, False),
    ],
)
def test_flags_of_an_origin(flags: int, understood: bool) -> None:
    """Handles in the other byte order, and flags that nobody knows, make an origin unknown (ovl_check_fb_len)."""
    value = struct.pack("BBBBB16s", 0, 0xFB, 25, flags, 1, bytes(16)) + b"hand"
    assert (fmt.decode_origin(value) is not None) is understood


def test_the_kernel_writes_the_same_origin(layers: Layers, overlayfs: MountFactory) -> None:
    lower = layers.lower / "file"
    lower.write_text("content")
    with overlayfs() as mount:
        (mount / "file").chmod(0o600)
    written = os.getxattr(layers.upper / "file", "trusted.overlay.origin")
    with syscalls.Fd(os.open(layers.lower, os.O_RDONLY | os.O_DIRECTORY)) as fd:
        kind, handle = syscalls.file_handle(fd.fd, b"file")
        uuid = fs_uuid(fd.fd)
    assert fmt.encode_origin(Origin(kind, handle, uuid)) == written
    assert fmt.decode_origin(written) == Origin(kind, handle, uuid)


# Redirects.

components = st.binary(min_size=1, max_size=6).filter(
    lambda name: not set(name) & set(b"/\0") and name not in (b".", b"..")
)
redirects = st.one_of(
    st.builds(Redirect, st.just(False), st.tuples(components)),
    st.builds(Redirect, st.just(True), st.lists(components, min_size=1, max_size=4).map(tuple)),
)


@given(redirects)
def test_redirects_survive_encoding(redirect: Redirect) -> None:
    assert fmt.decode_redirect(redirect.encode()) == redirect


@given(st.one_of(st.binary(max_size=12), st.text("/.ab\0", max_size=6).map(str.encode)))
def test_no_redirect_leads_out_of_a_layer(value: bytes) -> None:
    """Any bytes are names to be opened one by one, or EINVAL."""
    try:
        redirect = fmt.decode_redirect(value)
    except OSError as exc:
        number = exc.errno
    else:
        number = errno.EINVAL
        assert redirect.names
        assert all(syscalls.component(name) == name for name in redirect.names)
        assert redirect.absolute or len(redirect.names) == 1
    assert number == errno.EINVAL


@pytest.mark.parametrize(
    "value", [b"", b"/", b"//", b"a/b", b"/a/", b"/a//b", b"..", b"/../a", b"/a/..", b"./a", b"a\0"]
)
def test_redirects_that_are_none(value: bytes) -> None:
    with pytest.raises(OSError) as caught:
        fmt.decode_redirect(value)
    assert caught.value.errno == errno.EINVAL


# Names of xattrs.


@given(xattrs)
def test_escaping_can_be_undone(name: bytes) -> None:
    assert fmt.unescape(fmt.escape(name)) == name


@given(xattrs)
def test_what_users_can_set_is_never_taken_for_a_mark(name: bytes) -> None:
    assert fmt.is_internal(fmt.escape(name)) is fmt.is_forbidden(name)


@given(xattrs)
def test_what_users_see_is_what_they_must_say(name: bytes) -> None:
    """A visible xattr of a layer is listed under the name by which it can be read."""
    assert fmt.is_internal(name) or fmt.escape(fmt.unescape(name)) == name


@pytest.mark.parametrize("namespace", [fmt.TRUSTED, fmt.USER])
@pytest.mark.parametrize("mark", [fmt.OPAQUE, fmt.WHITEOUT, fmt.ORIGIN, fmt.IMPURE, b"redirect", b"metacopy", b""])
def test_marks_are_internal(namespace: bytes, mark: bytes) -> None:
    assert fmt.is_internal(namespace + mark)
    assert not fmt.is_internal(namespace + b"overlay." + mark)


XATTRS = [b"%soverlay.%s" % (depth, name) for depth in (b"", b"overlay.") for name in (b"opaque", b"x", b"overlay")]


@pytest.mark.parametrize(("namespace", "option"), [(b"trusted.", "xattr"), (b"user.", "userxattr")])
def test_the_kernel_escapes_the_same(namespace: bytes, option: str, layers: Layers, overlayfs: MountFactory) -> None:
    """Set through overlayfs and found in its upper; put into a lower and listed through overlayfs."""
    names = [namespace + name for name in XATTRS]
    (layers.lower / "seen").mkdir()
    for name in names:
        os.setxattr(layers.lower / "seen", name, b"value")
    (layers.upper / "set").touch()
    with overlayfs(*(["userxattr"] if option == "userxattr" else [])) as mount:
        for name in names:
            os.setxattr(mount / "set", name, b"value")
        listed = _xattrs(mount / "seen", namespace)
    assert _xattrs(layers.upper / "set", namespace) == {fmt.escape(name) for name in names}
    assert listed == {fmt.unescape(name) for name in names if not fmt.is_internal(name)}


def _xattrs(path: Path, namespace: bytes) -> set[bytes]:
    return {name for name in map(os.fsencode, os.listxattr(path)) if name.startswith(namespace)}


# Entries.


@given(entries)
def test_every_entry_can_be_hidden(name: bytes) -> None:
    hiding = fmt.wh_name(name)
    assert fmt.is_reserved(hiding)
    if not fmt.is_reserved(name):
        assert fmt.wh_target(hiding) == name


@given(entries)
def test_a_wh_entry_hides_nothing_but_its_own_name(name: bytes) -> None:
    target = fmt.wh_target(name)
    if target is not None:
        assert fmt.wh_name(target) == name
        assert target
        assert not fmt.is_reserved(target)


@pytest.mark.parametrize("name", [b".wh.", b".wh..wh..opq", b".wh..wh.plnk", b".wh", b"wh.a", b"a.wh.b", b".WH.a"])
def test_entries_that_hide_no_name(name: bytes) -> None:
    assert fmt.wh_target(name) is None


@pytest.mark.parametrize(
    ("kind", "rdev", "is_whiteout"),
    [
        (stat.S_IFCHR, 0, True),
        (stat.S_IFCHR | 0o600, os.makedev(0, 0), True),
        (stat.S_IFCHR, os.makedev(0, 1), False),
        (stat.S_IFCHR, os.makedev(1, 0), False),
        (stat.S_IFBLK, 0, False),
        (stat.S_IFREG, 0, False),
        (stat.S_IFIFO, 0, False),
    ],
)
def test_the_device_that_is_a_whiteout(kind: int, rdev: int, is_whiteout: bool) -> None:
    assert fmt.is_whiteout_device(kind, rdev) is is_whiteout


@pytest.mark.parametrize(
    ("values", "opaque", "xwhiteouts"),
    [
        ([b"y"], True, False),
        ([b"x"], False, True),
        ([b"x", b"y"], True, True),
        ([b"n"], False, False),
        ([b""], False, False),
        ([], False, False),
    ],
)
def test_marks_of_a_directory(values: list[bytes], opaque: bool, xwhiteouts: bool) -> None:
    assert fmt.marks(values) == fmt.Marks(opaque, xwhiteouts)


@given(st.lists(st.binary(max_size=3)))
def test_any_bytes_are_marks(values: list[bytes]) -> None:
    found = fmt.marks(values)
    assert found.opaque is any(value.startswith(b"y") for value in values)
    assert found.xwhiteouts is any(value.startswith(b"x") for value in values)
