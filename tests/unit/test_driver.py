"""The driver runs operations to their end, whatever happens around them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import trio
import trio.testing

from unionfsd.fuse.driver import THREADS, drive, finish
from unionfsd.steps import Blocking, Gate, Op


def blocking(value: Any) -> Op[Any]:
    return (yield Blocking(lambda: value))


async def test_an_operation_that_never_yields_gives_its_result() -> None:
    def op(steps: tuple[Gate, ...] = ()) -> Op[int]:
        yield from steps
        return 7

    assert await drive(op()) == 7


async def test_results_of_steps_go_back_in() -> None:
    def op() -> Op[list[int]]:
        first = yield Blocking(lambda: 1)
        second = yield Blocking(lambda: first + 1)
        return [first, second]

    assert await drive(op()) == [1, 2]


async def test_blocking_steps_leave_the_trio_thread_and_the_operation_does_not() -> None:
    def op() -> Op[tuple[int, int]]:
        inside = yield Blocking(threading.get_ident)
        return inside, threading.get_ident()

    inside, outside = await drive(op())
    assert inside != threading.get_ident()
    assert outside == threading.get_ident()


async def test_an_exception_of_a_step_is_thrown_in_and_may_be_handled() -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    def op() -> Op[str]:
        try:
            yield Blocking(fail)
        except OSError as error:
            number = error.errno
            handled = yield Blocking(lambda: f"handled {number}")
            return str(handled)
        return "not reached"

    assert await drive(op()) == "handled 28"


async def test_an_exception_that_the_operation_lets_through_is_raised() -> None:
    def op() -> Op[None]:
        yield Blocking(lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        await drive(op())


async def test_finish_takes_over_an_operation_that_was_begun_inline() -> None:
    op = blocking("done")
    assert await finish(op, op.send(None)) == "done"


async def test_an_open_gate_does_not_hold_an_operation_up() -> None:
    gate = Gate()
    gate.open()

    def op() -> Op[str]:
        yield gate
        return "through"

    assert await drive(op()) == "through"


async def test_a_gate_holds_every_waiter_until_another_operation_opens_it() -> None:
    gate = Gate()
    order: list[str] = []

    def waiter(name: str) -> Op[None]:
        yield gate
        order.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drive, waiter("a"))
        nursery.start_soon(drive, waiter("b"))
        await trio.testing.wait_all_tasks_blocked()
        assert order == []
        order.append("opened")
        gate.open()
    assert order[0] == "opened"
    assert sorted(order[1:]) == ["a", "b"]


async def test_a_cancelled_operation_runs_to_its_end() -> None:
    began = trio.Event()
    leave = threading.Event()
    trace: list[str] = []

    def op() -> Op[None]:
        began.set()
        yield Blocking(leave.wait)
        trace.append("published")
        yield Blocking(lambda: None)
        trace.append("cleaned up")

    async def release() -> None:
        await began.wait()
        scope.cancel()
        leave.set()

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(drive, op())
            nursery.start_soon(release)
    assert trace == ["published", "cleaned up"]


async def test_an_operation_whose_task_was_cancelled_before_it_ran_still_finishes() -> None:
    trace: list[str] = []

    def op() -> Op[None]:
        yield Blocking(lambda: trace.append("ran"))
        trace.append("finished")

    begun = op()
    step = begun.send(None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(finish, begun, step)
        nursery.cancel_scope.cancel()
    assert trace == ["ran", "finished"]


async def test_the_number_of_threads_is_bounded() -> None:
    lock = threading.Lock()
    full = threading.Barrier(THREADS)
    running = 0
    most = 0

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        full.wait(timeout=30)
        with lock:
            running -= 1

    def op() -> Op[None]:
        yield Blocking(work)

    async with trio.open_nursery() as nursery:
        for _ in range(2 * THREADS):
            nursery.start_soon(drive, op())
    assert most == THREADS
