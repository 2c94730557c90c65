"""The tar reader, and what is made of what it reads: every hostile archive is refused or contained."""

from __future__ import annotations

import io
import os
import stat
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.images import MTIME, directory, hard_link, member, symlink, tar
from unionfsd import format as fmt
from unionfsd.errors import UserError
from unionfsd.images import tree
from unionfsd.images.below import Below
from unionfsd.images.compress import Source, pieces
from unionfsd.images.inodedigests import InodeDigests
from unionfsd.images.tarread import HARD_LINK, Limits, Member, TarError, TarReader
from unionfsd.images.tarwrite import header
from unionfsd.images.unpack import Unpacker
from unionfsd.syscalls import Fd

Unpack = Callable[..., Path]

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="owners, devices and trusted xattrs need root")


def read(data: bytes, limits: Limits | None = None) -> list[tuple[Member, bytes]]:
    reader = TarReader(Source(pieces(io.BytesIO(data))), limits)
    return [(found, b"".join(bytes(piece) for piece in reader.data())) for found in reader]


def open_dir(path: Path) -> Fd:
    return Fd(os.open(path, os.O_PATH | os.O_DIRECTORY))


@pytest.fixture
def unpack(tmp_path: Path) -> Unpack:
    """Unpacks an archive beside a file that nothing may touch, over layers that are there already."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("kept")

    def unpack(data: bytes, *below: Path, limits: Limits | None = None) -> Path:
        root = tmp_path / f"layer{len(list(tmp_path.iterdir()))}"
        root.mkdir()
        unpacker = Unpacker(open_dir(root), limits)
        try:
            unpacker.unpack(TarReader(Source(pieces(io.BytesIO(data))), limits))
            unpacker.finish(Below([open_dir(layer) for layer in below]))
        finally:
            assert sorted(os.listdir(tmp_path / "outside")) == ["file"]
            assert (tmp_path / "outside" / "file").read_text() == "kept"
        return root

    return unpack


def shown(root: Path) -> set[str]:
    """Every name beneath a directory, whiteouts and opaque directories marked."""
    found = set()
    for path in root.rglob("*"):
        name = str(path.relative_to(root))
        at = path.lstat()
        if fmt.is_whiteout_device(at.st_mode, at.st_rdev):
            name = f"-{name}"
        elif stat.S_ISDIR(at.st_mode) and any(mark.decode() in os.listxattr(path) for mark in fmt.OPAQUE_NAMES):
            name = f"{name}!"
        found.add(name)
    return found


# What is read.

names = st.binary(min_size=1, max_size=300).filter(lambda name: b"\0" not in name and not name.endswith(b"/"))
members = st.builds(
    lambda name, kind, mode, owner, mtime, target, data, xattrs: member(
        name,
        kind,
        mode=mode,
        uid=owner,
        gid=owner // 2,
        mtime_ns=mtime,
        target=target if kind in (HARD_LINK, stat.S_IFLNK) else b"",
        rdev=(7, 300) if kind in (stat.S_IFCHR, stat.S_IFBLK) else (0, 0),
        xattrs=xattrs,
        data=data if kind == stat.S_IFREG else b"",
    ),
    names,
    st.sampled_from([HARD_LINK, stat.S_IFREG, stat.S_IFLNK, stat.S_IFDIR, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO]),
    st.integers(0, 0o7777),
    st.integers(0, (1 << 32) - 2),
    st.integers(-(1 << 60), 1 << 62),
    names,
    st.binary(max_size=2000),
    st.dictionaries(
        st.sampled_from([b"user.a", b"security.capability", b"user.\xff"]), st.binary(max_size=40), max_size=2
    ),
)


@given(st.lists(members, max_size=5))
def test_what_is_written_is_read(entries: list[tuple[Member, bytes]]) -> None:
    found = read(tar(entries))
    assert [(entry._replace(name=entry.name.rstrip(b"/")), data) for entry, data in found] == entries


@given(st.lists(members, min_size=1, max_size=3), st.data())
@settings(max_examples=150)
def test_a_damaged_archive_is_refused_or_read_never_more(
    entries: list[tuple[Member, bytes]], data: st.DataObject
) -> None:
    damaged = bytearray(tar(entries))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    try:
        found = read(bytes(damaged[:cut]), Limits(header=4096, size=1 << 20))
    except TarError:
        return
    assert sum(len(content) for _, content in found) <= cut


@given(st.binary(max_size=3000))
@example(b"\x1f\x8b")
@example(b"\x28\xb5\x2f\xfd")
def test_noise_is_no_archive(noise: bytes) -> None:
    try:
        found = read(noise)
    except UserError:
        return
    assert found == []


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_what_python_writes_is_read(form: int) -> None:
    long = "d" * 90 + "/" + "n" * 60
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as made:
        info = tarfile.TarInfo(long)
        info.size, info.mtime, info.uid = 3, MTIME, 70000
        made.addfile(info, io.BytesIO(b"abc"))
        info = tarfile.TarInfo("link")
        info.type, info.linkname = tarfile.SYMTYPE, "t" * (90 if form == tarfile.USTAR_FORMAT else 200)
        made.addfile(info)
    (first, data), (second, _) = read(buffer.getvalue())
    assert (first.name.decode(), first.uid, first.mtime_ns, data) == (long, 70000, MTIME * 10**9, b"abc")
    assert second.kind == stat.S_IFLNK
    assert set(second.target) == {ord("t")}


def raw(name: bytes = b"f", flag: bytes = b"0", size: bytes = b"0" * 11, **fields: bytes) -> bytes:
    """A header with fields as they are."""
    block = bytearray(header(member(name)[0])[-512:])
    block[156:157] = flag
    block[124:136] = size.ljust(12, b"\0")
    for place, value in fields.items():
        at = {"mode": 100, "uid": 108, "magic": 257, "sparse": 386, "realsize": 483, "target": 157}[place]
        block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(records: bytes, kind: bytes = b"x") -> bytes:
    return raw(b"p", kind, b"%011o" % len(records)) + records.ljust(-(-len(records) // 512) * 512, b"\0")


def record(text: bytes) -> bytes:
    length = len(text) + 2
    length += len(str(length + len(str(length))))
    return b"%d %s\n" % (length, text)


END: Final = bytes(1024)

REFUSED: Final = {
    "wrong checksum": b"f" + header(member("g")[0])[1:] + END,
    "half a header": header(member("f")[0])[:300],
    "unknown type": raw(flag=b"Z") + END,
    "multi-volume": raw(flag=b"M") + END,
    "negative size": raw(size=b"\xff" * 12) + END,
    "huge size": raw(size=b"\x80" + b"\x7f" * 11) + END,
    "minus in a number": raw(uid=b"-1\0\0\0\0\0\0") + END,
    "data of a device": raw(flag=b"3", size=b"00000001000") + bytes(512) + END,
    "cut in the data": raw(size=b"00000002000") + bytes(512),
    "cut after an extended header": pax(b"12 path=abc\n"),
    "a NUL in a name": pax(b"13 path=a\0b\n") + raw() + END,
    "a name that is too long": pax(b"5011 path=" + b"x" * 5000 + b"\n") + raw() + END,
    "a record that is too long": pax(b"99 path=abc\n") + raw() + END,
    "a record of length 0": pax(b"0 path=abc\n") + raw() + END,
    "a record without a number": pax(b"x path=abc\n") + raw() + END,
    "a record without an end": pax(b"11 path=abc") + raw() + END,
    "a negative size in PAX": pax(b"11 size=-1\n") + raw() + END,
    "a time that is none": pax(b"14 mtime=1e9\n") + raw() + END,
    "an xattr for everybody": pax(b"24 SCHILY.xattr.user.a=b\n"[:0] + b"25 SCHILY.xattr.user.a=b\n", b"g")
    + raw()
    + END,
    "an xattr with a NUL in its name": pax(record(b"SCHILY.xattr.user.a\0b=c")) + raw() + END,
    "an xattr without a name": pax(record(b"SCHILY.xattr.=c")) + raw() + END,
    "an xattr with a name that is too long": pax(record(b"SCHILY.xattr.user." + b"a" * 251 + b"=c")) + raw() + END,
    "an xattr that is too large": pax(record(b"SCHILY.xattr.user.a=" + b"c" * 65537)) + raw() + END,
    "an xattr of libarchive's that is not base64": pax(record(b"LIBARCHIVE.xattr.user.a=!!!!")) + raw() + END,
    "an xattr of libarchive's for everybody": pax(record(b"LIBARCHIVE.xattr.user.a=YQ"), b"g") + raw() + END,
    "an extended header that is too large": raw(flag=b"x", size=b"77777777777") + END,
    "a sparse map out of the file": raw(
        flag=b"S", size=b"00000001000", sparse=b"00000010000\0" + b"00000001000\0", realsize=b"00000001000\0"
    )
    + bytes(512)
    + END,
    "a sparse map not about its data": raw(
        flag=b"S", size=b"00000001000", sparse=b"00000000000\0" + b"00000000100\0", realsize=b"00000001000\0"
    )
    + bytes(512)
    + END,
}


def test_xattrs_are_read_as_star_and_as_libarchive_write_them() -> None:
    records = record(b"LIBARCHIVE.xattr.user.a%25%3d=AGEK") + record(b"LIBARCHIVE.xattr.user.b=YQ")
    records += record(b"SCHILY.xattr.user.b=star")
    [(found, _)] = read(pax(records) + raw() + END)
    assert found.xattrs == {b"user.a%=": b"\0a\n", b"user.b": b"star"}


def test_an_empty_record_takes_a_global_one_away() -> None:
    archive = pax(record(b"mtime=5") + record(b"uid=7"), b"g") + raw() + pax(record(b"uid=")) + raw() + END
    assert [(found.mtime_ns, found.uid) for found, _ in read(archive)] == [(5 * 10**9, 7), (5 * 10**9, 0)]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_the_reader(name: str) -> None:
    with pytest.raises(TarError):
        read(REFUSED[name])


def test_more_entries_than_allowed() -> None:
    with pytest.raises(TarError, match="entries"):
        read(tar([member(str(at)) for at in range(20)]), Limits(entries=10))


SPARSE: Final = {
    "0.0": (b"size=6000", b"offset=1024", b"numbytes=512", b"offset=4096", b"numbytes=512"),
    "0.1": (b"size=6000", b"map=1024,512,4096,512", b"name=f"),
    "1.0": (b"major=1", b"minor=0", b"realsize=6000", b"name=f"),
}


@pytest.mark.parametrize("version", ["old", "0.0", "0.1", "1.0"])
def test_sparse_files(unpack: Unpack, version: str) -> None:
    data = b"x" * 512 + b"y" * 512
    if version == "old":
        sparse = b"".join(b"%011o\0%011o\0" % pair for pair in ((1024, 512), (4096, 512)))
        archive = raw(b"f", b"S", b"%011o" % 1024, sparse=sparse, realsize=b"%011o\0" % 6000) + data + END
    else:
        if version == "1.0":
            data = b"2\n1024\n512\n4096\n512\n".ljust(512, b"\0") + data
        table = b"".join(record(b"GNU.sparse." + text) for text in SPARSE[version])
        name = b"f" if version == "0.0" else b"GNUSparseFile.0/f"
        archive = pax(table) + raw(name, size=b"%011o" % len(data)) + data + END
    found = unpack(archive) / "f"
    expected = bytearray(6000)
    expected[1024:1536], expected[4096:4608] = b"x" * 512, b"y" * 512
    assert found.read_bytes() == expected


@given(st.integers(0, 300_000), st.booleans(), st.booleans(), st.integers(1, 22), st.data())
@settings(max_examples=30)
def test_a_stream_of_zstd_that_is_cut_short_is_told(
    size: int, noise: bool, sized: bool, level: int, data: st.DataObject
) -> None:
    content = os.urandom(size) if noise else bytes(size)
    packer = zstandard.ZstdCompressor(level=level, write_content_size=sized, write_checksum=noise)
    whole = packer.compress(content) + b"\x51\x2a\x4d\x18\3\0\0\0abc" + packer.compress(b"end")
    assert b"".join(pieces(io.BytesIO(whole))) == content + b"end"
    last = len(packer.compress(b"end"))
    cut = data.draw(
        st.integers(6, len(whole) - 1).filter(lambda cut: cut not in (len(whole) - last, len(whole) - last - 11))
    )
    with pytest.raises(UserError, match="zstd"):
        list(pieces(io.BytesIO(whole[:cut])))


# What is made.


@pytest.mark.parametrize(
    "entries",
    [
        [member("../outside/file", data=b"x")],
        [member("a/../../outside/file", data=b"x")],
        [directory(".."), member("../f")],
        [symlink("a", "../outside"), member("a/file", data=b"x")],
        [symlink("a", "/"), member("a/file", data=b"x")],
        [symlink("a", "../outside"), directory("a/file/b")],
        [symlink("a", "../outside"), hard_link("b", "a/file")],
        [hard_link("b", "../outside/file")],
        [hard_link("b", "/../outside/file")],
        [hard_link("b", "not/there")],
        [hard_link("b", "")],
        [directory("d"), hard_link("b", "d")],
        [member("f"), hard_link("f", "gone"), hard_link("g", ".wh.f")],
        [member("f", data=b"x"), member("f/g", data=b"x")],
        [member(".", data=b"x")],
        [symlink("./", "../outside")],
        [symlink("a", "")],
        [member(".wh.")],
        [member("d/.wh..")],
        [member("d/.wh...")],
        [member(".wh.d/f")],
        [member("n" * 256)],
        [member("null", stat.S_IFCHR, rdev=(0, 0))],
        [member("a/" * 100_000 + "f")],
    ],
    ids=lambda entries: entries[-1][0].name[:30].decode() or "root",
)
def test_refused_and_contained(unpack: Unpack, entries: list[tuple[Member, bytes]]) -> None:
    with pytest.raises(TarError):
        unpack(tar(entries), limits=Limits(header=1 << 20))


def test_deep_paths_are_made(unpack: Unpack) -> None:
    path = "d/" * 1000 + "f"
    root = unpack(tar([member(path, data=b"deep")]))
    at = os.open(root, os.O_PATH)
    for _ in range(1000):
        deeper = os.open("d", os.O_PATH | os.O_NOFOLLOW, dir_fd=at)
        os.close(at)
        at = deeper
    with open(os.open("f", os.O_RDONLY, dir_fd=at)) as file:
        assert file.read() == "deep"
    os.close(at)
    from unionfsd.images import beneath

    beneath.remove(os.open(root.parent, os.O_PATH), root.name.encode())
    assert not root.exists()


def test_slashes_and_dots_mean_nothing(unpack: Unpack) -> None:
    root = unpack(tar([member("/etc//./passwd", data=b"x"), hard_link("./b", "/etc/passwd")]))
    assert (root / "etc" / "passwd").read_bytes() == b"x"
    assert (root / "b").stat().st_nlink == 2


def test_the_last_of_two_entries_counts(unpack: Unpack) -> None:
    entries = [
        *(member("f", data=b"1"), member("f", data=b"2")),
        *(symlink("s", "../outside/file"), member("s", data=b"own")),
        *(directory("d", mode=0o700), directory("d", mode=0o711), member("e"), directory("e")),
        *(member("h", data=b"h"), member("i", data=b"old"), hard_link("i", "h"), hard_link("i", "h")),
        *(directory("empty"), symlink("empty", "h")),
        *(directory("full/deep"), member("full/deep/f", data=b"gone"), hard_link("kept", "full/deep/f")),
        *(member("full/.wh.x"), member("full", data=b"file")),
        *(directory("again/a"), member("again"), directory("again"), member("again/b", data=b"b")),
    ]
    root = unpack(tar(entries))
    assert [(root / name).read_bytes() for name in "fshi"] == [b"2", b"own", b"h", b"h"]
    assert stat.S_IMODE((root / "d").stat().st_mode) == 0o711
    assert (root / "e").is_dir()
    assert os.readlink(root / "empty") == "h"
    assert ((root / "full").read_bytes(), (root / "kept").read_bytes()) == (b"file", b"gone")
    assert os.listdir(root / "again") == ["b"]


def test_an_xattr_that_the_system_does_not_take_is_named(unpack: Unpack) -> None:
    xattrs = {b"trusted.overlay." + b"a" * 239: b"longer when it is escaped"}
    for entry in (member("d/f", xattrs=xattrs), directory("d/f", xattrs=xattrs)):
        with pytest.raises(UserError, match=r"d/f.*xattr trusted") as raised:
            unpack(tar([entry]))
        assert raised.value.code == 1


@needs_root
def test_everything_about_a_file_is_kept(unpack: Unpack) -> None:
    capability = struct.pack("<IIIII", 0x2000001, 1 << 10, 0, 0, 0)
    entries = [
        member("cap", mode=0o4755, uid=1, gid=2, xattrs={b"security.capability": capability}, data=b"x"),
        member("mark", xattrs={b"trusted.overlay.redirect": b"/etc", b"user.containers.override_stat": b"0:0:777"}),
        member("fifo", stat.S_IFIFO),
        member("null", stat.S_IFCHR, rdev=(1, 3), mode=0o666),
        member(b"\xff\xfe", data=b"no utf-8"),
        member("old", mtime_ns=-5 * 10**9),
        member("fine", mtime_ns=MTIME * 10**9 + 123456789),
        symlink("link", "\xe9", uid=3),
        directory("ro", mode=0o500, mtime_ns=7 * 10**9),
        member("ro/f"),
    ]
    root = unpack(tar(entries))
    cap = (root / "cap").stat()
    assert (cap.st_mode, cap.st_uid, cap.st_gid) == (stat.S_IFREG | 0o4755, 1, 2)
    assert os.getxattr(root / "cap", "security.capability") == capability
    assert os.listxattr(root / "mark") == ["trusted.overlay.overlay.redirect"]
    assert stat.S_ISFIFO((root / "fifo").lstat().st_mode)
    assert (root / "null").stat().st_rdev == os.makedev(1, 3)
    assert (root / os.fsdecode(b"\xff\xfe")).read_bytes() == b"no utf-8"
    assert (root / "old").stat().st_mtime == -5
    assert (root / "fine").stat().st_mtime_ns % 10**9 == 123456789
    assert ((root / "link").lstat().st_uid, os.readlink(root / "link")) == (3, "\xe9")
    assert ((root / "ro").stat().st_mode & 0o777, (root / "ro").stat().st_mtime) == (0o500, 7)


BASE: Final = tar(
    [
        directory("d", mode=0o710, mtime_ns=5 * 10**9, xattrs={b"user.a": b"b"}),
        *(member("d/a"), member("d/b"), directory("d/sub"), member("d/sub/x"), member("f"), symlink("l", "d")),
    ]
)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([member(".wh.f")], {"-f"}),
        ([member(".wh.nothing")], set()),
        ([member("d/.wh.a")], {"d", "-d/a"}),
        ([member("none/.wh.a")], set()),
        ([member("f/.wh.a"), member("l/.wh.a")], set()),
        ([member(".wh.d"), member("d/.wh.a")], {"-d"}),
        ([member("d/.wh.a"), member(".wh.d")], {"-d"}),
        ([member("d/.wh..wh..opq"), member(".wh.d")], {"-d"}),
        ([member(".wh.d"), directory("d"), member("d/new")], {"d!", "d/new"}),
        ([directory("d"), member("d/new"), member(".wh.d")], {"d!", "d/new"}),
        ([member("f"), member(".wh.f")], {"f"}),
        ([member(".wh.f"), member("f")], {"f"}),
        ([member("d/.wh..wh..opq"), member("d/a"), member("d/.wh.b")], {"d!", "d/a"}),
        ([member("d/a"), member("d/.wh..wh..opq"), member("d/sub/.wh.x")], {"d!", "d/a"}),
        ([member("d/sub/.wh..wh..opq")], {"d", "d/sub!"}),
        ([member("d/.wh..wh..opq"), member("d/sub/.wh..wh..opq")], {"d!"}),
        ([member("new/.wh..wh..opq"), member("new/a")], {"new", "new/a"}),
        ([member(".wh..wh.plnk/1.2"), member(".wh..wh.aufs")], set()),
        ([member("d", data=b"x"), member("l/x")], {"d", "l", "l/x"}),
    ],
    ids=str,
)
def test_whiteouts_are_about_the_layers_below(
    unpack: Unpack, entries: list[tuple[Member, bytes]], expected: set[str]
) -> None:
    below = unpack(BASE)
    assert shown(unpack(tar(entries), below)) == expected


def test_implied_directories_stay_as_they_are_below(unpack: Unpack) -> None:
    below = unpack(BASE)
    made = unpack(tar([member("d/sub/new"), member("other/new")]), below)
    found = (made / "d").stat()
    assert (stat.S_IMODE(found.st_mode), found.st_mtime) == (0o710, 5)
    assert os.getxattr(made / "d", "user.a") == b"b"
    assert stat.S_IMODE((made / "other").stat().st_mode) == 0o755


def contained(archive: bytes) -> None:
    """Unpack what may be anything: it is refused in words, or lies where it belongs."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        root, below = Path(place) / "a" / "root", Path(place) / "below"
        root.mkdir(parents=True)
        (below / "d").mkdir(parents=True)
        (below / "d" / "b").touch()
        limits = Limits(header=1 << 14, size=1 << 20, entries=100)
        unpacker = Unpacker(open_dir(root), limits)
        try:
            unpacker.unpack(TarReader(Source(pieces(io.BytesIO(archive)), 1 << 22), limits))
            unpacker.finish(Below([open_dir(below)]))
        except UserError:
            pass
        assert (os.listdir(root.parent), os.listdir(below / "d")) == (["root"], ["b"])
        from unionfsd.images import beneath

        beneath.remove(os.open(root.parent, os.O_PATH), b"root")


@given(st.lists(members, max_size=6))
@settings(max_examples=60, deadline=None)
def test_whatever_the_archive_nothing_happens_outside(entries: list[tuple[Member, bytes]]) -> None:
    contained(tar(entries))


SEED = tar(
    [
        *(directory("d", xattrs={b"user.a": b"b"}), member("d/f", data=b"x" * 600), symlink("s", "d")),
        *(hard_link("h", "d/f"), member("d/.wh.b"), member("d/.wh..wh..opq")),
        *(member("n" * 150, mtime_ns=-5), member("p", stat.S_IFIFO)),
    ],
    end=False,
)
SEED += pax(b"".join(record(b"GNU.sparse." + text) for text in SPARSE["0.1"])) + raw(size=b"%011o" % 1024) + bytes(1024)


@given(st.lists(st.tuples(st.integers(0, len(SEED) - 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6))
@settings(max_examples=150, deadline=None)
def test_whatever_a_header_says_nothing_happens_outside(changes: list[tuple[int, bytes]]) -> None:
    archive = bytearray(SEED)
    for at, data in changes:
        archive[at : at + len(data)] = data
    for at in range(0, len(archive) - 511, 512):
        if archive[at + 257 : at + 262] == b"ustar":  # so that more is read of it than its checksum
            archive[at + 148 : at + 156] = b" " * 8
            archive[at + 148 : at + 156] = b"%06o\0 " % sum(archive[at : at + 512])
    contained(bytes(archive))


# The manifest of a tree.


def test_a_tree_is_compared_with_its_manifest(unpack: Unpack) -> None:
    root = unpack(tar([member("d/a", data=b"1"), member("d/b", data=b"2"), member("d.x"), symlink("s", "t")]))
    kept = list(tree.lines(open_dir(root)))
    assert list(tree.compare(iter(kept), tree.lines(open_dir(root)))) == []
    before = (root / "d" / "a").stat()
    (root / "d" / "a").write_bytes(b"9")
    os.utime(root / "d" / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    (root / "d" / "b").unlink()
    (root / "new").mkdir()
    (root / "s").unlink()
    (root / "s").symlink_to("u")
    found = dict(tree.compare(iter(kept), tree.lines(open_dir(root))))
    assert found["d/a"] == "sha256"
    assert (found["d/b"], found["new"]) == ("missing", "added")
    assert "target" in found["s"]
    assert "d.x" not in found


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1) | st.integers(0, 600), st.binary(min_size=32, max_size=32))))
def test_digests_of_inodes(added: list[tuple[int, bytes]]) -> None:
    found = InodeDigests()
    for number, digest in added:
        found.add(number, digest)
    assert len(found) == len(added)
    for number in [number for number, _ in added] + [5, 256, 2**64 - 1]:
        assert found.get(number) == dict(added).get(number)
