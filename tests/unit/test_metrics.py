"""Counters count, and a snapshot of them stays."""

from __future__ import annotations

import dataclasses

import pytest

from unionfsd.metrics import Counters, Operations, Statistics


def test_a_snapshot_has_every_counter() -> None:
    names = {field.name for field in dataclasses.fields(Counters)} - {"operations", "work", "samples"}
    assert names | {"requests"} == {field.name for field in dataclasses.fields(Statistics)}
    values = {name: number for number, name in enumerate(names, start=1)}
    done = Counters(**values).statistics()  # type: ignore[arg-type]
    assert dataclasses.asdict(done) == values | {"requests": 0}


def test_a_snapshot_does_not_move() -> None:
    counters = Counters()
    before = counters.statistics()
    counters.copy_ups += 1
    counters.operations.took(1, 100)
    assert (before.copy_ups, before.requests) == (0, 0)
    assert (counters.statistics().copy_ups, counters.statistics().requests) == (1, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.copy_ups = 5  # type: ignore[misc]


def test_requests_are_told_apart() -> None:
    operations = Operations()
    for nanoseconds in (1023, 1024, 1025, 1 << 50):
        operations.took(1, nanoseconds)
    operations.took(3, 7)
    operations.failed(3, 2)
    operations.failed(3, 2)
    one, three = operations.snapshot()
    assert (one.kind, one.total_ns) == (1, 1023 + 1024 + 1025 + (1 << 50))
    assert {bits: count for bits, count in enumerate(one.times) if count} == {10: 1, 11: 2, 51: 1}
    assert (three.kind, sum(three.times), three.errors) == (3, 1, {2: 2})
