"""The index: hard links of a lower are one object after copy-up and counted right, after a remount or a crash, too."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import ClassVar, TypeAlias

import pytest

from tests.union.client import UMASK, Client, FileSystem, Path, Plain, union_snapshot
from tests.union.scenarios import Operation, Scenario
from tests.union.stack import Stack, has_kernel_overlayfs, overlay, scratch_directory
from tests.union.test_crash import Case, crash_everywhere, fail_everywhere
from tests.union.trees import Tree, directory, join, snapshot
from unionfsd.errors import UserError
from unionfsd.format import NLINK, TRUSTED
from unionfsd.union import Union

#: Path -> (link count, all paths that are the same object, itself included).
Links: TypeAlias = dict[bytes, tuple[int, tuple[bytes, ...]]]

KERNEL = has_kernel_overlayfs()
A, B, C, D = (b"a",), (b"d", b"b"), (b"d", b"c"), (b"e", b"d")
NAMES = (A, B, C)


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(UMASK)
    yield
    os.umask(before)


@pytest.fixture
def scratch() -> Iterator[bytes]:
    with scratch_directory() as path:
        yield path


@pytest.fixture
def stack(scratch: bytes) -> Stack:
    made = Stack(scratch, [directory({b"d": directory(), b"e": directory()})], directory())
    link_lower(made)
    return made


def link_lower(stack: Stack, kind: int = stat.S_IFREG) -> None:
    """Make `a`, `d/b` and `d/c` of the lower one object, and `s` an ordinary one."""
    first = stack.lowers[0] + b"/a"
    if kind == stat.S_IFREG:
        with open(first, "wb") as file:
            file.write(b"lower data")
    else:
        os.mknod(first, kind | 0o644)
    for name in (b"/d/b", b"/d/c"):
        os.link(first, stack.lowers[0] + name)
    with open(stack.lowers[0] + b"/s", "wb") as file:
        file.write(b"single")


def grouped(found: dict[bytes, tuple[int, int]]) -> Links:
    return {
        path: (nlink, tuple(sorted(other for other, (_, number) in found.items() if number == ino)))
        for path, (nlink, ino) in found.items()
    }


def links_of(union: Union) -> Links:
    """Link counts and equalities as the union shows them, of all that is no directory; d_ino must agree with st_ino."""
    found: dict[bytes, tuple[int, int]] = {}

    def walk(nodeid: int, path: bytes) -> None:
        for name, ino, *_ in list(union.listdir(nodeid, 0)):
            if name not in (b".", b".."):
                below = union.lookup(nodeid, name)
                at = join(path, name)
                assert ino == below.attr.ino, at
                if stat.S_ISDIR(below.attr.st.st_mode):
                    walk(below.nodeid, at)
                else:
                    found[at] = below.attr.nlink, below.attr.ino
                union.forget(below.nodeid, 1)

    walk(union.root, b"")
    return grouped(found)


def links_in(root: bytes) -> Links:
    """The same of a directory."""
    found = {}
    for path, record in snapshot(root).items():
        if record.type != stat.S_IFDIR:
            st = os.lstat(join(root, path))
            found[path] = st.st_nlink, st.st_ino
    return grouped(found)


def seen_by_kernel(stack: Stack, *options: bytes) -> tuple[Tree, Links]:
    """What kernel overlayfs with index=on shows of the upper."""
    assert stack.upper is not None
    text = b",".join((b"redirect_dir=on,index=on", *options))
    layers = b",lowerdir=%b,upperdir=%b,workdir=%b" % (b":".join(stack.lowers), stack.upper, stack.work)
    with overlay(stack.mountpoint, text + layers):
        return snapshot(stack.mountpoint), links_in(stack.mountpoint)


def seen_by_us(stack: Stack, **options: str) -> tuple[Tree, Links]:
    union = stack.union(**options)
    seen = union_snapshot(union), links_of(union)
    union.close()
    return seen


def in_turn(*operations: Operation) -> Operation:
    """One after the other."""

    def run(fs: FileSystem) -> None:
        for operation in operations:
            operation(fs)

    return run


def write(path: Path, data: bytes = b"W", offset: int = 1) -> Operation:
    return lambda fs: fs.write(path, data, offset)


def unlink(path: Path) -> Operation:
    return lambda fs: fs.unlink(path)


def rename(path: Path, new: Path, flags: int = 0) -> Operation:
    return lambda fs: fs.rename(path, new, flags)


def link(path: Path, new: Path) -> Operation:
    return lambda fs: fs.link(path, new)


OPERATIONS: dict[str, Operation] = {
    "write": write(B),
    "truncate": lambda fs: fs.truncate(B, 3),
    "chmod": lambda fs: fs.chmod(B, 0o600),
    "unlink": unlink(B),
    "unlink all": in_turn(unlink(A), unlink(B), unlink(C)),
    "write and unlink": in_turn(write(B), unlink(C), unlink(B)),
    "write and unlink all": in_turn(write(C), unlink(A), unlink(B), unlink(C)),
    "link": link(B, D),
    "link twice": in_turn(link(B, D), link(A, (b"x",)), write(C)),
    "rename": rename(B, D),
    "rename over another name": rename(B, C),
    "rename over": rename((b"s",), B),
    "rename away and write": in_turn(rename(B, D), write(D), write(C, b"V", 2)),
    "exchange": rename(B, (b"s",), 2),
    "new file over": in_turn(unlink(B), lambda fs: fs.create(B, 0o640), write(A, b"W", 0)),
    "rename the directory": in_turn(write(B), rename((b"d",), (b"e", b"dd"))),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_as_on_a_plain_directory(name: str, stack: Stack) -> None:
    """The same content, link counts and equalities as where nothing is copied up; and so after a remount."""
    plain = stack.path + b"/plain"
    os.mkdir(plain)
    os.system(f"cp -a {os.fsdecode(stack.lowers[0])}/. {os.fsdecode(plain)}")
    OPERATIONS[name](Plain(plain))
    union = stack.union(index="on")
    client = Client(union)
    assert client.getattr(A).nlink == 3
    OPERATIONS[name](client)
    wanted = links_in(plain)
    assert links_of(union) == wanted
    assert contents(union_snapshot(union)) == contents(snapshot(plain))
    union.close()
    tree, links = seen_by_us(stack, index="on")
    assert (contents(tree), links) == (contents(snapshot(plain)), wanted)
    if KERNEL:
        assert seen_by_kernel(stack) == (tree, links)
        assert seen_by_us(stack, index="on") == (tree, links)


def contents(tree: Tree) -> dict[bytes, tuple[int, int, bytes]]:
    return {path: (record.type, record.mode, record.data) for path, record in tree.items()}


@pytest.mark.skipif(not KERNEL, reason="mounts kernel overlayfs")
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_the_kernel_left(name: str, stack: Stack) -> None:
    assert stack.upper is not None
    layers = b"lowerdir=%b,upperdir=%b,workdir=%b" % (stack.lowers[0], stack.upper, stack.work)
    with overlay(stack.mountpoint, layers + b",redirect_dir=on,index=on"):
        OPERATIONS[name](Plain(stack.mountpoint))
    kernel = seen_by_kernel(stack)
    assert seen_by_us(stack, index="on") == kernel
    # We go on where it stopped, and it where we did.
    union = stack.union(index="on")
    client = Client(union)
    for path in (A, C, D):
        try:
            client.append(path, b" and more")
            client.unlink(path)
        except FileNotFoundError:
            continue
    ours = union_snapshot(union), links_of(union)
    union.close()
    assert seen_by_us(stack, index="on") == ours
    assert seen_by_kernel(stack) == ours


@pytest.mark.parametrize("kind", [stat.S_IFIFO, stat.S_IFSOCK])
def test_other_objects(kind: int, scratch: bytes) -> None:
    stack = Stack(scratch, [directory({b"d": directory(), b"e": directory()})], directory())
    link_lower(stack, kind)
    union = stack.union(index="on")
    client = Client(union)
    client.chmod(B, 0o600)
    assert {client.getattr(name).st.st_mode & 0o777 for name in NAMES} == {0o600}
    client.unlink(A)
    assert client.getattr(C).nlink == 2
    union.close()


def test_inode_numbers_stay(stack: Stack) -> None:
    union = stack.union(index="on")
    client = Client(union)
    before = client.getattr(A).ino
    client.append(B, b"!")
    client.rename(C, D, 0)
    assert {client.getattr(name).ino for name in (A, B, D)} == {before}
    union.close()
    union = stack.union(index="on")
    client = Client(union)
    assert {client.getattr(name).ino for name in (A, B, D)} == {before}
    union.close()


def test_files_with_one_name_are_not_indexed(stack: Stack) -> None:
    union = stack.union()
    Client(union).append((b"s",), b"!")
    union.close()
    assert not os.path.exists(stack.work + b"/index")


def test_metacopy_and_index(stack: Stack) -> None:
    union = stack.union(index="on", metacopy="on")
    client = Client(union)
    client.chmod(B, 0o640)
    client.unlink(B)
    client.rename(C, D, 0)
    assert client.read(A, 100, 0) == client.read(D, 100, 0) == b"lower data"
    seen = union_snapshot(union), links_of(union)
    union.close()
    assert seen_by_us(stack, index="on", metacopy="on") == seen
    if KERNEL:
        assert seen_by_kernel(stack, b"metacopy=on") == seen
    union = stack.union(index="on", metacopy="on")
    client = Client(union)
    client.append(A, b"!")
    client.link(A, C)
    assert {client.read(name, 100, 0) for name in (A, C, D)} == {b"lower data!"}
    assert {client.getattr(name).nlink for name in (A, C, D)} == {3}
    union.close()


def test_open_files_follow(stack: Stack) -> None:
    """A reader of one name sees what is written through another, and an object without names keeps its data."""
    union = stack.union()
    client = Client(union)
    handle = client.open(A)
    client.write(B, b"LOWER", 0)
    assert client.fread(handle, 10, 0) == b"LOWER data"
    for name in NAMES:
        client.unlink(name)
    assert client.fread(handle, 10, 0) == b"LOWER data"
    assert client.fstat(handle)[2] == 0
    client.close(handle)
    union.close()
    assert os.listdir(stack.work + b"/index") == []


# Whose index it is.


@pytest.mark.parametrize("change", ["lower", "upper"])
def test_a_strange_index_is_refused(change: str, stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    union = stack.union()
    Client(union).append(A, b"!")
    union.close()
    if change == "lower":
        other = stack.path + b"/other"
        os.mkdir(other)
        stack.lowers.insert(0, other)
    else:
        assert stack.upper is not None
        os.rename(stack.upper, stack.path + b"/old")
        os.mkdir(stack.upper)
    with pytest.raises(UserError) as caught:
        stack.union(index="on")
    assert "upper" in str(caught.value)
    stack.union().close()
    assert "index=off" in caplog.text
    caplog.clear()
    stack.union(index="off").close()
    assert not caplog.text


def test_what_no_name_is_left_of_is_removed_at_mount(stack: Stack) -> None:
    union = stack.union()
    Client(union).append(A, b"!")
    union.close()
    index = stack.work + b"/index"
    (name,) = os.listdir(index)
    assert stack.upper is not None
    os.unlink(stack.upper + b"/a")
    os.setxattr(index + b"/" + name, TRUSTED + NLINK, b"U-1")
    os.mkdir(index + b"/#12")
    stack.union().close()
    assert os.listdir(index) == []


# Crashes.


class IndexCase(Case):
    """A case whose lower has hard links, some of them copied up before; views have link counts in them."""

    options_of_all: ClassVar[dict[str, str]] = {"index": "on"}

    def prepare(self, stack: Stack) -> None:
        link_lower(stack)
        before = PREPARED[self.scenario.name.rpartition(", ")[2]]
        if before is not None:
            union = self.union(stack)
            before(Client(union))
            union.close()

    def view(self, stack: Stack) -> Tree:
        tree, links = seen_by_us(stack, index="on")
        assert stack.litter() == []
        if self.compare_kernel:
            assert seen_by_kernel(stack) == (tree, links)
        return self.comparable(with_links(tree, links))

    def seen(self, union: Union) -> Tree:
        return self.comparable(with_links(union_snapshot(union), links_of(union)))


def with_links(tree: Tree, links: Links) -> Tree:
    return {
        path: record._replace(xattrs=(*record.xattrs, (b"links", repr(links.get(path)).encode())))
        for path, record in tree.items()
    }


PREPARED: dict[str, Operation | None] = {
    "untouched": None,
    "copied up": write(A),
    "copied up by this name": write(B),
    "last name": in_turn(write(A), unlink(A), unlink(C)),
}
_ONE_STEP = ("write", "truncate", "chmod", "unlink", "link", "rename", "rename over", "exchange")


def scenarios() -> Iterator[Scenario]:
    layer = directory({b"d": directory(), b"e": directory()})
    for prepared in PREPARED:
        for name in (*_ONE_STEP, *(["rename over another name"] if prepared != "last name" else [])):
            yield Scenario(f"{name}, {prepared}", directory(), layer, OPERATIONS[name])


@pytest.mark.parametrize("scenario", list(scenarios()), ids=lambda scenario: scenario.name)
def test_crash(scenario: Scenario, scratch: bytes) -> None:
    case = IndexCase(scenario, scratch)
    assert case.errno == 0
    crash_everywhere(case)


@pytest.mark.parametrize("scenario", list(scenarios()), ids=lambda scenario: scenario.name)
def test_fault(scenario: Scenario, scratch: bytes) -> None:
    """An error anywhere leaves the view of before or after, in this mount and in the next."""
    fail_everywhere(IndexCase(scenario, scratch))
