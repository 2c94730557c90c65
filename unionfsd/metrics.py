"""Counters of one mount: plain integers, bumped where things happen.

Exporters read frozen snapshots and live elsewhere. Every counter only grows. There is one `Counters` per mount and
nothing process-global, and all of it is touched from the one thread that runs the union, so a ``+= 1`` needs no lock.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Statistics:
    """What one mount had done up to a moment."""

    requests: int
    """Requests taken from the kernel."""
    errors: int
    """Requests answered with an errno: ordinary life, most of them ENOENT."""
    faults: int
    """Requests answered EIO because of a defect: an exception that nobody meant to raise."""
    threaded: int
    """Steps that had to leave the event loop for a thread."""
    copy_ups: int
    """Objects copied up."""
    copied_bytes: int
    """Bytes of file data copied up."""
    skipped_marks: int
    """Best-effort steps of copy-ups that failed: an origin or impure mark, or putting the parent's times back."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """What one mount held at a moment."""

    nodes: int
    """Objects the kernel knows, and their parents."""
    cached_fds: int
    """Descriptors that may be closed when they get too many."""
    fd_limit: int
    """How many of those there may be."""


@dataclass(slots=True)
class Counters:
    """The running counts behind `Statistics`."""

    requests: int = 0
    errors: int = 0
    faults: int = 0
    threaded: int = 0
    copy_ups: int = 0
    copied_bytes: int = 0
    skipped_marks: int = 0

    def statistics(self) -> Statistics:
        """A snapshot that later counting does not change."""
        return Statistics(
            requests=self.requests,
            errors=self.errors,
            faults=self.faults,
            threaded=self.threaded,
            copy_ups=self.copy_ups,
            copied_bytes=self.copied_bytes,
            skipped_marks=self.skipped_marks,
        )
