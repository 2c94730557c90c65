"""When memory is asked for, and given back."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from unionfsd.fuse.pressure import Pressure
from unionfsd.ledger import Ledger


class Counting:
    """A union of which only the size matters."""

    nodes = 0

    def known(self) -> int:
        return self.nodes


def test_memory_is_given_back_once_when_most_was_forgotten() -> None:
    union: Any = Counting()
    pressure = Pressure(union, notifier=None)  # type: ignore[arg-type]
    found = []
    for union.nodes in (10, 100_000, 60_000, 26_000, 20_000, 10_000, 10, 19_000, 10):
        found.append(pressure.spare())
    assert found == [False, False, False, False, True, False, False, False, False]


async def test_giving_back_is_a_full_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    union: Any = Counting()
    collected = []
    monkeypatch.setattr(gc, "collect", lambda: collected.append(True))
    union.ledger = Ledger.new()
    await Pressure(union, notifier=None).give_back()  # type: ignore[arg-type]
    union.ledger.close()
    assert collected == [True]
