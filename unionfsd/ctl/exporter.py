"""Serves figures to Prometheus over HTTP: ``unionfsctl metrics --listen``."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType

from unionfsd.errors import UserError, reason
from unionfsd.typed import Final

_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
#: Seconds for a client to say what it wants.
_PATIENCE: Final = 10.0


def serve(where: str, exposition: Callable[[], str]) -> None:
    """Answer GET /metrics with what `exposition` says then, on ``[HOST]:PORT``, until SIGINT or SIGTERM."""
    host, colon, port = where.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UserError(f"--listen {where}: not HOST:PORT", hint="for example: --listen 127.0.0.1:9850")
    try:
        server = ThreadingHTTPServer((host.strip("[]") or "127.0.0.1", int(port)), _handler(exposition))
    except OSError as error:
        raise UserError(f"--listen {where}: {reason(error)}") from None
    with server:
        address, number = server.socket.getsockname()[:2]
        print(f"serving http://{address}:{number}/metrics", flush=True)

        def stop(number: int, frame: FrameType | None) -> None:
            threading.Thread(target=server.shutdown).start()  # it waits for the loop that this signal interrupted

        for ending in (signal.SIGINT, signal.SIGTERM):
            signal.signal(ending, stop)
        server.serve_forever()


def _handler(exposition: Callable[[], str]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _PATIENCE

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            try:
                body = exposition().encode()
            except UserError as error:
                self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
                return
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", _TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Scrapes are not news."""

    return Handler
