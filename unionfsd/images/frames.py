"""Where the frames of a zstd stream end, which the decompressor does not tell: one cut short gives less, and no error.

Sources: RFC 8878, 3.1.1 (frames and their blocks) and 3.1.2 (skippable frames).
"""

from __future__ import annotations

from collections.abc import Generator

from unionfsd.typed import Final

_MAGIC: Final = 0xFD2FB528
_HEADER: Final = 5
_CONTENT_SIZES: Final = (0, 2, 4, 8)
_DICTIONARIES: Final = (0, 1, 2, 4)
_RUN: Final = 1


class Frames:
    """Follows a stream; `whole` as long as it is between two frames. What is no zstd at all, the decompressor tells."""

    def __init__(self) -> None:
        self._steps = _steps()
        self._keep, self._left = next(self._steps)
        self._held = b""

    def feed(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            count = min(self._left, len(data) - at)
            if self._keep:
                self._held += data[at : at + count]
            at, self._left = at + count, self._left - count
            while self._left == 0:
                held, self._held = self._held, b""
                self._keep, self._left = self._steps.send(held)

    @property
    def whole(self) -> bool:
        return self._keep and self._left == _HEADER


def _steps() -> Generator[tuple[bool, int], bytes, None]:
    """What comes next: whether it has to be seen, and its bytes."""
    while True:
        head = yield True, _HEADER
        if int.from_bytes(head[:4], "little") != _MAGIC:
            rest = yield True, 3
            yield False, int.from_bytes(head[4:] + rest, "little")
            continue
        flags = head[4]
        single = flags >> 5 & 1
        yield False, (1 - single) + _DICTIONARIES[flags & 3] + (_CONTENT_SIZES[flags >> 6] or single)
        last = False
        while not last:
            block = int.from_bytes((yield True, 3), "little")
            last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
            yield False, 1 if kind == _RUN else size
        yield False, 4 if flags & 4 else 0
