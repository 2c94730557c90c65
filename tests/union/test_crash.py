"""The crash and the fault matrix: every operation from every state, whole, and cut off at each of its system calls.

Crash: everything stops in front of the nth call that changes a file system. Whoever mounts the layers next must find
the view of before or that of after, and an empty work directory; kernel overlayfs must agree. Fault: the nth call fails
instead, and the operation must clean up after itself in the same way.

UNIONFSD_EVERY_CRASH=1 runs all pairs of states for operations on two names, not only those that differ in kind.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import time
import traceback
from collections.abc import Callable, Iterator
from typing import ClassVar, TypeAlias

import pytest

from tests.union.client import UMASK, Client, FileSystem, Plain, union_snapshot
from tests.union.scenarios import SINGLE, Operation, Scenario, double_scenarios, single_scenarios
from tests.union.seam import CRASHED, Exiting, Failing, Seam, StoppedError, Stopping
from tests.union.stack import Stack, has_kernel_overlayfs, scratch_directory
from tests.union.trees import Tree, diff, plant, settled, snapshot, timeless
from unionfsd.union import Union

Crash: TypeAlias = Callable[["Case", Stack, int], None]

EVERY = bool(os.environ.get("UNIONFSD_EVERY_CRASH"))
SCENARIOS = [*single_scenarios(), *double_scenarios(every=EVERY)]
#: The operations that write or replace whiteouts, where every kind of state occurs.
DELETING = [
    s
    for s in SCENARIOS
    if s.name.split(",")[0] in ("create", "mkdir", "unlink", "rmdir", "rename", "link") and "merged parent" in s.name
]
#: One state for each operation.
SAMPLE = [
    s for s in SCENARIOS if s.name.endswith((", lower file, merged parent", "lower file to whiteout, merged parents"))
]
KERNEL = has_kernel_overlayfs()

#: A child forked here runs the operation alone; other threads, if a plugin has some, are not needed in it.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(UMASK)
    yield
    os.umask(before)


def attempt(operation: Operation, client: FileSystem) -> int:
    """errno of the operation, 0 when it succeeded."""
    try:
        operation(client)
    except OSError as exc:
        return exc.errno or -1
    return 0


class Case:
    """One scenario: its layers built afresh as often as needed, and the views before and after."""

    #: Of ours.
    options_of_all: ClassVar[dict[str, str]] = {}
    #: Options of the kernel's overlayfs, each after a comma.
    kernel_options = b""

    def __init__(self, scenario: Scenario, scratch: bytes, whiteout: str = "auto") -> None:
        self.scenario = scenario
        self.options = {"whiteout": whiteout, **self.options_of_all}
        # Kernel overlayfs knows nothing of `.wh.` files.
        self.compare_kernel = KERNEL and whiteout != "wh"
        self.scratch = scratch
        self.built = 0
        self.since_ns = time.time_ns() - 10**9
        self.verified: list[Tree] = []
        stack = self.stack()
        self.before = self.view(stack)
        with Seam() as seam:
            union = self.union(stack)
            mounting = len(seam.calls)
            self.errno = attempt(scenario.operation, Client(union))
            self.calls = seam.calls[mounting:]
            union.close()
        self.after = self.view(stack)

    def stack(self) -> Stack:
        path = self.scratch + b"/%d" % self.built
        self.built += 1
        os.mkdir(path)
        stack = Stack(path, [self.scenario.lower], self.scenario.upper)
        self.prepare(stack)
        return stack

    def prepare(self, stack: Stack) -> None:
        """What else is done to the layers."""

    def union(self, stack: Stack) -> Union:
        return stack.union(**self.options)

    def view(self, stack: Stack) -> Tree:
        """What the next mount shows; it must have swept the work directory, and kernel overlayfs must agree."""
        union = self.union(stack)
        seen = union_snapshot(union)
        union.close()
        assert stack.litter() == []
        assert stack.upper is not None
        raw = settled(snapshot(stack.upper), self.since_ns)
        if self.compare_kernel and raw not in self.verified:
            assert diff(seen, stack.kernel_tree(self.kernel_options)) == []
            self.verified.append(raw)
        return self.comparable(seen)

    def seen(self, union: Union) -> Tree:
        """What a mount shows."""
        return self.comparable(union_snapshot(union))

    def comparable(self, tree: Tree) -> Tree:
        return timeless(settled(tree, self.since_ns))

    def must_be_whole(self, seen: Tree, where: str) -> None:
        """The view is the one before or the one after."""
        if seen not in (self.before, self.after):
            changes = "\n".join(["against before:", *diff(seen, self.before), "after:", *diff(seen, self.after)])
            pytest.fail(f"{where} of {self.calls}:\n{changes}")


@pytest.fixture
def scratch() -> Iterator[bytes]:
    with scratch_directory() as path:
        yield path


def in_child(work: Callable[[], None]) -> int:
    """Exit status of a child that does `work`."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 70
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_result(scenario: Scenario, scratch: bytes) -> None:
    """Undisturbed, the operation does what it does in a plain directory with the same content."""
    case = Case(scenario, scratch)
    os.mkdir(scratch + b"/model")
    stack = Stack(scratch + b"/model", [scenario.lower], scenario.upper)
    plain = scratch + b"/model/plain"
    plant(plain, stack.expected)
    assert attempt(scenario.operation, Plain(plain)) == case.errno
    union = case.union(stack)
    attempt(scenario.operation, Client(union))
    seen = union_snapshot(union)
    union.close()
    assert diff(settled(seen, case.since_ns), settled(snapshot(plain), case.since_ns)) == []


def crash(case: Case, stack: Stack, index: int) -> None:
    """Mount, run the operation, and stop for good in front of its call `index`."""
    union = case.union(stack)
    with Stopping(index) as seam:
        with contextlib.suppress(StoppedError):
            attempt(case.scenario.operation, Client(union))
        assert seam.stopped
        union.close()


def crash_in_child(case: Case, stack: Stack, index: int) -> None:
    """The same by a process that exits."""

    def work() -> None:
        client = Client(case.union(stack))
        with Exiting(index):
            attempt(case.scenario.operation, client)

    assert in_child(work) == CRASHED


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_crash(scenario: Scenario, scratch: bytes) -> None:
    crash_everywhere(Case(scenario, scratch))


def crash_everywhere(case: Case, crash: Crash = crash) -> None:
    if case.errno:
        assert case.after == case.before
    for index in range(len(case.calls)):
        stack = case.stack()
        crash(case, stack, index)
        case.must_be_whole(case.view(stack), f"crash in front of call {index}")


@pytest.mark.parametrize("scenario", SAMPLE, ids=lambda scenario: scenario.name)
def test_crash_of_a_process(scenario: Scenario, scratch: bytes) -> None:
    crash_everywhere(Case(scenario, scratch), crash_in_child)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_fault(scenario: Scenario, scratch: bytes) -> None:
    fail_everywhere(Case(scenario, scratch))


def fail_everywhere(case: Case) -> None:
    for index in range(len(case.calls)):
        number = errno.ENOSPC if index % 2 else errno.EIO
        stack = case.stack()
        union = case.union(stack)
        with Failing(index, number):
            got = attempt(case.scenario.operation, Client(union))
        seen = case.seen(union)
        union.close()
        # What could not be cleaned away is left to the next mount.
        litter = [] if case.calls[index] in ("unlink_at", "rmdir_at") else stack.litter()
        where = f"{errno.errorcode[number]} from call {index} of {case.calls}"
        case.must_be_whole(seen, where)
        assert got in (number, case.errno), f"errno {got}: {where}"
        if got == 0:
            assert seen == case.after, where
        assert litter == [], where
        assert diff(case.view(stack), seen) == [], where


@pytest.mark.parametrize("whiteout", ["xattr", "wh"])
@pytest.mark.parametrize("scenario", DELETING, ids=lambda scenario: scenario.name)
def test_other_whiteouts(scenario: Scenario, whiteout: str, scratch: bytes) -> None:
    """The same where the upper cannot have device nodes, or neither them nor xattrs."""
    case = Case(scenario, scratch, whiteout)
    crash_everywhere(case)
    fail_everywhere(case)


@pytest.mark.parametrize("name", ["create", "mkdir", "unlink", "rmdir", "write"])
def test_crash_of_the_recovery(name: str, scratch: bytes) -> None:
    """Whoever mounts after a crash may crash as well, in front of each of its own calls."""
    state = {"create": "whiteout", "mkdir": "whiteout", "rmdir": "merged directory, whited out"}.get(name, "lower file")
    scenario = next(s for s in SCENARIOS if s.name == f"{name}, {state}, merged parent")
    case = Case(scenario, scratch)
    for index in first_of_each_litter(case):
        for second in itertools.count():
            stack = case.stack()
            crash_in_child(case, stack, index)
            status = in_child(functools.partial(mount, stack, second))
            case.must_be_whole(case.view(stack), f"crash in front of call {index}, then {second} of the mount")
            if status != CRASHED:
                assert status == 0
                break


def first_of_each_litter(case: Case) -> list[int]:
    """Calls in front of which a crash leaves something else in the work directory than one before did."""
    found: dict[tuple[str, ...], int] = {}
    for index in range(len(case.calls)):
        stack = case.stack()
        crash_in_child(case, stack, index)
        found.setdefault(tuple(stack.litter()), index)
    return list(found.values())


def mount(stack: Stack, index: int) -> None:
    """Mount and crash in front of the mount's own call `index`."""
    with Exiting(index):
        stack.union()


@pytest.mark.parametrize("name", SINGLE)
def test_matrix_is_not_idle(name: str) -> None:
    """Every operation of the matrix has a state from which it succeeds and changes something."""
    assert any(map(is_effective, (s for s in SCENARIOS if s.name.startswith(f"{name}, "))))


def is_effective(scenario: Scenario) -> bool:
    with scratch_directory() as path:
        case = Case(scenario, path)
    return not case.errno and bool(case.calls) and case.before != case.after


@pytest.mark.parametrize("volatile", [False, True])
def test_copy_up_is_synced_before_it_is_published(scratch: bytes, volatile: bool) -> None:
    """After a power failure, too, the name must not lead to a file whose data never reached the disk."""
    scenario = next(s for s in SCENARIOS if s.name == "chmod, lower file, merged parent")
    os.mkdir(scratch + b"/0")
    union = Stack(scratch + b"/0", [scenario.lower], scenario.upper).union(volatile=volatile)
    with Seam() as seam:
        scenario.operation(Client(union))
    union.close()
    publish = min(seam.calls.index(name) for name in ("renameat2", "link_fd", "link_at") if name in seam.calls)
    synced = {"fsync", "fdatasync", "syncfs"} & set(seam.calls[:publish])
    assert bool(synced) is not volatile, seam.calls
