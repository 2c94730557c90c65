"""The ledger: what was stored is found by whoever adopts the memory, whatever moment the process ended at."""

from __future__ import annotations

import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unionfsd.ledger import ROOT_ID, Flag, Intent, Kind, Ledger, Record
from unionfsd.syscalls import Fd

NAMES = st.one_of(st.binary(min_size=1, max_size=24), st.binary(min_size=20, max_size=70), st.binary(max_size=255))


def again(ledger: Ledger) -> Ledger:
    """The same memory as another process has it."""
    return Ledger.adopt(Fd(os.dup(ledger.fd.fd)))


def by_id(ledger: Ledger) -> dict[int, Record]:
    return {record.nodeid: record for record in ledger.records()}


@given(st.lists(st.tuples(st.sampled_from(["add", "place", "drop", "count", "flag"]), NAMES, st.integers(0, 1 << 30))))
def test_a_successor_reads_what_was_stored(steps: list[tuple[str, bytes, int]]) -> None:
    ledger = Ledger.new()
    known: dict[int, Record] = {}
    try:
        for what, name, number in steps:
            chosen = list(known)[number % len(known)] if known else 0
            if what == "add":
                nodeid = ledger.add(number, name, number + 1, Flag.DIRECTORY)
                assert nodeid not in known
                known[nodeid] = Record(nodeid, number, name, number + 1, 0, Flag.DIRECTORY)
            elif not chosen:
                continue
            elif what == "place":
                ledger.place(chosen, number, name)
                known[chosen] = known[chosen]._replace(parent=number, name=name)
            elif what == "drop":
                ledger.drop(chosen)
                del known[chosen]
            elif what == "count":
                ledger.count(chosen)
                known[chosen] = known[chosen]._replace(lookups=known[chosen].lookups + 1)
            else:
                ledger.flag(chosen, Flag.LINKED)
                known[chosen] = known[chosen]._replace(flags=known[chosen].flags | Flag.LINKED)
        successor = again(ledger)
        assert by_id(successor) == known == {nodeid: successor.record(nodeid) for nodeid in known}
        for nodeid in known:
            successor.drop(nodeid)
        fresh = [successor.add(ROOT_ID, b"x" * 30, 1) for _ in range(len(steps) + 1)]
        assert not set(fresh) & set(known), "a nodeid was given twice"
        assert set(by_id(again(successor))) == set(fresh)
        successor.close()
    finally:
        ledger.close()


def test_a_nodeid_is_not_given_twice_although_its_record_is() -> None:
    ledger = Ledger.new()
    first = ledger.add(ROOT_ID, b"a", 1)
    ledger.drop(first)
    second = ledger.add(ROOT_ID, b"a", 1)
    assert first != second
    assert not ledger.has(first)
    assert ledger.has(second)
    ledger.close()


def test_what_was_counted_for_a_request_is_known_until_the_next() -> None:
    ledger = Ledger.new()
    a, b = ledger.add(ROOT_ID, b"a", 1), ledger.add(ROOT_ID, b"b", 2)
    ledger.begin(10)
    ledger.count(a)
    ledger.begin(12)
    ledger.count(b)
    ledger.count(a)
    successor = again(ledger)
    assert successor.hand == 12
    assert [successor.left(), successor.left()] == [(12, [b, a])] * 2
    assert again(successor).left() == (12, [b, a])
    assert [successor.lookups(a), successor.lookups(b)] == [2, 1]
    successor.begin(14)
    assert again(successor).left() == (14, [])
    successor.close()
    ledger.close()


def test_what_was_about_to_be_done_is_known() -> None:
    ledger = Ledger.new()
    assert ledger.intent() is None
    ledger.begin(10)
    ledger.intend(Kind.RENAME, 1, b"a" * 255, record=5, other=6, new_parent=7, new_name=b"b" * 255, ino=8, lower=True)
    expected = Intent(10, Kind.RENAME, 5, 6, 1, 7, 8, b"a" * 255, b"b" * 255, True, False)
    assert again(ledger).intent() == expected
    ledger.done()
    assert again(ledger).intent() == expected._replace(applied=True)
    ledger.close()


def test_requests_under_way_are_known_once() -> None:
    ledger = Ledger.new()
    places = [ledger.hold(unique) for unique in range(100, 3000)]
    assert places[-1] == -1, "there is room for so many only"
    ledger.let_go(places[0])
    ledger.let_go(-1)
    successor = again(ledger)
    assert set(successor.under_way()) == set(range(101, 100 + 1024))
    assert successor.under_way() == []
    ledger.close()


def test_pages_without_a_record_are_given_back() -> None:
    ledger = Ledger.new()
    nodeids = [ledger.add(ROOT_ID, b"name", 1) for _ in range(20000)]
    before = os.fstat(ledger.fd.fd).st_blocks
    for nodeid in nodeids[1:]:
        ledger.drop(nodeid)
    ledger.give_back()
    assert os.fstat(ledger.fd.fd).st_blocks < before // 5
    assert list(by_id(ledger)) == nodeids[:1]
    ledger.close()


@pytest.mark.parametrize("content", [b"", b"unionfs\x00" + bytes(200), bytes(4096)])
def test_what_another_version_wrote_is_refused(content: bytes) -> None:
    fd = Fd(os.memfd_create("other"))
    os.write(fd.fd, content)
    with pytest.raises(OSError, match="another version") as caught:
        Ledger.adopt(fd)
    assert caught.value.errno == errno.EPROTO
