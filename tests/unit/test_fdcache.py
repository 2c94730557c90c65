"""The bound on open descriptors holds, whatever is admitted, dropped, used and pinned in whatever order."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unionfsd.fdcache import FdCache, Holder
from unionfsd.syscalls import Fd

CAPACITY = FdCache.MINIMUM


def new_fd() -> Fd:
    return Fd(os.open("/", os.O_PATH | os.O_CLOEXEC))


#: Holders that somebody has: the cache alone keeps none.
alive: list[Holder] = []


@pytest.fixture(autouse=True)
def nobody_has_them_any_more() -> Iterator[None]:
    yield
    alive.clear()


def another() -> Holder:
    alive.append(Holder())
    return alive[-1]


def is_open(fd: int) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def full(cache: FdCache, *, pinned: bool = False) -> list[Holder]:
    """As many holders as fit, admitted in this order."""
    holders = [another() for _ in range(cache.capacity)]
    for holder in holders:
        cache.admit(holder, new_fd())
        if pinned:
            cache.pin(holder)
    return holders


def test_the_capacity_is_never_less_than_one_operation_needs() -> None:
    assert FdCache(1).capacity == CAPACITY
    assert FdCache(CAPACITY + 1).capacity == CAPACITY + 1


def test_one_more_than_fits_closes_one() -> None:
    cache = FdCache(CAPACITY, 4 * CAPACITY)
    holders = full(cache)
    numbers = [holder.fd.fd for holder in holders if holder.fd]
    late = Holder()
    assert is_open(cache.admit(late, new_fd()))
    assert len(cache) == CAPACITY
    gone = [number for holder, number in zip(holders, numbers, strict=True) if holder.fd is None]
    assert len(gone) == 1
    assert late.fd is not None
    assert gone[0] == late.fd.fd or not is_open(gone[0])


def test_what_was_used_stays_a_round_longer() -> None:
    cache = FdCache(CAPACITY, 4 * CAPACITY)
    holders = full(cache)
    cache.admit(another(), new_fd())  # a round of the hand: from here on nobody is hot
    used = next(holder for holder in holders if holder.fd is not None)
    used.hot += 1
    for _ in range(CAPACITY // 2):
        cache.admit(another(), new_fd())
    assert used.fd is not None
    assert sum(holder.fd is None for holder in holders) > CAPACITY // 2


def test_pinned_descriptors_are_never_closed() -> None:
    cache = FdCache(CAPACITY, 2 * CAPACITY)
    pinned = Holder()
    cache.admit(pinned, new_fd())
    cache.pin(pinned)
    for _ in range(5 * CAPACITY):
        cache.admit(another(), new_fd())
    assert pinned.fd is not None
    assert is_open(pinned.fd.fd)
    assert len(cache) == CAPACITY


def test_what_was_just_admitted_stays_open_even_when_all_others_are_pinned() -> None:
    cache = FdCache(CAPACITY, 2 * CAPACITY)
    full(cache, pinned=True)
    late = Holder()
    assert is_open(cache.admit(late, new_fd()))
    assert late.fd is not None


def test_a_holder_that_came_back_counts_once() -> None:
    cache = FdCache(CAPACITY, 4 * CAPACITY)
    holder = Holder()
    for _ in range(3):
        cache.admit(holder, new_fd())
        holder.drop()
    cache.admit(holder, new_fd())
    assert len(cache) == 1


def test_a_new_descriptor_replaces_the_old_one() -> None:
    cache = FdCache(CAPACITY, 4 * CAPACITY)
    holder = Holder()
    old = cache.admit(holder, new_fd())
    new = cache.admit(holder, new_fd())
    assert is_open(new)
    assert not is_open(old)
    assert len(cache) == 1


def test_a_thread_keeps_the_descriptor_it_was_given() -> None:
    cache = FdCache(CAPACITY, 4 * CAPACITY)
    holder = Holder()
    cache.admit(holder, new_fd())
    in_thread = holder.fd
    assert in_thread is not None
    for _ in range(3 * CAPACITY):
        cache.admit(another(), new_fd())
    assert holder.fd is None
    assert is_open(in_thread.fd)


@pytest.mark.parametrize("pinned", [False, True])
def test_a_forgotten_holder_makes_room(pinned: bool) -> None:
    cache = FdCache(CAPACITY, 4 * CAPACITY)
    holders = full(cache)
    if pinned:
        cache.pin(holders[0])
    assert holders[0].fd is not None
    number = holders[0].fd.fd
    cache.forget(holders[0])
    assert not is_open(number)
    assert len(cache) == CAPACITY - 1
    cache.admit(another(), new_fd())
    assert all(holder.fd is not None for holder in holders[1:])
    cache.forget(Holder())  # it never had one


@pytest.mark.parametrize("pinned", [False, True])
def test_closing_closes_everything(pinned: bool) -> None:
    cache = FdCache(CAPACITY, 4 * CAPACITY)
    numbers = [holder.fd.fd for holder in full(cache, pinned=pinned) if holder.fd]
    cache.close()
    assert len(cache) == 0
    assert not any(map(is_open, numbers))


_actions = st.tuples(st.sampled_from(["admit", "admit", "admit", "use", "drop", "forget", "pin"]), st.integers(0, 99))


@given(st.lists(_actions, min_size=200, max_size=600))
@settings(deadline=None, max_examples=30)
def test_the_bound_holds(actions: list[tuple[str, int]]) -> None:
    cache = FdCache(CAPACITY, 4 * CAPACITY)
    holders = [Holder() for _ in range(100)]
    gc.collect()  # what other tests left open must not be closed just now
    before = len(os.listdir("/proc/self/fd"))
    try:
        for action, index in actions:
            act(cache, holders[index], action)
            assert all(holder.fd is not None for holder in holders if holder.pin)
            free = sum(holder.fd is not None for holder in holders if not holder.pin)
            assert free <= len(cache) <= CAPACITY
        assert len(os.listdir("/proc/self/fd")) - before == sum(holder.fd is not None for holder in holders)
    finally:
        for holder in holders:
            holder.drop()


def act(cache: FdCache, holder: Holder, action: str) -> None:
    if action == "admit":
        assert is_open(cache.admit(holder, new_fd()))
        assert holder.fd is not None
    elif action == "use":
        holder.hot = int(holder.fd is not None)
    elif action == "drop":
        holder.pin = None
        holder.drop()
    elif action == "forget":
        cache.forget(holder)
    else:
        if holder.fd is not None:
            cache.pin(holder)


def test_what_may_not_be_closed_takes_room_from_what_may() -> None:
    cache = FdCache(4 * CAPACITY)
    full(cache)
    kept = [cache.keep(new_fd) for _ in range(2 * CAPACITY)]
    cache.admit(another(), new_fd())
    assert len(cache) == 2 * CAPACITY
    assert all(is_open(fd.fd) for fd in kept)
    with pytest.raises(OSError) as caught:
        cache.keep(new_fd)
    assert caught.value.errno == errno.ENFILE
    kept.pop()
    cache.keep(new_fd)


def test_no_user_has_more_than_half_of_what_is_left() -> None:
    user = 1000
    cache = FdCache(CAPACITY, 3 * CAPACITY, who=lambda: user)
    bound = 3 * CAPACITY - CAPACITY // 2
    held: dict[int, list[Fd]] = {}
    for user in (1000, 1001, 1002, 0):  # the cache asks for it
        held[user] = []
        with contextlib.suppress(OSError):
            while True:
                held[user].append(cache.keep(new_fd))
    assert [len(fds) for fds in held.values()] == [80, 40, 20, bound - 140]
    held[1000].clear()
    user = 1003
    assert len([cache.keep(new_fd) for _ in range(CAPACITY // 2)]) == CAPACITY // 2


def test_a_holder_that_nobody_has_goes_with_its_descriptor() -> None:
    cache = FdCache(CAPACITY)
    holder = Holder()
    number = cache.admit(holder, new_fd())
    before = cache.usage()
    del holder
    assert not is_open(number)
    assert len(cache) == 0
    assert cache.usage() == before
    full(cache)
    assert len(cache) == CAPACITY
