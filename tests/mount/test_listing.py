"""Directories listed: merged, each name once, steady while entries come and go, and without quadratic cost."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from tests.harness import Layers, MountFactory
from tests.trees import KINDS, getdents, make


def three_layers(layers: Layers) -> None:
    """Names in one layer, in two, in all: `a`, `b`, `c` and combinations, each file saying where its top one lives."""
    for layer, top in (("c", layers.lower), ("b", layers.push()), ("a", layers.push())):
        (top / "d").mkdir()
        for name in ("a", "b", "c", "ab", "bc", "ac", "abc"):
            if layer in name:
                (top / "d" / name).write_text(layer)


def test_a_merged_directory_shows_every_name_once(layers: Layers, mounted: MountFactory) -> None:
    three_layers(layers)
    mount = mounted()
    (mount / "d/new").touch()
    assert sorted(os.listdir(mount / "d")) == ["a", "ab", "abc", "ac", "b", "bc", "c", "new"]
    for name in ("a", "ab", "abc", "ac", "b", "bc", "c"):
        assert (mount / "d" / name).read_text() == min(name)


def test_a_file_hides_directories_below_and_the_other_way_round(layers: Layers, mounted: MountFactory) -> None:
    """Middle layer: file `x`, directory `y`. Below: directory `x`, file `y`. On top: two directories."""
    bottom = layers.lower
    (bottom / "x").mkdir()
    (bottom / "x/bottom").touch()
    (bottom / "y").touch()
    middle = layers.push()
    (middle / "x").touch()
    (middle / "y").mkdir()
    (middle / "y/middle").touch()
    top = layers.push()
    (top / "x").mkdir()
    (top / "x/top").touch()
    (top / "y").mkdir()
    (top / "y/top").touch()
    mount = mounted()
    assert os.listdir(mount / "x") == ["top"]
    assert sorted(os.listdir(mount / "y")) == ["middle", "top"]


def test_types_and_inode_numbers_of_entries_are_those_of_stat(layers: Layers, mounted: MountFactory) -> None:
    for kind in KINDS:
        make(layers.lower / kind, kind)
    mount = mounted()
    for kind in KINDS:
        make(mount / f"new-{kind}", kind)
    os.chmod(mount / "file", 0o600)
    with os.scandir(mount.path) as entries:
        found = list(entries)
    assert len(found) == 2 * len(KINDS)
    for entry in found:
        st = os.lstat(entry.path)
        assert entry.inode() == st.st_ino
        assert entry.is_dir(follow_symlinks=False) == stat.S_ISDIR(st.st_mode)
        assert entry.is_file(follow_symlinks=False) == stat.S_ISREG(st.st_mode)
        assert entry.is_symlink() == stat.S_ISLNK(st.st_mode)


def test_inode_numbers_are_unique(layers: Layers, mounted: MountFactory) -> None:
    three_layers(layers)
    mount = mounted()
    paths = [mount.path, mount / "d", *(mount / "d").iterdir()]
    (mount / "d/new").touch()
    assert len({os.lstat(path).st_ino for path in paths}) == len(paths)


def test_listing_again_shows_what_changed(layers: Layers, mounted: MountFactory) -> None:
    for name in ("a", "b"):
        (layers.lower / name).touch()
    mount = mounted()
    fd = os.open(mount.path, os.O_RDONLY)
    try:
        assert sorted(os.listdir(fd)) == ["a", "b"]
        (mount / "a").unlink()
        (mount / "c").touch()
        os.rename(mount / "b", mount / "d")
        assert sorted(os.listdir(fd)) == ["c", "d"]
    finally:
        os.close(fd)


def listed(directory: Path, at: int, change: object) -> list[str]:
    """Names of a directory, with `change` called once `at` of them have been seen."""
    names = []
    with os.scandir(directory) as entries:
        for entry in entries:
            names.append(entry.name)
            if len(names) == at and callable(change):
                change()
    return names


@pytest.mark.parametrize("where", ["lower", "upper", "both"])
def test_names_that_stay_are_seen_exactly_once(where: str, layers: Layers, mounted: MountFactory) -> None:
    """Whatever comes and goes between two getdents calls of one listing."""
    count = 6000
    lower, upper = layers.lower / "d", layers.upper / "d"
    lower.mkdir()
    upper.mkdir()
    for number in range(count):
        side = lower if where == "lower" or (where == "both" and number % 2) else upper
        (side / f"name{number:05d}").touch()
    mount = mounted()
    going = {f"name{number:05d}" for number in range(0, count, 3)}

    def change() -> None:
        for name in going:
            (mount / "d" / name).unlink()
        for number in range(500):
            (mount / "d" / f"other{number}").touch()

    names = listed(mount / "d", 100, change)
    staying = {f"name{number:05d}" for number in range(count)} - going
    assert len(names) == len(set(names))
    assert staying <= set(names)
    assert sorted(os.listdir(mount / "d")) == sorted(staying | {f"other{number}" for number in range(500)})


def test_deleting_each_entry_as_it_is_listed_empties_the_directory(layers: Layers, mounted: MountFactory) -> None:
    (layers.lower / "d").mkdir()
    for number in range(3000):
        (layers.lower / "d" / f"l{number}").touch()
    mount = mounted()
    for number in range(1000):
        (mount / "d" / f"u{number}").touch()
    with os.scandir(mount / "d") as entries:
        for entry in entries:
            os.unlink(entry.path)
    assert os.listdir(mount / "d") == []
    (mount / "d").rmdir()
    assert os.listdir(mount.path) == []


def test_positions_in_a_listing_can_be_returned_to(layers: Layers, mounted: MountFactory) -> None:
    """lseek on a directory to a position seen earlier goes on behind the same entry, also after others were deleted."""
    for number in range(1500):
        (layers.lower / f"name{number:04d}").touch()
    mount = mounted()
    fd = os.open(mount.path, os.O_RDONLY)
    try:
        everything = getdents(fd)
        middle = len(everything) // 2
        for dirent in everything[2:middle:7]:
            os.unlink(dirent.name, dir_fd=fd)
        os.lseek(fd, everything[middle].cookie, os.SEEK_SET)
        assert [dirent.name for dirent in getdents(fd)] == [dirent.name for dirent in everything[middle + 1 :]]
    finally:
        os.close(fd)


def test_forty_thousand_names(layers: Layers, mounted: MountFactory) -> None:
    """All are there, and the tenfold number costs nowhere near the hundredfold time."""
    times = {}
    for count in (4_000, 40_000):
        directory = layers.lower / str(count)
        directory.mkdir()
        for number in range(count):
            os.close(os.open(directory / f"{number:06d}", os.O_CREAT | os.O_WRONLY))
    mount = mounted()
    for count in (4_000, 40_000):
        (mount / str(count) / "new").touch()
        start = time.monotonic()
        names = os.listdir(mount / str(count))
        times[count] = time.monotonic() - start
        assert len(names) == len(set(names)) == count + 1
    assert times[40_000] < 40 * times[4_000]
    assert (mount / "40000/039999").exists()


def test_an_open_directory_survives_its_removal(layers: Layers, mounted: MountFactory) -> None:
    (layers.lower / "d").mkdir()
    (layers.lower / "d/f").touch()
    mount = mounted()
    fd = os.open(mount / "d", os.O_RDONLY)
    try:
        os.unlink(mount / "d/f")
        os.rmdir(mount / "d")
        assert os.listdir(fd) == []
    finally:
        os.close(fd)


def test_dot_entries_come_first_and_lead_where_they_should(layers: Layers, mounted: MountFactory) -> None:
    (layers.lower / "d/e").mkdir(parents=True)
    mount = mounted()
    fd = os.open(mount / "d/e", os.O_RDONLY)
    try:
        dots = getdents(fd)
    finally:
        os.close(fd)
    here, above = os.stat(mount / "d/e").st_ino, os.stat(mount / "d").st_ino
    assert [(dirent.name, dirent.ino) for dirent in dots] == [(b".", here), (b"..", above)]
    assert os.stat(mount / "d/e/.").st_ino == here
    assert os.stat(mount / "d/e/..").st_ino == above
