"""What a user does before the power fails, and what may be there afterwards.

A `Program` is a list of steps, each one operation. It runs on the mount and on a plain directory; the trees of the
latter are the states that may be found. A file system that keeps the order of changes leaves the state after some step:
not before the last one that was synced, not after the last one that was begun. Data that was written and not synced may
be there in any part.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Final, NamedTuple

from tests.union.client import RENAME_EXCHANGE, Plain
from tests.union.scenarios import Operation, Scenario
from tests.union.trees import OLD, Obj, Record, Tree, directory, join, regular, snapshot

#: Operations of the scenarios after which data is not synced.
_WRITES: Final = ("write", "tmpfile", "fallocate")
#: Those that ext4 and xfs make in two: what is cut off may be zeros before the file is shorter. A copy-up is not.
_CUTS: Final = ("empty", "truncate")


class Step(NamedTuple):
    """One operation: `run` on the root of a mount or of a directory.

    `dirty`: paths whose data is not on disk after it; `clean`: those whose data is. `syncs`: whoever sees it end finds
    the last step that changed these paths done, and all before that.
    """

    name: str
    run: Callable[[bytes], None]
    dirty: tuple[bytes, ...] = ()
    clean: tuple[bytes, ...] = ()
    syncs: tuple[bytes, ...] = ()


class Group(NamedTuple):
    """Steps on one directory of the union, of which upper and lower have what is told."""

    upper: Obj | None
    lower: Obj | None
    steps: Sequence[Step]


class Program:
    """Groups, each in a directory `gN`, whose steps come mixed, and now and then one that syncs."""

    def __init__(self, groups: Sequence[Callable[[bytes], Group]], rng: random.Random) -> None:
        made = {b"g%d" % index: make(b"g%d" % index) for index, make in enumerate(groups)}
        self.upper = directory({name: group.upper for name, group in made.items() if group.upper is not None})
        lowers = {name: group.lower for name, group in made.items() if group.lower is not None}
        self.lower = directory({**lowers, b"sync": directory()})
        self.steps = list(_mixed([list(group.steps) for group in made.values()], rng))

    def run(self, root: bytes, before: Callable[[int], None], after: Callable[[int], None]) -> list[int]:
        """Do it all; returns the errno of each step, 0 for none. `before` and `after` are told the number of each."""
        results = []
        for number, step in enumerate(self.steps):
            before(number)
            try:
                step.run(root)
                results.append(0)
            except OSError as exc:
                results.append(exc.errno or -1)
            after(number)
        return results

    def states(self, root: bytes) -> tuple[list[int], list[Tree]]:
        """The results and the trees on a plain directory: before the first step, and after each."""
        trees = [snapshot(root)]

        def after(number: int) -> None:
            trees.append(snapshot(root))

        return self.run(root, lambda number: None, after), trees


def _mixed(queues: list[list[Step]], rng: random.Random) -> Iterator[Step]:
    """The steps of all queues, each in its order, and a barrier after every few."""
    number = 0
    while queues:
        queue = rng.choice(queues)
        yield queue.pop(0)
        queues = [queue for queue in queues if queue]
        if not rng.randrange(6):
            yield from rng.choice((_synced_file, _synced_directory))(b"sync/%d" % number)
            number += 1


def _synced_file(path: bytes) -> Iterator[Step]:
    yield _create(path)
    yield _write(path, 0, b"synced")
    yield _fsync(path)


def _synced_directory(path: bytes) -> Iterator[Step]:
    yield _mkdir(path)._replace(dirty=(path,))
    yield Step("fsync of the directory", partial(_sync, b"sync"), clean=(path,), syncs=(path,))


def scenario_group(scenario: Scenario) -> Callable[[bytes], Group]:
    """One of the scenarios of the crash matrix."""

    def make(base: bytes) -> Group:
        loose = scenario.name.startswith(_WRITES)
        loose |= scenario.name.startswith(_CUTS) and ", lower file" not in scenario.name
        dirty = (base + b"/d/n",) if loose else ()
        return Group(scenario.upper, scenario.lower, [_scenario_step(scenario.name, scenario.operation, base, dirty)])

    return make


def _scenario_step(name: str, operation: Operation, base: bytes, dirty: tuple[bytes, ...]) -> Step:
    def run(root: bytes) -> None:
        operation(Plain(join(root, base)))

    return Step(name, run, dirty)


# Steps.


def _create(path: bytes) -> Step:
    def create(root: bytes) -> None:
        os.close(os.open(join(root, path), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))

    return Step("create", create)


def _mkdir(path: bytes) -> Step:
    return Step("mkdir", lambda root: os.mkdir(join(root, path)))


def _rmdir(path: bytes) -> Step:
    return Step("rmdir", lambda root: os.rmdir(join(root, path)))


def _unlink(path: bytes) -> Step:
    return Step("unlink", lambda root: os.unlink(join(root, path)))


def _rename(path: bytes, new: bytes) -> Step:
    return Step("rename", lambda root: os.rename(join(root, path), join(root, new)))


def _chmod(path: bytes) -> Step:
    return Step("chmod", lambda root: os.chmod(join(root, path), 0o640))


def _sync(path: bytes, root: bytes) -> None:
    fd = os.open(join(root, path), os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _fsync(path: bytes, *names: bytes) -> Step:
    """Sync a file that was changed, which `names` are, too."""
    return Step("fsync", partial(_sync, path), clean=(path, *names), syncs=(path,))


def _write(path: bytes, offset: int, data: bytes, *names: bytes) -> Step:
    def write(root: bytes) -> None:
        fd = os.open(join(root, path), os.O_WRONLY)
        try:
            os.pwrite(fd, data, offset)
        finally:
            os.close(fd)

    return Step("write", write, dirty=(path, *names))


def _pattern(seed: bytes, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


# Groups that do more than one thing to one file.


def copied_up_by_a_write(base: bytes) -> Group:
    """A large lower file is written in its midst, then synced."""
    path = base + b"/d/big"
    lower = directory({b"d": directory({b"big": regular(_pattern(base, 300_000))}, mode=0o751)})
    return Group(
        None,
        lower,
        [_write(path, 100_000, b"W" * 9000), _fsync(path), _write(path, 300_000, b"A" * 5000), _fsync(path)],
    )


def copied_up_by_chmod(base: bytes) -> Group:
    """What is not written comes along whole."""
    names = [b"f%d" % size for size in (1, 5000, 200_000)]
    lower = directory({name: regular(_pattern(base + name, int(name[1:]))) for name in names})
    return Group(None, lower, [_chmod(join(base, name)) for name in names])


def replaced(base: bytes) -> Group:
    """How an editor saves: a new file, synced, over the old one."""
    path, new = base + b"/file", base + b"/file.new"
    return Group(
        None,
        directory({b"file": regular(_pattern(base, 20_000))}),
        [
            _create(new),
            _write(new, 0, _pattern(new, 30_000)),
            _fsync(new),
            _rename(new, path),
        ],
    )


def moved(base: bytes) -> Group:
    """Directories of a lower go round, with files in them that are written."""
    names = {b"a": regular(_pattern(base, 3000)), b"b": directory({b"c": regular()})}

    def rename(old: bytes, new: bytes) -> Step:
        return _rename(base + old, base + new)

    def exchange(root: bytes) -> None:
        Plain(join(root, base)).rename((b"two",), (b"three",), RENAME_EXCHANGE)

    return Group(
        None,
        directory({b"one": directory(names), b"three": directory({b"x": regular(b"x")})}),
        [
            rename(b"/one", b"/two"),
            _write(base + b"/two/a", 10, b"written"),
            _fsync(base + b"/two/a"),
            rename(b"/two/b", b"/b"),
            Step("exchange", exchange),
            rename(b"/three/a", b"/a"),
            _unlink(base + b"/b/c"),
            _rmdir(base + b"/b"),
            _mkdir(base + b"/b"),
        ],
    )


def without_data(base: bytes) -> Group:
    """With metacopy: attributes first, the data when it is written, under one name and under two."""
    one, two, other = base + b"/one", base + b"/two", base + b"/other"
    lower = directory({b"one": regular(_pattern(one, 150_000)), b"two": regular(_pattern(two, 150_000))})
    return Group(
        None,
        lower,
        [
            _chmod(one),
            _chmod(two),
            Step("link", lambda root: os.link(join(root, two), join(root, other))),
            _write(one, 70_000, b"W" * 100),
            _fsync(one),
            _write(other, 70_000, b"W" * 100, two),
            _fsync(two, other),
            Step("truncate", lambda root: os.truncate(join(root, one), 1000), dirty=(one,)),
        ],
    )


def tree_removed(base: bytes) -> Group:
    """rm -r of a directory of a lower, and another in its place."""
    lower = directory({b"d": directory({b"f%d" % number: regular() for number in range(4)})})
    return Group(
        None,
        lower,
        [
            *(_unlink(base + b"/d/f%d" % number) for number in range(4)),
            _rmdir(base + b"/d"),
            _mkdir(base + b"/d"),
            _create(base + b"/d/f1"),
            Step("utimens", lambda root: os.utime(join(root, base + b"/d/f1"), ns=(OLD, OLD))),
        ],
    )


def renamed_over(base: bytes) -> Group:
    """Files of a lower take the places of others, of the lower and of the upper."""
    lower = directory({b"f%d" % number: regular(b"lower %d" % number) for number in range(8)})
    upper = directory({b"u%d" % number: regular(b"upper %d" % number) for number in range(4)})
    pairs = [(b"f%d" % n, b"u%d" % n) for n in range(4)] + [(b"f4", b"f5"), (b"f6", b"f7")]
    return Group(upper, lower, [_rename(join(base, old), join(base, new)) for old, new in pairs])


LIVES: Final = (renamed_over, copied_up_by_a_write, copied_up_by_chmod, replaced, moved, without_data, tree_removed)


# What may be found.


class Expectation:
    """The states of a program on a plain directory, to hold what was found against."""

    def __init__(self, steps: Sequence[Step], trees: Sequence[Tree]) -> None:
        self._steps = steps
        self._trees = trees

    def states(self, ended: int, begun: int) -> range:
        """Numbers of the states that may be there when so many steps had ended and begun."""
        synced = max((self._changed(i, path) for i in range(ended) for path in self._steps[i].syncs), default=0)
        return range(synced, begun + 1)

    def _changed(self, number: int, path: bytes) -> int:
        """The state after the last step before `number` that changed the path: another sync may have come between."""
        return max((i + 1 for i in range(number) if path in self._steps[i].dirty), default=0)

    def differences(self, found: Tree, ended: int, begun: int) -> list[str]:
        """Nothing if `found` is one of the states, else how it differs from the one that comes nearest."""
        states = self.states(ended, begun)
        loose = {path: self._versions(path, states[0], begun) for path in self._dirty(states[0], begun)}
        nearest: list[str] | None = None
        for state in reversed(states):
            lines = list(_compare(found, self._trees[state], loose))
            if not lines:
                return []
            if nearest is None or len(lines) < len(nearest):
                around = [f"{n}: {step.name} {step.dirty}" for n, step in enumerate(self._steps[:begun])][state - 2 :]
                nearest = [f"against state {state} of {states}, {around}, loose {[*loose]}:", *lines]
        return nearest or []

    def _dirty(self, synced: int, begun: int) -> set[bytes]:
        """Paths whose data may be there in part."""
        dirty: set[bytes] = set()
        for number, step in enumerate(self._steps[:begun]):
            if number < synced:
                dirty -= set(step.clean)
            dirty |= set(step.dirty)
        return dirty

    def _versions(self, path: bytes, synced: int, begun: int) -> list[bytes]:
        """What it held since it was last known to be on disk."""
        clean = max((i + 1 for i in range(synced) if path in self._steps[i].clean), default=0)
        held = (self._trees[state].get(path) for state in range(clean, begun + 1))
        return list({record.data: None for record in held if record is not None})


def _compare(found: Tree, wanted: Tree, loose: dict[bytes, list[bytes]]) -> Iterator[str]:
    for path in sorted(found.keys() | wanted.keys()):
        a, b = found.get(path), wanted.get(path)
        if a == b:
            continue
        if a is None or b is None:
            yield f"{path!r}: {'is missing' if a is None else 'is there'}: {_short(a or b)}"
        elif path not in loose or not _is_part(a, b, loose[path]):
            yield f"{path!r}: {_short(a)} and not {_short(b)}{_first_difference(a, b)}"


def _is_part(found: Record, wanted: Record, versions: Iterable[bytes]) -> bool:
    """Whether it is the object, and each byte of its data is one that was written there, or none was yet."""
    if found._replace(size=0, data=b"", mtime_ns=0) != wanted._replace(size=0, data=b"", mtime_ns=0):
        return False
    known = list(versions)
    if len(found.data) > max(map(len, known)):
        return False
    if any(found.data == version[: len(found.data)] for version in known):
        return True
    return all(
        not byte or any(at < len(version) and version[at] == byte for version in known)
        for at, byte in enumerate(found.data)
    )


def _first_difference(found: Record, wanted: Record) -> str:
    differing = [at for at, (a, b) in enumerate(zip(found.data, wanted.data, strict=False)) if a != b]
    if not differing:
        return ""
    at = differing[0]
    return f"; {len(differing)} bytes from {at} on: {found.data[at : at + 20]!r} and not {wanted.data[at : at + 20]!r}"


def _short(record: Record | None) -> str:
    if record is None:
        return "nothing"
    text = repr(record._replace(data=record.data[:20]))
    return f"{text} ({len(record.data)} bytes)"
