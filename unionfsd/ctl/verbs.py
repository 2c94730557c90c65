"""The verbs of ``unionfsctl`` that ask one mount, each a function from the arguments to an exit code.

What a mount answers is printed as it is with ``--json``, else for people. Names are printed so that they cannot drive
the terminal.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

from unionfsd.control.client import GoneError
from unionfsd.ctl import find, show
from unionfsd.errors import MOUNT, OK, UserError
from unionfsd.typed import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import argparse

    from unionfsd.control.protocol import Json

#: The mount said no, or that there is no such thing.
NEGATIVE: Final = 1
_UPGRADE: Final = 20.0
"""Seconds for a newer program to take over."""


class Asked:
    """A mount, its answer to come: `given` are the arguments, `inside` the path in the mount."""

    def __init__(self, given: argparse.Namespace, *, silence: float | None = 30.0) -> None:
        socket = getattr(given, "socket", None)
        path = os.fsencode(given.path)
        target = find.Target(os.fsencode(socket), path) if socket else find.locate(path)
        self.inside = target.inside.decode("utf-8", "surrogateescape")
        self.client = find.connect(target.socket, silence)

    def __enter__(self) -> Asked:
        return self

    def __exit__(self, *exc: object) -> None:
        self.client.close()


def ask(given: argparse.Namespace, method: str, **params: Json) -> Json:
    """The result of a method that answers at once."""
    with Asked(given) as asked:
        return asked.client.call(method, **params)


def out(given: argparse.Namespace, value: Json, human: Callable[[Any], str]) -> int:
    """Print a result: as JSON if that was asked for."""
    text = json.dumps(value, indent=2) if given.json else human(value)
    if text:
        print(text)
    return OK


def status(given: argparse.Namespace) -> int:
    return out(given, ask(given, "status"), _status)


def _status(value: Json) -> str:
    rows = [
        ("state", "frozen" if value["frozen"] else "serving" if value["mounted"] else "serving, detached"),
        ("for", show.duration(value["uptime"])),
        ("pid", f"{value['pid']} of user {value['owner']}"),
        ("transport", f"{value['transport']}, {value['io']}"),
        (
            "access",
            "read-only" if value["read_only"] else "read-write, volatile" if value["volatile"] else "read-write",
        ),
        ("socket", show.name(value["socket"])),
        ("version", value["version"]),
        *((layer["role"], show.name(layer["path"])) for layer in value["layers"]),
    ]
    return show.styled(show.name(value["mountpoint"]), "bold") + "\n" + _indented(show.table(rows))


def _indented(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


def layers(given: argparse.Namespace) -> int:
    return out(given, ask(given, "layers"), _layers)


def _layers(value: Json) -> str:
    rows = [
        (
            str(layer["index"]),
            layer["role"],
            layer["dev"],
            "private" if layer["private"] else "",
            f"{show.size(layer['available'])} free",
            show.name(layer["path"]),
        )
        for layer in value["layers"]
    ]
    text = show.table(rows, ("#", "role", "device", "held", "space", "directory"), right=(0, 4))
    upper = value["upper"]
    if upper is not None:
        able = [word for word in ("tmpfile", "exchange", "rename_whiteout") if upper[word]]
        text += f"\nwhiteouts: {upper['whiteout']}; marks: {upper['xattrs'] or 'none'}; can: {', '.join(able) or '-'}"
    return text


def stats(given: argparse.Namespace) -> int:
    return out(given, ask(given, "stats"), _stats)


def _stats(value: Json) -> str:
    memory = value["memory"]
    rows = [
        *((name.replace("_", " "), f"{count:,}") for name, count in value["counters"].items()),
        ("nodes", f"{value['nodes']:,}"),
        ("descriptors", f"{value['fds']:,} ({value['cached_fds']:,} cached, at most {value['fd_limit']:,})"),
        ("cached descriptors", f"{_share(value['fd_hits'], value['fd_misses'])}, {value['fd_evictions']:,} closed"),
        ("lists of lower names", f"{value['lists']:,} kept ({value['names']:,} names), {value['lists_read']:,} read"),
        ("memory", f"{show.size(memory['resident'])}, {show.size(memory['peak'])} at most"),
        ("processor time", f"{value['cpu']:.2f} s in {show.duration(value['uptime'])}"),
    ]
    return show.table(rows) + "\n\n" + _operations(value)


def _share(hits: int, misses: int) -> str:
    return f"{hits:,} hits ({hits / (hits + misses):.1%})" if hits + misses else "none used"


def _operations(value: Json) -> str:
    bounds = value["bounds"]
    rows = [
        (
            name,
            f"{of['count']:,}",
            show.moment(of["seconds"] / of["count"]),
            *("< " + show.moment(show.quantile(bounds, of["histogram"], share)) for share in (0.5, 0.99)),
            " ".join(f"{number} {count:,}" for number, count in of["errors"].items()),
        )
        for name, of in sorted(value["operations"].items(), key=lambda item: -item[1]["count"])
    ]
    return show.table(rows, ("request", "count", "mean", "50 %", "99 %", "errors"), right=(1, 2, 3, 4))


def explain(given: argparse.Namespace) -> int:
    with Asked(given) as asked:
        value = asked.client.call("explain", path=asked.inside)
    out(given, value, _explain)
    return OK if value["exists"] else NEGATIVE


def _explain(value: Json) -> str:
    path = show.name(value["path"])
    copies = value["copies"]
    if value["exists"]:
        kind = next(copy["type"] for copy in copies if copy["role"] == "gives")
        lines = [f"{show.styled(path, 'bold')}: {kind} from {_layer(value['layer'])}"]
    else:
        lines = [f"{show.styled(path, 'bold')}: not in the union{_because(value['decided_by'])}"]
    rows = [(_role(copy), copy["type"], f"{copy['mode']:04o}", f"{copy['uid']}:{copy['gid']}") for copy in copies]
    if rows:
        places = [show.name(copy["path"]) for copy in copies]
        lines += _indented(show.table([(*row, place) for row, place in zip(rows, places, strict=True)])).splitlines()
    lines += [_indented(f"{where}: {name} = {data}") for where, name, data in _marks(value)]
    if value["ino"] is not None:
        source = value["ino"]["source"]
        lines.append(_indented(f"inode {value['ino']['number']}" + (f", of {show.name(source)}" if source else "")))
    return "\n".join(lines)


def _role(copy: Json) -> str:
    if copy["whiteout"] is not None:
        return f"whiteout ({copy['whiteout']})"
    why = _because(copy["decided_by"]) if copy["role"] == "hidden" else ""
    return f"{copy['role']}{why}"


def _because(decision: Json) -> str:
    if decision is None:
        return ""
    return f": {decision['mark']} {show.name(decision['path'])} in {_layer(decision['layer'])}"


def _layer(layer: Json) -> str:
    number = f" {layer['index']}" if layer["role"] == "lower" else ""
    return f"{layer['role']}{number} {show.name(layer['path'])}"


def _marks(value: Json) -> list[tuple[str, str, str]]:
    import base64

    found = [("xattr", name, data) for name, data in value["xattrs"].items()]
    for copy in value["copies"]:
        found += [(f"mark in {_layer(copy['layer'])}", name, data) for name, data in copy["marks"].items()]
    return [(show.name(where), show.name(name), _value(base64.b64decode(data))) for where, name, data in found]


def _value(data: bytes) -> str:
    text = data.decode("ascii", "replace")
    return f'"{text}"' if text.isprintable() and text.isascii() else "0x" + data.hex()


def diff(given: argparse.Namespace) -> int:
    """A line for each change, printed as they come."""
    items: list[Json] = []
    progress = show.Progress("diff")

    def notified(method: str, params: Json) -> None:
        if method == "progress":
            progress.update(params["done"])
        elif given.json:
            items.extend(params["items"])
        else:
            progress.clear()
            print("\n".join(_change(item) for item in params["items"]))

    with Asked(given) as asked:
        value = asked.client.call(
            "diff", notified=notified, path=asked.inside, stream=True, progress=sys.stderr.isatty()
        )
    progress.clear()
    if given.json:
        print(json.dumps(value | {"items": items}, indent=2))
    return OK


_CHANGE_STYLES: Final = {"added": "green", "changed": "yellow", "deleted": "red"}


def _change(item: Json) -> str:
    details = item["fields"] + ([f"renamed from {show.name(item['renamed_from'])}"] if item["renamed_from"] else [])
    slash = "/" if item["type"] == "directory" else ""
    line = show.styled(f"{item['kind']:<7}", _CHANGE_STYLES[item["kind"]]) + f" {show.name(item['path'])}{slash}"
    return line + (f"  ({', '.join(details)})" if details else "")


def du(given: argparse.Namespace) -> int:
    progress = show.Progress("du")
    with Asked(given) as asked:
        value = asked.client.call(
            "du",
            notified=lambda _, params: progress.update(params["done"]),
            path=asked.inside,
            depth=given.depth,
            progress=sys.stderr.isatty(),
        )
    progress.clear()
    return out(given, value, _du)


def _du(value: Json) -> str:
    if value["total"] is None:
        return "nothing of it is in the upper"
    rows = [
        (
            show.size(row["disk"]),
            show.size(row["apparent"]),
            f"{row['objects']:,}",
            f"{row['whiteouts']:,}",
            row["path"],
        )
        for row in (value["total"], *value["items"])
    ]
    shown = [(*row[:4], show.name(row[4])) for row in rows]
    return show.table(shown, ("on disk", "apparent", "objects", "whiteouts", "directory"), right=(0, 1, 2, 3))


def events(given: argparse.Namespace) -> int:
    """A line for each event; with `--json` an object on each."""

    def told(method: str, value: Json) -> None:
        if value["lost"]:
            print(f"unionfsctl: {value['lost']:,} events were lost", file=sys.stderr)
        for event in value["events"]:
            print(json.dumps(event) if given.json else _event(event), flush=given.follow)

    with Asked(given, silence=None) as asked:
        params = {"path": asked.inside, "since": given.since}
        if given.follow:
            asked.client.call("events", notified=told, follow=True, **params)
        else:
            told("events", asked.client.call("events", limit=4096, **params))
    return OK


def _event(event: Json) -> str:
    import time

    clock = time.strftime("%H:%M:%S", time.localtime(event["time"])) + f".{int(event['time'] % 1 * 1000):03}"
    who = "" if event["pid"] is None else f"pid {event['pid']} uid {event['uid']}"
    to = "" if event["to"] is None else f" -> {show.name(event['to'])}"
    fields = f"  ({', '.join(map(show.name, event['fields']))})" if event["fields"] else ""
    path = "" if event["path"] is None else show.name(event["path"])
    return f"{event['number']:>6}  {clock}  {who:<20}  {event['kind']:<11}  {path}{to}{fields}".rstrip()


def open(given: argparse.Namespace) -> int:
    with Asked(given) as asked:
        value = asked.client.call("open", path=asked.inside)
    return out(given, value, _open)


def _open(value: Json) -> str:
    rows = [
        (
            str(row["pid"]),
            str(row["uid"]),
            show.name(row["command"]),
            row["how"] if row["fd"] is None else f"{row['fd']}{'' if row['access'] == 'path' else row['access']}",
            show.name(row["path"]) + (" (deleted)" if row["deleted"] else ""),
        )
        for row in value["holders"]
    ]
    lines = [show.table(rows, ("pid", "uid", "command", "how", "path"), right=(0, 1))] if rows else ["nobody"]
    if value["unseen"]:
        lines.append(f"processes that could not be looked into: {value['unseen']:,}")
    if value["handles"]:
        opened = [
            (f"{row['opens']:,}", "-" if row["path"] is None else show.name(row["path"])) for row in value["handles"]
        ]
        lines += ["", show.table(opened, ("opens", "file"), right=(0,))]
    return "\n".join(lines)


def options(given: argparse.Namespace) -> int:
    return out(given, ask(given, "options"), _options)


def _options(value: Json) -> str:
    given = set(value["explicit"])
    rows = [(name, "given" if name in given else "", _plain(setting)) for name, setting in value["options"].items()]
    return "\n".join([show.table(rows, ("option", "", "value")), *map(show.name, value["warnings"])])


def _plain(setting: Json) -> str:
    if isinstance(setting, bool):
        return "yes" if setting else "no"
    if isinstance(setting, list):
        return ":".join(map(_plain, setting)) or "-"
    return "-" if setting is None else show.name(str(setting))


def sync(given: argparse.Namespace) -> int:
    progress = show.Progress("sync", unit="")
    with Asked(given, silence=None) as asked:
        value = asked.client.call(
            "sync", notified=lambda _, params: progress.update(params["done"]), progress=sys.stderr.isatty()
        )
    progress.clear()
    return out(given, value, lambda _: "volatile: nothing is synced" if value["volatile"] else "")


def freeze(given: argparse.Namespace) -> int:
    with Asked(given, silence=None) as asked:
        value = asked.client.call("freeze", timeout=given.timeout)
    return out(
        given, value, lambda _: f"frozen for {show.duration(value['thaws_in'])} at most; unionfsctl thaw ends it"
    )


def thaw(given: argparse.Namespace) -> int:
    value = ask(given, "thaw")
    return out(given, value, lambda _: "" if value["frozen_for"] else "it was not frozen")


def refresh(given: argparse.Namespace) -> int:
    progress = show.Progress("refresh")
    with Asked(given, silence=None) as asked:
        value = asked.client.call(
            "refresh",
            notified=lambda _, params: progress.update(params["done"]),
            path=asked.inside,
            progress=sys.stderr.isatty(),
        )
    progress.clear()
    return out(given, value, lambda _: f"{value['nodes']:,} objects looked at, {value['replaced']:,} were replaced")


def drop_caches(given: argparse.Namespace) -> int:
    with Asked(given, silence=None) as asked:
        value = asked.client.call("drop_caches")
    return out(given, value, lambda _: f"{value['fds']:,} descriptors closed, {value['names']:,} names forgotten")


def log(given: argparse.Namespace) -> int:
    value = ask(given, "log", level=given.level)
    return out(given, value, lambda _: value["level"])


def reexec(given: argparse.Namespace) -> int:
    before = ask(given, "status")
    ask(given, "reexec")
    deadline = time.monotonic() + _UPGRADE
    while time.monotonic() < deadline:
        try:
            after = ask(given, "status")
        except (GoneError, UserError):  # between the two
            after = before
        if after["restarts"] != before["restarts"]:
            return out(given, after, lambda now: f"served by process {now['pid']}, unionfsd {now['version']}")
        time.sleep(0.02)
    raise UserError(f"nobody has taken over after {_UPGRADE:.0f} s", hint="see the log of the mount", code=MOUNT)


def unmount(given: argparse.Namespace) -> int:
    with Asked(given, silence=None) as asked:
        value = asked.client.call("unmount", lazy=given.lazy)
    busy = "busy: somebody uses it, or something is mounted over it; --lazy detaches a mount in use"
    out(
        given,
        value,
        lambda _: {"gone": "", "detached": "detached: it ends when its last user leaves"}.get(value["result"], busy),
    )
    return NEGATIVE if value["result"] == "busy" else OK


def discover(given: argparse.Namespace) -> int:
    """What the daemon itself says that it can do; always JSON."""
    print(json.dumps(ask(given, "rpc.discover"), indent=2))
    return OK


def call(given: argparse.Namespace) -> int:
    """Any method, with parameters in JSON; always JSON."""
    try:
        params = dict(json.loads(given.params))
    except (ValueError, TypeError):
        raise UserError(f"not an object in JSON: {given.params}") from None
    with Asked(given, silence=None) as asked:
        value = asked.client.call(given.method, notified=lambda *said: print(json.dumps(said)), **params)
    print(json.dumps(value, indent=2))
    return OK
