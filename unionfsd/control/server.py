"""Serves the control socket under trio, beside the transport.

Rules this file obeys:

- Whatever a client does, it is the client's loss: every failure of a call is its answer, every failure of a connection
  ends that connection, and neither ends the mount.
- Only the user who serves the mount, root, and the group that was asked for get an answer.
- Everything a client can make us keep, do or wait for has a bound: frames, depth, connections, time to finish a frame
  or to take an answer. The calls of all clients together get a tenth of the event loop, the mount has the rest.
- A connection's calls are answered one after the other. A client that hangs up ends its call; one that only closes its
  sending side (``nc -N``) still gets its answers.
"""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import AsyncGenerator
from contextlib import aclosing
from time import monotonic, perf_counter

import trio

from unionfsd.control import protocol, schema
from unionfsd.control.methods import Methods, failure
from unionfsd.control.mounted import Mounted
from unionfsd.control.protocol import INTERNAL_ERROR, METHOD_NOT_FOUND, REFUSED, Broken, Id, Json, Request, RpcError
from unionfsd.logger import get_logger
from unionfsd.typed import Final, NamedTuple

log = get_logger(__name__)

MAX_CLIENTS: Final = 16
"""When there are more, the one that has been idle for longest has to go."""
FRAME_SECONDS: Final = 10.0
"""How long a frame may take from its first byte to its last."""
IDLE_SECONDS: Final = 600.0
SEND_SECONDS: Final = 60.0
"""How long a client may take to read what it asked for, one message."""
LAST_SECONDS: Final = 5.0
"""The same for the answer to an action, which the end of the mount waits for."""
_LOOK: Final = 0.5
"""Seconds between two looks at whether the client of a long call is still there."""

_SHARE: Final = 0.1
_BURST: Final = 0.05
"""Seconds of the event loop that may be used at once."""
_PER_CALL: Final = 0.0002
"""Seconds of the event loop that a call is taken to cost besides what is measured."""
_UCRED: Final = struct.Struct("3i")
_GID: Final = struct.Struct("I")
_SO_PEERGROUPS: Final = 59
_MOST_GROUPS: Final = 256


#: What becomes of a connection whose client has gone, or does not read or write.
_LOST: Final = (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError)


class Peer(NamedTuple):
    """Who is at the other end: the user, and all groups."""

    uid: int
    groups: frozenset[int]


class Server:
    """The server of one mount's socket; `gid` is the group that may use it."""

    def __init__(self, mounted: Mounted, gid: int | None) -> None:
        self._gid = gid
        self._methods = Methods(mounted, self._census)
        self._clients: dict[_Connection, float] = {}
        self.toll = Toll(_SHARE, _BURST)
        self._calls = 0
        self._refused = 0

    def _census(self) -> dict[str, int]:
        return {"clients": len(self._clients), "calls": self._calls, "refused": self._refused}

    async def serve(self, fd: int) -> None:
        """Accept clients on `fd`, a listening unix socket that stays the caller's, until cancelled."""
        listening = trio.socket.from_stdlib_socket(socket.socket(fileno=os.dup(fd)))
        async with trio.SocketListener(listening) as listener, trio.open_nursery() as nursery:
            nursery.start_soon(self._methods.keep)
            while True:
                try:
                    stream = await listener.accept()
                except OSError as error:  # out of descriptors, most likely
                    log.warning("control: cannot accept: %s", error)
                    await trio.sleep(1)
                    continue
                nursery.start_soon(self._attend, stream)
                await self.toll.pay()

    async def _attend(self, stream: trio.SocketStream) -> None:
        """One connection, from its beginning to its end."""
        connection = _Connection(stream)
        try:
            async with stream:
                if not self._admits(stream.socket):
                    self._refused += 1
                    await connection.send(protocol.error(RpcError(REFUSED, "not your mount"), None))
                    return
                self._make_room()
                self._clients[connection] = monotonic()
                with connection.scope:
                    await self._converse(connection)
        except _LOST as error:
            log.debug("control: client lost: %r", error)
        except Exception:
            log.exception("control: a connection failed")
        finally:
            self._clients.pop(connection, None)

    def _admits(self, sock: trio.socket.SocketType) -> bool:
        peer = credentials(sock)
        return peer.uid in (0, os.geteuid()) or self._gid in peer.groups

    def _make_room(self) -> None:
        while len(self._clients) >= MAX_CLIENTS:
            oldest = min(self._clients, key=self._clients.__getitem__)
            del self._clients[oldest]
            oldest.scope.cancel()

    async def _converse(self, connection: _Connection) -> None:
        async with aclosing(connection.frames()) as frames:
            async for frame in frames:
                self._clients[connection] = monotonic()
                await self.toll.pay()
                await self._answer(connection, frame)

    async def _answer(self, connection: _Connection, frame: bytes) -> None:
        try:
            with self.toll:
                calls, batch = protocol.requests(protocol.decode(frame))
        except RpcError as error:
            await self._send(connection, protocol.error(error, None))
            return
        acts = any(isinstance(call, Request) and _acts(call) for call in calls)
        # What was begun gets done and answered, also when it ends the mount, and with it this server.
        with trio.CancelScope(shield=acts):
            answers = [answer for call in calls if (answer := await self._call(connection, call)) is not None]
            if answers:
                with trio.fail_after(LAST_SECONDS if acts else SEND_SECONDS):
                    await self._send(connection, answers if batch else answers[0])

    async def tell(self, connection: _Connection, message: Json) -> None:
        """Send a notification; who is told something is not idle."""
        if connection in self._clients:
            self._clients[connection] = monotonic()
        await self._send(connection, message)

    async def _send(self, connection: _Connection, message: Json) -> None:
        with self.toll:
            frame = protocol.encode(message)
        await connection.send_frame(frame)

    async def _call(self, connection: _Connection, call: Request | Broken) -> Json:
        """The answer to one call; None for a notification."""
        if isinstance(call, Broken):
            return protocol.error(call.refusal, call.id)
        self._calls += 1
        try:
            answer = protocol.result(await self._result(connection, call), call.id)
        except RpcError as error:
            answer = protocol.error(error, call.id)
        except _LOST:
            raise
        except OSError as error:
            answer = protocol.error(failure(error), call.id)
        except Exception:
            log.exception("control: %s failed", call.method)
            answer = protocol.error(RpcError(INTERNAL_ERROR, "this is a defect; the log has more"), call.id)
        return answer if call.answered else None

    async def _result(self, connection: _Connection, call: Request) -> Json:
        method = schema.BY_NAME.get(call.method)
        if method is None:
            raise RpcError(METHOD_NOT_FOUND, repr(call.method[:64]))
        arguments = schema.bind(method, call.params)
        function = self._methods.named(method.name)
        result: Json = None
        failed: Exception | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(connection.watch, nursery.cancel_scope)
            try:
                result = await function(_Ongoing(self, connection, call.id), **arguments)
            except Exception as error:  # kept, because the nursery would wrap it
                failed = error
            nursery.cancel_scope.cancel()
        if connection.gone:
            raise trio.BrokenResourceError("the client hung up")
        if failed is not None:
            raise failed
        return result


class Toll:
    """What the event loop spends on clients, all together: at most `share` of its time, and `burst` seconds at once.

    ``with toll:`` measures. `pay` waits until what was spent is made up for.
    """

    def __init__(self, share: float, burst: float) -> None:
        self._share = share
        self._ahead = burst / share
        self._paid_until = 0.0
        self._start = 0.0

    def __enter__(self) -> None:
        self._start = perf_counter()

    def __exit__(self, *exc: object) -> None:
        spent = perf_counter() - self._start
        self._paid_until = max(self._paid_until, monotonic()) + spent / self._share

    async def pay(self) -> None:
        """Wait for one's turn, and be charged for a call."""
        wait = self._paid_until - self._ahead - monotonic()
        self._paid_until = max(self._paid_until, monotonic()) + _PER_CALL / self._share
        await trio.sleep(max(0.0, wait))


class _Ongoing:
    """The call that a method is answering."""

    def __init__(self, server: Server, connection: _Connection, identity: Id) -> None:
        self._server = server
        self._connection = connection
        self._id = identity

    async def notify(self, method: str, params: dict[str, Json]) -> None:
        await self._server.tell(self._connection, protocol.call(method, {"id": self._id, **params}, None))

    async def rest(self) -> None:
        await self._server.toll.pay()


class _Connection:
    """A client's stream, cut into frames."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._left = FRAME_SECONDS
        self.gone = False
        #: Cancelled when others need the place.
        self.scope = trio.CancelScope()

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """The lines that the client sends, without empty ones; ends with the connection, or when one is too long."""
        while True:
            end = self._buffer.find(b"\n")
            if end >= 0:
                frame = bytes(self._buffer[:end]).strip()
                del self._buffer[: end + 1]
                self._left = FRAME_SECONDS
                if frame:
                    yield frame
            elif len(self._buffer) >= protocol.MAX_FRAME:
                too_long = RpcError(protocol.INVALID_REQUEST, f"longer than {protocol.MAX_FRAME} bytes")
                await self.send(protocol.error(too_long, None))
                return
            elif not await self._receive():
                rest = bytes(self._buffer).strip()
                self._buffer.clear()
                if rest:
                    yield rest
                return

    async def _receive(self) -> bool:
        """Whether there is more; TooSlowError when a frame that was begun is not finished in time."""
        start = trio.current_time()
        with trio.fail_after(self._left if self._buffer else IDLE_SECONDS):
            data = await self._stream.receive_some(protocol.MAX_FRAME - len(self._buffer))
        if self._buffer:
            self._left -= trio.current_time() - start
        self._buffer += data
        return bool(data)

    async def send(self, message: Json) -> None:
        await self.send_frame(protocol.encode(message))

    async def send_frame(self, frame: bytes) -> None:
        with trio.fail_after(SEND_SECONDS):
            await self._stream.send_all(frame)

    async def watch(self, call: trio.CancelScope) -> None:
        """Cancel `call` when the client hangs up; one that only stopped sending has not."""
        poll = select.poll()
        poll.register(self._stream.socket.fileno(), 0)  # what is left is POLLHUP and POLLERR
        while not poll.poll(0):  # noqa: ASYNC110  # there is no event for this without one for being readable
            await trio.sleep(_LOOK)
        self.gone = True
        call.cancel()


def _acts(call: Request) -> bool:
    method = schema.BY_NAME.get(call.method)
    return method is not None and method.acts


def credentials(sock: trio.socket.SocketType) -> Peer:
    """Who connected, as of then (SO_PEERCRED, and SO_PEERGROUPS of Linux 4.13)."""
    _, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS * _GID.size)
    except OSError:  # an old kernel, or a member of more groups: then the first one has to do
        raw = b""
    return Peer(uid, frozenset((gid, *(group for (group,) in _GID.iter_unpack(raw)))))
