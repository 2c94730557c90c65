"""Counters count, and a snapshot of them stays."""

from __future__ import annotations

from unionfsd.metrics import Counters, Operations, Statistics


def test_a_snapshot_has_every_counter() -> None:
    names = set(Counters.__slots__) - {"operations", "work", "samples"}
    assert names | {"requests"} == set(Statistics._fields)
    values = {name: number for number, name in enumerate(names, start=1)}
    counters = Counters()
    for name, value in values.items():
        setattr(counters, name, value)
    assert counters.statistics()._asdict() == values | {"requests": 0}


def test_a_snapshot_does_not_move() -> None:
    counters = Counters()
    before = counters.statistics()
    counters.copy_ups += 1
    counters.operations.took(1, 100)
    assert (before.copy_ups, before.requests) == (0, 0)
    assert (counters.statistics().copy_ups, counters.statistics().requests) == (1, 1)


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
