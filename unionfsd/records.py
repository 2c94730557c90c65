"""What a `ledger` has: records of what the kernel was told, and the change that was about to be made; values."""

from __future__ import annotations

import enum

from unionfsd.typed import Final, NamedTuple


class Flag:
    """What a record is. Plain numbers: members of an enum.IntFlag take a microsecond each time they are combined."""

    DIRECTORY: Final = 1
    UNLINKED: Final = 2
    """The node has no name any more."""
    ALIAS: Final = 4
    """A further name of a node."""
    LINKED: Final = 8
    """The node may have further names that nobody has looked up."""
    LOWER: Final = 16
    """It is found by its name in the lowers: a file that was only there when it lost its last name, or a directory."""
    OPENS: Final = 32
    """No node, but what the kernel has open of one, its `parent`; see `Ledger.tally_open`."""


class Kind(enum.IntEnum):
    """The change of names that a request makes, as far as a second execution would answer otherwise."""

    NEW = 1
    GONE = 2
    RENAME = 3
    EXCHANGE = 4
    LINK = 5
    XATTR = 6


class Record(NamedTuple):
    """One record; `ino` of an alias is the nodeid that it names."""

    nodeid: int
    parent: int
    name: bytes
    ino: int
    lookups: int
    flags: int


class Intent(NamedTuple):
    """The last change that was about to be published, for the request `unique`.

    `record` and `other` are the records of the names that it moves or removes, 0 where the kernel knows none. `ino`:
    inode number in the upper of what moves. `lower`: what goes is found by its name in the lowers still. `applied`: the
    records say what it did.
    """

    unique: int
    kind: Kind
    record: int
    other: int
    parent: int
    new_parent: int
    ino: int
    name: bytes
    new_name: bytes
    lower: bool
    applied: bool
