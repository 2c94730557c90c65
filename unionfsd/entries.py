"""Entries: what objects are made of.

An `Entry` is a value that lookup makes and copy-up replaces; the truth it speaks of is on the disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from .fdcache import FdCache
from .format import Digest, Redirect
from .layers import LowerDir
from .syscalls import Fd
from .typed import Any, Final, NamedTuple


class Source(NamedTuple):
    """Where data of a file is that has none of its own: `name` in `lower`; `digest` is one still to be checked."""

    lower: LowerDir
    name: bytes
    digest: Digest | None

    def open(self, fds: FdCache) -> Fd:
        """A new O_RDONLY descriptor."""
        return self.lower.layer.open_data(self.lower.open(fds), self.name)

    @property
    def path(self) -> str:
        """Its path, for people."""
        return os.fsdecode(b"/".join((self.lower.layer.path, *self.lower.components(), self.name)))


class Spot(NamedTuple):
    """Where an object can be reached: `name` in the directory fd `dirfd`; an empty name means `dirfd` itself."""

    dirfd: int
    name: bytes


class Entry:
    """What an object is made of; a value.

    `upper`: it is in the upper, under the very path it has in the union. `lowers`: for a directory, the lower
    directories merged into it, top first; for anything else, the one lower directory that holds it when it is not in
    the upper, else nothing. `redirect`: what the upper directory is called in the lowers, None for its own name.
    `data`: where the data of a file is that has none of its own (metacopy); None also as long as nobody asked. `name`:
    what the lower calls an object that has other names there, which the union may know it by. `index`: what the upper
    object is called in the index; without `upper`, it has become that, but not under the name in question.
    """

    __slots__ = ("data", "index", "lowers", "name", "redirect", "upper")

    asleep = False

    def __init__(
        self,
        upper: bool,
        lowers: tuple[LowerDir, ...],
        redirect: Redirect | None = None,
        data: Source | None = None,
        name: bytes | None = None,
        index: bytes | None = None,
    ) -> None:
        self.upper = upper
        self.lowers = lowers
        self.redirect = redirect
        self.data = data
        self.name = name
        self.index = index

    def with_data(self, data: Source | None) -> Entry:
        """The same with its data elsewhere."""
        return Entry(self.upper, self.lowers, self.redirect, data, self.name, self.index)

    @property
    def in_lowers(self) -> bool:
        """Whether its name in the lowers of its directory leads to its `lowers`, whatever becomes of the upper."""
        return bool(self.lowers) and (self.redirect is None or not self.upper)

    @property
    def of_object(self) -> Entry:
        """The entry of the object that has this entry under one of its names."""
        return self if self.upper or self.index is None else Entry(True, (), index=self.index)

    def __repr__(self) -> str:
        return f"Entry(upper={self.upper}, lowers={self.lowers}, redirect={self.redirect})"


class Asleep(Entry):
    """The entry of a node that a process before this one knew, until somebody needs it: `wake` finds the real one."""

    __slots__ = ("wake",)

    asleep = True

    def __init__(self, wake: Callable[[Any], None]) -> None:
        super().__init__(False, ())
        self.wake = wake


#: Of everything that is only in the upper.
UPPER: Final = Entry(True, ())
