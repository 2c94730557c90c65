"""Listings: what a merged directory holds, and cookies that readers can rely on while names come and go."""

from __future__ import annotations

import os
import stat
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.union.stack import stacked
from tests.union.trees import Obj, Whiteout, build, directory, merged, regular, symlink
from unionfsd.fdcache import FdCache
from unionfsd.layers import LayerStack
from unionfsd.listing import (
    DT_CHR,
    DT_DIR,
    DT_LNK,
    DT_REG,
    Listing,
    LowerNames,
    UpperNames,
    cookie_of,
    dt_type,
    entry_type,
    merge,
    read_lowers,
    read_upper,
)
from unionfsd.opening import open_stack
from unionfsd.options import MountConfig

names = st.binary(min_size=1, max_size=4).filter(lambda name: name not in (b".", b".."))

# Cookies.


@given(st.binary(max_size=255))
def test_a_cookie_fits_off_t_and_is_none_of_the_dots(name: bytes) -> None:
    assert 2 < cookie_of(name) < 1 << 63


def test_cookies_are_the_same_in_every_process() -> None:
    """A reader may go on after the daemon was replaced: these numbers are for ever."""
    assert [cookie_of(name) for name in (b"a", b"b", b"\xff" * 255)] == [
        851349202560073235,
        2113280398794464420,
        2007260854128740546,
    ]


def rows(found: set[bytes]) -> list[tuple[bytes, int, int]]:
    return [(name, 7, DT_REG) for name in found]


@given(st.sets(names, max_size=40))
def test_a_listing_begins_with_the_dots_and_has_every_name_once(present: set[bytes]) -> None:
    listing = Listing(1, 2, rows(present))
    entries = list(listing.after(0))
    assert entries[:2] == [(b".", 1, DT_DIR, 1), (b"..", 2, DT_DIR, 2)]
    assert sorted(name for name, *_ in entries[2:]) == sorted(present)
    assert [entry[3] for entry in entries] == sorted({entry[3] for entry in entries})
    assert len(listing) == len(entries)


@given(st.sets(names, max_size=30), st.integers(0, (1 << 63) - 1))
def test_any_number_is_a_place_to_go_on_from(present: set[bytes], cookie: int) -> None:
    listing = Listing(1, 2, rows(present))
    assert list(listing.after(cookie)) == [entry for entry in listing.after(0) if entry[3] > cookie]


@given(st.sets(names, max_size=30), st.lists(st.tuples(st.integers(0, 5), st.sets(names, max_size=6)), max_size=12))
def test_what_was_there_all_along_is_seen_exactly_once(
    present: set[bytes], reads: list[tuple[int, set[bytes]]]
) -> None:
    """A reader takes some entries at a time, each time of a fresh snapshot; between two reads names come and go."""
    always = set(present)
    seen: list[bytes] = []
    cookie = 0
    for count, changed in [*reads, (10**6, set())]:
        taken = list(islice(Listing(1, 2, rows(present)).after(cookie), count))
        seen += [name for name, *_ in taken]
        cookie = taken[-1][3] if taken else cookie
        present = present ^ changed
        always &= present
    assert {name for name in always if seen.count(name) != 1} == set()
    assert len(seen) == len(set(seen))


# Types.


@pytest.mark.parametrize(
    ("obj", "expected"),
    [
        (regular(), DT_REG),
        (directory(), DT_DIR),
        (symlink(), DT_LNK),
        (Obj(stat.S_IFIFO), 1),
        (Obj(stat.S_IFSOCK), 12),
        (Obj(stat.S_IFBLK, rdev=os.makedev(7, 1)), 6),
        (Obj(stat.S_IFCHR, rdev=os.makedev(1, 3)), DT_CHR),
        (Whiteout("chardev"), None),
        (Whiteout("xattr"), None),
    ],
)
def test_types_of_entries(obj: Obj | Whiteout, expected: int | None, disk: Path) -> None:
    build(os.fsencode(disk / "dir"), directory({b"entry": obj}))
    fd = os.open(disk / "dir", os.O_PATH)
    try:
        with os.scandir(os.fsencode(disk / "dir")) as entries:
            assert [entry_type(fd, entry.name, entry, xwhiteouts=True) for entry in entries] == [expected]
    finally:
        os.close(fd)
    if expected is not None:
        assert dt_type(os.lstat(disk / "dir/entry").st_mode) == expected


def test_a_marked_file_is_a_whiteout_only_where_the_directory_says_so(disk: Path) -> None:
    build(os.fsencode(disk / "dir"), directory({b"entry": Whiteout("xattr")}))
    fd = os.open(disk / "dir", os.O_PATH)
    try:
        with os.scandir(os.fsencode(disk / "dir")) as entries:
            assert [entry_type(fd, entry.name, entry, xwhiteouts=False) for entry in entries] == [DT_REG]
    finally:
        os.close(fd)


# Merging.

_forms = st.builds(Whiteout, st.sampled_from(["chardev", "xattr", "wh"]))
_leaves = st.sampled_from([regular(), symlink(), Obj(stat.S_IFIFO), directory({b"inside": regular()})])
_names = st.sampled_from([b"a", b"b", b"c", b"d", b"\xff"])
_layers = st.dictionaries(_names, st.one_of(_leaves, _leaves, _forms), max_size=4).map(directory)


def opened(lowers: list[bytes], upper: bytes | None = None, work: bytes | None = None) -> LayerStack:
    return open_stack(MountConfig(lowerdirs=tuple(lowers), upperdir=upper, workdir=work, mountpoint=b"/"))


@given(st.lists(_layers, min_size=1, max_size=4), _layers)
@settings(deadline=None, max_examples=60)
def test_merged_names_are_those_of_the_union(lowers: list[Obj], upper: Obj) -> None:
    """Whiteouts of all forms, in all layers, over and under objects of all types."""
    with stacked(lowers, upper) as layers:
        stack = opened(layers.lowers, layers.upper, layers.work)
        assert stack.upper is not None
        fds = FdCache(FdCache.MINIMUM)
        below = read_lowers(tuple(layer.root_dir for layer in stack.lowers), stack, fds)
        above = read_upper(stack.upper.root.fd, stack.upper, stack, xwhiteouts=True)
        assert top_level(merge(None, below)) == expected(lowers)
        assert top_level(merge(above, below)) == expected([upper, *lowers])
        assert top_level(merge(above, None)) == expected([upper])
        stack.close()


def top_level(rows: object) -> dict[bytes, int]:
    assert isinstance(rows, type(merge(None, None)))
    found = list(rows)
    assert len({name for name, _, _ in found}) == len(found)
    return {name: kind for name, _, kind in found}


def expected(layers: list[Obj]) -> dict[bytes, int]:
    return {path: dt_type(record.type) for path, record in merged(layers).items() if path and b"/" not in path}


def test_directories_are_merged_until_something_ends_it() -> None:
    here = directory({b"d": directory()})
    lowers = [
        here,
        directory(),
        here,
        directory({b"d": regular()}),
        here,
    ]
    assert indices(lowers) == (0, 2)
    assert indices([here, directory({b"d": Whiteout("chardev")}), here]) == (0,)
    assert indices([here, directory({b"d": Whiteout("xattr")}), here]) == (0,)
    assert indices([here, directory({b"d": Whiteout("wh")}), here]) == (0,)


def test_a_wh_entry_hides_what_is_below_its_own_layer() -> None:
    """As in OCI layers, where a layer may delete what was below and put something of its own there."""
    both = directory({b"d": directory(), b".wh.d": regular(b"")})
    assert indices([directory({b"d": directory()}), both, directory({b"d": directory()})]) == (0, 1)


def indices(lowers: list[Obj]) -> tuple[int, ...]:
    with stacked(lowers, None) as layers:
        stack = opened(layers.lowers)
        found = read_lowers(tuple(layer.root_dir for layer in stack.lowers), stack, FdCache(FdCache.MINIMUM))
        stack.close()
    return found.indices(b"d")


def test_the_dots_of_wh_are_no_names() -> None:
    """aufs's own files, and a bare prefix."""
    odd = {b".wh..wh..opq": regular(b""), b".wh..wh.plnk": directory(), b".wh.": regular(b""), b"a": regular()}
    with stacked([directory(odd)], directory(odd)) as layers:
        stack = opened(layers.lowers, layers.upper, layers.work)
        assert stack.upper is not None
        below = read_lowers((stack.lowers[0].root_dir,), stack, FdCache(FdCache.MINIMUM))
        above = read_upper(stack.upper.root.fd, stack.upper, stack, xwhiteouts=False)
        stack.close()
    assert {name for name, _ in below.items()} == set(above.names) == {b"a"}
    assert above.hidden == set()


def test_nothing_merges_to_nothing() -> None:
    assert list(merge(None, None)) == []
    assert list(merge(UpperNames({}, set()), LowerNames())) == []
    assert list(merge(UpperNames({b"a": None}, {b"b"}), None)) == []
