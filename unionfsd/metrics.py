"""Counters and latencies of one mount: plain integers, bumped where things happen.

Exporters read frozen snapshots and live elsewhere. Every counter only grows. There is one `Counters` per mount and
nothing process-global, and all of it is touched from the one thread that runs the union, so a ``+= 1`` needs no lock.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from time import monotonic

from unionfsd.typed import Final, NamedTuple


class Statistics(NamedTuple):
    """What one mount had done up to a moment."""

    requests: int
    """Requests of the kernel that were dealt with."""
    errors: int
    """Requests answered with an errno: ordinary life, most of them ENOENT."""
    faults: int
    """Requests answered EIO because of a defect: an exception that nobody meant to raise."""
    threaded: int
    """Requests that could not be answered at once: they had to wait, for a thread or for another."""
    copy_ups: int
    """Objects copied up."""
    copied_bytes: int
    """Bytes of file data copied up."""
    skipped_marks: int
    """Best-effort steps of copy-ups that failed: an origin or impure mark, or putting the parent's times back."""
    corrupt: int
    """Times that something of a lower was not what it must be, and was refused."""


class Holdings(NamedTuple):
    """What one mount held at a moment."""

    nodes: int
    """Objects the kernel knows, and their parents."""
    cached_fds: int
    """Descriptors that may be closed when they get too many."""
    fd_limit: int
    """How many of those there may be."""
    fd_hits: int
    """Uses of such a descriptor that found it open, so far; a cache's hits."""
    fd_misses: int
    """Those that had to open it."""
    fd_evictions: int
    """Descriptors closed because there were too many."""
    lists: int
    """Merged lower directories whose names are kept."""
    names: int
    """The names in all of them."""
    lists_read: int
    """How often one was read, so far."""


KINDS: Final = 64
"""Kinds of requests that are told apart, by the numbers of the FUSE protocol; 0 is every other."""
_COLUMNS: Final = 64
"""Bits of a time in nanoseconds: more than any takes."""


class Operation(NamedTuple):
    """Requests of one kind that were answered: `times` has at i those that took less than 2**i ns but not 2**(i-1)."""

    kind: int
    times: tuple[int, ...]
    total_ns: int
    errors: dict[int, int]
    """How often each errno was the answer."""


class Operations:
    """How often, how fast, and with which errors requests were answered, by kind.

    Whoever answers bumps `times` and `totals` in place: a call would cost more than all there is to count. `times` is
    a row for each kind with a column for each length of a time in bits; `totals` are nanoseconds.
    """

    __slots__ = ("errors", "times", "totals")

    def __init__(self) -> None:
        self.times: list[list[int]] = [[0] * _COLUMNS for _ in range(KINDS)]
        self.totals: list[int] = [0] * KINDS
        self.errors: dict[tuple[int, int], int] = {}

    def took(self, kind: int, nanoseconds: int) -> None:
        """Count a request that was answered; what the fastest path does by itself."""
        self.times[kind][nanoseconds.bit_length()] += 1
        self.totals[kind] += nanoseconds

    def failed(self, kind: int, number: int) -> None:
        """Count an errno; the request counts besides."""
        key = (kind, number)
        self.errors[key] = self.errors.get(key, 0) + 1

    def snapshot(self) -> Iterator[Operation]:
        """Every kind that occurred."""
        for kind, times in enumerate(self.times):
            if any(times):
                errors = {number: count for (of, number), count in self.errors.items() if of == kind}
                yield Operation(kind, tuple(times), self.totals[kind], errors)


class Work(NamedTuple):
    """Something long that is under way: what, on which path, how much of it is done, since when (monotonic).

    `total` is None where nobody knows it beforehand. `done` may be asked at any time, from any thread.
    """

    kind: str
    path: bytes | None
    total: int | None
    done: Callable[[], int]
    since: float


class Samples:
    """Which nodes requests are about, by looking at some of them. It ends by itself when nobody reads it."""

    LIMIT: Final = 20_000

    def __init__(self) -> None:
        self.by_node: dict[int, int] = {}
        self.left = self.LIMIT

    def take(self, nodeid: int) -> bool:
        """Count a request; False when that is enough."""
        self.by_node[nodeid] = self.by_node.get(nodeid, 0) + 1
        self.left -= 1
        return self.left > 0


class Counters:
    """The running counts behind `Statistics`, the operations, and what is under way."""

    __slots__ = (
        "copied_bytes",
        "copy_ups",
        "corrupt",
        "errors",
        "faults",
        "operations",
        "samples",
        "skipped_marks",
        "threaded",
        "work",
    )

    def __init__(self) -> None:
        self.errors = 0
        self.faults = 0
        self.threaded = 0
        self.copy_ups = 0
        self.copied_bytes = 0
        self.skipped_marks = 0
        self.corrupt = 0
        self.operations = Operations()
        self.work: dict[int, Work] = {}
        self.samples: Samples | None = None

    @contextlib.contextmanager
    def working(self, kind: str, path: bytes | None, total: int | None, done: Callable[[], int]) -> Iterator[None]:
        """Say that something long is under way, for as long as the context lasts."""
        work = Work(kind, path, total, done, monotonic())
        self.work[id(work)] = work
        try:
            yield
        finally:
            del self.work[id(work)]

    def sample(self, nodeid: int) -> None:
        """Count a request among the samples; called where there are some."""
        if self.samples is not None and not self.samples.take(nodeid):
            self.samples = None

    def statistics(self) -> Statistics:
        """A snapshot that later counting does not change."""
        return Statistics(
            requests=sum(map(sum, self.operations.times)),
            errors=self.errors,
            faults=self.faults,
            threaded=self.threaded,
            copy_ups=self.copy_ups,
            copied_bytes=self.copied_bytes,
            skipped_marks=self.skipped_marks,
            corrupt=self.corrupt,
        )
