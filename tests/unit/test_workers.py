"""The threads of a channel: what waits for the kernel must not keep one from what the kernel waits for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import pytest

from unionfsd.fuse.exchange import Deferred
from unionfsd.fuse.workers import THREADS, Workers
from unionfsd.steps import Blocking, Calling

#: Threads hand it back, nothing more.
SOMEBODY = cast("Deferred", object())


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers()
    yield workers
    workers.close()


def results(workers: Workers, count: int) -> list[Any]:
    """What the next `count` steps that end returned."""
    deadline = time.monotonic() + 20
    found: list[Any] = []
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} came back"
        if workers.ready:
            found.append(workers.take().value)
        else:
            time.sleep(0.001)
    return found


@pytest.mark.parametrize("count", [1, THREADS + 3])
def test_steps_end_while_the_kernel_keeps_who_called_it_waiting(workers: Workers, count: int) -> None:
    answered = threading.Event()
    try:
        for _ in range(count):
            workers.call(answered.wait)
            workers.submit(SOMEBODY, Calling(answered.wait))
        for number in range(3):
            workers.submit(SOMEBODY, Blocking(partial(int, number)))
        assert sorted(results(workers, 3)) == [0, 1, 2]
    finally:
        answered.set()
    assert results(workers, count) == [True] * count


def test_calls_one_after_the_other_have_one_thread(workers: Workers) -> None:
    before = threading.active_count()
    for number in range(20):
        workers.submit(SOMEBODY, Calling(partial(int, number)))
        assert results(workers, 1) == [number]
        time.sleep(0.002)
    assert threading.active_count() - before <= 2
