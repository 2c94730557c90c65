"""What arrives from the kernel's writeback cache was written earlier: it leaves the time of the change alone."""

from __future__ import annotations

from tests.union.stack import stacked
from tests.union.trees import directory, regular
from unionfsd.steps import Blocking, Op, run
from unionfsd.union import Caller, SetAttr, Union

LARGE = memoryview(bytes(1 << 20))


def first_step(op: Op[int]) -> Blocking:
    step = op.send(None)
    assert isinstance(step, Blocking)
    return step


def resume(op: Op[int], step: Blocking) -> int:
    """Do the step in hand, and the others; returns the result."""
    value = step.fn()
    while True:
        try:
            following = op.send(value)
        except StopIteration as stop:
            written: int = stop.value
            return written
        assert isinstance(following, Blocking)
        value = following.fn()


def set_mtime(union: Union, nodeid: int, mtime_ns: int) -> None:
    run(union.setattr(nodeid, SetAttr(mtime_ns=mtime_ns), Caller(0, 0, 0, 0)))


def test_the_mtime_stays_and_the_last_one_said_wins() -> None:
    with stacked([directory({b"low": regular(b"data")})], directory({b"file": regular()})) as stack:
        union = stack.union()
        for name in (b"file", b"low"):
            nodeid = union.lookup(union.root, name).nodeid
            before = union.getattr(nodeid).st.st_mtime_ns
            run(union.write_late(nodeid, memoryview(b"small"), 0))
            assert union.getattr(nodeid).st.st_mtime_ns == before
            first, second = (union.write_late(nodeid, LARGE, offset) for offset in (0, 1 << 20))
            steps = first_step(first), first_step(second)
            assert resume(first, steps[0]) == len(LARGE)
            set_mtime(union, nodeid, 77)
            assert resume(second, steps[1]) == len(LARGE)
            attributes = union.getattr(nodeid).st
            assert (attributes.st_mtime_ns, attributes.st_size) == (77, 2 << 20)
        union.close()


def test_space_and_copies_leave_the_mtime_where_the_kernel_keeps_it() -> None:
    """In one tick of its clock the kernel sees no change of the mtime, and says nothing: the file's must not move."""
    with stacked([directory({b"low": regular(b"data")})], directory({b"file": regular(b"x")})) as stack:
        union = stack.union()
        file, low = (union.lookup(union.root, name).nodeid for name in (b"file", b"low"))
        for nodeid in (file, low):
            before = union.getattr(nodeid).st.st_mtime_ns
            run(union.fallocate(nodeid, 0, 0, 100_000, late=True))
            assert run(union.copy_file_range(file, 0, nodeid, 200_000, 1, late=True)) == 1
            attributes = union.getattr(nodeid).st
            assert (attributes.st_mtime_ns, attributes.st_size) == (before, 200_001)
        set_mtime(union, file, 77)
        run(union.fallocate(file, 0, 0, 300_000))
        assert union.getattr(file).st.st_mtime_ns != 77
        union.close()
