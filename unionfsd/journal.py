"""systemd's journal, in its own protocol (https://systemd.io/JOURNAL_NATIVE_PROTOCOL): entries with fields.

An entry is one datagram of ``NAME=value`` lines to a unix socket; a value of several lines has its length before it.
One too large for a datagram is sent as a sealed file in memory.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Mapping

from unionfsd.typed import Final

SOCKET: Final = "/run/systemd/journal/socket"


class Journal:
    """A connection to the journal."""

    def __init__(self, address: str = SOCKET) -> None:
        """OSError when there is no journal at `address`."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            self._socket.connect(address)
        except OSError:
            self._socket.close()
            raise

    def send(self, fields: Mapping[str, str]) -> None:
        """Make an entry of `fields`, whose names are capitals, digits and underscores; OSError."""
        entry = b"".join(map(_field, fields, fields.values()))
        try:
            self._socket.send(entry)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self._send_file(entry)

    def _send_file(self, entry: bytes) -> None:
        fd = os.memfd_create("unionfsd-journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(entry)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            socket.send_fds(self._socket, [b""], [fd])
        finally:
            os.close(fd)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def _field(name: str, value: str) -> bytes:
    data = value.encode("utf-8", "surrogateescape")
    if b"\n" not in data:
        return name.encode() + b"=" + data + b"\n"
    return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
