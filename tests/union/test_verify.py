"""verify=: lowers checked against what they must hold. What was changed in one is EIO, never data, and is told."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from tests.union.client import UMASK, Client, union_snapshot
from tests.union.stack import Stack, stacked
from tests.union.trees import OLD, Obj, Whiteout, diff, directory, regular, symlink
from unionfsd import lookup, steps
from unionfsd.errors import UserError
from unionfsd.events import Event
from unionfsd.images import tree
from unionfsd.options.text import TreeFile
from unionfsd.syscalls import Fd
from unionfsd.union import Union

BIG: Final = b"big" * 100_000
MANY: Final = {b"file%04d" % number: regular(b"") for number in range(30)}
TOP: Final = directory(
    {
        b"f": regular(b"top"),
        b"gone": Whiteout(),
        b"d": directory({b"x": Whiteout("xattr"), b"own": regular(b"own")}),
        b"o": directory({b"kept": regular()}, opaque="trusted"),
        b"wh": directory({b"y": Whiteout("wh")}),
    }
)
BOTTOM: Final = directory(
    {
        b"f": regular(b"bottom"),
        b"gone": regular(b"gone"),
        b"big": regular(BIG),
        b"link": symlink(b"target"),
        b"fifo": Obj(stat.S_IFIFO),
        b"device": Obj(stat.S_IFCHR, rdev=os.makedev(7, 8)),
        b"cap": Obj(stat.S_IFREG, b"cap", xattrs=((b"user.a", b"1"), (b"user.b", b"2"))),
        b"d": directory({b"x": regular(b"hidden"), b"y": regular(b"seen"), b"e": directory({b"z": regular(b"deep")})}),
        b"o": directory({b"hidden": regular()}),
        b"wh": directory({b"y": regular(b"hidden")}),
        b"many": directory(MANY),
    }
)


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(UMASK)
    yield
    os.umask(before)


@pytest.fixture
def stack() -> Iterator[Stack]:
    with stacked([TOP, BOTTOM], directory()) as made:
        yield made


def recorded(lowers: list[bytes]) -> tuple[TreeFile, ...]:
    """Indices of layers as they are now."""
    files = []
    for lower in lowers:
        indexer = tree.Indexer()
        with Fd(os.open(lower, os.O_PATH | os.O_DIRECTORY)) as root:
            for entry in tree.entries(root):
                indexer.add(entry)
        with open(lower + b".index", "wb") as file:
            file.writelines(indexer.pieces())
        files.append(TreeFile(lower + b".index", None))
    return tuple(files)


def alarms(union: Union) -> list[tuple[bytes | None, tuple[str, ...]]]:
    """What was told: paths, and what is wrong."""
    events: list[Event] = union.events.since(None, 100).events
    return [(event.path, event.fields) for event in events if event.kind == "corrupt"]


def test_layers_as_they_were_show_what_they_have(stack: Stack) -> None:
    union = stack.union(verify=recorded(stack.lowers))
    assert diff(union_snapshot(union), stack.expected) == []
    assert (union.statistics().corrupt, alarms(union)) == (0, [])
    client = Client(union)
    written: list[tuple[tuple[bytes, ...], bytes]] = [
        ((b"big",), BIG),
        ((b"f",), b"top"),
        ((b"d", b"e", b"z"), b"deep"),
    ]
    for path, data in written:
        client.write(path, b"B", 0)
        assert client.read(path, len(BIG), 0) == b"B" + data[1:]
    client.chmod((b"cap",), 0o600)
    client.truncate((b"d", b"y"), 2)
    assert client.read((b"d", b"y"), 9, 0) == b"se"
    removed: list[tuple[bytes, ...]] = [(b"d", b"own"), (b"link",), (b"many", b"file0007")]
    for path in removed:
        client.unlink(path)
        with pytest.raises(FileNotFoundError):
            client.stat(path)
    assert union.statistics().corrupt == 0
    union.close()


def keep_time(change: Callable[[bytes], None], *parents: str) -> Callable[[bytes], None]:
    """The change by somebody who hides it: times of what is named are put back."""

    def changed(root: bytes) -> None:
        kept = {path: os.lstat(root + b"/" + os.fsencode(path)) for path in parents}
        change(root)
        for path, st in kept.items():
            name = root + b"/" + os.fsencode(path)
            os.utime(name, ns=(st.st_atime_ns, st.st_mtime_ns), follow_symlinks=False)

    return changed


def put(name: str, data: bytes) -> Callable[[bytes], None]:
    def write(root: bytes) -> None:
        with open(root + b"/" + os.fsencode(name), "wb") as file:
            file.write(data)

    return write


def relink(root: bytes) -> None:
    os.unlink(root + b"/link")
    os.symlink(b"/other", root + b"/link")
    os.utime(root + b"/link", ns=(OLD, OLD), follow_symlinks=False)


def hide(root: bytes) -> None:
    os.unlink(root + b"/f")
    os.mknod(root + b"/f", stat.S_IFCHR)


def flip(root: bytes) -> None:
    with open(root + b"/big", "r+b") as file:
        file.seek(123_456)
        file.write(b"X")


def read(*path: bytes) -> Callable[[Client], Any]:
    return lambda client: client.read(path, 1 << 20, 0)


def look(*path: bytes) -> Callable[[Client], Any]:
    return lambda client: client.stat(path)


TOP_LAYER, BOTTOM_LAYER = 0, 1
#: Name: which lower is changed, how, what then meets it, and what is told.
Case = tuple[int, Callable[[bytes], None], Callable[[Client], Any], tuple[bytes, str]]
CASES: Final[dict[str, Case]] = {
    "data": (1, keep_time(flip, "big"), read(b"big"), (b"/big", "data")),
    "data copied up": (1, keep_time(flip, "big"), lambda c: c.write((b"big",), b"x", 0), (b"/big", "data")),
    "data copied up in part": (1, keep_time(flip, "big"), lambda c: c.truncate((b"big",), 99), (b"/big", "data")),
    "mode": (0, lambda root: os.chmod(root + b"/f", 0o4755), look(b"f"), (b"/f", "metadata")),
    "owner": (1, lambda root: os.chown(root + b"/big", 5, 5), look(b"big"), (b"/big", "metadata")),
    "time": (1, lambda root: os.utime(root + b"/fifo"), look(b"fifo"), (b"/fifo", "metadata")),
    "target": (1, keep_time(relink, "."), lambda c: c.readlink((b"link",)), (b"/link", "metadata")),
    "xattr changed": (1, lambda root: os.setxattr(root + b"/cap", "user.a", b"2"), look(b"cap"), (b"/cap", "metadata")),
    "xattr added": (1, lambda root: os.setxattr(root + b"/cap", "user.c", b""), look(b"cap"), (b"/cap", "metadata")),
    "xattr gone": (1, lambda root: os.removexattr(root + b"/cap", "user.b"), look(b"cap"), (b"/cap", "metadata")),
    "missing": (1, keep_time(lambda root: os.unlink(root + b"/big"), "."), look(b"big"), (b"/big", "missing")),
    "missing beside many": (
        1,
        keep_time(lambda root: os.unlink(root + b"/many/file0001"), "many"),
        look(b"many", b"file0001"),
        (b"/many/file0001", "missing"),
    ),
    "a directory of several gone": (
        1,
        keep_time(lambda root: os.rename(root + b"/d", root + b"/many/d"), ".", "many"),
        look(b"d", b"own"),
        (b"/d", "missing"),
    ),
    "added": (1, keep_time(put("d/new", b""), "d"), look(b"d", b"new"), (b"/d/new", "added")),
    "added, and listed": (1, keep_time(put("d/new", b""), "d"), lambda c: c.listdir((b"d",)), (b"/d", "names")),
    "a directory": (1, lambda root: os.chmod(root + b"/d/e", 0o777), look(b"d", b"e", b"z"), (b"/d/e", "metadata")),
    "opaque no more": (
        0,
        lambda root: os.removexattr(root + b"/o", "trusted.overlay.opaque"),
        look(b"o", b"hidden"),
        (b"/o", "metadata"),
    ),
    "opaque by a file": (
        0,
        keep_time(put("d/.wh..wh..opq", b""), "d"),
        look(b"d", b"y"),
        (b"/d/.wh..wh..opq", "added"),
    ),
    "a whiteout gone": (
        0,
        keep_time(lambda root: os.unlink(root + b"/gone"), "."),
        look(b"gone"),
        (b"/gone", "missing"),
    ),
    "a whiteout for another object": (
        0,
        keep_time(hide, "."),
        look(b"f"),
        (b"/f", "metadata"),
    ),
    "a whiteout added": (
        0,
        keep_time(lambda root: os.mknod(root + b"/big", stat.S_IFCHR), "."),
        look(b"big"),
        (b"/big", "added"),
    ),
    "a whiteout of AUFS added": (0, keep_time(put(".wh.big", b""), "."), look(b"big"), (b"/.wh.big", "added")),
    "a whiteout of AUFS gone": (
        0,
        keep_time(lambda root: os.unlink(root + b"/wh/.wh.y"), "wh"),
        look(b"wh", b"y"),
        (b"/wh/.wh.y", "missing"),
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("names", ["kept", "asked for"])
def test_what_was_changed_is_refused_and_told(
    stack: Stack, case: str, when: str, names: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if names == "asked for":
        monkeypatch.setattr(lookup, "_READ_AT_ONCE", -1)
    which, change, meet, (path, what) = CASES[case]
    files = recorded(stack.lowers)
    if when == "before":
        change(stack.lowers[which])
    union = stack.union(verify=files)
    if when == "after":
        change(stack.lowers[which])
    client = Client(union)
    with pytest.raises(OSError, match="Input/output error") as failure:
        meet(client)
    assert failure.value.errno == errno.EIO
    assert (path, (what,)) in alarms(union)
    assert union.statistics().corrupt > 0
    if not path.startswith(b"/d"):
        assert client.read((b"d", b"e", b"z"), 9, 0) == b"deep"
    union.close()
    assert stack.upper is not None
    assert (os.listdir(stack.upper), stack.litter()) == ([], [])


def test_what_nobody_sees_is_not_looked_at(stack: Stack) -> None:
    files = recorded(stack.lowers)
    put("f", b"other")(stack.lowers[1])
    union = stack.union(verify=files)
    assert Client(union).read((b"f",), 9, 0) == b"top"
    union.close()


def test_a_changed_file_can_be_replaced_and_removed(stack: Stack) -> None:
    files = recorded(stack.lowers)
    keep_time(flip, "big")(stack.lowers[1])
    keep_time(put("d/y", b"SEEN"), "d/y")(stack.lowers[1])
    union = stack.union(verify=files)
    client = Client(union)
    client.truncate((b"big",), 0)
    assert client.read((b"big",), 9, 0) == b""
    client.unlink((b"d", b"y"))
    assert union.statistics().corrupt == 0
    union.close()


def test_a_file_is_looked_at_again_if_it_changed(stack: Stack) -> None:
    union = stack.union(verify=recorded(stack.lowers))
    client = Client(union)
    assert client.read((b"big",), 3, 0) == b"big"
    state = union._table.get(union.lookup(union.root, b"big").nodeid).state()
    union._fds.forget(state)
    assert client.read((b"big",), 3, 0) == b"big"
    flip(stack.lowers[1])
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            client.read((b"big",), 3, 0)
    put("big", BIG)(stack.lowers[1])
    assert client.read((b"big",), 3, 0) == b"big"
    union.close()


def test_data_of_another_layer_is_looked_at(stack: Stack) -> None:
    """metacopy: a file of the upper whose data is in a lower."""
    files = recorded(stack.lowers)
    union = stack.union(verify=files, metacopy="on")
    client = Client(union)
    client.chmod((b"big",), 0o600)
    client.chmod((b"d", b"y"), 0o600)
    keep_time(flip, "big")(stack.lowers[1])
    for meet in (read(b"big"), lambda c: c.write((b"big",), b"x", 0), read(b"big")):
        with pytest.raises(OSError, match="Input/output error"):
            meet(client)
    assert alarms(union) == [(b"/big", ("data",))]
    assert client.read((b"d", b"y"), 9, 0) == b"seen"
    client.write((b"d", b"y"), b"S", 0)
    assert client.read((b"d", b"y"), 9, 0) == b"Seen"
    union.close()


def test_readers_share_one_look(stack: Stack) -> None:
    union = stack.union(verify=recorded(stack.lowers))
    nodeid = union.lookup(union.root, b"big").nodeid
    ops = [union.read(nodeid, 3, 0) for _ in range(4)]
    first = ops[0].send(None)
    assert isinstance(first, steps.Blocking)
    assert all(isinstance(op.send(None), steps.Gate) for op in ops[1:])
    assert bytes(ended(ops[0], first.fn())) == b"big"
    assert [bytes(ended(op, None)) for op in ops[1:]] == [b"big"] * 3
    union.close()


def ended(op: steps.Op[memoryview], value: object) -> memoryview:
    """What an operation gives that was answered `value`."""
    try:
        while True:
            step = op.send(value)
            assert isinstance(step, steps.Blocking)
            assert "read_all" in repr(step.fn)  # the data that was asked for, and no further look
            value = step.fn()
    except StopIteration as done:
        data: memoryview = done.value
        return data


def test_an_index_that_is_not_the_one_meant_is_refused(stack: Stack) -> None:
    files = recorded(stack.lowers)
    wrong = files[0]._replace(digest=bytes(32))
    for verify, words in (((wrong, None), "changed"), ((TreeFile(b"/nonexistent", None), None), "No such file")):
        with pytest.raises(UserError, match=words):
            stack.union(verify=verify)
    with open(files[0].path, "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="not the index"):
        stack.union(verify=files)


def test_a_changed_root_is_not_mounted(stack: Stack) -> None:
    files = recorded(stack.lowers)
    os.chmod(stack.lowers[0], 0o700)
    with pytest.raises(UserError, match="layer"):
        stack.union(verify=files)


def test_a_layer_without_an_index_is_taken_as_it_is(stack: Stack) -> None:
    verify = (None, recorded(stack.lowers)[1])
    put("f", b"other")(stack.lowers[0])
    keep_time(flip, "big")(stack.lowers[1])
    union = stack.union(verify=verify)
    client = Client(union)
    assert client.read((b"f",), 9, 0) == b"other"
    with pytest.raises(OSError, match="Input/output error"):
        client.read((b"big",), 1, 0)
    union.close()
