"""`changes`, `usage` and `explain` against what the layers are: from random stacks, and one by one where it matters."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.trees import errno_of
from tests.union.stack import Stack, scratch_directory, stacked
from tests.union.strategies import WANTED_NAMES, stacks
from tests.union.trees import Obj, Record, Tree, Whiteout, WhiteoutForm, directory, merged, regular, symlink
from unionfsd import steps
from unionfsd.changes import Change, changes
from unionfsd.explain import Copy, Explanation, explain, find, split
from unionfsd.union import Caller, Union
from unionfsd.usage import Usage, usage

PROPERTY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
ROOT = Caller(0, 0, 1, 0o022)


def changed(union: Union, path: bytes = b"/") -> list[Change]:
    reader = union.reader()
    try:
        return list(changes(reader, split(path)))
    finally:
        reader.fds.close()


def explained(union: Union, path: bytes) -> Explanation:
    reader = union.reader()
    try:
        return explain(reader, path)
    finally:
        reader.fds.close()


def used(union: Union, path: bytes = b"/", depth: int = 1) -> list[Usage]:
    reader = union.reader()
    try:
        return usage(reader, split(path), depth)
    finally:
        reader.fds.close()


# The difference.


def expected_changes(old: Tree, new: Tree) -> set[tuple[str, bytes]]:
    """(kind, path) of every difference, told from what the lowers and the union show."""
    found = {("added", path) for path in new.keys() - old.keys()}
    for path in old.keys() & new.keys() - {b""}:
        if identity(old[path]) != identity(new[path]):
            found.add(("changed", path))
    for path in old.keys() - new.keys():
        parent = path.rpartition(b"/")[0]
        if is_directory(new, parent) and is_directory(old, parent):
            found.add(("deleted", path))
    return found


def identity(record: Record) -> Record:
    """What counts as a change: the times of a directory tell of its content."""
    return record._replace(mtime_ns=0) if record.type == stat.S_IFDIR else record


def is_directory(tree: Tree, path: bytes) -> bool:
    return path in tree and tree[path].type == stat.S_IFDIR


@PROPERTY
@given(stacks())
def test_changes_are_the_difference_of_the_trees(layers: list[Obj]) -> None:
    with stacked(layers[1:], layers[0]) as stack:
        union = stack.union()
        try:
            found = [(change.kind, change.path[1:]) for change in changed(union)]
        finally:
            union.close()
        assert len(found) == len(set(found))
        assert set(found) == expected_changes(merged(layers[1:]), merged(layers))


@PROPERTY
@given(stacks(), st.lists(st.sampled_from(WANTED_NAMES[:3]), min_size=1, max_size=2))
def test_changes_beneath_a_directory_are_those_of_the_whole_with_its_path(
    layers: list[Obj], names: list[bytes]
) -> None:
    with stacked(layers[1:], layers[0]) as stack:
        union = stack.union()
        try:
            path = b"/" + b"/".join(names)
            tree = merged(layers)
            if is_directory(tree, path[1:]):
                every = [change for change in changed(union) if change.path.startswith(path + b"/")]
                assert sorted(changed(union, path)) == sorted(every)
            else:
                assert errno_of(changed, union, path) in ("ENOENT", "ENOTDIR")
        finally:
            union.close()


@pytest.fixture
def made() -> Iterator[Stack]:
    """Lowers and an upper with one of everything that a change may be."""
    shared = {b"same": regular(b"same"), b"data": regular(b"old!"), b"mode": regular(), b"gone": regular()}
    lower = directory({**shared, b"dir": directory({b"in": regular(), b"out": regular()}), b"link": symlink(b"a")})
    upper = directory(
        {
            b"same": regular(b"same"),
            b"data": regular(b"new!"),
            b"mode": regular(mode=0o600),
            b"gone": Whiteout(),
            b"dir": directory({b"in": regular(), b"new": regular()}, opaque="trusted"),
            b"link": symlink(b"b"),
            b"nothing": Whiteout(),
        }
    )
    with stacked([lower], upper) as stack:
        yield stack


def test_a_change_says_what_differs_and_a_copy_up_alone_is_none(made: Stack) -> None:
    union = made.union()
    found = {change.path: change for change in changed(union)}
    union.close()
    assert {path: (change.kind, change.fields) for path, change in found.items()} == {
        b"/data": ("changed", ("data",)),
        b"/mode": ("changed", ("mode",)),
        b"/gone": ("deleted", ()),
        b"/dir/new": ("added", ()),
        b"/dir/out": ("deleted", ()),
        b"/link": ("changed", ("target",)),
    }
    assert stat.S_ISREG(found[b"/gone"].mode)


def test_directories_come_before_what_is_in_them() -> None:
    upper = directory({b"a": directory({b"b": directory({b"c": regular()})}), b"z": regular()})
    with stacked([directory()], upper) as stack:
        union = stack.union()
        paths = [change.path for change in changed(union)]
        union.close()
    assert paths.index(b"/a") < paths.index(b"/a/b") < paths.index(b"/a/b/c")


@pytest.mark.parametrize("form", ["chardev", "xattr", "wh"])
def test_every_form_of_a_whiteout_deletes(form: WhiteoutForm) -> None:
    lower = directory({b"gone": regular(), b"stays": regular()})
    with stacked([lower], directory({b"gone": Whiteout(form)})) as stack:
        union = stack.union()
        assert [(change.kind, change.path) for change in changed(union)] == [("deleted", b"/gone")]
        why = explained(union, b"/gone")
        union.close()
    assert why.giver is None
    assert why.decided_by is not None
    assert (why.decided_by.mark, why.decided_by.layer.rank) == ("whiteout", 0)
    assert [copy.whiteout is None for copy in why.copies] == [False, True]


def test_a_renamed_directory_says_where_it_was() -> None:
    with stacked([directory({b"old": directory({b"in": regular(), b"out": regular()})})], directory()) as stack:
        union = stack.union()
        steps.run(union.rename(union.root, b"old", union.root, b"new", 0))
        parent = union.lookup(union.root, b"new").nodeid
        steps.run(union.unlink(parent, b"out"))
        found = {change.path: (change.kind, change.renamed_from) for change in changed(union)}
        why = explained(union, b"/new/in")
        union.close()
        assert found == {b"/new": ("added", b"/old"), b"/old": ("deleted", None), b"/new/out": ("deleted", None)}
        assert why.giver is not None
        assert (why.giver.layer.path, why.giver.path) == (stack.lowers[0], b"/old/in")


def test_the_time_is_that_of_the_upper() -> None:
    """Of a large lower directory only what the upper has is looked at."""
    names = {b"%04d" % number: regular(b"") for number in range(500)}
    with stacked(
        [directory({b"big": directory(names)})], directory({b"big": directory({b"0001": Whiteout()})})
    ) as stack:
        union = stack.union()
        ticks: list[None] = []
        reader = union.reader()
        found = list(changes(reader, (), lambda: ticks.append(None)))
        reader.fds.close()
        union.close()
    assert [change.path for change in found] == [b"/big/0001"]
    assert len(ticks) == 2


def test_a_walk_beside_changes_of_what_it_walks_through() -> None:
    """Names that come and go meanwhile are there or not; nothing fails, and what stays is told."""
    steady = {b"keep%d" % number: regular(b"x") for number in range(30)}
    with stacked([directory()], directory({b"d": directory(steady)})) as stack:
        union = stack.union()
        failures: list[BaseException] = []
        ended = threading.Event()

        def walk() -> None:
            try:
                for _ in range(30):
                    found = {change.path for change in changed(union)}
                    assert {b"/d/" + name for name in steady} <= found
                    used(union)
            except BaseException as error:
                failures.append(error)
            finally:
                ended.set()

        walker = threading.Thread(target=walk)
        walker.start()
        parent = union.lookup(union.root, b"d").nodeid
        while not ended.is_set():
            union.mkdir(parent, b"t", 0o755, ROOT)
            inside = union.lookup(parent, b"t").nodeid
            union.mkdir(inside, b"u", 0o755, ROOT)
            union.rmdir(inside, b"u")
            union.rmdir(parent, b"t")
        walker.join()
        union.close()
    assert failures == []


# Space.


def test_usage_is_what_the_upper_takes() -> None:
    upper = directory(
        {
            b"a": directory({b"big": regular(b"x" * 100_000), b"sub": directory({b"in": regular(b"y" * 10_000)})}),
            b"b": directory({b"gone": Whiteout()}),
            b"top": regular(b"z" * 5_000),
        }
    )
    with stacked([directory({b"b": directory({b"gone": regular()}), b"lower": regular(b"l" * 10**6)})], upper) as stack:
        assert stack.upper is not None
        os.link(stack.upper + b"/top", stack.upper + b"/a/other name")
        union = stack.union()
        total, *parts = used(union)
        assert {part.path for part in used(union, depth=2)} == {b"/", b"/a", b"/b", b"/a/sub"}
        assert [part.path for part in used(union, b"/a", depth=0)] == [b"/a"]
        assert used(union, depth=0) == [total]
        union.close()
        sizes = {path: os.lstat(path) for path in everything(stack.upper)}
    counted = {(st.st_dev, st.st_ino): st for path, st in sizes.items() if not path.endswith(b"/gone")}
    assert total == Usage(
        b"/",
        sum(st.st_blocks * 512 for st in counted.values()),
        sum(st.st_size for st in counted.values()),
        len(counted),
        1,
    )
    assert [part.path for part in parts] == [b"/a", b"/b"]
    assert parts[1].whiteouts == 1


def everything(root: bytes) -> Iterator[bytes]:
    yield root
    for entry in os.scandir(root):
        if entry.is_dir(follow_symlinks=False):
            yield from everything(entry.path)
        else:
            yield entry.path


def test_what_is_not_in_the_upper_takes_nothing() -> None:
    with stacked([directory({b"d": directory()})], directory()) as stack:
        union = stack.union()
        assert used(union, b"/d") == []
        assert errno_of(used, union, b"/nope") == "ENOENT"
        assert changed(union, b"/d") == []
        union.close()


# Explaining.


def paths_of(trees: list[Tree]) -> list[bytes]:
    return sorted({b"/" + path for tree in trees for path in tree} | {b"/absent", b"/a/absent"})


def at(root: bytes, path: bytes) -> bytes:
    return root + path if path != b"/" else root


@PROPERTY
@given(stacks())
def test_every_path_is_explained_by_the_layer_that_gives_it(layers: list[Obj]) -> None:
    tree = merged(layers)
    with stacked(layers[1:], layers[0]) as stack:
        union = stack.union()
        try:
            for path in paths_of([tree, *(merged([layer]) for layer in layers)]):
                why = explained(union, path)
                assert (why.giver is not None) == (path[1:] in tree), path
                check_copies(stack, why)
                if why.giver is not None:
                    st = os.lstat(at(why.giver.layer.path, why.giver.path))
                    assert stat.S_IFMT(st.st_mode) == tree[path[1:]].type
                    assert st.st_mtime_ns == tree[path[1:]].mtime_ns
                    assert dict(why.xattrs) == dict(tree[path[1:]].xattrs)
                    assert why.number is not None
        finally:
            union.close()


def check_copies(stack: Stack, why: Explanation) -> None:
    """The copies are exactly those on disk; one gives, and each that is out of sight has a reason above it."""
    on_disk = [layer for layer in stack.layers if os.path.lexists(at(layer, why.path))]
    assert [copy.layer.path for copy in why.copies] == on_disk
    assert [copy.role for copy in why.copies].count("gives") == (why.giver is not None)
    for copy in why.copies:
        if copy.whiteout is None and copy.role in ("covered", "hidden"):
            assert copy.decided_by is not None
            assert copy.decided_by.layer.rank < copy.layer.rank
            assert mark_is_there(copy)


def mark_is_there(copy: Copy) -> bool:
    assert copy.decided_by is not None
    path = at(copy.decided_by.layer.path, copy.decided_by.path)
    mode = os.lstat(path).st_mode
    match copy.decided_by.mark:
        case "whiteout":
            return stat.S_ISCHR(mode)
        case "opaque":
            return os.getxattr(path, "trusted.overlay.opaque") == b"y"
        case "not a directory":
            return not stat.S_ISDIR(mode)
        case mark:
            return mark == "covered"


@PROPERTY
@given(stacks())
def test_an_inode_number_is_that_of_the_mount(layers: list[Obj]) -> None:
    tree = merged(layers)
    with stacked(layers[1:], layers[0]) as stack:
        union = stack.union()
        try:
            for path in tree:
                number = explained(union, b"/" + path).number
                nodeid, ino = union.root, union.getattr(union.root).ino
                for name in split(path):
                    found = union.lookup(nodeid, name)
                    nodeid, ino = found.nodeid, found.attr.ino
                assert number is not None
                assert number.shown == ino
                assert number.source is not None
        finally:
            union.close()


def test_a_file_on_the_way_hides_what_is_beneath() -> None:
    layers = [directory({b"a": regular()}), directory({b"a": directory({b"b": regular()})})]
    with stacked(layers, directory()) as stack:
        union = stack.union()
        why = explained(union, b"/a/b")
        union.close()
        assert why.giver is None
        assert why.decided_by is not None
        assert why.decided_by == (
            "not a directory",
            (1, False, stack.lowers[0]),
            b"/a",
        )


def test_a_path_with_dots_is_refused() -> None:
    with stacked([directory()], None) as stack:
        union = stack.union()
        assert errno_of(explained, union, b"/a/../b") == "EINVAL"
        assert errno_of(explained, union, b"/" + b"n" * 300) == "ENAMETOOLONG"
        union.close()


def test_marks_and_xattrs_are_told_apart() -> None:
    with stacked([directory({b"d": directory()})], directory({b"d": directory(opaque="trusted")})) as stack:
        assert stack.upper is not None
        os.setxattr(stack.upper + b"/d", b"user.mine", b"1")
        union = stack.union()
        why = explained(union, b"/d")
        union.close()
    assert why.xattrs == {b"user.mine": b"1"}
    assert why.giver is not None
    assert why.giver.marks == {b"trusted.overlay.opaque": b"y"}
    assert why.copies[1].decided_by == ("opaque", why.giver.layer, b"/d")


def test_nothing_is_left_open() -> None:
    with stacked(
        [directory({b"d": directory({b"e": directory()})})], directory({b"d": directory({b"f": regular()})})
    ) as s:
        union = s.union()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            explained(union, b"/d/e")
            explained(union, b"/d/absent/x")
            changed(union)
            used(union)
        assert len(os.listdir("/proc/self/fd")) == before
        union.close()


def test_a_reader_finds_what_the_union_finds() -> None:
    with scratch_directory() as path:
        Path(os.fsdecode(path), "x").mkdir()
        stack = Stack(path + b"/x", [directory({b"a": regular()})], directory({b"b": regular()}))
        union = stack.union()
        reader = union.reader()
        _, hit = find(reader, (b"a",))
        assert hit is not None
        assert hit.ino == union.lookup(union.root, b"a").attr.ino
        assert find(reader, (b"a", b"below"))[1] is None
        assert errno_of(changed, union, b"/a") == errno.errorcode[errno.ENOTDIR]
        reader.fds.close()
        union.close()
