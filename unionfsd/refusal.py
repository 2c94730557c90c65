"""A connection that nobody serves any more, and that somebody still uses: nobody is left waiting on it."""

from __future__ import annotations

import errno
import json
import os
import select
import socket
from types import TracebackType

from unionfsd.control.protocol import GIVEN_UP
from unionfsd.fuse import notify, wire
from unionfsd.fuse.abi import Opcode
from unionfsd.fuse.exchange import Buffer
from unionfsd.typed import Final

_NO_REPLY: Final = frozenset((Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY))
_ERROR: Final = {"code": GIVEN_UP, "message": "its processes died one after the other: every request fails"}
_SILENCE: Final = 1.0


class Refusal:
    """Answers EIO to whatever is asked, and says so on the control socket. `wake`: a descriptor that ends `serve`."""

    def __init__(self, fuse_fd: int, control: int | None, wake: int) -> None:
        self._fd = fuse_fd
        self._control = None if control is None else socket.socket(fileno=os.dup(control))
        self._wake = wake
        self._buffer = Buffer()

    def __enter__(self) -> Refusal:
        os.set_blocking(self._fd, False)
        notify.resend(self._fd)
        return self

    def __exit__(self, et: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if self._control is not None:
            self._control.close()

    def serve(self) -> bool:
        """Answer until `wake` is readable (True), or the connection has ended."""
        poll = select.poll()
        for fd in (self._fd, self._wake, *([] if self._control is None else [self._control.fileno()])):
            poll.register(fd, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            if self._wake in ready:
                return True
            if self._fd in ready and not self._refuse():
                return False
            if self._control is not None and self._control.fileno() in ready:
                self._tell(self._control)

    def _refuse(self) -> bool:
        try:
            received = os.readv(self._fd, self._buffer.vector)
        except OSError as exc:
            return exc.errno in (errno.EAGAIN, errno.ENOENT, errno.EINTR)
        if received < wire.BODY:
            return bool(received)
        header = wire.IN_HEADER.unpack_from(self._buffer.map)
        if header[1] not in _NO_REPLY:
            try:
                os.write(self._fd, wire.error(header[2], errno.EIO))
            except OSError as exc:
                return exc.errno == errno.ENOENT  # who asked is gone
        return True

    def _tell(self, control: socket.socket) -> None:
        try:
            client, _ = control.accept()
            with client:
                client.settimeout(_SILENCE)
                request = client.recv(1 << 16)
                identity = json.loads(request.splitlines()[0]).get("id") if request else None
                client.sendall(json.dumps({"jsonrpc": "2.0", "id": identity, "error": _ERROR}).encode() + b"\n")
        except (OSError, ValueError, IndexError, AttributeError):
            pass  # a client that asks nothing, or rubbish, or is gone
