"""What people see: tables, sizes, durations, and colour where somebody looks at it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final, TextIO

_STYLES: Final = {"bold": "1", "red": "31", "green": "32", "yellow": "33", "dim": "2"}


def coloured(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that takes colours (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, style: str) -> str:
    """`text` in a style, on a terminal."""
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if coloured(sys.stdout) else text


def name(text: str) -> str:
    """A name as one line of printable text: what a file is called must not drive the terminal."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that was no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return char.encode("unicode_escape").decode("ascii")


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), right: Sequence[int] = ()) -> str:
    """Columns, aligned; those whose numbers are in `right` to the right. The last one is not padded."""
    every = [header, *rows] if header else list(rows)
    widths = [max(len(row[column]) for row in every) for column in range(len(every[0]))] if every else []
    lines = []
    for row in every:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        line = "  ".join(cells).rstrip()
        lines.append(styled(line, "bold") if row is header else line)
    return "\n".join(lines)


def size(count: int) -> str:
    """A number of bytes in three or four figures."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} PiB"


def duration(seconds: float) -> str:
    """A time in its two largest units."""
    whole = int(seconds)
    units = ((whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s"))
    shown = [f"{count} {unit}" for count, unit in units if count]
    return " ".join(shown[:2]) or "0 s"


class Progress:
    """One line on the terminal that says how far something is; nothing when standard error is no terminal."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._shown = False

    def update(self, done: int) -> None:
        """Say that `done` objects were looked at."""
        if sys.stderr.isatty():
            print(f"\r{self._what}: {done:,} objects", end="", file=sys.stderr, flush=True)
            self._shown = True

    def clear(self) -> None:
        """Take the line away."""
        if self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = False
