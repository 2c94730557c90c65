"""The verbs of ``unionfsctl`` that go on: `top`, a live screen, and `work`, what is under way."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
from collections import deque
from collections.abc import Iterator

from unionfsd.ctl import show
from unionfsd.ctl.verbs import Asked
from unionfsd.errors import OK, UserError
from unionfsd.typed import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import argparse

    from unionfsd.control.client import Client
    from unionfsd.control.protocol import Json
    from unionfsd.ctl.screen import Moment

_QUIT: Final = frozenset(b"qQ\x03\x04\x1b")
_EVENTS: Final = 50
_LOOK: Final = 0.25


class Watcher:
    """Asks one mount again and again, as the screen needs it."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._events: deque[Json] = deque(maxlen=_EVENTS)
        self._next: int | None = None

    def moment(self) -> Moment:
        """How it is now."""
        from unionfsd.ctl.screen import Moment

        call = self._client.call
        told = call("events", since=self._next, limit=4096)
        self._next = told["next"]
        self._events.extend(event for event in told["events"] if event["kind"] != "start")
        return Moment(
            time.monotonic(), call("status"), call("stats"), call("work"), call("hot", limit=30), tuple(self._events)
        )


def top(given: argparse.Namespace) -> int:
    """Until somebody presses q; with `--json`, an object with what the screen would show on each line."""
    if not given.interval >= 0.1:
        raise UserError(f"--interval {given.interval}: at least 0.1 seconds")
    with Asked(given) as asked:
        watcher = Watcher(asked.client)
        if given.json:
            while True:
                _print_json(watcher.moment())
                time.sleep(given.interval)
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise UserError("not a terminal", hint="--json prints what the screen would show")
        return _on_screen(watcher, given.interval)


def _print_json(moment: Moment) -> None:
    names = ("status", "stats", "work", "hot", "events")
    print(json.dumps({name: getattr(moment, name) for name in names}), flush=True)


def _on_screen(watcher: Watcher, interval: float) -> int:
    from rich.console import Console
    from rich.live import Live

    from unionfsd.ctl.screen import screen

    before, now = None, watcher.moment()
    console = Console()
    with _keys() as keys, Live(screen(before, now), console=console, screen=True, auto_refresh=False) as live:
        while not keys.wait(interval):
            before, now = now, watcher.moment()
            live.update(screen(before, now), refresh=True)
    return OK


class _Keys:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def wait(self, seconds: float) -> bool:
        """Whether somebody presses a key that ends it within that time, or the terminal is gone."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self._fd], [], [], left)[0]:
                pressed = os.read(self._fd, 64)
                if not pressed or _QUIT & set(pressed[:1]):
                    return True
        return False


@contextlib.contextmanager
def _keys() -> Iterator[_Keys]:
    """Single keys of the terminal, unseen."""
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd, termios.TCSANOW)
        yield _Keys(fd)
    finally:
        termios.tcsetattr(fd, termios.TCSANOW, before)


def work(given: argparse.Namespace) -> int:
    """What is under way; with `--follow` until all of it is done."""
    with Asked(given) as asked:
        value = asked.client.call("work")
        if not given.follow:
            print(json.dumps(value, indent=2) if given.json else _table(value["work"]))
        elif given.json or not sys.stdout.isatty():
            _follow_lines(asked.client, value, as_json=given.json)
        else:
            _follow_bars(asked.client, value)
    return OK


def _follow_lines(client: Client, value: Json, *, as_json: bool) -> None:
    while value["work"]:
        print(json.dumps(value) if as_json else _table(value["work"]), flush=True)
        time.sleep(_LOOK)
        value = client.call("work")


def _follow_bars(client: Client, value: Json) -> None:
    from rich.live import Live

    from unionfsd.ctl.screen import under_way

    with Live(under_way(value["work"]), auto_refresh=False, transient=True) as live:
        while value["work"]:
            live.update(under_way(value["work"]), refresh=True)
            time.sleep(_LOOK)
            value = client.call("work")


def _table(rows: list[Json]) -> str:
    if not rows:
        return "nothing is under way"
    shown = [
        (
            row["kind"],
            _share(row),
            show.duration(row["seconds"]),
            "-" if row["path"] is None else show.name(row["path"]),
        )
        for row in rows
    ]
    return show.table(shown, ("what", "done", "for", "path"))


def _share(row: Json) -> str:
    if row["total"]:
        return f"{show.size(row['done'])} of {show.size(row['total'])} ({row['done'] / row['total']:.0%})"
    return f"{row['done']:,} objects" if row["done"] else "-"
