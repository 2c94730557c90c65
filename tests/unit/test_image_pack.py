"""Layers made of directories: what is packed over layers, and unpacked over them again, is the same."""

from __future__ import annotations

import os
import stat
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.images import directory, hard_link, member, symlink, tar
from tests.trees import compare_trees
from tests.unit.test_image_tar import open_dir
from unionfsd import format as fmt
from unionfsd.errors import UserError
from unionfsd.images import compare, pack, sources
from unionfsd.images.below import Below
from unionfsd.images.commit import COMPRESSIONS, Committed, Compression, compressed
from unionfsd.images.compress import Source, pieces
from unionfsd.images.containers import create, every, remove
from unionfsd.images.importing import import_image
from unionfsd.images.store import Store
from unionfsd.images.tarread import TarReader
from unionfsd.images.unpack import Unpacker

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="owners, devices and trusted xattrs need root")

BASE: Final = tar(
    [
        *(directory("d"), member("d/a", data=b"1"), member("d/b"), member("d/c"), directory("e"), member("e/x")),
        *(directory("e/sub"), member("e/sub/y"), member("f", data=b"2"), hard_link("g", "f"), symlink("s", "d")),
    ]
)


def unpacked(data: bytes, root: Path, below: Below) -> Path:
    root.mkdir()
    unpacker = Unpacker(open_dir(root))
    reader = TarReader(Source(pieces(BytesIO(data))))
    unpacker.unpack(reader)
    assert reader.finished
    unpacker.finish(below)
    return root


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return unpacked(BASE, tmp_path / "base", Below([]))


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """An upper over the base: an empty file before others, links, whiteouts, an opaque directory, every type."""
    upper = tmp_path / "upper"
    for name in ("d", "e", "new/deep"):
        (upper / name).mkdir(parents=True)
    (upper / "d" / "a").write_bytes(b"")
    (upper / "d" / "b").write_bytes(b"changed")
    os.mknod(upper / "d" / "c", stat.S_IFCHR, 0)
    os.setxattr(upper / "e", fmt.OPAQUE_NAMES[0], b"y")
    (upper / "e" / "sub").mkdir()
    (upper / "new" / "big").write_bytes(os.urandom(3_000_000))
    os.link(upper / "new" / "big", upper / "new" / "deep" / "linked")
    (upper / "new" / os.fsdecode(b"\xff")).symlink_to("n" * 150)
    os.mkfifo(upper / "new" / "fifo")
    os.mknod(upper / "new" / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.setxattr(upper / "new" / "big", "user.\xe9", b"\0\n")
    os.setxattr(upper / "new", "trusted.overlay.overlay.opaque", b"nested")
    os.setxattr(upper / "d", fmt.ORIGIN_NAMES[0], b"")
    os.chown(upper / "new" / "deep", 1 << 30, 5)
    os.utime(upper / "new" / "fifo", ns=(1, -12345678901))
    return upper


def packed(upper: Path, below: Below) -> bytes:
    return b"".join(pack.upper(open_dir(upper), below))


def test_an_upper_is_the_same_layer_again(base: Path, changed: Path, tmp_path: Path) -> None:
    below = Below([open_dir(base)])
    data = packed(changed, below)
    assert packed(changed, below) == data
    with tarfile.open(fileobj=BytesIO(data)) as archive:
        names = archive.getnames()
    assert names == sorted(names, key=lambda name: [(".wh." not in part, part) for part in name.split("/")])
    assert {"d/.wh.c", "e/.wh.x", "new/deep/linked"} < set(names)
    assert "e/.wh.sub" not in names
    layer = unpacked(data, tmp_path / "layer", below)
    stacks = [Below([open_dir(root), open_dir(base)]) for root in (changed, layer)]
    assert list(compare.compare(*stacks)) == []
    assert list(compare.compare(*reversed(stacks))) == []
    assert compare_trees(changed / "new", layer / "new") == []


@pytest.mark.parametrize(("name", "value"), [(fmt.REDIRECT_NAMES[0], b"x"), (fmt.METACOPY_NAMES[0], b"")])
def test_what_no_layer_can_say_is_refused(base: Path, tmp_path: Path, name: bytes, value: bytes) -> None:
    upper = tmp_path / "upper"
    (upper / "dir").mkdir(parents=True)
    (upper / "file").write_bytes(b"")
    os.setxattr(upper / ("dir" if name in fmt.REDIRECT_NAMES else "file"), name, value)
    with pytest.raises(UserError, match="layer cannot say"):
        packed(upper, Below([open_dir(base)]))


@given(st.lists(st.binary(max_size=5000), max_size=20), st.sampled_from(COMPRESSIONS))
@settings(max_examples=40)
def test_what_is_compressed_is_there_again(parts: list[bytes], how: Compression) -> None:
    data = b"".join(compressed(iter(parts), how))
    source = Source(pieces(BytesIO(data)))
    assert source.exactly(1 << 20) == b"".join(parts)


@pytest.mark.parametrize("how", COMPRESSIONS)
def test_a_commit_adds_a_layer(tmp_path: Path, changed: Path, how: Compression) -> None:
    store = Store(str(tmp_path / "store"))
    (tmp_path / "base.tar").write_bytes(BASE)
    source = sources.open_source(f"tar:{tmp_path}/base.tar", store.stage).source
    image = import_image(store, source, ("localhost/base:1",))
    container = create(store, image, "work")
    os.rmdir(container.upper)
    os.rename(changed, container.upper)
    changes = ['Cmd=["a"]', "Env=A=1", "Env=A=2", "Label=x=y", "WorkingDir=/d"]
    made = Committed(store, container, changes=changes, compression=how, timestamp=5)
    again = Committed(store, container, changes=changes, compression=how, timestamp=5)
    assert made.manifest.digest == again.manifest.digest
    new = import_image(store, made, ("localhost/made:1",))
    assert new.config.chain_ids[0] == image.config.chain_ids[0]
    assert dict(new.config.process) == {"Cmd": ["a"], "Env": ["A=2"], "Labels": {"x": "y"}, "WorkingDir": "/d"}
    stack = [Below([store.open_diff(chain) for chain in reversed(each.config.chain_ids)]) for each in (image, new)]
    found = {change.kind + " " + os.fsdecode(b"/".join(change.path)) for change in compare.compare(*stack)}
    assert {"C d/a", "C d/b", "D d/c", "D e/x", "A new", "A new/big", "A new/deep/linked"} <= found
    remove(store, next(every(store)))
    assert list(every(store)) == []
