"""Listings of directories: the names that lowers give, merged once, and the snapshot that a reader walks through.

Rules this file obeys:

- The merged names of lower directories are immutable and may be cached for good. The upper is read when it is needed.
- Merging follows the kernel (fs/overlayfs/readdir.c): the topmost layer that has a name decides its type; directories
  merge downwards until something that is not a directory, or a whiteout, ends it. A ``.wh.`` entry speaks only of the
  layers below its own. Whiteouts are no names.
- A cookie is a hash of the name. It is the same in every snapshot, so a reader can go on after any change, or in
  another process: names that were there all the while are seen exactly once.
"""

from __future__ import annotations

import stat
from _blake2 import blake2b  # hashlib's own; hashlib itself loads OpenSSL, a twentieth of the start
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import itemgetter

from . import format as fmt
from . import syscalls
from .fdcache import FdCache
from .layers import DirEntry, Layer, LayerStack, LowerDir, Scanned, is_xattr_whiteout
from .remote import AskedError, together
from .typed import Final, NamedTuple, Protocol, TypeAlias

DT_UNKNOWN: Final = 0
DT_CHR: Final = 2
DT_DIR: Final = 4
DT_REG: Final = 8
DT_LNK: Final = 10


#: What is kept of a name in merged lowers, in one int because there are so many: from the low end its DT_* type, which
#: lower gives it, and its inode number as the mount shows it.
_TYPE_BITS: Final = 4
_LOWER_BITS: Final = 20


Row: TypeAlias = tuple[bytes, int, int]
"""A name, its inode number as the mount shows it, and its DT_* type."""


class LowerName(NamedTuple):
    """A name in merged lowers: its DT_* type, its inode number as the mount shows it, and which lower gives it."""

    type: int
    ino: int
    lower: int


def _unpack(packed: int) -> LowerName:
    place = packed >> _TYPE_BITS
    return LowerName(packed & (1 << _TYPE_BITS) - 1, place >> _LOWER_BITS, place & (1 << _LOWER_BITS) - 1)


class LowerNames:
    """Merged names of a tuple of lower directories.

    `stacks`: for directories in more than one lower, the indices of all of them, top first (whether one of them is
    opaque is not looked at here).
    """

    __slots__ = ("_packed", "stacks")

    def __init__(self) -> None:
        self._packed: dict[bytes, int] = {}
        self.stacks: dict[bytes, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self._packed)

    def __contains__(self, name: bytes) -> bool:
        return name in self._packed

    def get(self, name: bytes) -> LowerName | None:
        packed = self._packed.get(name)
        return None if packed is None else _unpack(packed)

    def add(self, name: bytes, kind: int, ino: int, lower: int) -> None:
        """A name that none of the lowers above has."""
        self._packed[name] = (ino << _LOWER_BITS | lower) << _TYPE_BITS | kind

    def add_files(self, entries: Iterable[Scanned], lower: int, number: Callable[[int], int]) -> Iterator[Scanned]:
        """Add those regular files among `entries` of a lower that none above it has; returns the rest, to be looked at.

        `number` makes an inode number of an entry's.
        """
        packed, shift, low = self._packed, _LOWER_BITS + _TYPE_BITS, lower << _TYPE_BITS | DT_REG
        for scanned in entries:
            name, entry = scanned
            if name not in packed and entry.is_file(follow_symlinks=False) and not name.startswith(fmt.WH):
                packed[name] = number(entry.inode()) << shift | low
            else:
                yield scanned

    def items(self) -> Iterator[tuple[bytes, LowerName]]:
        for name, packed in self._packed.items():
            yield name, _unpack(packed)

    def rows(self) -> Iterator[Row]:
        """The rows of all of them."""
        shift, mask = _TYPE_BITS + _LOWER_BITS, (1 << _TYPE_BITS) - 1
        return ((name, packed >> shift, packed & mask) for name, packed in self._packed.items())

    def indices(self, name: bytes) -> tuple[int, ...]:
        """Which lowers give the directory `name`, top first."""
        return self.stacks.get(name) or (_unpack(self._packed[name]).lower,)


def read_lowers(lowers: tuple[LowerDir, ...], stack: LayerStack, fds: FdCache) -> LowerNames:
    """Read and merge the directories `lowers`, top first."""
    merged = LowerNames()
    closed: set[bytes] = set()
    for index, lower in enumerate(lowers):
        hidden = _merge_lower(merged, closed, index, lower, stack, fds)
        closed.update(hidden)
    return merged


def _merge_lower(
    merged: LowerNames, closed: set[bytes], index: int, lower: LowerDir, stack: LayerStack, fds: FdCache
) -> list[bytes]:
    """Add what `lower` has; `closed` are the names that end above it. Returns what its ``.wh.`` entries hide."""
    hidden = []
    asked = []
    number = stack.entry_inos(lower.layer)
    xwhiteouts = lower.marks(fds).xwhiteouts
    fd = lower.open(fds)
    entries = lower.layer.scan(fd)
    for name, entry in entries if xwhiteouts or closed else merged.add_files(entries, index, number):
        if fmt.is_reserved(name):
            if target := fmt.wh_target(name):
                hidden.append(target)
        elif name not in closed:
            try:
                kind = entry_type(fd, name, entry, xwhiteouts=xwhiteouts)
            except AskedError as error:
                asked.append(error)
                continue
            known = merged.get(name)
            if kind is None or (known is not None and kind != DT_DIR):
                closed.add(name)
            elif known is None:
                merged.add(name, kind, number(entry.inode()), index)
            elif known.type == DT_DIR:
                merged.stacks[name] = (*merged.indices(name), index)
    if asked:
        raise together(asked)
    return hidden


def entry_type(dirfd: int, name: bytes, entry: DirEntry, *, xwhiteouts: bool) -> int | None:
    """DT_* of the entry `name` of the directory `dirfd`, None for a whiteout."""
    if entry.is_file(follow_symlinks=False):
        if xwhiteouts and not syscalls.stat_at(dirfd, name).st_size and is_xattr_whiteout(dirfd, name):
            return None
        return DT_REG
    if entry.is_dir(follow_symlinks=False):
        return DT_DIR
    if entry.is_symlink():
        return DT_LNK
    try:
        st = syscalls.stat_at(dirfd, name)
    except FileNotFoundError:
        return DT_UNKNOWN
    return None if fmt.is_whiteout_device(st.st_mode, st.st_rdev) else dt_type(st.st_mode)


def dt_type(mode: int) -> int:
    """DT_* of a st_mode."""
    return stat.S_IFMT(mode) >> 12


Dirent: TypeAlias = tuple[bytes, int, int, int]
"""An entry as a reader gets it: name, inode number, DT_* type, and the cookie that says where to go on after it."""

_DOT_COOKIE: Final = 1
_DOTDOT_COOKIE: Final = 2
_FIRST_COOKIE: Final = 3


def cookie_of(name: bytes) -> int:
    """A positive number below 2**63 that depends on `name` alone."""
    return (int.from_bytes(blake2b(name, digest_size=8).digest(), "little") >> 2) + _FIRST_COOKIE


_cookie: Final = itemgetter(3)
_TAKEN: Final = 256
"""Entries that a reader is handed at once: one request has room for about as many."""


class Listing:
    """A snapshot of a merged directory, in the order of cookies; "." and ".." come first."""

    __slots__ = ("_entries",)

    def __init__(self, ino: int, parent_ino: int, rows: Iterable[Row]) -> None:
        """`ino` and `parent_ino` are of the dots."""
        self._entries = [(name, number, kind, cookie_of(name)) for name, number, kind in rows]
        self._entries.sort(key=_cookie)
        self._entries[:0] = (b".", ino, DT_DIR, _DOT_COOKIE), (b"..", parent_ino, DT_DIR, _DOTDOT_COOKIE)

    def __len__(self) -> int:
        return len(self._entries)

    def after(self, cookie: int) -> Iterator[Dirent]:
        """The entries after the one with `cookie`, which need not be there any more; all of them after 0."""
        entries = self._entries
        first = bisect_right(entries, cookie, key=_cookie)
        return chain.from_iterable(entries[at : at + _TAKEN] for at in range(first, len(entries), _TAKEN))


def read_upper(fd: int, layer: Layer, stack: LayerStack, *, xwhiteouts: bool) -> UpperNames:
    """Read the upper directory `fd` (O_PATH)."""
    upper = UpperNames({}, set())
    number = stack.entry_inos(layer)
    for name, entry in layer.scan(fd):
        if fmt.is_reserved(name):
            if target := fmt.wh_target(name):
                upper.hidden.add(target)
        else:
            kind = entry_type(fd, name, entry, xwhiteouts=xwhiteouts)
            upper.names[name] = None if kind is None else (number(entry.inode()), kind)
    return upper


class UpperNames(NamedTuple):
    """What an upper directory has: (inode number, DT_* type) by name, None for a whiteout; and what ``.wh.`` hides."""

    names: dict[bytes, tuple[int, int] | None]
    hidden: set[bytes]


def merge(upper: UpperNames | None, lowers: LowerNames | None) -> Iterator[Row]:
    """The rows of a directory that has `upper` over `lowers`."""
    names, hidden = ({}, ()) if upper is None else upper
    for name, found in names.items():
        if found is not None:
            yield name, found[0], found[1]
    if lowers is not None and (names or hidden):
        for row in lowers.rows():
            if row[0] not in names and row[0] not in hidden:
                yield row
    elif lowers is not None:
        yield from lowers.rows()


class Named(Protocol):
    """What merged names are kept in: a directory."""

    lower_names: LowerNames | None


class NamesKept(NamedTuple):
    """Lower directories, merged, whose names are kept; the names in all; how often one was read, so far."""

    lists: int
    names: int
    read: int


class KeptNames:
    """Which directories have merged names of their lowers: at most `limit` names in all, the oldest go first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._nodes: dict[Named, int] = {}
        self._count = 0
        self._read = 0

    def keep(self, node: Named) -> None:
        """`node` has its `lower_names` now."""
        assert node.lower_names is not None
        self._read += 1
        self.released(node)
        self._nodes[node] = len(node.lower_names)
        self._count += len(node.lower_names)
        while self._count > self._limit and len(self._nodes) > 1:
            oldest = next(iter(self._nodes))
            self.released(oldest)
            oldest.lower_names = None

    def released(self, node: Named) -> None:
        """`node` is gone."""
        self._count -= self._nodes.pop(node, 0)

    def forget(self) -> int:
        """Keep none; returns how many that were."""
        count = self._count
        for node in self._nodes:
            node.lower_names = None
        self._nodes.clear()
        self._count = 0
        return count

    def held(self) -> NamesKept:
        """What is kept now."""
        return NamesKept(len(self._nodes), self._count, self._read)
