"""Files made in advance: used soon, of the mode that is wanted, and none where nothing follows."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from unionfsd import stock as module
from unionfsd import syscalls
from unionfsd.stock import Stock
from unionfsd.syscalls import Fd


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Made:
    """Counts what is made, and makes it; `failing` has it fail."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.failing = False

    def __call__(self, dirfd: int, mode: int, make: object = syscalls.tmpfile_at) -> Fd:
        if self.failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert callable(make)
        fd = make(dirfd, mode)
        assert isinstance(fd, Fd)
        self.numbers.append(os.fstat(fd.fd).st_ino)
        return fd


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "monotonic", clock)
    return clock


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    made = Made()
    monkeypatch.setattr(syscalls, "tmpfile_at", made)
    return made


@pytest.fixture
def stock(disk: Path, clock: Clock, made: Made) -> Iterator[Stock]:
    directory = os.open(disk, os.O_PATH)
    stock = Stock(directory)
    yield stock
    stock.close()
    os.close(directory)


def number(fd: Fd) -> int:
    return os.fstat(fd.fd).st_ino


def take_two(stock: Stock, mode: int = 0o644) -> None:
    """Two in a row: a third is likely."""
    for _ in range(2):
        stock.take(mode).close()


def test_the_next_one_is_what_was_made_in_advance(stock: Stock, made: Made) -> None:
    take_two(stock)
    stock.add(0o644)
    with stock.take(0o644) as third:
        assert number(third) == made.numbers[2]
        assert len(made.numbers) == 3


def test_it_has_the_mode_that_is_wanted_and_can_be_written(stock: Stock) -> None:
    take_two(stock, 0o600)
    stock.add(0o600)
    with stock.take(0o755) as fd:
        assert stat.S_IMODE(os.fstat(fd.fd).st_mode) == 0o755
        assert os.pwrite(fd.fd, b"x", 0) == 1


def test_one_that_has_waited_is_not_used(stock: Stock, made: Made, clock: Clock) -> None:
    take_two(stock)
    stock.add(0o644)
    clock.now += 1
    with stock.take(0o644) as fd:
        assert number(fd) == made.numbers[3]


def test_none_is_made_where_none_follows(stock: Stock, made: Made, clock: Clock) -> None:
    stock.add(0o644)
    assert made.numbers == []
    stock.take(0o644).close()
    stock.add(0o644)
    assert len(made.numbers) == 1, "the first"
    clock.now += 1
    stock.take(0o644).close()
    stock.add(0o644)
    assert len(made.numbers) == 2, "one a second later"
    stock.take(0o644).close()
    clock.now += 1
    stock.add(0o644)
    assert len(made.numbers) == 3, "after a sync that took long"


def test_no_more_than_one_waits(stock: Stock, made: Made) -> None:
    take_two(stock)
    stock.add(0o644)
    stock.add(0o644)
    assert len(made.numbers) == 3


def test_what_cannot_be_made_in_advance_fails_when_it_is_needed(stock: Stock, made: Made) -> None:
    take_two(stock)
    made.failing = True
    stock.add(0o644)
    with pytest.raises(OSError, match="No space"):
        stock.take(0o644)
    made.failing = False
    stock.take(0o644).close()


def test_what_waits_goes_with_the_stock(stock: Stock) -> None:
    before = len(os.listdir("/proc/self/fd"))
    take_two(stock)
    stock.add(0o644)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    stock.close()
    assert len(os.listdir("/proc/self/fd")) == before
