"""The protocol of operations, driven without an event loop."""

from __future__ import annotations

import errno

import pytest

from unionfsd import steps
from unionfsd.steps import Blocking, DeadlockError, Gate, Op


def failing() -> None:
    raise OSError(errno.ENOSPC, "full")


def test_the_result_of_a_step_goes_back_in() -> None:
    def inner() -> Op[int]:
        first: int = yield Blocking(lambda: 1)
        second: int = yield Blocking(lambda: 2)
        return first + second

    def outer() -> Op[list[int]]:
        first = yield from inner()
        return [first, (yield Blocking(lambda: 4))]

    assert steps.run(outer()) == [3, 4]


def test_an_operation_may_end_without_a_step() -> None:
    def op() -> Op[str]:
        yield from ()
        return "done"

    assert steps.run(op()) == "done"


def test_what_a_step_raises_is_raised_at_its_yield() -> None:
    seen: list[int | None] = []

    def op() -> Op[str]:
        try:
            yield Blocking(failing)
        except OSError as exc:
            seen.append(exc.errno)
        result: str = yield Blocking(lambda: "went on")
        return result

    assert steps.run(op()) == "went on"
    assert seen == [errno.ENOSPC]


def test_an_operation_may_end_where_a_step_failed() -> None:
    def op() -> Op[str]:
        try:
            yield Blocking(failing)
        except OSError:
            return "gave up"
        return "went on"

    assert steps.run(op()) == "gave up"


def test_what_an_operation_lets_through_reaches_the_caller() -> None:
    cleaned = []

    def op() -> Op[None]:
        try:
            yield Blocking(failing)
        finally:
            cleaned.append(True)

    with pytest.raises(OSError) as caught:
        steps.run(op())
    assert caught.value.errno == errno.ENOSPC
    assert cleaned


def test_an_open_gate_holds_nobody_up() -> None:
    gate = Gate()
    gate.open()

    def op() -> Op[str]:
        assert (yield gate) is None
        return "through"

    assert steps.run(op()) == "through"


def test_a_closed_gate_is_a_deadlock_where_nobody_else_runs() -> None:
    def op() -> Op[None]:
        yield Gate()

    with pytest.raises(DeadlockError):
        steps.run(op())


def test_a_gate_calls_each_who_waits_once_and_in_order() -> None:
    gate = Gate()
    called: list[str] = []
    gate.on_open(lambda: called.append("first"))
    gate.on_open(lambda: called.append("second"))
    assert called == []
    gate.open()
    gate.open()
    assert called == ["first", "second"]
    gate.on_open(lambda: called.append("late"))
    assert called == ["first", "second", "late"]


def test_who_is_let_through_finds_the_gate_open() -> None:
    gate = Gate()
    seen: list[bool] = []
    gate.on_open(lambda: seen.append(gate.opened))
    gate.open()
    assert seen == [True]
