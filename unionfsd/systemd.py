"""sd_notify(3) in plain Python: tell the service manager about ourselves, when there is one listening.

The protocol is one datagram of ``NAME=value`` lines to the unix socket named by ``$NOTIFY_SOCKET``; a leading ``@``
stands for the NUL of an abstract address. Without that variable nothing happens, so callers need not ask first.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

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


def keeps_fds() -> bool:
    """Whether the service manager keeps descriptors for us while we are not there (``FileDescriptorStoreMax=``).

    It says so in ``$FDSTORE`` since systemd 254 (systemd.exec(5)).
    """
    most = os.environ.get("FDSTORE", "")
    return listening() and most.isascii() and most.isdigit() and int(most) > 0


def store(name: str, fd: int) -> bool:
    """Give it a copy of `fd` to keep as `name`; it lets go of one that reports an error, as a mount that is gone."""
    return _send(["FDSTORE=1", f"FDNAME={name}"], [fd])


def forget(name: str) -> bool:
    """Have it let go of what it keeps as `name`."""
    return _send(["FDSTOREREMOVE=1", f"FDNAME={name}"])


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
