"""sd_notify(3) in plain Python: tell the service manager about ourselves, when there is one listening.

The protocol is one datagram of ``NAME=value`` lines to the unix socket named by ``$NOTIFY_SOCKET``; a leading ``@``
stands for the NUL of an abstract address. Without that variable nothing happens, so callers need not ask first.
"""

from __future__ import annotations

import os
import select
from collections.abc import Sequence

from unionfsd.typed import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import socket

_LISTEN_FDS_START: Final = 3
_ANSWER: Final = 5.0
"""Seconds for the service manager to say what it is about to do."""

#: Set in a process that has a keeper, which is the one that the service manager heeds.
_through: socket.socket | None = None


def listening() -> bool:
    """Whether a service manager wants to hear from us."""
    return os.environ.get("NOTIFY_SOCKET", "")[:1] in ("/", "@")


def watchdog() -> float | None:
    """Seconds after which the service manager gives us up if it hears no ``WATCHDOG=1``; None when it waits for none.

    That is ``$WATCHDOG_USEC``, unless ``$WATCHDOG_PID`` means another process (sd_watchdog_enabled(3)).
    """
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not (microseconds.isascii() and microseconds.isdigit() and int(microseconds)):
        return None
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(microseconds) / 1e6


def room_for_fds() -> int:
    """How many descriptors the service manager keeps for us while we are not there (``FileDescriptorStoreMax=``).

    It says so in ``$FDSTORE`` since systemd 254 (systemd.exec(5)); before, a unit can say it by ``Environment=``.
    """
    most = os.environ.get("FDSTORE", "")
    return int(most) if listening() and most.isascii() and most.isdigit() else 0


def store(name: str, fd: int) -> bool:
    """Give it a copy of `fd` to keep as `name`; it lets go of one that reports an error, as a mount that is gone."""
    return _send(["FDSTORE=1", f"FDNAME={name}"], [fd])


def forget(name: str) -> bool:
    """Have it let go of what it keeps as `name`."""
    return _send(["FDSTOREREMOVE=1", f"FDNAME={name}"])


def stored() -> dict[str, int]:
    """What it kept and gives back to this process, by name (sd_listen_fds_with_names(3)); told once."""
    pid, count = (os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS"))
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdigit():
        return {}
    fds = range(_LISTEN_FDS_START, _LISTEN_FDS_START + int(count))
    for fd in fds:
        os.set_inheritable(fd, False)
    return dict(zip(names, fds, strict=False))


def settle(seconds: float) -> bool:
    """Wait until it has taken note of all that it was told (``BARRIER=1``); whether it has."""
    receiver, sender = os.pipe2(os.O_CLOEXEC)
    try:
        sent = _send(["BARRIER=1"], [sender])
    finally:
        os.close(sender)
    try:
        poll = select.poll()
        poll.register(receiver, 0)
        return sent and bool(poll.poll(seconds * 1000))
    finally:
        os.close(receiver)


def is_restarting() -> bool:
    """Whether it stops us only in order to start us again: its job for our unit says so. Takes some milliseconds."""
    unit = _unit()
    if unit is None:
        return False
    import subprocess

    # A manager of a user has its socket where the user's programs have theirs.
    private = os.environ.get("XDG_RUNTIME_DIR", "/nonexistent") + "/"
    whose = ["--user"] if os.environ["NOTIFY_SOCKET"].startswith(private) else ["--system"]
    try:
        done = subprocess.run(
            ["systemctl", *whose, "list-jobs", "--full", "--no-legend", "--plain", "--", unit],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=False,
            timeout=_ANSWER,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return any(line.split()[1:3] == [unit.encode(), b"restart"] for line in done.stdout.splitlines())


def _unit() -> str | None:
    """The service that we run as: the last of those in the path of our control group, as sd_pid_get_unit(3) has it."""
    with open("/proc/self/cgroup") as groups:
        for line in groups:
            _, controllers, path = line.rstrip("\n").split(":", 2)
            if controllers in ("", "name=systemd"):
                units = [part for part in path.split("/") if part.endswith(".service")]
                if units:
                    return units[-1]
    return None


def notify(*assignments: str) -> bool:
    """Send ``assignments`` (``"READY=1"``, ``"STATUS=..."``) as one message; whether somebody took it.

    A service manager that has gone away, or never listened, is no reason for a mount to fail: send errors give False.
    """
    return _send(assignments)


def relay(end: socket.socket) -> None:
    """From now on this process speaks through `end`, whose other end does `pass_on`; the watchdog means it, too."""
    global _through
    _through = end
    if "WATCHDOG_PID" in os.environ:
        os.environ["WATCHDOG_PID"] = str(os.getpid())


def pass_on(message: bytes, fds: Sequence[int]) -> bool:
    """Send what came through a `relay`."""
    return _send_bytes(message, fds)


def _send(assignments: Sequence[str], fds: Sequence[int] = ()) -> bool:
    message = "\n".join(assignments).encode()
    if _through is None:
        return _send_bytes(message, fds)
    import socket

    try:
        socket.send_fds(_through, [message], fds)
    except OSError:
        return False
    return True


def _send_bytes(message: bytes, fds: Sequence[int]) -> bool:
    if not listening():
        return False
    address = os.environ["NOTIFY_SOCKET"]
    import socket  # late: most mounts have no service manager, and the import is not free

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.connect("\0" + address[1:] if address[0] == "@" else address)
            if fds:
                socket.send_fds(sock, [message], fds)
            else:
                sock.sendall(message)
        except OSError:
            return False
    return True
