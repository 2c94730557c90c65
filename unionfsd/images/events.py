"""What happens while an image is imported, pulled or pushed, for people and for scripts."""

from __future__ import annotations

import json
import sys
import threading
import time

from unionfsd.typed import TYPE_CHECKING, Any, Final, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

#: Seconds between two lines about the same layer.
_PACE: Final = 1.0


class Events:
    """Takes notice of everything and says nothing; also what the others build on. Safe to call from any thread.

    `item` is what is worked on, a layer mostly, by its digest; `total` its bytes, None when that is not known.
    """

    def begin(self, item: str, what: str, total: int | None) -> None:
        """Work on `item` begins: `what` is "unpack", "download", "upload" or "there" when nothing is to be done."""

    def advance(self, item: str, count: int) -> None:
        """So many more bytes of it are done."""

    def end(self, item: str) -> None:
        """It is done."""

    def note(self, text: str) -> None:
        """Something that could not be kept, or is worth knowing."""

    def close(self) -> None:
        """Nothing more will come."""


class JsonEvents(Events):
    """A line of JSON each."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._lock = threading.Lock()
        self._done: dict[str, int] = {}
        self._said: dict[str, float] = {}

    def _say(self, event: str, **members: Any) -> None:
        with self._lock:
            print(json.dumps({"event": event, **members}), file=self._stream, flush=True)

    def begin(self, item: str, what: str, total: int | None) -> None:
        self._done[item] = 0
        self._say("begin", item=item, what=what, total=total)

    def advance(self, item: str, count: int) -> None:
        done = self._done[item] = self._done.get(item, 0) + count
        now = time.monotonic()
        if now - self._said.get(item, 0) >= _PACE:
            self._said[item] = now
            self._say("progress", item=item, done=done)

    def end(self, item: str) -> None:
        self._say("end", item=item, done=self._done.get(item, 0))

    def note(self, text: str) -> None:
        self._say("note", text=text)


class LineEvents(Events):
    """A line when something begins that takes a while, and for what is worth knowing."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr

    def begin(self, item: str, what: str, total: int | None) -> None:
        size = "" if total is None else f" ({total:,} bytes)"
        self.note(f"{_short(item)}: {what}{size}")

    def note(self, text: str) -> None:
        self._stream.write(f"{text}\n")  # in one piece: threads share the stream
        self._stream.flush()


class BarEvents(Events):
    """A bar for each, on a terminal."""

    def __init__(self) -> None:
        from rich import progress
        from rich.console import Console

        self._progress: Progress = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(binary_units=True),
            progress.TransferSpeedColumn(),
            console=Console(stderr=True),
        )
        self._tasks: dict[str, TaskID] = {}
        self._progress.start()

    def begin(self, item: str, what: str, total: int | None) -> None:
        text = f"{_short(item)} {what}"
        if item in self._tasks:
            self._progress.reset(self._tasks[item], description=text, total=total)
        else:
            self._tasks[item] = self._progress.add_task(text, total=total)

    def advance(self, item: str, count: int) -> None:
        if item in self._tasks:
            self._progress.advance(self._tasks[item], count)

    def end(self, item: str) -> None:
        task = self._tasks.get(item)
        if task is not None:
            done = next(each.completed for each in self._progress.tasks if each.id == task)
            self._progress.update(task, total=done, completed=done)

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._progress.stop()


def _short(item: str) -> str:
    """The beginning of a digest."""
    return item.partition(":")[2][:12] if item.startswith(("sha256:", "sha512:")) else item


def make(*, as_json: bool, quiet: bool = False) -> Events:
    """What suits: JSON if asked for, bars on a terminal, plain lines otherwise."""
    if as_json:
        return JsonEvents()
    if quiet:
        return Events()
    return BarEvents() if sys.stderr.isatty() else LineEvents()
