"""Resolution: two ways to the same answer, and the kernel's overlayfs as the judge of it."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.union.stack import Stack, has_kernel_overlayfs, overlay, stacked
from tests.union.trees import Entry, Obj, Whiteout, build, directory, regular, symlink
from unionfsd import format as fmt
from unionfsd import lookup, syscalls
from unionfsd.entries import UPPER
from unionfsd.fdcache import FdCache
from unionfsd.inodes import DirNode, Node, NodeTable
from unionfsd.layers import fs_uuid
from unionfsd.listing import LowerNames
from unionfsd.lookup import Hit, Resolver
from unionfsd.opening import open_stack
from unionfsd.options import MountConfig

#: Few, so that layers collide. The last two are what hides the first two.
NAMES = (b"a", b"b", b"\xff", b".wh.a", b".wh.b")


class Prober(Resolver):
    """Never reads directories: asks each layer for each name."""

    def lower_names(self, node: DirNode, *, may_read: bool = False, read: bool = False) -> LowerNames | None:
        return None


class Reader(Resolver):
    """Reads every directory before it answers."""

    def lower_names(self, node: DirNode, *, may_read: bool = False, read: bool = False) -> LowerNames | None:
        return super().lower_names(node, read=True)


@contextlib.contextmanager
def resolving(layers: Stack, kind: type[Resolver] = Resolver) -> Iterator[tuple[Resolver, DirNode]]:
    """A resolver over `layers`, and the root to begin at."""
    stack = open_stack(
        MountConfig(
            lowerdirs=tuple(layers.lowers),
            upperdir=layers.upper,
            workdir=layers.work if layers.upper else None,
            mountpoint=layers.mountpoint,
        )
    )
    try:
        resolver = kind(stack, FdCache(FdCache.MINIMUM), follow_redirects=True)
        root = resolver.root()
        yield resolver, NodeTable(root.entry, root.ino, resolver.fds, resolver.kept.released).root
    finally:
        stack.close()


class Answer(NamedTuple):
    """A `Hit` in comparable words: `lowers` are (layer, path in it)."""

    upper: bool
    lowers: tuple[tuple[bytes, tuple[bytes, ...]], ...]
    mode: int
    st_ino: int
    ino: int


def answer(hit: Hit) -> Answer:
    lowers = tuple((lower.layer.path, lower.components()) for lower in hit.entry.lowers)
    return Answer(hit.entry.upper, lowers, hit.st.st_mode, hit.st.st_ino, hit.ino)


def walk(resolver: Resolver, node: DirNode, path: tuple[bytes, ...] = ()) -> Iterator[tuple[tuple[bytes, ...], Hit]]:
    """Everything that can be found beneath `node` under NAMES."""
    for name in NAMES:
        hit = resolver.find(node, name)
        if hit is not None:
            yield (*path, name), hit
            if stat.S_ISDIR(hit.st.st_mode):
                yield from walk(resolver, DirNode(0, node, name, hit.entry, hit.ino), (*path, name))


def answers(layers: Stack, kind: type[Resolver]) -> dict[tuple[bytes, ...], Answer]:
    with resolving(layers, kind) as (resolver, root):
        return {path: answer(hit) for path, hit in walk(resolver, root)}


# Random layers, in every form that is read.


OBJECTS = (regular(b""), regular(b"data"), symlink(), Obj(stat.S_IFIFO))
FORMS = ("chardev", "xattr", "wh")
OPAQUE_FORMS = ("trusted", "user", "fuseoverlayfs", "wh")


@st.composite
def layer(draw: st.DrawFn, forms: Sequence[Any] = FORMS, opaque: Sequence[Any] = OPAQUE_FORMS, depth: int = 2) -> Obj:
    """A directory of a layer, with whiteouts and opaque marks of these forms: much of it where other layers have it."""
    children: dict[bytes, Entry] = {}
    for name in NAMES[:3] if depth else NAMES[:2]:
        kind = draw(st.sampled_from(["nothing", "object", "whiteout", "directory", "directory", "both"]))
        if kind == "whiteout":
            children[name] = Whiteout(draw(st.sampled_from(forms)))
        elif kind == "directory" and depth:
            children[name] = draw(layer(forms, opaque, depth - 1))
        elif kind != "nothing":
            children[name] = draw(st.sampled_from(OBJECTS))
        if kind == "both" and "wh" in forms:  # as in OCI layers, which replace what was there
            children[b".wh." + name] = regular(b"")
    return directory(children, opaque=draw(st.sampled_from([None, None, None, None, *opaque])))


every_form = layer()
fast = settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])


@given(st.lists(every_form, min_size=1, max_size=5), st.one_of(st.none(), every_form))
@fast
def test_reading_and_probing_give_the_same_answers(lowers: list[Obj], upper: Obj | None) -> None:
    """However a lower is asked, by its listing or name by name, and whatever lies in an upper above it."""
    with stacked(lowers, upper) as layers:
        by_listing = answers(layers, Reader)
        assert by_listing == answers(layers, Prober)
        assert by_listing == answers(layers, Resolver)


@given(st.lists(every_form, min_size=2, max_size=4))
@fast
def test_an_upper_reads_as_a_lower_would(layers: list[Obj]) -> None:
    """Every form is read in every layer: what a stack shows does not depend on whether its top can be written."""

    def shown(layers: Stack) -> dict[tuple[bytes, ...], tuple[int, int]]:
        return {path: (found.mode, found.st_ino) for path, found in answers(layers, Resolver).items()}

    with stacked(layers, None) as read_only:
        before = shown(read_only)
        top, read_only.lowers = read_only.lowers[0], read_only.lowers[1:]
        read_only.upper = top
        assert shown(read_only) == before


@given(st.lists(every_form, min_size=1, max_size=4), st.one_of(st.none(), every_form))
@fast
def test_a_listing_has_the_names_that_can_be_found(lowers: list[Obj], upper: Obj | None) -> None:
    with stacked(lowers, upper) as layers, resolving(layers) as (resolver, root):
        pending = [root]
        while pending:
            node = pending.pop()
            hits = {name: hit for name in NAMES if (hit := resolver.find(node, name)) is not None}
            entries = list(resolver.listing(node).after(0))[2:]
            found = [entry[:3] for entry in entries]
            assert sorted(found) == sorted((name, hit.ino, hit.st.st_mode >> 12) for name, hit in hits.items())
            assert resolver.is_empty(node) is (not hits)
            for name, hit in hits.items():
                if stat.S_ISDIR(hit.st.st_mode):
                    pending.append(DirNode(0, node, name, hit.entry, hit.ino))


# The kernel's overlayfs.


#: What the kernel knows; it looks at no marks of roots.
kernel_forms = layer(("chardev", "xattr"), ("trusted",)).map(lambda root: strip(replace(root, opaque=None)))


def strip(obj: Obj) -> Obj:
    """Without whiteout files in opaque directories, where the kernel takes them for whiteouts all the same."""
    children: dict[bytes, Entry] = {}
    for name, entry in obj.children.items():
        if not (obj.opaque and isinstance(entry, Whiteout) and entry.form == "xattr"):
            children[name] = strip(entry) if isinstance(entry, Obj) and entry.children else entry
    return replace(obj, children=children)


#: Names and paths that the directories of a layer may have in the layers below it.
REDIRECTS = (b"a", b"b", b"/a", b"/b", b"/a/b", b"/b/a", b"/a/a", b"/c")


@st.composite
def redirected(draw: st.DrawFn) -> list[Obj]:
    """Layers whose directories are called otherwise in the layers below."""
    return [_redirect(draw, draw(kernel_forms)) for _ in range(draw(st.integers(2, 4)))]


def _redirect(draw: st.DrawFn, obj: Obj) -> Obj:
    children: dict[bytes, Entry] = {}
    for name, entry in obj.children.items():
        if isinstance(entry, Obj) and entry.type == stat.S_IFDIR:
            entry = _redirect(draw, entry)
            if draw(st.booleans()):
                entry = replace(entry, xattrs=((b"trusted.overlay.redirect", draw(st.sampled_from(REDIRECTS))),))
        children[name] = entry
    return replace(obj, children=children)


needs_overlayfs = pytest.mark.skipif(not has_kernel_overlayfs(), reason="needs kernel overlayfs to compare with")


@needs_overlayfs
@given(st.lists(kernel_forms, min_size=1, max_size=4))
@fast
@example(
    [directory({b"a": directory({b"b": regular()})}), directory({b"a": regular()}), directory({b"a": directory()})]
)
@example([directory({b"a": directory(opaque="trusted")}), directory({b"a": directory({b"b": regular()})})])
@example([directory({b"a": Whiteout("xattr")}), directory({b"a": regular()})])
def test_the_kernel_gives_the_same_answers(lowers: list[Obj]) -> None:
    must_agree(lowers, b"ro")


@needs_overlayfs
@given(redirected())
@fast
def test_the_kernel_follows_redirects_to_the_same_place(lowers: list[Obj]) -> None:
    must_agree(lowers, b"ro,redirect_dir=follow")


def must_agree(lowers: list[Obj], options: bytes) -> None:
    """What can be looked up has the same type and inode number: by listing, by probing, by the kernel."""
    with stacked(lowers, None) as layers:
        found = {path: (hit.mode, hit.st_ino) for path, hit in answers(layers, Reader).items()}
        assert found == {path: (hit.mode, hit.st_ino) for path, hit in answers(layers, Prober).items()}
        empty = layers.path + b"/empty"
        build(empty, directory())  # the kernel wants two layers, and looks for no whiteout files in the last
        with overlay(layers.mountpoint, options + b",lowerdir=" + b":".join([*layers.lowers, empty])):
            assert found == dict(kernel_walk(layers.mountpoint))


def kernel_walk(at: bytes, path: tuple[bytes, ...] = ()) -> Iterator[tuple[tuple[bytes, ...], tuple[int, int]]]:
    """The same as `walk` by system calls: by looking up, for the kernel lists whiteouts where it merges nothing."""
    for name in NAMES:
        try:
            found = os.lstat(at + b"/" + name)
        except FileNotFoundError:
            continue
        yield (*path, name), (found.st_mode, found.st_ino)
        if stat.S_ISDIR(found.st_mode):
            yield from kernel_walk(at + b"/" + name, (*path, name))


# Roots.


OPAQUE_ROOT = directory({b"a": regular()}, opaque="wh")


@pytest.mark.parametrize("upper", [True, False])
def test_an_opaque_root_hides_the_layers_below(upper: bool) -> None:
    """As in an OCI layer that begins afresh. (The kernel does not look at the marks of roots: docs/deviations.md.)"""
    below = directory({b"b": regular()})
    with stacked([below] if upper else [OPAQUE_ROOT, below], OPAQUE_ROOT if upper else None) as layers:
        assert {path for (path,) in answers(layers, Resolver)} == {b"a"}


# Names.


def find_errno(resolver: Resolver, root: DirNode, name: bytes) -> int:
    with pytest.raises(OSError) as caught:
        resolver.find(root, name)
    assert caught.value.errno is not None
    return caught.value.errno


@pytest.mark.parametrize("upper", [None, directory()])
def test_names_have_a_limit(upper: Obj | None) -> None:
    longest = b"n" * 255
    with stacked([directory({longest: regular()})], upper) as layers, resolving(layers) as (resolver, root):
        assert resolver.find(root, longest) is not None
        assert resolver.find(root, b"m" * 255) is None
        assert find_errno(resolver, root, b"n" * 256) == errno.ENAMETOOLONG


@pytest.mark.parametrize("name", [b".wh.a", b".wh..wh..opq", b".wh.", b".wh." + b"x" * 251])
def test_reserved_names_do_not_exist(name: bytes) -> None:
    content = directory({name: regular()})
    with stacked([content], content) as layers, resolving(layers) as (resolver, root):
        assert resolver.find(root, name) is None
        assert not resolver.lower_has(root, name)


@pytest.mark.parametrize("name", [b".", b"..", b"", b"a/b", b"a\0b"])
@pytest.mark.parametrize("kind", [Prober, Reader])
def test_a_name_is_one_component(name: bytes, kind: type[Resolver]) -> None:
    content = directory({b"a": directory({b"b": regular()})})
    for upper in (None, content):
        with stacked([content], upper) as layers, resolving(layers, kind) as (resolver, root):
            assert find_errno(resolver, root, name) in (errno.EINVAL, errno.ENOENT)


# What is kept.


def test_large_directories_are_read_when_questions_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "_READ_AT_ONCE", 0)
    monkeypatch.setattr(lookup, "_READ_AFTER", 3)
    lower = directory({b"a": regular(), b"b": directory()})
    with stacked([lower, lower], None) as layers, resolving(layers) as (resolver, root):
        for name in (b"a", b"b", b"c"):
            before = resolver.find(root, name)
            assert root.lower_names is None
        assert resolver.find(root, b"c") is before is None
        assert root.lower_names is not None
        assert {name for name, _ in root.lower_names.items()} == {b"a", b"b"}


def test_what_was_read_costs_no_call_in_any_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    lowers: Sequence[Obj] = [directory({b"%d" % index: regular()}) for index in range(20)]
    with stacked(lowers, directory()) as layers, resolving(layers) as (resolver, root):
        resolver.find(root, b"absent")
        calls: list[bytes] = []
        stat_at = syscalls.stat_at

        def counted(dirfd: int, name: bytes) -> os.stat_result:
            calls.append(name)
            return stat_at(dirfd, name)

        monkeypatch.setattr(syscalls, "stat_at", counted)
        assert resolver.find(root, b"absent") is None
        assert calls == [b"absent"]  # in the upper
        assert resolver.find(root, b"19") is not None
        assert calls == [b"absent", b"19", b"19"]  # in the upper, and in the lower that has it


def test_no_more_names_are_kept_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookup, "_KEEP_NAMES", 5)
    inner = directory({b"a": regular(), b"b": regular()})
    lower = directory({b"%d" % index: inner for index in range(4)})
    with stacked([lower], None) as layers, resolving(layers) as (resolver, root):
        nodes = []
        for index in range(4):
            hit = resolver.find(root, b"%d" % index)
            assert hit is not None
            nodes.append(DirNode(index, root, b"%d" % index, hit.entry, hit.ino))
            assert resolver.find(nodes[-1], b"a") is not None
        assert [node.lower_names is not None for node in nodes] == [False, False, True, True]
        resolver.kept.released(nodes[2])  # makes room
        resolver.lower_names(nodes[0], read=True)
        assert [nodes[0].lower_names is not None, nodes[3].lower_names is not None] == [True, True]


# Where objects lie.


def test_a_directory_that_moves_takes_what_is_in_it_along() -> None:
    """Nothing is cached by path: renaming an upper directory on the disk and in its node is all it takes."""
    upper = directory({b"d": directory({b"e": directory({b"f": regular(b"deep")})})})
    with stacked([directory()], upper) as layers, resolving(layers) as (resolver, root):
        at = root
        for name in (b"d", b"e"):
            hit = resolver.find(at, name)
            assert hit is not None
            at = DirNode(0, at, name, hit.entry, hit.ino)
        leaf = Node(0, at, b"f", UPPER, 0)
        assert resolver.stat(leaf).st_size == 4
        assert layers.upper is not None
        os.rename(layers.upper + b"/d", layers.upper + b"/moved")
        assert at.parent is not None
        at.parent.name = b"moved"
        assert resolver.stat(leaf).st_size == 4
        resolver.fds.close()
        assert resolver.stat(leaf).st_size == 4


def test_what_has_no_name_is_reached_by_its_descriptor(disk: Path) -> None:
    with stacked([directory()], directory({b"f": regular(b"data")})) as layers, resolving(layers) as (resolver, root):
        node = Node(0, root, b"f", UPPER, 0)
        node.state().orphan = resolver.open_object(node)
        assert layers.upper is not None
        os.unlink(layers.upper + b"/f")
        node.unlinked = True
        assert resolver.stat(node).st_size == 4
        with resolver.open_object(node) as fd:
            assert os.fstat(fd.fd).st_nlink == 0
        node.state().orphan = None
        with pytest.raises(OSError) as caught:
            resolver.stat(node)
        assert caught.value.errno == errno.ESTALE


# Inode numbers.


def copied_up(layers: Stack, *, lower: bytes = b"f", uuid: bool = True) -> None:
    """Put the origin that a copy-up of the lower's `lower` records on the upper's f."""
    assert layers.upper is not None
    with syscalls.Fd(os.open(layers.lowers[0], os.O_RDONLY | os.O_DIRECTORY)) as fd:
        kind, handle = syscalls.file_handle(fd.fd, lower)
        origin = fmt.Origin(kind, handle, fs_uuid(fd.fd) if uuid else b"\1" * 16)
    os.setxattr(layers.upper + b"/f", "trusted.overlay.origin", fmt.encode_origin(origin), follow_symlinks=False)


def shown_and_own(layers: Stack) -> tuple[int, int, int]:
    """Inode numbers of f: what the union shows, what the upper has, what the lower has."""
    assert layers.upper is not None
    with resolving(layers) as (resolver, root):
        hit = resolver.find(root, b"f")
    assert hit is not None
    return hit.ino, os.lstat(layers.upper + b"/f").st_ino, os.lstat(layers.lowers[0] + b"/f").st_ino


@pytest.mark.parametrize("obj", [regular(), symlink(), Obj(stat.S_IFIFO)], ids=["file", "symlink", "fifo"])
def test_a_copied_up_object_keeps_its_number(obj: Obj, disk: Path) -> None:
    layers = Stack(os.fsencode(disk), [directory({b"f": obj, b"g": obj})], directory({b"f": obj}))
    shown, upper, lower = shown_and_own(layers)
    assert shown == upper
    copied_up(layers)
    shown, upper, lower = shown_and_own(layers)
    assert shown == lower != upper


def test_a_number_follows_its_origin_wherever_that_lies(disk: Path) -> None:
    """Under another name, as after a rename; no more once the origin is gone, or in another file system."""
    layers = Stack(os.fsencode(disk), [directory({b"f": regular(), b"g": regular()})], directory({b"f": regular()}))
    copied_up(layers, lower=b"g")
    assert shown_and_own(layers)[0] == os.lstat(layers.lowers[0] + b"/g").st_ino
    os.unlink(layers.lowers[0] + b"/g")
    shown, upper, _ = shown_and_own(layers)
    assert shown == upper
    copied_up(layers, uuid=False)
    assert shown_and_own(layers)[0] == upper


def test_an_origin_of_another_type_is_none(disk: Path) -> None:
    layers = Stack(os.fsencode(disk), [directory({b"f": symlink()})], directory({b"f": regular()}))
    copied_up(layers)
    shown, upper, _ = shown_and_own(layers)
    assert shown == upper


@pytest.mark.parametrize("several", ["in the upper", "in the lower"])
def test_a_number_that_other_names_of_the_lower_have_is_not_taken(several: str, disk: Path) -> None:
    """However many names the copy has; those of the lower that were not copied up go on having its number."""
    layers = Stack(os.fsencode(disk), [directory({b"f": regular()})], directory({b"f": regular()}))
    copied_up(layers)
    assert layers.upper is not None
    at = layers.upper if several == "in the upper" else layers.lowers[0]
    os.link(at + b"/f", at + b"/second")
    shown, upper, lower = shown_and_own(layers)
    assert shown == (lower if several == "in the upper" else upper)


@pytest.mark.parametrize("damaged", [b"", b"\0", b"\0\xfb\x15\0\1" + bytes(16), b"x" * 100])
def test_a_damaged_origin_is_none(damaged: bytes, disk: Path) -> None:
    layers = Stack(os.fsencode(disk), [directory({b"f": regular()})], directory({b"f": regular()}))
    assert layers.upper is not None
    os.setxattr(layers.upper + b"/f", "trusted.overlay.origin", damaged)
    shown, upper, _ = shown_and_own(layers)
    assert shown == upper


def test_a_merged_directory_has_the_number_of_its_topmost_lower() -> None:
    here = directory({b"f": directory()})
    with stacked([here, here], here) as layers:
        shown, upper, lower = shown_and_own(layers)
    assert shown == lower != upper
