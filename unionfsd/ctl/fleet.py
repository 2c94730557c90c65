"""The verbs of ``unionfsctl`` about all mounts: `ps`, `reap` and `metrics`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator

from unionfsd import mountinfo
from unionfsd.control.client import CallFailedError, Client, GoneError
from unionfsd.ctl import find, prometheus, show
from unionfsd.ctl.verbs import NEGATIVE
from unionfsd.errors import OK, reason
from unionfsd.typed import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import argparse

    from unionfsd.control.protocol import Json
    from unionfsd.ctl.find import Seen

_STYLES: Final = {
    "serving": "green",
    "dead": "red",
    "failed": "red",
    "hung": "red",
    "no socket": "yellow",
    "unknown": "yellow",
}


def ps(given: argparse.Namespace) -> int:
    """Every mount in sight."""
    found = list(find.everything())
    if given.json:
        print(json.dumps([_as_json(seen) for seen in found], indent=2))
    elif found:
        print(show.table([_row(seen) for seen in found], ("id", "state", "pid", "up", "transport", "mountpoint")))
    return OK


def _as_json(seen: Seen) -> Json:
    return {
        "id": seen.number,
        "state": seen.state,
        "mountpoint": _mountpoint(seen),
        "mounted": bool(seen.lines),
        "socket": None if seen.socket is None else _text(seen.socket),
        "status": seen.status,
    }


def _mountpoint(seen: Seen) -> str | None:
    if seen.lines:
        return _text(seen.lines[0].path)
    path: str | None = None if seen.status is None else seen.status["mountpoint"]
    return path


def _text(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")


def _row(seen: Seen) -> tuple[str, ...]:
    status = seen.status or {}
    where = _mountpoint(seen)
    elsewhere = "" if seen.lines else " (not mounted here)"
    return (
        str(seen.number),
        show.styled(seen.state, _STYLES[seen.state]),
        str(status.get("pid", "-")),
        show.duration(status["uptime"]) if status else "-",
        status.get("transport", "-"),
        "-" + elsewhere if where is None else show.name(where) + elsewhere,
    )


def reap(given: argparse.Namespace) -> int:
    """Take away mounts whose daemon is dead or failed, and sockets nobody listens on: all, or on certain paths."""
    done: list[Json] = []
    failed = False
    only = {os.path.abspath(os.fsencode(path)) for path in given.paths}
    for seen in find.everything():
        if seen.state not in ("dead", "failed") or (only and not only & {line.path for line in seen.lines}):
            continue
        for what, problem in _reap(seen, dry=given.dry_run):
            failed = failed or problem is not None
            done.append({"path": what, "error": problem})
            if not given.json:
                stream = sys.stdout if problem is None else sys.stderr
                print(show.name(what) + ("" if problem is None else f": {problem}"), file=stream)
    if given.json:
        print(json.dumps(done, indent=2))
    return NEGATIVE if failed else OK


def _reap(seen: Seen, *, dry: bool) -> Iterator[tuple[str, str | None]]:
    """(what, why it could not be taken away or None) for each thing that a dead mount left."""
    for line in reversed(seen.lines):
        yield _text(line.path), None if dry else _detach(line)
    if seen.socket is not None and seen.state == "dead":  # a keeper takes its own away
        yield _text(seen.socket), None if dry else _remove(seen.socket)


def _detach(line: mountinfo.MountLine) -> str | None:
    if all(other.mount_id != line.mount_id for other in mountinfo.read()):
        return None
    if find.covered(line):
        return "something is mounted over it"
    from unionfsd import syscalls

    try:
        syscalls.umount2(line.path, syscalls.MNT_DETACH | syscalls.UMOUNT_NOFOLLOW)
    except PermissionError:
        return _detach_by_fusermount(line.path)
    except OSError as error:
        return reason(error)
    return None


def _detach_by_fusermount(path: bytes) -> str | None:
    import subprocess

    try:
        done = subprocess.run([b"fusermount3", b"-u", b"-z", b"--", path], capture_output=True, check=False)
    except OSError as error:
        return f"fusermount3: {reason(error)}"
    return None if done.returncode == 0 else done.stderr.decode(errors="replace").strip()


def _remove(socket: bytes) -> str | None:
    try:
        with Client(socket):
            return "somebody listens after all"
    except OSError:
        pass
    try:
        os.unlink(socket)
    except FileNotFoundError:
        return None
    except OSError as error:
        return reason(error)
    return None


def metrics(given: argparse.Namespace) -> int:
    """Figures of one mount, or of all, as Prometheus reads them."""
    path = None if given.path is None else os.fsencode(given.path)
    if given.listen is not None:
        from unionfsd.ctl import exporter

        exporter.serve(given.listen, lambda: prometheus.text(_samples(path)))
    elif given.json:
        print(json.dumps([{"status": status, "stats": stats} for status, stats in _samples(path)], indent=2))
    else:
        print(prometheus.text(_samples(path)), end="")
    return OK


def _samples(path: bytes | None) -> list[tuple[Json, Json]]:
    """(status, stats) of the mount that `path` lies on, or of every mount that answers."""
    if path is not None:
        sockets = [find.locate(path).socket]
    else:
        sockets = [seen.socket for seen in find.everything() if seen.state == "serving" and seen.socket]
    return [sample for socket in sockets if (sample := _sample(socket)) is not None]


def _sample(socket: bytes) -> tuple[Json, Json] | None:
    """(status, stats) of a mount; None when it ends at this moment."""
    try:
        with find.connect(socket, 30.0) as client:
            return client.call("status"), client.call("stats")
    except (CallFailedError, GoneError):
        return None
