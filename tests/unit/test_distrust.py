"""What is taken back from the kernel: also what it was given to keep while that was under way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from unionfsd.fuse import notify
from unionfsd.fuse.distrust import Distrust
from unionfsd.fuse.workers import Workers


class Here:
    """A union in which every node has a place, and a thread that is this one."""

    def place(self, nodeid: int) -> tuple[int, bytes]:
        return 1, b"name"

    def call(self, fn: Callable[[], None]) -> None:
        fn()


def test_a_failure_meanwhile_is_taken_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[int] = []
    here = Here()
    distrust = Distrust(-1, cast("Any", here), cast("Workers", here))

    def drop(fd: int, nodeid: int, place: tuple[int, bytes] | None) -> None:
        dropped.append(nodeid)
        if len(dropped) < 3:
            distrust.drop(nodeid)

    monkeypatch.setattr(notify, "drop", drop)
    distrust.drop(5)
    assert dropped == [5, 5, 5]
    assert not distrust.dropping
