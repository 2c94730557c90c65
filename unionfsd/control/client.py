"""The asking end of a control socket, for programs that have no event loop.

Cheap to import: no trio, nothing of the union.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable

from unionfsd.control import protocol
from unionfsd.control.protocol import Json
from unionfsd.typed import Final

#: Answers come at once, or with signs of life in between; a daemon that is silent for so long is stuck.
SILENCE: Final = 30.0


class CallFailedError(Exception):
    """The mount answered with an error: its `code` and `data` as in JSON-RPC."""

    def __init__(self, code: int, message: str, data: Json) -> None:
        super().__init__(message)
        self.code = code
        self.data = data


class GoneError(Exception):
    """Nobody serves the socket, or whoever does has hung up."""


class Client:
    """A connection to one control socket."""

    def __init__(self, path: bytes, *, silence: float | None = SILENCE) -> None:
        """Connect to the socket `path`; OSError when it cannot be, ConnectionRefusedError when nobody listens."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.settimeout(silence)
            _connect(self._socket, path)
        except BaseException:
            self._socket.close()
            raise
        self._lines = self._socket.makefile("rb")
        self._next = 1

    def call(self, method: str, *, notified: Callable[[str, Json], None] | None = None, **params: Json) -> Json:
        """The result of `method`; what the mount sends on the way goes to `notified`.

        CallFailedError, GoneError, TimeoutError.
        """
        identity, self._next = self._next, self._next + 1
        try:
            self._socket.sendall(protocol.encode(protocol.call(method, params, identity)))
        except ConnectionError:
            pass  # it may have said why
        while True:
            message = self._receive()
            if "method" in message and notified is not None:
                notified(message["method"], message.get("params", {}))
            elif "method" not in message and message.get("id") in (identity, None):
                return _result(message)

    def _receive(self) -> dict[str, Json]:
        try:
            line = self._lines.readline()
        except ConnectionError:
            line = b""
        if not line.endswith(b"\n"):
            raise GoneError("the daemon hung up")
        message = json.loads(line)
        if not isinstance(message, dict):
            raise GoneError("the daemon does not speak JSON-RPC")
        return message

    def close(self) -> None:
        """Hang up; a call under way ends."""
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _result(message: dict[str, Json]) -> Json:
    error = message.get("error")
    if error is not None:
        raise CallFailedError(error["code"], error["message"], error.get("data"))
    return message["result"]


def _connect(sock: socket.socket, path: bytes) -> None:
    """An address has room for 107 bytes; a longer path is reached through its directory."""
    if len(path) <= 107:
        sock.connect(path)
        return
    directory, name = os.path.split(path)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    try:
        sock.connect(b"/proc/self/fd/%d/%s" % (fd, name))
    finally:
        os.close(fd)
