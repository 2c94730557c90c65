"""Events have numbers without gaps, cost nothing while nobody asks, and say what was missed."""

from __future__ import annotations

import pytest

from unionfsd import events
from unionfsd.events import Events, Who
from unionfsd.fuse.acting import Acting
from unionfsd.steps import Blocking, Op


def recorded(kinds: int) -> Events:
    """Events at work, with one of each number up to `kinds`; the first is "start"."""
    found = Events()
    found.listen()
    for number in range(2, kinds + 1):
        found.record("create", b"/%d" % number)
    return found


def numbers(since: events.Since) -> list[int]:
    return [event.number for event in since.events]


def test_nothing_is_kept_until_somebody_asks() -> None:
    silent = Events()
    assert not silent.recording
    silent.listen()
    silent.listen()
    assert [(event.kind, event.number) for event in silent.since(None, 10).events] == [("start", 1)]


def test_readers_go_on_where_they_were() -> None:
    kept = recorded(5)
    first = kept.since(None, 2)
    assert (numbers(first), first.lost, first.next) == ([1, 2], 0, 3)
    rest = kept.since(first.next, 10)
    assert (numbers(rest), rest.lost, rest.next) == ([3, 4, 5], 0, 6)
    assert kept.since(rest.next, 10) == ([], 0, 6)
    assert numbers(kept.since(0, 10)) == [1, 2, 3, 4, 5]
    assert numbers(kept.since(1000, 10)) == [1, 2, 3, 4, 5]


def test_what_was_dropped_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "RING", 3)
    kept = recorded(10)
    assert (numbers(kept.since(None, 10)), kept.since(None, 10).lost) == ([8, 9, 10], 0)
    assert (numbers(kept.since(5, 10)), kept.since(5, 10).lost) == ([8, 9, 10], 3)
    assert kept.since(0, 10).lost == kept.since(1, 10).lost == 7


def test_recording_ends_when_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    kept = recorded(3)
    now += events.LINGER + 1
    kept.record("create", b"/late")
    assert not kept.recording
    kept.listen()
    assert [event.kind for event in kept.since(None, 10).events] == ["start"]
    assert kept.since(2, 10).lost == 2
    always = Events()
    always.listen(always=True)
    always.listen()
    now += 1e9
    always.record("create", b"/a")
    assert always.recording


def test_waiters_are_woken_once() -> None:
    kept = recorded(1)
    woken: list[str] = []

    def unwanted() -> None:
        woken.append("unwanted")

    kept.on_next(lambda: woken.append("wanted"))
    kept.on_next(unwanted)
    kept.never_mind(unwanted)
    kept.record("create", b"/a")
    kept.record("create", b"/b")
    assert woken == ["wanted"]


def test_the_first_write_of_each_process_to_each_file() -> None:
    kept = recorded(1)
    who = Who(10, 0)
    kept.who = lambda: who
    assert [kept.is_first_write(node) for node in (5, 5, 6, 5)] == [True, False, True, False]
    who = Who(11, 0)
    assert kept.is_first_write(5)
    for node in range(1000, 3000):
        kept.is_first_write(node)
    assert kept.is_first_write(5)


def test_a_deferred_operation_works_for_who_began_it() -> None:
    acting, seen = Acting(), []

    def op() -> Op[str]:
        seen.append(acting.who())
        try:
            yield Blocking(lambda: None)
        except OSError:
            seen.append(acting.who())
        yield Blocking(lambda: None)
        seen.append(acting.who())
        return "done"

    begun = op()
    step = begun.send(None)
    rest = acting.resumed(begun, step, Who(7, 8))
    assert rest.send(None) is step
    acting.now = Who(1, 1)  # another request, between two steps
    rest.throw(OSError())
    assert acting.now == Who(1, 1)
    with pytest.raises(StopIteration) as end:
        rest.send(None)
    assert end.value.value == "done"
    assert seen == [events.NOBODY, Who(7, 8), Who(7, 8)]
