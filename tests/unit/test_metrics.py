"""Counters count, and a snapshot of them stays."""

from __future__ import annotations

import dataclasses

import pytest

from unionfsd.metrics import Counters, Statistics


def test_a_snapshot_has_every_counter() -> None:
    names = [field.name for field in dataclasses.fields(Counters)]
    assert names == [field.name for field in dataclasses.fields(Statistics)]
    values = {name: number for number, name in enumerate(names, start=1)}
    assert dataclasses.asdict(Counters(**values).statistics()) == values


def test_a_snapshot_does_not_move() -> None:
    counters = Counters()
    before = counters.statistics()
    counters.copy_ups += 1
    assert before.copy_ups == 0
    assert counters.statistics().copy_ups == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.copy_ups = 5  # type: ignore[misc]
