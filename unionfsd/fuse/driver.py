"""Drives the union's operations under trio: blocking steps go to threads, gates are waited for.

Rules this file obeys:

- An operation that was begun runs to its end, whatever is cancelled around it: half of one would leave a staged object
  unpublished, or a gate closed for ever.
- The operation itself runs in the trio thread only; a thread sees nothing but the function of a `Blocking` step.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from unionfsd.steps import Blocking, Gate, Op, Step
from unionfsd.typed import Any, Final, TypeVar

T = TypeVar("T")

THREADS: Final = 16
"""Blocking steps at work at once, in one trio run; the others queue."""

#: What `finish` is at work on, for `quiesce`.
_unfinished: Final = trio.lowlevel.RunVar[set[trio.Event]]("unionfsd: operations under way")
_limiter: Final = trio.lowlevel.RunVar[trio.CapacityLimiter]("unionfsd: blocking steps")


async def drive(op: Op[T]) -> T:
    """Run `op` from its beginning; returns its result, raises what it raises."""
    try:
        step = op.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    return await finish(op, step)


async def finish(op: Op[T], step: Step) -> T:
    """Run `op`, which has just yielded `step`, to its end; returns its result, raises what it raises.

    For a transport that began it inline and could not answer at once. A cancellation from outside waits until it is
    done.
    """
    ended = trio.Event()
    unfinished = _under_way()
    unfinished.add(ended)
    try:
        with trio.CancelScope(shield=True):
            result = await _to_end(op, step)
    finally:
        unfinished.discard(ended)
        ended.set()
    return result


async def quiesce() -> None:
    """Wait until everything that is under way now, here, has ended; what begins meanwhile is not waited for."""
    for ended in list(_under_way()):
        await ended.wait()


def _under_way() -> set[trio.Event]:
    try:
        return _unfinished.get()
    except LookupError:
        unfinished: set[trio.Event] = set()
        _unfinished.set(unfinished)
        return unfinished


async def _to_end(op: Op[T], step: Step) -> T:
    while True:
        resume = await _perform(op, step)
        try:
            step = resume()
        except StopIteration as stop:
            result: T = stop.value
            return result
        finally:
            del resume  # holds the error of the step, which holds this frame: a cycle that keeps descriptors open


async def _perform(op: Op[Any], step: Step) -> Callable[[], Step]:
    """Do what `step` asks; returns how `op` goes on after it."""
    if isinstance(step, Gate):
        await opened(step)
        return partial(op.send, None)
    try:
        value = await _in_thread(step)
    except Exception as error:
        return partial(op.throw, error)
    return partial(op.send, value)


async def opened(gate: Gate) -> None:
    """Wait until `gate` is open."""
    event = trio.Event()
    gate.on_open(event.set)
    await event.wait()


async def _in_thread(step: Blocking) -> Any:
    try:
        limiter = _limiter.get()
    except LookupError:
        limiter = trio.CapacityLimiter(THREADS)
        _limiter.set(limiter)
    return await trio.to_thread.run_sync(step.fn, limiter=limiter)
