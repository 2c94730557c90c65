"""A listing read in pieces, while names come and go: what stays is listed once, and nothing twice.

readdir(3) promises nothing about names that are made or removed during a listing, and everything about the others.
"""

from __future__ import annotations

from itertools import islice

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.union.client import Client
from tests.union.stack import stacked
from tests.union.trees import Entry, Whiteout, directory, regular
from unionfsd.union import Union

NAMES = [b"%c%d" % (letter, number) for letter in b"abc" for number in range(8)]

name_sets = st.sets(st.sampled_from(NAMES))
#: How many entries to read, then what to remove and what to make.
pieces = st.lists(st.tuples(st.integers(1, 6), name_sets, name_sets), max_size=8)


@settings(max_examples=100, deadline=None)
@given(lower=name_sets, upper=name_sets, hidden=name_sets, program=pieces, fresh=st.booleans())
def test_pieces(
    lower: set[bytes],
    upper: set[bytes],
    hidden: set[bytes],
    program: list[tuple[int, set[bytes], set[bytes]]],
    fresh: bool,
) -> None:
    whiteouts: dict[bytes, Entry] = {name: Whiteout() for name in hidden & lower - upper}
    above = directory(whiteouts | dict.fromkeys(upper, regular()))
    with stacked([directory(dict.fromkeys(lower, regular()))], above) as stack:
        union = stack.union()
        present = (lower - hidden) | upper
        stayed, seen = read_in_pieces(union, present, program, forget_iterator=fresh)
        union.close()
    assert len(seen) == len(set(seen)), "a name was listed twice"
    assert stayed <= set(seen), "a name that was there all the time was not listed"


def read_in_pieces(
    union: Union, present: set[bytes], program: list[tuple[int, set[bytes], set[bytes]]], *, forget_iterator: bool
) -> tuple[set[bytes], list[bytes]]:
    """Names that were there all the time, and names listed; nothing that was removed is made again."""
    client = Client(union)
    stayed = set(present)
    seen: list[bytes] = []
    gone: set[bytes] = set()
    entries = union.listdir(union.root, 0)
    cookie = 0
    for count, removed, made in [*program, (10**6, set(), set())]:
        if forget_iterator and cookie:
            entries = union.listdir(union.root, cookie)
        taken = list(islice(entries, count))
        seen += [name for name, *_ in taken]
        cookie = taken[-1][3] if taken else cookie
        for name in sorted(removed & present):
            client.unlink((name,))
        gone |= removed & present
        stayed -= removed
        present = present - removed
        for name in sorted(made - present - gone):
            client.create((name,), 0o600)
            present = present | {name}
    assert seen[:2] == [b".", b".."]
    return stayed, seen[2:]


def test_the_entries_of_a_large_directory_are_looked_up_once_some_were() -> None:
    names = [b"n%d" % number for number in range(10_001)]
    with stacked(
        [directory({b"large": directory(dict.fromkeys(names, regular())), b"small": directory({})})], None
    ) as stack:
        union = stack.union()
        large, small = (union.lookup(union.root, name).nodeid for name in (b"large", b"small"))
        eager = []
        for sought in (names[:60], names[60:70]):
            for name in sought:
                union.lookup(large, name)
            list(zip(range(5), union.listdir(large, 0), strict=False))
            eager.append(union.eager(large))
        assert eager == [False, True]
        union.listdir(small, 0)
        assert union.eager(small)
        union.close()
