"""What copies have in common with lowers: hard links kept together (index), data left where it is (metacopy)."""

from __future__ import annotations

import mmap
import os
import stat
from pathlib import Path

import pytest

from tests.harness import Layers, MountFactory

NAMES = ("a", "d/b", "d/c")
BIG = b"0123456789abcdef" * 8192


def link_lower(layers: Layers) -> None:
    (layers.lower / "d").mkdir()
    (layers.lower / "a").write_bytes(BIG)
    for name in NAMES[1:]:
        os.link(layers.lower / "a", layers.lower / name)


def facts(root: Path, names: tuple[str, ...]) -> set[tuple[int, int, int, bytes]]:
    """What the names are, one value when they are one object: number, links, mode, data."""
    found = set()
    for name in names:
        st = (root / name).stat()
        found.add((st.st_ino, st.st_nlink, stat.S_IMODE(st.st_mode), (root / name).read_bytes()))
    return found


@pytest.mark.privileged
def test_all_names_are_the_one_copy(layers: Layers, mounted: MountFactory) -> None:
    link_lower(layers)
    union = mounted("index=on")
    ((ino, *_),) = facts(union.path, NAMES)
    with (union.path / "d/b").open("r+b") as file:
        file.write(b"written")
    data = b"written" + BIG[7:]
    assert facts(union.path, NAMES) == {(ino, 3, 0o644, data)}
    (union.path / "d/c").chmod(0o600)
    (union.path / "a").unlink()
    os.link(union.path / "d/b", union.path / "new")
    assert facts(union.path, ("d/b", "d/c", "new")) == {(ino, 3, 0o600, data)}
    with (union.path / "d/c").open("rb") as held:
        for name in ("d/b", "d/c"):
            (union.path / name).unlink()
        assert os.fstat(held.fileno()).st_nlink == 1
        assert held.read() == data
    union.remount()
    assert facts(union.path, ("new",)) == {(ino, 1, 0o600, data)}
    union.unmount()
    assert (layers.lower / "a").read_bytes() == BIG


def test_data_stays_until_it_is_written(layers: Layers, mounted: MountFactory) -> None:
    (layers.lower / "f").write_bytes(BIG)
    blocks = (layers.lower / "f").stat().st_blocks
    union = mounted("metacopy=on", "redirect_dir=on")
    path = union.path / "f"
    path.chmod(0o600)
    os.utime(path, ns=(1, 2))
    assert (layers.upper / "f").stat().st_blocks < 16
    assert (path.stat().st_size, path.stat().st_blocks) == (len(BIG), blocks)
    path = path.rename(union.path / "g")
    assert path.read_bytes() == BIG
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as seen:
        file.write(b"written")
        file.flush()
        assert path.read_bytes() == b"written" + BIG[7:]
        assert seen[-16:] == BIG[-16:]
    union.remount()
    assert (union.path / "g").read_bytes() == b"written" + BIG[7:]
    assert stat.S_IMODE((union.path / "g").stat().st_mode) == 0o600


def test_a_file_without_data_is_emptied(layers: Layers, mounted: MountFactory) -> None:
    (layers.lower / "f").write_bytes(BIG)
    union = mounted("metacopy=on", "redirect_dir=on")
    (union.path / "f").chmod(0o600)
    (union.path / "f").write_bytes(b"new")
    assert (union.path / "f").read_bytes() == b"new"
    union.remount()
    assert (union.path / "f").read_bytes() == b"new"
