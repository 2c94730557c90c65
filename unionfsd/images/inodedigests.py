"""The digests of very many files by their inode numbers, in 40 bytes each."""

from __future__ import annotations

from bisect import bisect_right

from unionfsd.typed import Final

_NUMBER: Final = 8
_RECORD: Final = _NUMBER + 32
_PARTS: Final = 256


class InodeDigests:
    """SHA-256 by inode number; of what was added twice the last counts. First everything is added, then looked up."""

    def __init__(self) -> None:
        # In parts, so that sorting makes objects of few records at a time.
        self._parts = [bytearray() for _ in range(_PARTS)]
        self._unsorted = set(range(_PARTS))

    def __len__(self) -> int:
        return sum(map(len, self._parts)) // _RECORD

    def add(self, number: int, digest: bytes) -> None:
        self._parts[number % _PARTS] += number.to_bytes(_NUMBER, "big") + digest
        self._unsorted.add(number % _PARTS)

    def get(self, number: int) -> bytes | None:
        """The digest of an inode; None for an unknown one."""
        part = self._parts[number % _PARTS]
        if number % _PARTS in self._unsorted:
            self._unsorted.remove(number % _PARTS)
            records = [bytes(part[at : at + _RECORD]) for at in range(0, len(part), _RECORD)]
            records.sort(key=_number)
            part[:] = b"".join(records)
        wanted = number.to_bytes(_NUMBER, "big")
        places = range(0, len(part), _RECORD)
        found = bisect_right(places, wanted, key=lambda at: bytes(part[at : at + _NUMBER])) - 1
        if found < 0 or part[places[found] : places[found] + _NUMBER] != wanted:
            return None
        return bytes(part[places[found] + _NUMBER : places[found] + _RECORD])


def _number(record: bytes) -> bytes:
    return record[:_NUMBER]
