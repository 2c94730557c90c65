"""Every change of names, with death at each store and call on the way, and again while the next process takes over.

However often that happens, who asked is answered as if nobody had died, and every node that the kernel knows is what it
would be: by its links, its content, and the names that lead to it. The disk is checked by mounting it anew.

UNIONFSD_EVERY_CRASH=1 tries all pairs of deaths, and not some.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import pytest

from tests.union.client import union_snapshot
from tests.union.lives import NEVER, Machine, Path
from tests.union.stack import Stack, scratch_directory
from tests.union.trees import Tree, Whiteout, directory, regular, settled, timeless
from unionfsd.fuse import wire
from unionfsd.fuse.abi import Opcode
from unionfsd.ledger import Flag
from unionfsd.syscalls import RENAME_EXCHANGE

K = TypeVar("K")
T = TypeVar("T")

EVERY = bool(os.environ.get("UNIONFSD_EVERY_CRASH"))
#: How many single deaths and how many pairs are tried with each operation.
SINGLE, PAIRS = 4, 3
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")

LOWER = directory(
    {
        b"l": regular(b"lower"),
        b"l2": regular(b"lower 2"),
        b"m": regular(b"merged below"),
        b"m2": regular(b"merged below 2"),
        b"d": directory({b"x": regular(b"x"), b"y": regular(b"y")}),
        b"e": directory(),
        b"me": directory({b"z": regular(b"z")}),
    }
)
UPPER = directory(
    {
        b"u": regular(b"upper"),
        b"u2": regular(b"upper 2"),
        b"m": regular(b"merged"),
        b"m2": regular(b"merged 2"),
        b"ue": directory(),
        b"ud": directory({b"w": regular(b"w")}),
        b"me": directory({b"z": Whiteout()}),
        b"o": directory({b"p": regular(b"p")}),
    }
)
SINCE_NS = time.time_ns() - 10**9
KNOWN: tuple[Path, ...] = (
    *((name,) for name in (b"l", b"l2", b"m", b"m2", b"d", b"e", b"me", b"u", b"u2", b"ue", b"ud", b"o")),
    *((b"d", b"x"), (b"d", b"y"), (b"ud", b"w"), (b"o", b"p")),
)
PERHAPS: tuple[Path, ...] = ((b"n",), (b"o", b"n"), (b"d", b"n"), (b"o", b"k"), (b"o", b"k2"))


def path(text: str) -> Path:
    return tuple(os.fsencode(name) for name in text.split("/"))


# Requests, by what they are sent for.


def remove(machine: Machine, opcode: int, what: str) -> int:
    *above, name = path(what)
    return machine.send(opcode, name + b"\0", nodeid=machine.nodes[tuple(above)])


def unlink(machine: Machine, what: str) -> int:
    return remove(machine, Opcode.UNLINK, what)


def rmdir(machine: Machine, what: str) -> int:
    return remove(machine, Opcode.RMDIR, what)


def rename(machine: Machine, what: str, to: str, flags: int = 0) -> int:
    (*above, name), (*beyond, new) = path(what), path(to)
    body = wire.RENAME2_IN.pack(machine.nodes[tuple(beyond)], flags) + name + b"\0" + new + b"\0"
    return machine.send(Opcode.RENAME2, body, nodeid=machine.nodes[tuple(above)])


def link(machine: Machine, what: str, to: str) -> int:
    *beyond, new = path(to)
    body = wire.LINK_IN.pack(machine.nodes[path(what)]) + new + b"\0"
    return machine.send(Opcode.LINK, body, nodeid=machine.nodes[tuple(beyond)])


def make(machine: Machine, opcode: int, what: str, body: bytes, tail: bytes = b"") -> int:
    *above, name = path(what)
    return machine.send(opcode, body + name + b"\0" + tail, nodeid=machine.nodes[tuple(above)])


def create(machine: Machine, what: str) -> int:
    return make(machine, Opcode.CREATE, what, wire.CREATE_IN.pack(os.O_RDWR | os.O_EXCL, stat.S_IFREG | 0o644, 0o22, 0))


def mkdir(machine: Machine, what: str) -> int:
    return make(machine, Opcode.MKDIR, what, wire.MKDIR_IN.pack(0o755, 0o22))


def mkfifo(machine: Machine, what: str) -> int:
    return make(machine, Opcode.MKNOD, what, wire.MKNOD_IN.pack(stat.S_IFIFO | 0o644, 0, 0o22))


def symlink(machine: Machine, what: str) -> int:
    return make(machine, Opcode.SYMLINK, what, b"", b"target\0")


def tmpfile(machine: Machine, what: str) -> int:
    return make(machine, Opcode.TMPFILE, what, wire.CREATE_IN.pack(os.O_RDWR, stat.S_IFREG | 0o644, 0o22, 0))


def setxattr(machine: Machine, what: str) -> int:
    body = wire.SETXATTR_IN.pack(1, os.XATTR_CREATE, 0) + b"user.x\0" + b"1"
    return machine.send(Opcode.SETXATTR, body, nodeid=machine.nodes[path(what)])


def removexattr(machine: Machine, what: str) -> int:
    return machine.send(Opcode.REMOVEXATTR, b"user.x\0", nodeid=machine.nodes[path(what)])


def chmod(machine: Machine, what: str) -> int:
    body = wire.SETATTR_IN.pack(1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0o600, 0, 0)
    return machine.send(Opcode.SETATTR, body, nodeid=machine.nodes[path(what)])


def truncate(machine: Machine, what: str) -> int:
    body = wire.SETATTR_IN.pack(8, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    return machine.send(Opcode.SETATTR, body, nodeid=machine.nodes[path(what)])


def look(machine: Machine, what: str) -> int:
    return make(machine, Opcode.LOOKUP, what, b"")


def open_(machine: Machine, what: str) -> int:
    return machine.send(Opcode.OPEN, wire.OPEN_IN.pack(os.O_RDWR, 0), nodeid=machine.nodes[path(what)])


def release(machine: Machine, what: str) -> int:
    return machine.send(Opcode.RELEASE, wire.RELEASE_IN.pack(0, os.O_RDWR, 0, 0), nodeid=machine.nodes[path(what)])


def link_nameless(machine: Machine, to: str) -> int:
    """Give the file a name that `tmpfile` made last."""
    *beyond, new = path(to)
    body = wire.LINK_IN.pack(max(machine.lookups)) + new + b"\0"
    return machine.send(Opcode.LINK, body, nodeid=machine.nodes[tuple(beyond)])


# Cases.


Send = Callable[[Machine], int]


class Case(NamedTuple):
    """What is done before, and then with death on the way."""

    name: str
    before: tuple[Send, ...]
    operation: Send
    passthrough: bool = False


def said(function: Callable[..., int], *args: object) -> tuple[str, Send]:
    words = " ".join(str(arg) for arg in args)
    return f"{function.__name__} {words}", lambda machine: function(machine, *args)


def step(function: Callable[..., int], *args: object) -> Send:
    return said(function, *args)[1]


def case(what: tuple[str, Send], *before: Send, where: str = "") -> Case:
    return Case(f"{what[0]}{where and f' ({where})'}", before, what[1])


def alias(file: str, name: str) -> tuple[Send, ...]:
    """`file` is also `name`, and either is known."""
    return step(link, file, name), step(look, name)


def once(file: str, name: str) -> tuple[Send, ...]:
    """`file` had another name once."""
    return *alias(file, name), step(unlink, name)


#: What a name may be: how it is called, how that is brought about, by which name it is meant.
SOURCES = (
    ("", (), "l"),
    ("", (), "u"),
    ("", (), "m"),
    ("first of two", alias("u", "o/k"), "u"),
    ("second of two", alias("u", "o/k"), "o/k"),
    ("had two", once("u", "o/k"), "u"),
    ("merged, had two", once("m", "o/k"), "m"),
    ("merged, first of two", alias("m", "o/k"), "m"),
)
TARGETS = (
    ("", (), "n"),
    ("", (), "o/n"),
    ("", (), "l2"),
    ("", (), "u2"),
    ("", (), "m2"),
    ("first of two", alias("u2", "o/k2"), "u2"),
    ("second of two", alias("u2", "o/k2"), "o/k2"),
    ("had two", once("u2", "o/k2"), "u2"),
)


SEVERAL = (
    "create n",
    "mkdir n",
    "symlink n",
    "unlink u",
    "unlink m",
    "rename u n",
    "rename u u2",
    "link u o/n",
    "rmdir ue",
)


def new_objects() -> Iterator[Case]:
    for function in (create, mkdir, mkfifo, symlink, look):
        for where in ("n", "o/n", "d/n"):
            yield case(said(function, where))
    for where in ("l", "m", "u"):
        yield case(said(create, where), step(unlink, where), where="again")
        yield case(said(mkdir, where), step(unlink, where), where="again")
    yield case(said(mkdir, "e"), step(rmdir, "e"), where="again")
    yield case(said(tmpfile, "o/tmp"))
    yield case(said(link_nameless, "o/n"), step(tmpfile, "o/tmp"))


def of_files() -> Iterator[Case]:
    for where, before, name in SOURCES:
        known = name.replace("o/k", "u")
        yield case(said(unlink, name), *before, where=where)
        yield case(said(link, known, "o/n"), *before, where=where)
        yield case(said(chmod, known), *before, where=where)
        yield case(said(truncate, known), *before, where=where)
        yield case(said(setxattr, known), *before, where=where)
        yield case(said(removexattr, known), *before, step(setxattr, known), where=where)
        for beyond, also, new in TARGETS:
            yield case(said(rename, name, new), *before, *also, where=", ".join(filter(None, (where, beyond))))
    for name in ("l", "u", "m"):
        for new in ("l2", "u2", "m2", "o/p", "ud"):
            yield case(said(rename, name, new, RENAME_EXCHANGE))
    yield case(said(unlink, "u"), *alias("u", "l3"), *alias("u", "o/k"), step(unlink, "l3"), where="had three")


def of_directories() -> Iterator[Case]:
    for name in ("e", "ue", "me"):
        yield case(said(rmdir, name))
    for name in ("d", "ud", "me"):
        for new in ("n", "o/n", "e", "ue", "me"):
            if name != new:
                yield case(said(rename, name, new))


def of_nameless() -> Iterator[Case]:
    """Files that have no name any more are reached all the same, wherever they were."""
    for file in ("d/x", "ud/w", "u", "m", "l"):
        yield case(said(chmod, file), step(unlink, file), where="nameless")
    yield case(said(rmdir, "d"), step(unlink, "d/x"), step(unlink, "d/y"), where="its files are known")
    yield case(said(rename, "d", "o/n"), step(unlink, "d/x"), step(unlink, "d/y"), where="its files are known")
    yield case(said(rmdir, "ud"), step(unlink, "ud/w"), where="its file is known")


def opening() -> Iterator[Case]:
    yield Case("open", (), step(open_, "u"), passthrough=True)
    yield Case("open again", (step(open_, "u"),), step(open_, "u"), passthrough=True)
    yield Case("release", (step(open_, "u"), step(open_, "u")), step(release, "u"), passthrough=True)
    yield Case("release last", (step(open_, "u"),), step(release, "u"), passthrough=True)
    yield Case("create, open", (), step(create, "n"), passthrough=True)


CASES = [*new_objects(), *of_files(), *of_directories(), *of_nameless(), *opening()]
#: One of each kind.
SOME = [case for case in CASES if case.name.split(" (")[0] in SEVERAL]


class Seen(NamedTuple):
    """What the kernel was answered and sees then; `left`: lookups that are counted when it has forgotten everything."""

    error: int
    nodes: dict[object, tuple[object, ...]]
    names: dict[Path, object]
    disk: Tree
    log: str
    opens: int
    left: int


def prepare(machine: Machine, before: tuple[Send, ...]) -> None:
    for depth in (1, 2):
        machine.know(path for path in KNOWN if len(path) == depth)
    for send in before:
        reply = machine.receive(send(machine))
        assert not reply.error
        machine.entered(reply)


def observed(machine: Machine, error: int, made: int) -> Seen:
    """What the kernel sees now, by labels in place of nodeids; the mount ends."""
    labels: dict[int, object] = {nodeid: name for name, nodeid in machine.nodes.items()}
    if made:
        labels.setdefault(made, "made")
    nodes = {labels[nodeid]: what for nodeid, what in machine.seen(labels).items()}
    asked = {
        name: machine.send(Opcode.LOOKUP, name[-1] + b"\0", nodeid=machine.nodes[name[:-1]])
        for name in (*KNOWN, *PERHAPS)
    }
    names: dict[Path, object] = {}
    for name, unique in asked.items():
        reply = machine.receive(unique)
        found = machine.entered(reply)
        names[name] = reply.error or (labels.get(found, "another") if found else "nothing")
    opens = machine.opens(machine.nodes[(b"u",)])
    machine.forget_all()
    left, log = sum(each.lookups for each in machine.records() if not each.flags & Flag.OPENS), machine.said()
    machine.end()
    machine.union.stack.unlock()
    again = machine.stack.union()
    disk = timeless(settled(union_snapshot(again), SINCE_NS))
    again.close()
    assert machine.stack.litter() == []
    return Seen(error, nodes, names, disk, log, opens, left)


class Runs:
    """Runs of cases, each over layers of its own."""

    def __init__(self, scratch: bytes) -> None:
        self._scratch = scratch
        self._count = 0

    def run(self, case: Case, *dooms: int, beside: Send | None = None) -> Seen | None:
        """What came of a case, with deaths. With `beside`, that is under way from before until after the first death.

        None when there was none: how far `beside` had come differs.
        """
        hangs = beside is not None and bool(dooms)
        with self._machine(case, hangs=hangs) as machine:
            waiting = 0 if beside is None else beside(machine)
            machine.settle()
            machine.arm(*dooms)
            reply = machine.receive(case.operation(machine))
            made = machine.entered(reply)
            machine.disarm()
            if hangs and machine.lives == 1:
                return None
            if waiting:
                assert not machine.receive(waiting).error
            return observed(machine, reply.error, made)

    def points(self, case: Case, *dooms: int, beside: Send | None = None) -> range:
        """The points after those deaths at which the process can die that comes then."""
        with self._machine(case, hangs=beside is not None) as machine:
            if beside is not None:
                beside(machine)
            machine.settle()
            machine.arm(*dooms, NEVER)
            machine.receive(case.operation(machine))
            passed = NEVER - machine.disarm()
            return range(1, 1 + passed) if machine.lives > len(dooms) else range(0)

    @contextlib.contextmanager
    def _machine(self, case: Case, *, hangs: bool) -> Iterator[Machine]:
        self._count += 1
        path = self._scratch + b"/%d" % self._count
        os.mkdir(path)
        stack = Stack(path, [LOWER], UPPER)
        with Machine(stack, redirect_dir="on", fsync=False, passthrough=case.passthrough, hangs=hangs) as machine:
            prepare(machine, case.before)
            yield machine
        shutil.rmtree(path)

    def check(self, case: Case, expected: Seen, *dooms: int, beside: Send | None = None) -> None:
        """Nobody sees these deaths."""
        seen = self.run(case, *dooms, beside=beside)
        if seen is None:
            return
        where = f"death at {' and '.join(map(str, dooms))}"
        assert not seen.log, where
        assert seen.error == expected.error, where
        assert_same(
            seen.nodes, {name: is_gone(seen.nodes[name], was) or was for name, was in expected.nodes.items()}, where
        )
        assert_same(seen.names, expected.names, where)
        assert_same(seen.disk, expected.disk, where)
        # What is counted is never less than what the kernel has, and at most one more for each death.
        assert 0 <= seen.opens - expected.opens <= len(dooms), where
        assert 0 <= seen.left <= len(dooms), where


def assert_same(seen: Mapping[K, object], expected: Mapping[K, object], where: str = "") -> None:
    keys = [key for key in {**seen, **expected} if seen.get(key) != expected.get(key)]
    assert [(key, seen.get(key)) for key in keys] == [(key, expected.get(key)) for key in keys], where


def is_gone(seen: tuple[object, ...], was: tuple[object, ...]) -> tuple[object, ...] | None:
    """ESTALE of a directory that has no name any more: what it was is not known after a death."""
    gone = ("errno", errno.ESTALE)
    return gone if seen == gone and was[1] == 0 and stat.S_ISDIR(int(str(was[0]), 8)) else None


@pytest.fixture
def runs() -> Iterator[Runs]:
    with scratch_directory() as path:
        yield Runs(path)


def some(points: Sequence[T], count: int, chance: random.Random) -> Sequence[T]:
    return points if EVERY or count >= len(points) else chance.sample(points, count)


@pytest.mark.timeout(3600 if EVERY else 60)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_nobody_sees_a_death(case: Case, runs: Runs) -> None:
    expected, points = runs.run(case), runs.points(case)
    assert expected is not None
    assert expected.left == 0
    chance = random.Random(case.name)
    for number in some(points, SINGLE, chance):
        runs.check(case, expected, number)
    later = runs.points(case, points[-1])
    for first, second in some(list(itertools.product(points, later)), PAIRS, chance):
        runs.check(case, expected, first, second)


@pytest.mark.timeout(3600 if EVERY else 60)
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_nobody_sees_a_death_beside_another_operation(case: Case, runs: Runs) -> None:
    """That is sent again, too, and first; what it does must not make the next process forget the other."""
    beside = step(rename, "d/y", "d/q")
    expected, points = runs.run(case, beside=beside), runs.points(case, beside=beside)
    assert expected is not None
    chance = random.Random(case.name)
    later = runs.points(case, points[-2], beside=beside)
    # Late, when it is done and not answered, and beyond the start of the next process.
    pairs = list(itertools.product(points[len(points) // 3 :], later[len(later) // 3 :]))
    for first, second in some(pairs, SINGLE, chance):
        runs.check(case, expected, first, second, beside=beside)
