"""The kernel channel: our own reader and writer of /dev/fuse, under trio.

What it does, and what it is worth, is in docs/performance.md; in short: one buffer reused for every request, a request
answered before the next is read, no task for what cannot block, no event loop while requests keep coming.

Rules of this file:

- Only the task in `Channel.run` reads requests; deferred operations re-enter the union from tasks of the same thread,
  between two of its awaits. So everything between two awaits is atomic for all of them.
- Every request that expects a reply gets exactly one: from `_answer`, or from `_finish` if its operation was deferred.
- A guard in each of the two turns exceptions into errnos: OSError into its own, WireError and anything unexpected into
  EIO, the unexpected with a traceback in the log.
- trio is imported when the channel first waits. Until then `begin` serves, without a loop or a task, so that a mount
  answers while most of its start is still to come.
- INTERRUPT is ignored, as the protocol allows: what is inline is over before it could be read, what is deferred is a
  copy-up or a sync that somebody else may already count on.
"""

from __future__ import annotations

import errno
import logging
import os
import select
from collections.abc import Awaitable, Callable
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Final

from unionfsd.errors import UserError
from unionfsd.fuse import negotiate, readahead, wire
from unionfsd.fuse.abi import FUSE_KERNEL_VERSION, InitFlag, Opcode
from unionfsd.fuse.dirs import Dirs
from unionfsd.fuse.exchange import Deferred, Exchange, Handler, Payload
from unionfsd.fuse.files import Files
from unionfsd.fuse.linger import Lingerer
from unionfsd.fuse.names import Names
from unionfsd.fuse.passthrough import Passthrough
from unionfsd.steps import FrozenError

if TYPE_CHECKING:
    import trio

    from unionfsd.fuse.pressure import Pressure
    from unionfsd.options import MountConfig
    from unionfsd.union import Union

log = logging.getLogger(__name__)

_SLICE: Final = 0.005
"""Seconds the channel may keep the thread to itself while requests keep coming; then everybody else has a turn."""
_SHORT_SLICE: Final = 0.0002
"""The same while operations are deferred, which need the thread as soon as their steps are done."""
_LOOK: Final = 1.0
"""Seconds between two looks at how much is known."""
_BURST: Final = 32
"""Requests between two looks at the clock when they come faster than they are answered."""

_QUIET_MS: Final = 20
"""Milliseconds without a request after which the start goes on."""
_BEGINNING: Final = 1.0
"""Seconds after which it goes on even while requests keep coming."""
_DEFECT: Final = "request failed with an unexpected error"
_OUT: Final = wire.OUT_HEADER
_OUT_SIZE: Final = wire.OUT_HEADER.size
_GONE: Final = frozenset((errno.ENODEV, errno.ECONNABORTED, errno.ENOTCONN))
_NO_REPLY: Final = frozenset((Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY))


async def serve(union: Union, fuse_fd: int, config: MountConfig, *, started: Callable[[], None]) -> None:
    """Answer the kernel on `fuse_fd`, a mounted /dev/fuse descriptor, until the mount is gone.

    `started` is called once, when INIT has been answered. `fuse_fd` stays the caller's and becomes non-blocking.
    UserError: the kernel is too old.
    """
    await channel(union, fuse_fd, config, started).run()


def channel(union: Union, fuse_fd: int, config: MountConfig, started: Callable[[], None]) -> Channel:
    """The same in two parts: `begin`, which needs no event loop, then `run`."""
    kind = TracedChannel if config.debug else Channel
    return kind(union, fuse_fd, config, started)


class Channel:
    """One connection to the kernel."""

    def __init__(self, union: Union, fuse_fd: int, config: MountConfig, started: Callable[[], None]) -> None:
        valid = wire.Validity.of(config.timeout, config.timeout)
        self.counters = union.counters
        self._fd = fuse_fd
        self._started = started
        self._mountpoint = config.mountpoint
        self._wanted = _wanted(config)
        self._explicit = "io" in config.explicit
        self._exchange = Exchange(union, valid, self._defer)
        self._names = Names(self._exchange)
        self._files = Files(self._exchange)
        self._dirs = Dirs(self._exchange)
        self._handlers: list[Handler] = [self._unknown] * wire.OPCODES
        self._fill(self._names.table() | self._files.table() | self._dirs.table())
        self._fill({Opcode.INIT: self._init, Opcode.DESTROY: _ok, Opcode.INTERRUPT: _silent})
        self._nursery: trio.Nursery | None = None
        self._early: list[Deferred] = []
        self._readable: Callable[[int], Awaitable[None]]
        self._checkpoint: Callable[[], Awaitable[None]]
        self._deferred = 0
        self._alone = Lingerer(fuse_fd)
        self._beside = Lingerer(fuse_fd)
        self._turn = 0.0
        self._pressure: Pressure
        self._look = 0.0

    def _fill(self, table: dict[Opcode, Handler]) -> None:
        for opcode, handler in table.items():
            self._handlers[opcode] = handler

    # --- the loop ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until the mount is gone and every deferred operation has ended."""
        import trio

        from unionfsd.fuse.notify import Notifier
        from unionfsd.fuse.pressure import Pressure

        os.set_blocking(self._fd, False)
        self._pressure = Pressure(self._exchange.union, Notifier(self._fd))
        self._readable, self._checkpoint = trio.lowlevel.wait_readable, trio.lowlevel.checkpoint
        failure: Exception | None = None
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for deferred in self._early:
                nursery.start_soon(self._finish, deferred)
            try:
                await self._loop()
            except Exception as exc:  # kept, because the nursery would wrap it
                failure = exc
        if failure is not None:
            raise failure

    def begin(self) -> None:
        """Answer INIT and what comes with it, until nothing comes for a moment or something has to wait for a thread.

        UserError: the kernel is too old.
        """
        os.set_blocking(self._fd, False)
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        end = monotonic() + _BEGINNING
        while not self._early and poll.poll(_QUIET_MS) and monotonic() < end:
            try:
                received = os.readv(self._fd, self._exchange.inbox.vector)
            except OSError:
                return  # `run` meets it again, and knows what to do
            if received < wire.BODY:
                return
            self._answer(received)

    async def _loop(self) -> None:
        fd, exchange, answer = self._fd, self._exchange, self._answer
        readv = os.readv
        left = _BURST
        while True:
            try:
                received = readv(fd, exchange.inbox.vector)
            except BlockingIOError:
                await self._idle()
                continue
            except OSError as exc:
                if exc.errno in _GONE:
                    return
                if exc.errno not in (errno.ENOENT, errno.EINTR):
                    raise
                continue
            if received < wire.BODY:
                if not received:
                    return
                log.warning("%d bytes are no request", received)
                continue
            answer(received)
            left -= 1
            if not left:
                left = _BURST
                await self._turn_over()

    async def _idle(self) -> None:
        """Wait for the next request: as long as it is likely to come at once outside the event loop, then in it."""
        await self._turn_over()
        deferred = self._deferred
        lingerer = self._beside if deferred else self._alone
        if lingerer.spin() or (not deferred and lingerer.sleep()):
            return
        start = monotonic()
        await self._readable(self._fd)
        now = monotonic()
        lingerer.woken(now - start)
        self._turn = now + (_SHORT_SLICE if deferred else _SLICE)

    async def _turn_over(self) -> None:
        """Let every other task run if the channel's turn is over."""
        if monotonic() > self._turn:
            await self._checkpoint()
            now = monotonic()
            self._turn = now + (_SHORT_SLICE if self._deferred else _SLICE)
            if now > self._look:
                self._look = now + _LOOK
                self._see_to_memory()

    def _see_to_memory(self) -> None:
        if self._nursery is not None and self._pressure.due():
            self._nursery.start_soon(self._pressure.relieve)

    # --- one request -------------------------------------------------------------------------------------------------

    def _answer(self, received: int) -> None:
        """Dispatch the request in the inbox, `received` bytes, and write its reply unless it is due later or never."""
        exchange = self._exchange
        self.counters.requests += 1
        try:
            header = exchange.header = wire.IN_HEADER.unpack_from(exchange.buf)
            opcode = header[1]
            wire.check(header[0], opcode, received)
            handler = self._handlers[opcode] if opcode < wire.OPCODES else self._unknown
            payload = handler(header[3], received)
        except OSError as exc:
            self._fail(exchange.header, exc.errno or errno.EIO)
        except wire.WireError as exc:
            log.warning("request refused: %s", exc)
            self._fail(exchange.header, errno.EIO)
        except FrozenError as frozen:
            frozen.gate.on_open(partial(self._again, exchange.buf[:received]))
        except UserError:
            self._fail(exchange.header, errno.EPROTO)
            raise
        except Exception:
            log.exception(_DEFECT)
            self._fault(exchange.header)
        else:
            if payload is not None:
                self._reply(header[2], payload)

    def _again(self, request: bytes) -> None:
        """Take a request up that was put aside; between two of the loop's awaits nothing is in the inbox."""
        self._exchange.buf[: len(request)] = request
        self._answer(len(request))

    def _reply(self, unique: int, payload: Payload) -> None:
        size = len(payload)
        self._write([_OUT.pack(_OUT_SIZE + size, 0, unique), payload])

    def _fail(self, header: tuple[int, ...], code: int) -> None:
        if header[1] not in _NO_REPLY:
            self.counters.errors += 1
            self._write([wire.error(header[2], code)])

    def _fault(self, header: tuple[int, ...]) -> None:
        self.counters.faults += 1
        self._fail(header, errno.EIO)

    def _write(self, parts: list[Payload]) -> None:
        try:
            os.writev(self._fd, parts)
        except OSError as exc:
            # ENOENT: the caller was killed and nobody waits for this. Gone: the loop will see it when it reads.
            if exc.errno != errno.ENOENT and exc.errno not in _GONE:
                log.error("reply refused by the kernel: %s", exc)

    # --- operations that yielded -------------------------------------------------------------------------------------

    def _defer(self, deferred: Deferred) -> None:
        self._deferred += 1
        if self._nursery is None:
            self._early.append(deferred)
        else:
            self._nursery.start_soon(self._finish, deferred)

    async def _finish(self, deferred: Deferred) -> None:
        """Drive an operation from its first step to its end, and answer its request."""
        from unionfsd.fuse.driver import finish  # late, like trio

        header = (0, 0, deferred.unique)
        try:
            self._reply(deferred.unique, deferred.done(await finish(deferred.op, deferred.step)))
        except OSError as exc:
            self._fail(header, exc.errno or errno.EIO)
        except Exception:
            log.exception(_DEFECT)
            self._fault(header)
        finally:
            self._deferred -= 1
            if deferred.held is not None:
                self._exchange.give_back(deferred.held)

    # --- the connection itself ---------------------------------------------------------------------------------------

    def _init(self, nodeid: int, end: int) -> Payload | None:
        offer = wire.init(self._exchange.buf, end)
        if offer.major > FUSE_KERNEL_VERSION:
            return negotiate.other_major()
        session = negotiate.settle(offer, self._wanted)
        self._apply(session)
        self._reply(self._exchange.header[2], session.reply)
        readahead.widen(self._mountpoint)
        self._started()
        return None

    def _apply(self, session: negotiate.Session) -> None:
        self._names.setxattr_ext = InitFlag.SETXATTR_EXT in session.flags
        if InitFlag.NO_OPEN_SUPPORT in session.flags:
            self._files.handles = False
        if InitFlag.PASSTHROUGH in session.flags:
            self._files.passthrough = Passthrough(
                self._fd, self._exchange.union, self._exchange.unsettled, asked_for=self._explicit
            )
        elif self._wanted.passthrough and self._explicit:
            log.warning("io=passthrough is not possible: the kernel does not offer it (Linux 6.9)")
        if self._wanted.writeback and InitFlag.WRITEBACK_CACHE not in session.flags:
            log.warning("writeback=on ignored: it cannot be had together with io=passthrough")
        if InitFlag.NO_OPENDIR_SUPPORT in session.flags:
            self._dirs.handles = False
            self._fill({Opcode.OPENDIR: self._unknown})

    def _unknown(self, nodeid: int, end: int) -> Payload:
        raise OSError(errno.ENOSYS, "not served")


class TracedChannel(Channel):
    """A channel that logs every message."""

    def _answer(self, received: int) -> None:
        length, opcode, unique, nodeid, uid, gid, pid, _ = wire.IN_HEADER.unpack_from(self._exchange.buf)
        name = Opcode(opcode).name if opcode in _KNOWN else str(opcode)
        log.debug("#%d %s node %d, %d bytes, uid %d gid %d pid %d", unique, name, nodeid, length, uid, gid, pid)
        super()._answer(received)

    def _write(self, parts: list[Payload]) -> None:
        length, code, unique = _OUT.unpack_from(parts[0])
        log.debug("#%d answered: %s, %d bytes", unique, errno.errorcode.get(-code, "ok"), length)
        super()._write(parts)


_KNOWN: Final = frozenset(Opcode)


def _ok(nodeid: int, end: int) -> Payload:
    return b""


def _silent(nodeid: int, end: int) -> None:
    return None


def _wanted(config: MountConfig) -> negotiate.Wanted:
    """What this mount asks of the kernel. A timeout somebody set means that something else changes the layers."""
    return negotiate.Wanted(
        writeback=config.writeback == "on",
        sole_writer="timeout" not in config.explicit,
        passthrough=config.io == "passthrough",
    )
