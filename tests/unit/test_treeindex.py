"""What a layer must hold: the index that a mount asks, and the option that names it."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfsd import treeindex
from unionfsd.control import to_json
from unionfsd.errors import UserError
from unionfsd.options import parse
from unionfsd.options.text import TreeFile
from unionfsd.treeindex import Record, TreeIndex, Writer

RECORDS = st.builds(Record, st.binary(min_size=16, max_size=16), st.binary(min_size=32, max_size=32))


@given(st.dictionaries(st.binary(max_size=20), RECORDS), st.lists(st.binary(max_size=20)))
def test_what_is_written_is_found(records: dict[bytes, Record], others: list[bytes]) -> None:
    writer = Writer()
    for path, record in records.items():
        writer.add(path, record)
    data = b"".join(writer.pieces())
    index = TreeIndex(data)
    assert len(index) == len(records)
    for path in (*records, *others):
        assert index.find(path) == records.get(path)
    for wrong in (data[:-1], data + b"x", b"X" + data[1:], b""):
        if wrong != treeindex.MAGIC:
            with pytest.raises(ValueError, match="index"):
                TreeIndex(wrong)


def test_an_index_is_read_whole_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "index"
    path.write_bytes(treeindex.MAGIC)
    digest = hashlib.sha256(treeindex.MAGIC).digest()
    assert len(treeindex.read(bytes(path), None)) == len(treeindex.read(bytes(path), digest)) == 0
    with pytest.raises(UserError, match="changed"):
        treeindex.read(bytes(path), bytes(32))
    with pytest.raises(UserError, match="No such file"):
        treeindex.read(bytes(path) + b"x", None)


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=3), st.integers(0, 255)), min_size=1, unique=True))
def test_names_in_a_directory_are_told_apart(names: list[tuple[bytes, int]]) -> None:
    def digest(names: list[tuple[bytes, int]]) -> bytes:
        made = treeindex.Children()
        for name, kind in names:
            made.add(name, kind)
        return made.digest()

    plain = [(name.replace(b"\0", b"a").replace(b"/", b"b"), kind) for name, kind in names]
    assert digest(plain) != digest(plain[:-1])
    assert digest(plain) != digest([*plain[:-1], (plain[-1][0], plain[-1][1] ^ 1)])


def test_the_option() -> None:
    wanted = hashlib.sha256(b"").hexdigest()
    config = parse([f"lowerdir=a:/b:c::/d,verify={wanted}@i\\:1::/j:"]).config(b"/m", cwd=b"/at", root=True)
    assert config.verify == (TreeFile(b"/at/i:1", bytes.fromhex(wanted)), None, TreeFile(b"/j", None), None)
    assert to_json.options(config)["verify"] == [f"{wanted}@/at/i:1", None, "/j", None]
    with pytest.raises(UserError, match="2 files for 1 layers"):
        parse(["lowerdir=a,verify=i:j"]).config(b"/m", root=True)
