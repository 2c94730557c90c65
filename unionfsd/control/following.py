"""The events of a mount, for those who ask: what is kept, and what comes, as it comes.

A follower is sent batches. Between two of them it waits for its turn like everybody, so that many events cost the mount
no more than few; who reads more slowly than things happen is told how many events it missed.
"""

from __future__ import annotations

import os

import trio

from unionfsd.control import to_json
from unionfsd.control.protocol import Json
from unionfsd.events import LINGER
from unionfsd.typed import TYPE_CHECKING, Final, NoReturn

if TYPE_CHECKING:
    from unionfsd.control.methods import Call
    from unionfsd.events import Event, Events, Since

_BATCH: Final = 256
#: Seconds between an event and the message that has it, so that others may come along.
_GATHER: Final = 0.02


def kept(events: Events, number: int | None, limit: int, path: bytes) -> Json:
    """What is kept of `path` and beneath it, from `number` on, or all for None."""
    events.listen()
    return _as_json(events.since(number, limit), path)


async def follow(events: Events, call: Call, number: int | None, path: bytes) -> NoReturn:
    """Send what is kept from `number` on, or nothing for None, and then what comes, until cancelled."""
    events.listen()
    at = events.next if number is None else number
    while True:
        found = events.since(at, _BATCH)
        at = found.next
        shown = _as_json(found, path)
        if shown["events"] or shown["lost"]:
            await call.notify("events", shown)
            await call.rest()
        if not found.events:
            await _next(events)
            events.listen()


async def _next(events: Events) -> None:
    """Wait for an event, or until it is time to say again that somebody wants them."""
    event = trio.Event()
    events.on_next(event.set)
    try:
        with trio.move_on_after(LINGER / 2):
            await event.wait()
            await trio.sleep(_GATHER)
    finally:
        events.never_mind(event.set)


def _as_json(found: Since, path: bytes) -> dict[str, Json]:
    shown = [_event(event) for event in found.events if _concerns(event, path)]
    return {"events": shown, "lost": found.lost, "next": found.next}


def _concerns(event: Event, path: bytes) -> bool:
    top = b"/" + path.strip(b"/")
    if top == b"/":
        return True
    return any(at is not None and (at == top or at.startswith(top + b"/")) for at in (event.path, event.to))


def _event(event: Event) -> Json:
    return {
        "number": event.number,
        "time": event.time_ns / 1e9,
        "kind": event.kind,
        "path": None if event.path is None else to_json.text(event.path),
        "to": None if event.to is None else to_json.text(event.to),
        "fields": [os.fsencode(field).decode("utf-8", "surrogateescape") for field in event.fields],
        "pid": event.who.pid,
        "uid": event.who.uid,
    }
