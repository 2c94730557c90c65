"""Finding mounts: from a path to the control socket of the mount it lies on, and all there are.

Rules this file obeys:

- Where a mount is, is read from mountinfo and from the names of the sockets. The mount itself is asked as late as can
  be, and never where it could keep us waiting for good: it may hang, or be dead.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator

from unionfsd import mountinfo
from unionfsd.control import places
from unionfsd.control.client import CallFailedError, Client, GoneError
from unionfsd.control.protocol import GIVEN_UP, Json
from unionfsd.errors import MOUNT, UserError
from unionfsd.mountinfo import MountLine
from unionfsd.typed import Final, Literal, NamedTuple

_OURS: Final = b"fuse.unionfsd"
#: A mount appears in mountinfo a moment before its socket does.
_PATIENCE: Final = 0.5
#: Seconds for a mount to say whether it lives.
_PULSE: Final = 2.0

State = Literal["serving", "no socket", "dead", "failed", "hung", "unknown"]


class Target(NamedTuple):
    """A mount to ask: its socket, and where in it the path is that it was found by."""

    socket: bytes
    inside: bytes


class Seen(NamedTuple):
    """A mount that was found: `lines` are its places here, none when it is in another mount namespace."""

    number: int
    lines: tuple[MountLine, ...]
    socket: bytes | None
    state: State
    status: Json
    """Its own answer, None when it gave none."""


def locate(path: bytes) -> Target:
    """The mount that `path`, which need not exist, lies on; UserError when that is none of ours."""
    line = _line(path)
    deadline = time.monotonic() + _PATIENCE
    while (socket := _socket(line)) is None and line.fstype == _OURS and time.monotonic() < deadline:
        time.sleep(0.01)
    if socket is None:
        raise _no_socket(path, line)
    return Target(socket, mountinfo.within(line, _resolved(path)))


def _line(path: bytes) -> MountLine:
    # By its words first: resolving symlinks would ask the mount, which may hang.
    plain = mountinfo.at(os.path.abspath(path))
    if plain is not None and plain.fstype.startswith(b"fuse") and _socket(plain) is not None:
        return plain
    line = mountinfo.at(_resolved(path))
    if line is None:
        raise UserError(f"{os.fsdecode(path)}: no mount has it", code=MOUNT)
    return line


def _resolved(path: bytes) -> bytes:
    """`path` without symlinks on the way; what its last name is, a symlink or nothing, stays."""
    head, name = os.path.split(path.rstrip(b"/") or b"/")
    if name in (b"", b".", b".."):
        return os.path.realpath(path)
    return os.path.join(os.path.realpath(head or b"."), name)


def _socket(line: MountLine) -> bytes | None:
    """Its owner's, if there are several: one that is left of a mount that is no more may have the same number."""
    name, owner = places.name(line.device[1]), _owner(line)
    found = []
    for directory in places.everywhere(owner):
        path = os.path.join(directory, name)
        with contextlib.suppress(OSError):
            found.append((os.lstat(path).st_uid != owner, path))
    return min(found, key=lambda one: one[0])[1] if found else None


def _owner(line: MountLine) -> int | None:
    for option in line.super_options.split(b","):
        if option.startswith(b"user_id="):
            return int(option[len(b"user_id=") :])
    return None


def _no_socket(path: bytes, line: MountLine) -> UserError:
    where = os.fsdecode(path)
    if line.fstype != _OURS:
        missing = "" if os.path.lexists(path) else ": No such file or directory"
        return UserError(f"{where}: not on a unionfsd mount{missing}", hint="unionfsctl ps lists them", code=MOUNT)
    if _pulse(line) == "dead":
        return UserError(f"{where}: its daemon is dead", hint="unionfsctl reap takes such mounts away", code=MOUNT)
    return UserError(f"{where}: the mount has no control socket", hint="it was made with control=off", code=MOUNT)


def connect(socket: bytes, silence: float | None) -> Client:
    """A connection to the mount that has `socket`; UserError when nobody is there, or not for us."""
    try:
        return Client(socket, silence=silence)
    except (ConnectionRefusedError, FileNotFoundError):
        why, hint = "nobody answers: the daemon is dead", "unionfsctl reap takes such mounts away"
    except PermissionError:
        why, hint = "not permitted", "only the owner of the mount and root may ask it"
    except OSError as error:
        why, hint = error.strerror or str(error), ""
    raise UserError(f"{os.fsdecode(socket)}: {why}", hint=hint or None, code=MOUNT)


# All there are.


def everything() -> Iterator[Seen]:
    """Every mount of ours in sight, the dead ones included, in the order of mounting; then those elsewhere."""
    sockets: dict[int, bytes] = {}
    lines: dict[int, list[MountLine]] = {}
    owners: set[int | None] = {None}
    for line in mountinfo.read():
        if line.fstype.startswith(b"fuse.") and line.device[0] == 0:
            lines.setdefault(line.device[1], []).append(line)
            owners.add(_owner(line))
    directories = [directory for owner in owners for directory in places.everywhere(owner)]
    for number, path in places.known(list(dict.fromkeys(directories))):
        sockets.setdefault(number, path)
    for number, found in lines.items():
        if any(line.fstype == _OURS for line in found):
            yield _seen(number, tuple(found), sockets.get(number))
        elif number in sockets:
            yield _seen_by_another_name(number, tuple(found), sockets[number])
    for number in sorted(sockets.keys() - lines.keys()):
        yield _seen(number, (), sockets[number])


def _seen_by_another_name(number: int, lines: tuple[MountLine, ...], socket: bytes) -> Seen:
    """A FUSE mount of another type: ours with ``subtype=``, or somebody's who got the number of a dead one of ours."""
    seen = _seen(number, (), socket)
    return seen._replace(lines=lines) if seen.status is not None else seen


def _seen(number: int, lines: tuple[MountLine, ...], socket: bytes | None) -> Seen:
    state: State | None = None if lines else "dead"
    if socket is not None:
        try:
            with Client(socket, silence=_PULSE) as client:
                return Seen(number, lines, socket, "serving", client.call("status"))
        except TimeoutError:
            return Seen(number, lines, socket, "hung", None)
        except CallFailedError as error:
            return Seen(number, lines, socket, "failed" if error.code == GIVEN_UP else "unknown", None)
        except PermissionError:
            return Seen(number, lines, socket, "unknown", None)
        except (GoneError, OSError):
            pass  # perhaps of a dead mount that had this number before, while this one starts
    return Seen(number, lines, socket, state or _pulse(lines[0]), None)


def covered(line: MountLine) -> bool:
    """Whether something is mounted over it, so that its path leads elsewhere."""
    return any(other.parent_id == line.mount_id and other.path == line.path for other in mountinfo.read())


def _pulse(line: MountLine) -> State:
    """Whether a mount without a socket lives; asked from a thread, because a hung one never answers."""
    import threading

    if covered(line):
        return "unknown"

    outcome: list[State] = []

    def ask() -> None:
        try:
            os.statvfs(line.path)
            outcome.append("no socket")
        except OSError as error:
            dead = error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
            outcome.append("dead" if dead else "unknown")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PULSE)
    return outcome[0] if outcome else "hung"
