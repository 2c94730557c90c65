"""What the kernel was told, in memory that outlives the process: a successor reads it and goes on.

A crash of the process loses nothing that was stored here; a crash of the machine ends the mount and with it the need.

Rules this file obeys:

- Handing a nodeid out, counting a lookup and moving a name take constant time and no system call: stores into memory
  shared with whoever keeps the descriptor (`memfd_create(2)`).
- The process may be killed between any two stores. What makes a record valid, or gives a name another place, is one
  aligned store of eight bytes, and comes last. A count is never less than what the kernel has.
- Space is bounded by what the kernel knows: a record goes when its node does, and is used again.

Layout, in the byte order of the machine: a header, then records of 64 bytes, then `cells` for long names.

====== =====================================================================================================
word   of a record (eight bytes each)
====== =====================================================================================================
0      its nodeid: a serial number and, in the low 26 bits, the number of the record; 0 when it is free
1      nodeid of the parent
2      inode number; of a further name, the nodeid that it names
3      bits 0-31: the cell that has parent and name instead of words 1 and 5-7, 0 for none; 32-47: `Flag`; 48-63: the
       length of the name
4      how many lookups the kernel has not taken back
5-7    the name
====== =====================================================================================================
"""

from __future__ import annotations

import errno
import mmap
import os
from array import array
from collections.abc import Iterator
from struct import Struct

from .records import Flag, Intent, Kind, Record
from .syscalls import Fd
from .typed import Final

__all__ = ["ROOT_ID", "Flag", "Intent", "Kind", "Ledger", "Record"]

ROOT_ID: Final = 1

_VERSION: Final = 2
_MAGIC: Final = int.from_bytes(b"unionfs" + bytes([_VERSION]), "little")
_BITS: Final = 26
_SLOT: Final = (1 << _BITS) - 1
_RECORD: Final = 64
_INLINE: Final = 24
_INLINE_AT: Final = 40
_SMALL: Final = 40
_SMALL_AT: Final = 24
_BIG_SIZE: Final = 320
_BIG_AT: Final = 16
_BIG: Final = 1 << 31
_CELLS: Final = 1 << 22
_CELL_MARK: Final = 1 << 63
_NAME_MAX: Final = 255
_PAGE: Final = 4096
_PER_PAGE: Final = _PAGE // _RECORD
_WORTH_GIVING_BACK: Final = 1 << 12
"""Records below which nobody looks for pages to give back."""

# Words of the header.
_W_MAGIC: Final = 0
_W_SERIAL: Final = 1
_W_HIGH: Final = 2
_W_HAND: Final = 3
_W_COUNTED: Final = 4
_W_PHASE: Final = 5
_W_SESSION: Final = 6
_W_HIGH_CELL: Final = 7
_W_UP: Final = 8
_W_SLOTS: Final = 9
_W_SIGNALS: Final = 10
_W_SERVING: Final = 11
_W_RESTS: Final = 12
_WORD: Final = Struct("=Q")

_INTENT_AT: Final = 512
_INTENT: Final = Struct("=QQQQQQQHHH")
_INTENT_ROOM: Final = 704
_SECOND: Final = 4
"""Of the phase: the intent is in the second of two places. So the last one holds until the next is whole."""
_SESSION_AT: Final = 2048
_HELD: Final = 4096 // 8
_HELD_MAX: Final = 1024
_LOG: Final = (1 << 16) // 8
_LOG_MAX: Final = 1 << 13
_HEAD: Final = 1 << 17
_WORDS: Final = Struct("=QQQQQ24s")


class Ledger:
    """The records of one mount. A nodeid handed out names its record, so no table leads from one to the other."""

    __slots__ = ("_bytes", "_cells", "_counted", "_free", "_free_cells", "_map", "_slots", "_words", "fd", "held")

    def __init__(self, fd: Fd, slots: int) -> None:
        self.fd = fd
        self._slots = slots
        self._cells = _HEAD + slots * _RECORD
        self._map = mmap.mmap(fd.fd, _size(slots))
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("Q")
        self._free = array("I")
        self._free_cells = array("I")
        self._counted = 0
        #: Places for the uniques of requests that are under way (`hold`) that are free.
        self.held = list(range(_HELD_MAX))

    @classmethod
    def new(cls) -> Ledger:
        """An empty one, but for the root."""
        fd = Fd(os.memfd_create("unionfsd", os.MFD_CLOEXEC))
        ledger = cls(fd, _reserve(fd.fd))
        words = ledger._words
        words[_W_MAGIC] = _MAGIC
        words[_W_SLOTS] = ledger._slots
        words[_W_HIGH] = words[_W_SERIAL] = 1
        words[_root(0)] = ROOT_ID
        words[_root(3)] = Flag.DIRECTORY << 32
        return ledger

    @classmethod
    def adopt(cls, fd: Fd) -> Ledger:
        """What another process wrote; EPROTO when it is of another version."""
        head = os.pread(fd.fd, (_W_SLOTS + 1) * _WORD.size, 0)
        if len(head) != (_W_SLOTS + 1) * _WORD.size or _WORD.unpack_from(head)[0] != _MAGIC:
            raise OSError(errno.EPROTO, "what the kernel was told is written down in another version")
        return cls(fd, _WORD.unpack_from(head, _W_SLOTS * _WORD.size)[0])

    # Records.

    def add(self, parent: int, name: bytes, ino: int, flags: int = 0) -> int:
        """A new record; returns its nodeid. ENOMEM when there are too many."""
        slot = self._take()
        words, at = self._words, _HEAD // 8 + (slot << 3)
        size = len(name)
        if size <= _INLINE:
            start = _HEAD + slot * _RECORD + _INLINE_AT
            self._bytes[start : start + size] = name
            words[at + 3] = flags << 32 | size << 48
        else:
            words[at + 3] = flags << 32 | self._cell(parent, name)
        words[at + 1] = parent
        words[at + 2] = ino
        words[at + 4] = 0
        serial = words[_W_SERIAL] + 1
        words[_W_SERIAL] = serial
        nodeid = words[at] = (serial << _BITS | slot) & (_CELL_MARK - 1)
        return nodeid

    def place(self, record: int, parent: int, name: bytes, flags: int | None = None) -> None:
        """Give a record another parent and name, and other flags perhaps, in one store."""
        at, words = self._at(record) + 3, self._words
        old = words[at]
        new = self._cell(parent, name)
        words[at] = new | (old & 0xFFFF_0000_0000 if flags is None else flags << 32)
        self._drop_cell(old & 0xFFFF_FFFF)

    def has(self, record: int) -> bool:
        """Whether there is such a record still."""
        return record != 0 and self._words[self._at(record)] == record

    def record(self, record: int) -> Record | None:
        """What a record says; None when there is no such record."""
        if not self.has(record):
            return None
        return self._read(*_WORDS.unpack_from(self._bytes, _HEAD + (record & _SLOT) * _RECORD))

    def flags(self, record: int) -> int:
        """The flags of a record."""
        return self._words[self._at(record) + 3] >> 32 & 0xFFFF

    def flag(self, record: int, flag: int) -> None:
        """Set a flag."""
        self._words[self._at(record) + 3] |= flag << 32

    def drop(self, record: int) -> None:
        """A record goes."""
        at, words = self._at(record), self._words
        words[at] = 0
        self._drop_cell(words[at + 3] & 0xFFFF_FFFF)
        self._free.append(record & _SLOT)

    def records(self) -> Iterator[Record]:
        """All of them but the root's. To be read to its end before anything is added: it learns what is free."""
        self._free, self._free_cells = array("I"), array("I")
        high = self._words[_W_HIGH]
        part = self._bytes[_HEAD + 2 * _RECORD : _HEAD + (high + 1) * _RECORD]
        cells: set[int] = set()
        big: set[int] = set()
        unused: list[int] = []
        for slot, (nodeid, parent, ino, third, lookups, name) in enumerate(_WORDS.iter_unpack(part), 2):
            if not nodeid:
                self._free.append(slot)
                continue
            if nodeid & _CELL_MARK:
                unused.append(slot)
                continue
            cell = third & 0xFFFF_FFFF
            if cell:
                (big if cell & _BIG else cells).add(cell & ~_BIG)
            yield self._read(nodeid, parent, ino, third, lookups, name)
        for slot in unused:
            if slot not in cells:
                self._words[_HEAD // 8 + (slot << 3)] = 0
                self._free.append(slot)
        self._free_cells.extend(cell for cell in range(1, self._words[_W_HIGH_CELL] + 1) if cell not in big)

    # Lookups.

    def begin(self, unique: int) -> None:
        """From now on the request `unique` is in hand: what is counted, is counted for it."""
        words = self._words
        if self._counted:
            self._counted = words[_W_COUNTED] = 0
        words[_W_HAND] = unique
        words[_W_RESTS] = 0

    def rest(self) -> None:
        """Until the next `begin` nothing is in hand."""
        self._words[_W_RESTS] = 1

    @property
    def rests(self) -> bool:
        """Whether who serves waits for a request."""
        return bool(self._words[_W_RESTS])

    @property
    def hand(self) -> int:
        """The unique of the request that was in hand last."""
        return self._words[_W_HAND]

    def count(self, nodeid: int) -> None:
        """One more lookup."""
        words = self._words
        words[_HEAD // 8 + ((nodeid & _SLOT) << 3) + 4] += 1
        counted = self._counted
        if counted < _LOG_MAX:
            words[_LOG + counted] = nodeid
            self._counted = words[_W_COUNTED] = counted + 1

    # Of a `Flag.OPENS`: what is open now. Between two stores it is too many, if anything, and never too few.

    def tally_open(self, record: int, count: int) -> None:
        """There is one more, which counts for the request in hand as a lookup does."""
        self._tally(record, count)
        self._note(record)

    def tally_release(self, record: int, count: int) -> None:
        """There is one fewer, which the request in hand asked for."""
        self._note(record)
        self._tally(record, count)

    def tally_back(self, record: int, count: int) -> None:
        """There is one fewer: what was counted for a request is taken back."""
        self._tally(record, count)

    def _tally(self, record: int, count: int) -> None:
        self._words[_HEAD // 8 + ((record & _SLOT) << 3) + 4] = count

    def _note(self, record: int) -> None:
        words = self._words
        words[_LOG + self._counted] = record
        self._counted = words[_W_COUNTED] = self._counted + 1

    def uncount(self, nodeid: int, count: int) -> None:
        """So many fewer."""
        at = _HEAD // 8 + ((nodeid & _SLOT) << 3) + 4
        words = self._words
        words[at] = max(0, words[at] - count)

    def lookups(self, nodeid: int) -> int:
        """How many the kernel has not taken back."""
        return self._words[_HEAD // 8 + ((nodeid & _SLOT) << 3) + 4]

    def left(self) -> tuple[int, list[int]]:
        """The request that was in hand last, if any, and what was counted for it; it is so until another is begun."""
        words = self._words
        self._counted = words[_W_COUNTED]
        return words[_W_HAND], list(words[_LOG : _LOG + self._counted])

    # What is about to be published.

    def intend(
        self,
        kind: Kind,
        parent: int,
        name: bytes,
        *,
        record: int = 0,
        other: int = 0,
        new_parent: int = 0,
        new_name: bytes = b"",
        ino: int = 0,
        lower: bool = False,
    ) -> None:
        """The next call that changes the view does what the fields of `Intent` say, for the request in hand."""
        words = self._words
        second = ~words[_W_PHASE] & _SECOND
        at = _INTENT_AT + (_INTENT_ROOM if second else 0)
        sizes = len(name), len(new_name)
        unique = words[_W_HAND]
        _INTENT.pack_into(self._map, at, unique, kind, record, other, parent, new_parent, ino, lower, *sizes)
        at += _INTENT.size
        self._bytes[at : at + sizes[0]] = name
        self._bytes[at + _NAME_MAX : at + _NAME_MAX + sizes[1]] = new_name
        words[_W_PHASE] = second | 1

    def done(self) -> None:
        """It was done, and the records say so."""
        words = self._words
        words[_W_PHASE] = words[_W_PHASE] & _SECOND | 2

    def intent(self) -> Intent | None:
        """The last one; whether it was carried out is to be seen on the disk, if not `applied`."""
        phase = self._words[_W_PHASE]
        if not phase:
            return None
        at = _INTENT_AT + (_INTENT_ROOM if phase & _SECOND else 0)
        unique, kind, record, other, parent, new_parent, ino, lower, size, new_size = _INTENT.unpack_from(self._map, at)
        at += _INTENT.size
        name, new_name = self._map[at : at + size], self._map[at + _NAME_MAX : at + _NAME_MAX + new_size]
        which = Kind(kind), record, other, parent, new_parent, ino
        return Intent(unique, *which, name, new_name, bool(lower), phase & ~_SECOND == 2)

    # The connection.

    def remember_session(self, session: bytes) -> None:
        """Keep what was settled with the kernel: it is asked once."""
        self._map[_SESSION_AT : _SESSION_AT + len(session)] = session
        self._words[_W_SESSION] = len(session)

    def session(self) -> bytes | None:
        """What was settled with the kernel; None before that."""
        size = self._words[_W_SESSION]
        return self._map[_SESSION_AT : _SESSION_AT + size] if size else None

    def hold(self, unique: int) -> int:
        """Note a request that is under way beside the one in hand; returns its place, -1 when there is none."""
        if not self.held:
            return -1
        place = self.held.pop()
        self._words[_HELD + place] = unique
        return place

    def let_go(self, place: int) -> None:
        """It was answered."""
        if place >= 0:
            self._words[_HELD + place] = 0
            self.held.append(place)

    def under_way(self) -> list[int]:
        """The uniques of requests that were begun and perhaps not answered; forgotten by this."""
        words = self._words
        held = [(at, words[at]) for at in range(_HELD, _HELD + _HELD_MAX) if words[at]]
        for at, _ in held:
            words[at] = 0
        return [unique for _, unique in held]

    # Between the keeper and who serves.

    @property
    def up(self) -> bool:
        """Whether the mount was reported to answer: from then on its processes are replaced."""
        return bool(self._words[_W_UP])

    def is_up(self) -> None:
        """It was."""
        self._words[_W_UP] = 1

    @property
    def serving(self) -> bool:
        """Whether the present process has come so far as to answer."""
        return bool(self._words[_W_SERVING])

    @serving.setter
    def serving(self, value: bool) -> None:
        self._words[_W_SERVING] = value

    @property
    def signals(self) -> int:
        """How many of the signals that stop us the keeper passed on."""
        return self._words[_W_SIGNALS]

    def pass_signal(self) -> None:
        """One more."""
        self._words[_W_SIGNALS] += 1

    def forget_signals(self) -> None:
        """None was passed on: this is another keeper."""
        self._words[_W_SIGNALS] = 0

    # Space.

    def give_back(self) -> None:
        """Give pages without a record back to the system, if there may be many."""
        high = self._words[_W_HIGH]
        if len(self._free) < max(_WORTH_GIVING_BACK, high // 2):
            return
        words = self._words[_HEAD // 8 :]
        step = _PAGE // 8
        start = None
        for page in range((high + 1) // _PER_PAGE + 1):
            empty = page < (high + 1) // _PER_PAGE and not any(words[page * step : (page + 1) * step : 8].tolist())
            if empty and start is None:
                start = page
            elif not empty and start is not None:
                self._map.madvise(mmap.MADV_REMOVE, _HEAD + start * _PAGE, (page - start) * _PAGE)
                start = None

    def close(self) -> None:
        """Let go of it; whoever else has the descriptor keeps it."""
        self._words.release()
        self._bytes.release()
        self._map.close()
        self.fd.close()

    def _at(self, record: int) -> int:
        return _HEAD // 8 + ((record & _SLOT) << 3)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        slot = self._words[_W_HIGH] + 1
        if slot >= self._slots:
            raise OSError(errno.ENOMEM, "the kernel knows too many objects")
        self._words[_W_HIGH] = slot
        return slot

    def _cell(self, parent: int, name: bytes) -> int:
        """A cell that has these; returns its number."""
        size = len(name)
        if size <= _SMALL:
            slot = self._take()
            at = _HEAD + slot * _RECORD
            words = at // 8
            self._bytes[at + _SMALL_AT : at + _SMALL_AT + size] = name
            self._words[words + 1] = parent
            self._words[words + 2] = size
            self._words[words] = _CELL_MARK
            return slot
        if self._free_cells:
            cell = self._free_cells.pop()
        else:
            cell = self._words[_W_HIGH_CELL] + 1
            if cell >= _CELLS:
                raise OSError(errno.ENOMEM, "the kernel knows too many long names")
            self._words[_W_HIGH_CELL] = cell
        at = self._cells + cell * _BIG_SIZE
        self._bytes[at + _BIG_AT : at + _BIG_AT + size] = name
        self._words[at // 8] = parent
        self._words[at // 8 + 1] = size
        return cell | _BIG

    def _read(self, nodeid: int, parent: int, ino: int, third: int, lookups: int, name: bytes) -> Record:
        """What the words of a record say."""
        cell = third & 0xFFFF_FFFF
        parent, name = self._read_cell(cell) if cell else (parent, name[: third >> 48])
        return Record(nodeid, parent, name, ino, lookups, third >> 32 & 0xFFFF)

    def _read_cell(self, cell: int) -> tuple[int, bytes]:
        if cell & _BIG:
            at = self._cells + (cell & ~_BIG) * _BIG_SIZE
            parent, size = self._words[at // 8], self._words[at // 8 + 1]
            return parent, bytes(self._bytes[at + _BIG_AT : at + _BIG_AT + size])
        at = _HEAD + cell * _RECORD
        parent, size = self._words[at // 8 + 1], self._words[at // 8 + 2]
        return parent, bytes(self._bytes[at + _SMALL_AT : at + _SMALL_AT + size])

    def _drop_cell(self, cell: int) -> None:
        if cell & _BIG:
            self._free_cells.append(cell & ~_BIG)
        elif cell:
            self._words[_HEAD // 8 + (cell << 3)] = 0
            self._free.append(cell)


def _root(word: int) -> int:
    return _HEAD // 8 + (ROOT_ID << 3) + word


def _size(slots: int) -> int:
    return _HEAD + slots * _RECORD + _CELLS * _BIG_SIZE


def _reserve(fd: int) -> int:
    """Make the file as large as it may become, which takes no memory; returns how many records there may be."""
    for bits in (_BITS, 22, 18):
        try:
            os.ftruncate(fd, _size(1 << bits))
            mmap.mmap(fd, _size(1 << bits)).close()
            return 1 << bits
        except OSError as error:
            failure = error
    raise failure
