"""What people see: tables, sizes, durations, and colour where somebody looks at it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from unionfsd.typed import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from rich import progress

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


def moment(seconds: float) -> str:
    """A short time in about three figures."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def quantile(bounds: Sequence[float], histogram: Sequence[int], share: float) -> float:
    """The time within which `share` of those in `histogram` were done: the bound of the column it falls in."""
    wanted = share * sum(histogram)
    total = 0
    for bound, count in zip(bounds, histogram, strict=False):
        total += count
        if total and total >= wanted:
            return bound
    return float("inf") if histogram and histogram[-1] else 0.0


class Progress:
    """A bar on the terminal while something takes long; nothing when standard error is no terminal."""

    def __init__(self, what: str, unit: str = "objects") -> None:
        self._what = what
        self._unit = unit
        self._bar: progress.Progress | None = None

    def update(self, done: int) -> None:
        """Say that it goes on, and that `done` units of it are done."""
        if self._bar is None:
            if not sys.stderr.isatty():
                return
            self._bar = _bar()
            self._bar.add_task(self._what, total=None, unit=self._unit, shown="")
        self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=done, shown=f"{done:,}" if self._unit else "")

    def clear(self) -> None:
        """Take the bar away; the next `update` brings it back."""
        if self._bar is not None:
            self._bar.stop()


def _bar() -> progress.Progress:
    from rich import progress  # late: few calls take long enough
    from rich.console import Console

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[shown]} {task.fields[unit]}"),
        progress.TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
